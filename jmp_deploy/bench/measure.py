"""Measures several runners side by side: warm-up until stable, then in turns, A B B A.

Turns, because a device drifts (heat, clocks, what else runs): a ratio of two artifacts that were
measured one after the other has the drift in it, one of turns has not. What a runner does is up
to `bench_runners`; the clock is an argument, so that tests need no real time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..core import interrupt

WINDOW = 5
"""Inferences in a window of the warm-up."""
STABLE = 0.03
"""Warm enough: the medians of two windows are within 3 % of each other."""
LEAST_ROUNDS = 4
"""Rounds that are measured however long they take; with fewer a ratio has no spread."""
MOST_PER_VISIT = 500
"""Inferences per turn. More would tell no more."""
SETTLE_BELOW = 0.1
"""Seconds. Faster inferences get an unmeasured one at each turn: caches hold the others' data."""


@dataclass(frozen=True)
class Times:
    """One inference, in ms; what a runner cannot tell apart is None.

    Attributes:
        start: when it began, by the runner's clock.
        total: end to end: from images in host memory to outputs in host memory.
        enqueue: until the call that starts it on the device returned.
        h2d, compute, d2h: copies in, computation and copies out by the device's own events.
    """

    start: float
    total: float
    enqueue: float | None = None
    h2d: float | None = None
    compute: float | None = None
    d2h: float | None = None

    @classmethod
    def of_device(
        cls, started: float, enqueued: float, ended: float, spent: Sequence[float]
    ) -> Times:
        """From a clock's seconds, and from milliseconds between events: (h2d, compute, d2h)."""
        h2d, compute, d2h = spent
        return cls(
            start=1000 * started,
            total=1000 * (ended - started),
            enqueue=1000 * (enqueued - started),
            h2d=h2d,
            compute=compute,
            d2h=d2h,
        )


@dataclass(frozen=True)
class Participant:
    """Something to be measured.

    Attributes:
        artifact: its folder, as the user wrote it.
        backend: "engine", "onnxruntime" or "torch".
        batch: images per inference.
        infer: runs one inference.
        cuda_graph: replayed as a CUDA graph; None where there is no such choice.
    """

    artifact: str
    backend: str
    batch: int
    infer: Callable[[], Times]
    cuda_graph: bool | None = None


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        warm_iterations: inferences before anything counts, at least.
        warm_seconds: when to stop waiting for stable times, per participant.
        iterations: inferences to measure, at least, if `seconds` allows.
        rounds: turns of each participant; an even number makes A B B A of them.
        visit_seconds: how long a turn is at least.
        seconds: how long to measure at most, per participant; LEAST_ROUNDS are measured anyhow.
    """

    warm_iterations: int = 10
    warm_seconds: float = 10.0
    iterations: int = 40
    rounds: int = 10
    visit_seconds: float = 0.05
    seconds: float = 20.0


@dataclass
class Series:
    """What was measured of one participant: a list of inferences for every round."""

    participant: Participant
    rounds: list[list[Times]] = field(default_factory=list)
    warm_iterations: int = 0
    stable: bool = True


OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""


def measure(
    participants: Sequence[Participant],
    settings: Settings,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: OnProgress = lambda words, share: None,
) -> tuple[list[Series], bool]:
    """Measures participants of one batch size in turns.

    Returns:
        A series for each, all with the same number of rounds, and whether all rounds were
        measured: on Ctrl-C it is what was whole until then.

    Raises:
        KeyboardInterrupt: before two rounds were whole.
    """
    series = [Series(participant) for participant in participants]
    try:
        latency = [_warm_up(item, settings, clock, on_progress) for item in series]
        visits = [_visit_length(seconds, settings) for seconds in latency]
        started = clock()
        budget = settings.seconds * len(series)
        for index in range(settings.rounds):
            late = clock() - started > budget
            # Rounds come in pairs: half a pair would favour whoever went first.
            if late and index >= LEAST_ROUNDS and index % 2 == 0:
                break
            _round(series, index, visits, latency)
            share = max((index + 1) / settings.rounds, (clock() - started) / budget)
            on_progress("measuring", min(share, 1.0))
    except KeyboardInterrupt:
        if min(len(item.rounds) for item in series) < 2:
            raise
        return series, False
    on_progress("measuring", 1.0)
    return series, True


def order(count: int, index: int) -> list[int]:
    """Who runs when in round `index`: forwards, then backwards, so that drift cancels."""
    forwards = list(range(count))
    return forwards if index % 2 == 0 else forwards[::-1]


def _round(
    series: Sequence[Series], index: int, visits: Sequence[int], latency: Sequence[float]
) -> None:
    """One turn of every participant; kept only if it is whole."""
    turn: dict[int, list[Times]] = {}
    for who in order(len(series), index):
        infer = series[who].participant.infer
        if latency[who] < SETTLE_BELOW:
            infer()
        turn[who] = [infer() for _ in range(visits[who])]
        interrupt.check()
    for who, times in turn.items():
        series[who].rounds.append(times)


def _warm_up(
    item: Series, settings: Settings, clock: Callable[[], float], on_progress: OnProgress
) -> float:
    """Runs until the times are stable; returns seconds per inference."""
    words = f"warming up {item.participant.artifact}"
    started = clock()
    seconds: list[float] = []
    while True:
        seconds.append(item.participant.infer().total / 1000)
        interrupt.check()
        spent = clock() - started
        done = len(seconds)
        share = max(done / (settings.warm_iterations + WINDOW), spent / settings.warm_seconds)
        on_progress(words, min(share, 1.0))
        item.warm_iterations = done
        if done >= settings.warm_iterations and _is_stable(seconds):
            break
        # Slow models on slow devices: three inferences are enough to have allocated everything.
        if spent > settings.warm_seconds and done >= 3:
            item.stable = _is_stable(seconds[-2 * WINDOW :])
            break
    return max(_median(seconds[-WINDOW:]), 1e-9)


def _is_stable(seconds: Sequence[float]) -> bool:
    if len(seconds) < 2 * WINDOW:
        last = seconds[-2:]
        return len(last) == 2 and abs(last[1] - last[0]) <= STABLE * last[0]
    before, after = _median(seconds[-2 * WINDOW : -WINDOW]), _median(seconds[-WINDOW:])
    return abs(after - before) <= STABLE * before


def _visit_length(seconds: float, settings: Settings) -> int:
    """Inferences per turn: enough for the iterations asked for, no more than the time allows."""
    wanted = max(
        math.ceil(settings.iterations / settings.rounds),
        math.ceil(settings.visit_seconds / seconds),
    )
    affordable = int(settings.seconds / settings.rounds / seconds)
    return max(1, min(wanted, affordable, MOST_PER_VISIT))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
