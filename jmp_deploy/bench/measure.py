"""Measures contenders side by side: warm-up until stable, then in turns, A B B A; and from times to
figures: percentiles, throughput, the ratio of two with its spread.

Turns, because a device drifts (heat, clocks, what else runs): a ratio of two artifacts that were
measured one after the other has the drift in it, one of turns has not. The one timer of `bench`,
of INT8's choice of an engine and of benchmarks/. What is timed is up to `backends`; the clock is an
argument, so that tests need no real time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import Times
from ..core import interrupt
from ..core.stats import mean_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

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
class Participant:
    """Something to be measured.

    Attributes:
        artifact: its folder, as the user wrote it.
        backend: what runs it.
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


Quantity = Callable[[Times], "float | None"]
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
        budget = max(settings.seconds * len(series), 1e-9)
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
    return max(median(seconds[-WINDOW:]), 1e-9)


def _is_stable(seconds: Sequence[float]) -> bool:
    if len(seconds) < 2 * WINDOW:
        last = seconds[-2:]
        return len(last) == 2 and abs(last[1] - last[0]) <= STABLE * last[0]
    before, after = median(seconds[-2 * WINDOW : -WINDOW]), median(seconds[-WINDOW:])
    return abs(after - before) <= STABLE * before


def _visit_length(seconds: float, settings: Settings) -> int:
    """Inferences per turn: enough for the iterations asked for, no more than the time allows."""
    wanted = max(
        math.ceil(settings.iterations / settings.rounds),
        math.ceil(settings.visit_seconds / seconds),
    )
    affordable = int(settings.seconds / settings.rounds / seconds)
    return max(1, min(wanted, affordable, MOST_PER_VISIT))


# --- Figures ---


def total(times: Times) -> float:
    """End to end, in ms."""
    return times.total


def compute(times: Times) -> float | None:
    """On the device, in ms."""
    return times.compute


def enqueue(times: Times) -> float | None:
    """The host's time to start the computation on the device, in ms."""
    return times.enqueue


def by_round(series: Series, quantity: Quantity) -> Array | None:
    """[rounds, inferences per round] in ms; None where the runner does not tell it."""
    rounds = [[quantity(times) for times in turn] for turn in series.rounds]
    if any(value is None for turn in rounds for value in turn):
        return None
    return np.array(rounds, dtype=np.float64)


def latency(values: Array) -> dict[str, float]:
    """Percentiles (linear between order statistics), mean, spread and range, all in ms."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def throughput(batch: int, median_ms: float) -> float:
    """Images per second, one inference after the other, at the median latency: its reciprocal, not
    what several at once could reach.

    The median, not the sum of all times: an interruption by the system is no property of the model.
    """
    return 1000 * batch / median_ms


def ratio(first: Array, second: Array) -> dict[str, Any]:
    """Throughput of the second over the first, with its 95 % interval.

    Each round gives one ratio, that of the medians of both participants' turns in it: what happened
    to the machine in a round happened to both, and inferences within a round are not independent.
    Over rounds their geometric mean is taken, with Student's t. In simulations of rounds with noise
    and a drift of 3 % it covers the true ratio in 94 to 97 % of 4, 10 and 20 rounds
    (tests/bench/test_bench.py).

    Args:
        first, second: [rounds, inferences per round] in ms, with the same number of rounds, two or
            more.

    Returns:
        {"ratio", "ci95": [low, high], "rounds", "round_min", "round_max"}, the last two being the
        smallest and the largest ratio of one round.
    """
    own = np.median(first, axis=1) / np.median(second, axis=1)
    middle, low, high = np.exp(mean_interval(np.log(own)))
    return {
        "ratio": float(middle),
        "ci95": [float(low), float(high)],
        "rounds": len(own),
        "round_min": float(own.min()),
        "round_max": float(own.max()),
    }


def trtexec_times(turns: Sequence[Sequence[Times]]) -> list[dict[str, float]]:
    """Inferences in the form of `trtexec --exportTimes` (TensorRT 8.5 to 10: sampleReporting.cpp).

    Timestamps are relative to the first inference. Without a device's events there is one interval,
    and it is the computation.
    """
    everything = [times for turn in turns for times in turn]
    origin = min((times.start for times in everything), default=0.0)
    rows = []
    for times in everything:
        start = times.start - origin
        h2d, d2h = times.h2d or 0.0, times.d2h or 0.0
        work = times.total if times.compute is None else times.compute
        enqueue = times.total if times.enqueue is None else times.enqueue
        begin, end = start + h2d, start + h2d + work
        rows.append(
            {
                "startEnqMs": start,
                "endEnqMs": start + enqueue,
                "startH2dMs": start,
                "endH2dMs": begin,
                "startComputeMs": begin,
                "endComputeMs": end,
                "startD2hMs": end,
                "endD2hMs": end + d2h,
                "h2dMs": h2d,
                "computeMs": work,
                "d2hMs": d2h,
                "latencyMs": h2d + work + d2h,
            }
        )
    return rows
