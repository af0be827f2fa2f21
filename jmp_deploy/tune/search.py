"""The search behind `tune`: how many tokens to take away in which block. Plain integers, no model.

A candidate is a tuple `keeps`: patch tokens that stay after each block, all of them from a falling
`grid` of allowed counts. In between it is handled as `steps`, how far each block goes down the
grid, because then a change in one block moves all later ones along.

1. Begin with the best of plain schedules at the budget: `paper`'s blocks, the even spread, windows.
2. Choose tau there.
3. Measure, on a few images, what one step more in each block costs per saved FLOP (or
   millisecond); move steps from the dearest blocks to the cheapest, always back onto the budget;
   keep a move only if it is better on all images. Halve the step where nothing helps any more.
4. If there is work left to spend, once more with prices from all images.

No random numbers: the same answers of `measure` give the same search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.errors import ScheduleError

Keeps = tuple[int, ...]
Measure = Callable[[Keeps, float, bool], float]
"""(keeps, tau, on all images rather than few) -> distance from the dense model."""

TAUS = (0.8, -1.0, 0.7, 0.75, 0.85, 0.9)
"""Thresholds to choose from; on equal distance the earlier stays. -1 merges all."""
MOVES = 6
COARSEST, FINEST = 12, 96
"""First and last step, as parts of the grid."""


@dataclass(frozen=True)
class Problem:
    """What is to be met.

    Attributes:
        depth: blocks.
        grid: allowed patch token counts, falling; grid[0] is all of them.
        cost: of a candidate, in the budget's unit; falls with every token that goes.
        budget: most that a candidate may cost.
        last: last block that may reduce. (Where the head reads prefix tokens only, a reduction in
            the last block would cost what computing those alone saves.)
    """

    depth: int
    grid: tuple[int, ...]
    cost: Callable[[Keeps], float]
    budget: float
    last: int

    def keeps(self, steps: Sequence[int]) -> Keeps:
        """Steps down the grid, block by block, to token counts."""
        position, kept = 0, []
        for step in steps:
            position += step
            kept.append(self.grid[position])
        return tuple(kept)

    def steps(self, keeps: Keeps) -> tuple[int, ...]:
        """The way back."""
        positions = [0, *(self.grid.index(keep) for keep in keeps)]
        return tuple(b - a for a, b in pairwise(positions))

    def dense(self) -> Keeps:
        """Keeps every token."""
        return (self.grid[0],) * self.depth

    def least(self) -> Keeps:
        """Keeps as few as the grid allows, from the first block on."""
        return (self.grid[-1],) * self.depth

    def fits(self, keeps: Keeps) -> bool:
        """Whether a candidate meets the budget."""
        return self.cost(keeps) <= self.budget

    def snap(self, keeps: Iterable[float]) -> Keeps:
        """To the next allowed count above, so that no more tokens go than asked for."""
        snapped, top = [], self.grid[0]
        for keep in keeps:
            wanted = max(keep, self.grid[-1])
            top = min(top, min(count for count in self.grid if count >= wanted))
            snapped.append(top)
        return tuple(snapped)


def check(problem: Problem, unit: str) -> None:
    """Raises ScheduleError for a budget that no candidate meets, or that all do."""
    least, dense = problem.cost(problem.least()), problem.cost(problem.dense())
    if problem.budget >= dense:
        raise ScheduleError(
            f"a budget of {problem.budget:.4g} {unit} leaves nothing to do: "
            f"the dense model takes {dense:.4g} {unit}",
            "name a smaller budget, or build with --dense",
        )
    if problem.budget < least:
        kept = f"{problem.grid[-1]} of {problem.grid[0]} patch tokens"
        raise ScheduleError(
            f"a budget of {problem.budget:.4g} {unit} cannot be met: the nearest possible is "
            f"{least:.4g} {unit}, keeping {kept} from the first block on",
            "name a larger budget, a smaller model or a smaller --img-size",
        )


def plain(problem: Problem, blocks: Sequence[int], form: str) -> Keeps | None:
    """The mildest plain schedule on these blocks that meets the budget, or None.

    Args:
        form: "even" takes the same number of tokens in each block, "rate" the same share
            (`schedule.for_share`); "keep" is `schedule.keep_rate` to three digits.
    """
    top = problem.grid[0]

    def at(amount: float) -> Keeps:
        left, done, wanted = float(top), 0, []
        for block in range(problem.depth):
            if block in blocks:
                done += 1
                part = done / len(blocks)
                if form == "even":
                    left = round(top - (top - amount) * part)
                elif form == "rate":
                    left = max(1, round(top * (amount / top) ** part))
                else:
                    # Binary fractions: as in schedule.keep_rate.
                    left = math.ceil(round(left * amount, 9))
            wanted.append(left)
        return problem.snap(wanted)

    amounts: list[float] = list(range(top - 1, 0, -1))
    if form == "keep":
        amounts = [n / 1000 for n in range(999, 0, -1)]
    elif form == "rate":
        amounts += [1 / 2**n for n in range(1, 64)]  # one token already before the last block
    low, high = 0, len(amounts) - 1
    if high < 0 or not problem.fits(at(amounts[high])):
        return None
    while low < high:  # the cost falls along `amounts`
        middle = (low + high) // 2
        if problem.fits(at(amounts[middle])):
            high = middle
        else:
            low = middle + 1
    return at(amounts[low])


def paper_like(problem: Problem) -> Keeps | None:
    """The blocks of `schedule.paper` with the keep rate that meets the budget."""
    return plain(problem, [problem.depth * q // 4 for q in (1, 2, 3)], "keep")


def spread_like(problem: Problem) -> Keeps | None:
    """`schedule.for_share` at the budget: even steps, or a rate where those would leave few."""
    blocks = range(2, problem.depth - 1)
    even = plain(problem, blocks, "even")
    if even and even[-1] >= problem.grid[0] / 5:
        return even
    return plain(problem, blocks, "rate")


def scaled(problem: Problem, keeps: Keeps) -> Keeps | None:
    """A schedule of the same form as `keeps` that meets the budget: all reductions x a factor."""
    top = problem.grid[0]
    low, high, best = 0.0, 1.0, None
    logs = [math.log(keep / top) for keep in keeps]
    while not problem.fits(problem.snap(top * math.exp(high * value) for value in logs)):
        high *= 2
        if high > 64:
            return None
    for _ in range(30):
        middle = (low + high) / 2
        candidate = problem.snap(top * math.exp(middle * value) for value in logs)
        if problem.fits(candidate):
            best, high = candidate, middle
        else:
            low = middle
    return best or problem.snap(top * math.exp(high * value) for value in logs)


@dataclass(frozen=True)
class Found:
    """The answer of a search.

    Attributes:
        keeps, tau: the best candidate.
        distance: of it, on all images.
        paper, spread: distance of the plain schedules at the same budget and their best tau of
            those tried on them, None where they cannot meet it.
    """

    keeps: Keeps
    tau: float
    distance: float
    paper: tuple[Keeps, float] | None
    spread: tuple[Keeps, float] | None


def search(
    problem: Problem,
    measure: Measure,
    *,
    tau: float | None,
    exhausted: Callable[[], bool] = lambda: False,
) -> Found:
    """Finds the candidate of least distance that meets the budget.

    Args:
        tau: fixed threshold, or None to choose it from `TAUS`.
        exhausted: asked between measurements; True ends the search with the best so far.
    """
    threshold = TAUS[0] if tau is None else tau
    paper, spread = paper_like(problem), spread_like(problem)
    baselines = [keeps for keeps in (paper, spread) if keeps]
    best, distance = _first(problem, measure, baselines, threshold)
    if tau is None:
        threshold, distance = _choose_tau(measure, best, threshold, distance, TAUS)
    for thorough in (False, True):
        size = max(1, len(problem.grid) // COARSEST)
        while not exhausted():
            round_ = _Round(problem, measure, threshold, size, thorough, exhausted)
            moved = round_.improve(best, distance)
            if moved:
                best, distance = moved
            elif size > max(1, len(problem.grid) // FINEST):
                size = max(1, size // 2)
            else:
                break
    if tau is None:
        near = sorted(TAUS, key=lambda value: abs(value - threshold))[1:3]
        threshold, distance = _choose_tau(measure, best, threshold, distance, near)
    # The plain schedules get the chosen tau too: they are compared at their best.
    plain_taus = {TAUS[0], threshold} if tau is None else {tau}
    scores = [
        None if keeps is None else (keeps, min(measure(keeps, t, True) for t in plain_taus))
        for keeps in (paper, spread)
    ]
    for entry in scores:
        if entry and entry[1] < distance:  # the search ended before it had a chance
            best, distance = entry
            threshold = min(plain_taus, key=lambda t: measure(best, t, True))
    return Found(best, threshold, distance, scores[0], scores[1])


def _first(
    problem: Problem, measure: Measure, baselines: list[Keeps], tau: float
) -> tuple[Keeps, float]:
    """The best plain schedule: windows are screened on few images, the best two on all."""
    windows = [(first, last) for first in range(4) for last in (problem.last - 1, problem.last)]
    others = [
        plain(problem, range(first, last + 1), form)
        for first, last in windows
        for form in ("even", "rate")
        if first < last
    ]
    # The last resort meets any budget that can be met at all.
    others += [plain(problem, range(problem.last + 1), "rate"), problem.least()]
    screened = sorted({keeps for keeps in others if keeps} - set(baselines), reverse=True)
    screened.sort(key=lambda keeps: measure(keeps, tau, False))
    finalists = [*baselines, *screened[:2]]
    best = min(finalists, key=lambda keeps: measure(keeps, tau, True))
    return best, measure(best, tau, True)


def _choose_tau(
    measure: Measure, keeps: Keeps, tau: float, distance: float, values: Iterable[float]
) -> tuple[float, float]:
    for value in values:
        found = measure(keeps, value, True)
        if found < distance:
            tau, distance = value, found
    return tau, distance


@dataclass(frozen=True)
class _Round:
    """One round of moves of one size.

    Attributes:
        thorough: price blocks and try moves on all images rather than few.
    """

    problem: Problem
    measure: Measure
    tau: float
    size: int
    thorough: bool
    exhausted: Callable[[], bool]

    def improve(self, best: Keeps, distance: float) -> tuple[Keeps, float] | None:
        """Prices every block, moves steps from dear ones to cheap ones; None if no gain."""
        prices = self.prices(best)
        current = self.problem.steps(best)
        current_distance = self.measure(best, self.tau, self.thorough)
        tried: list[Keeps] = []
        for source, target in _transfers(prices, current)[:MOVES]:
            if self.exhausted():
                break
            moved = _transfer(self.problem, current, source, target, self.size)
            if moved is None:
                continue
            found = self.measure(self.problem.keeps(moved), self.tau, self.thorough)
            if found < current_distance:
                tried.append(self.problem.keeps(moved))
                current, current_distance = moved, found
        # Moves build on one another; if all together do not hold on all images, perhaps the
        # first of them do.
        for keeps in reversed(tried):
            found = self.measure(keeps, self.tau, True)
            if found < distance:
                return keeps, found
        return None

    def prices(self, best: Keeps) -> dict[int, float]:
        """Block -> distance per unit of cost saved by `size` steps more there."""
        steps = self.problem.steps(best)
        before, cost = self.measure(best, self.tau, self.thorough), self.problem.cost(best)
        room = len(self.problem.grid) - 1 - sum(steps)
        prices: dict[int, float] = {}
        for block in range(self.problem.last + 1):
            # Where the grid ends, price the step that is there already.
            change = min(self.size, room) or -min(self.size, steps[block])
            if change == 0 or self.exhausted():
                continue
            keeps = self.problem.keeps(_with(steps, block, steps[block] + change))
            saved = cost - self.problem.cost(keeps)
            if saved * change > 0:
                prices[block] = (self.measure(keeps, self.tau, self.thorough) - before) / saved
        return prices


def _transfers(prices: dict[int, float], steps: Sequence[int]) -> list[tuple[int, int]]:
    """(from, to) pairs of blocks, the most promising first, no block in too many of the first."""
    cheap = sorted(prices, key=lambda block: (prices[block], block))
    dear = [block for block in reversed(cheap) if steps[block] > 0]
    pairs = [
        (i + j, source, target)
        for i, source in enumerate(dear)
        for j, target in enumerate(cheap)
        if prices[source] > prices[target]
    ]
    return [(source, target) for _, source, target in sorted(pairs)]


def _transfer(
    problem: Problem, steps: Sequence[int], source: int, target: int, size: int
) -> tuple[int, ...] | None:
    """Takes `size` steps away in one block and adds in another the fewest that meet the budget."""
    eased = _with(steps, source, steps[source] - min(size, steps[source]))
    if eased == tuple(steps):
        return None
    low, high = 0, len(problem.grid) - 1 - (sum(eased) - eased[target])

    def fits(step: int) -> bool:
        return problem.fits(problem.keeps(_with(eased, target, step)))

    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    moved = _with(eased, target, low)
    return moved if moved != tuple(steps) and fits(low) else None


def _with(steps: Sequence[int], block: int, step: int) -> tuple[int, ...]:
    return (*steps[:block], step, *steps[block + 1 :])
