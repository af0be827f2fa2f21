"""The search behind `tune`: how a reduction is laid over the blocks. Plain numbers, no model.

A candidate is a tuple `keeps`: patch tokens that stay after each block, all of them from a falling
`grid` of allowed counts. It follows from a `Form`, three smooth numbers, and from the budget, which
says how far the reduction goes. Eleven free counts did better on the images that chose them and
worse on all others (docs/method.md); `spread` is one of the forms, so the search begins there.

One number after the other is moved by a step, up and down, as long as that is better; where no move
is, all steps are halved. Then tau is chosen. No random numbers: the same answers of `measure` give
the same search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..core.errors import ScheduleError

Keeps = tuple[int, ...]
Measure = Callable[[Keeps, float], float]
"""(keeps, tau) -> what is to be small: distance from the dense model on the images that choose."""

TAUS = (0.8, -1.0, 0.7, 0.9)
"""Thresholds to choose from; on equal distance the earlier stays. -1 merges all."""
STEPS = {"first": 1.0, "law": 0.5, "delay": 0.3}
"""First step of each number of a `Form`."""
BOUNDS = {"law": (-1.0, 2.0), "delay": (0.4, 3.0)}
FINEST = 1 / 4
"""Of a first step: the last one."""


@dataclass(frozen=True)
class Form:
    """How a reduction is laid over the blocks, whatever its size.

    With t = ((block + 1 - first) / (depth - 1 - first)) ** delay, from 0 to 1 in the last block but
    one, and K tokens of M left there, `keep ** law` falls evenly in t from M ** law to K ** law.

    Attributes:
        first: where the reduction begins, in blocks: at 1.5 block 1 takes half a step.
        law: 1: equal steps; 0 (the limit): each block keeps the same share of its tokens.
        delay: 1: no block is preferred; above 1 the later ones take more.
    """

    first: float
    law: float
    delay: float


@dataclass(frozen=True)
class Problem:
    """What is to be met.

    Attributes:
        depth: blocks.
        grid: allowed patch token counts, falling; grid[0] is all of them.
        cost: of a candidate, in the budget's unit; falls with every token that goes.
        budget: most that a candidate may cost.
    """

    depth: int
    grid: tuple[int, ...]
    cost: Callable[[Keeps], float]
    budget: float

    @property
    def end(self) -> int:
        """The first block that reduces nothing more: the last, where there is another."""
        return max(self.depth - 1, 1)

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


def fit(problem: Problem, form: Form) -> Keeps | None:
    """The mildest reduction of this form that meets the budget, or None."""
    top = problem.grid[0]

    def at(final: float) -> Keeps:
        law, left = form.law, []
        for block in range(problem.depth):
            t = (min(block + 1, problem.end) - form.first) / (problem.end - form.first)
            t = max(t, 0.0) ** form.delay
            if law:
                keep = (top**law - (top**law - final**law) * t) ** (1 / law)
            else:
                keep = top * (final / top) ** t
            left.append(round(keep))
        return problem.snap(left)

    # Below one token: it is reached before the last step.
    return _mildest(problem, at, [*range(top - 1, 0, -1), *(1 / 2**n for n in range(1, 64))])


def spread(problem: Problem) -> Form:
    """`schedule.for_share`, or a form that meets a budget which it cannot.

    Even steps from block 2 on, or a rate where those would leave few; then a rate from block 0 on;
    then one that keeps the least allowed count from there on, which meets any budget that can be
    met.
    """
    first = float(min(2, problem.end - 1))
    even = Form(first, 1.0, 1.0)
    keeps = fit(problem, even)
    if keeps and keeps[-1] >= problem.grid[0] / 5:
        return even
    rates = (replace(even, law=0.0), Form(0.0, 0.0, 1.0))
    return next((form for form in rates if fit(problem, form)), Form(0.0, -1.0, 1.0))


def paper_like(problem: Problem) -> Keeps | None:
    """The blocks of `schedule.paper` with the keep rate that meets the budget, to three digits."""
    blocks = {problem.depth * quarter // 4 for quarter in (1, 2, 3)}

    def at(rate: float) -> Keeps:
        left, kept = problem.grid[0], []
        for block in range(problem.depth):
            if block in blocks:
                left = math.ceil(round(left * rate, 9))  # binary fractions: schedule.keep_rate
            kept.append(left)
        return problem.snap(kept)

    return _mildest(problem, at, [n / 1000 for n in range(999, 0, -1)])


def _mildest(
    problem: Problem, at: Callable[[float], Keeps], amounts: Sequence[float]
) -> Keeps | None:
    """`at` the first of the amounts, along which the cost falls, that meets the budget."""
    low, high = 0, len(amounts) - 1
    if not problem.fits(at(amounts[high])):
        return None
    while low < high:
        middle = (low + high) // 2
        if problem.fits(at(amounts[middle])):
            high = middle
        else:
            low = middle + 1
    return at(amounts[low])


@dataclass(frozen=True)
class Found:
    """The answer of a search: a form, the counts that it has at the budget, and a threshold."""

    form: Form
    keeps: Keeps
    tau: float


def plain(problem: Problem, tau: float | None) -> Found:
    """`spread` at the budget, with its own tau where none is fixed: where a search begins."""
    form = spread(problem)
    return Found(form, fit(problem, form) or problem.least(), TAUS[0] if tau is None else tau)


def search(
    problem: Problem,
    measure: Measure,
    *,
    tau: float | None,
    exhausted: Callable[[], bool] = lambda: False,
) -> Found:
    """Looks for the candidate of least distance that meets the budget.

    Args:
        tau: fixed threshold, or None to choose it from `TAUS`.
        exhausted: asked between measurements; True ends the search with the best so far.
    """
    best = plain(problem, tau)
    distance = measure(best.keeps, best.tau)

    def take(form: Form, threshold: float) -> bool:
        """Whether a candidate is better; then it is the best."""
        nonlocal best, distance
        keeps = None if exhausted() else fit(problem, form)
        if keeps is None or (found := measure(keeps, threshold)) >= distance:
            return False
        best, distance = Found(form, keeps, threshold), found
        return True

    size = 1.0
    while size >= FINEST and not exhausted():
        moved = False
        for name, step in STEPS.items():
            for change in (step * size, -step * size):
                while (form := _moved(problem, best.form, name, change)) and take(form, best.tau):
                    moved = True
        if not moved:
            size /= 2
    for threshold in TAUS if tau is None else ():
        take(best.form, threshold)
    return best


def _moved(problem: Problem, form: Form, name: str, change: float) -> Form | None:
    """A form with one number changed, or None beyond its bounds."""
    low, high = BOUNDS.get(name, (0.0, problem.end - 1.0))
    value = getattr(form, name) + change
    return replace(form, **{name: value}) if low <= value <= high else None
