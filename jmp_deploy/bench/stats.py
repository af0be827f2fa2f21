"""From times to figures: percentiles, throughput, the ratio of two artifacts with its spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .measure import Series, Times

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

RESAMPLES = 2000

Quantity = Callable[[Times], "float | None"]


def total(times: Times) -> float:
    """End to end, in ms."""
    return times.total


def compute(times: Times) -> float | None:
    """On the device, in ms."""
    return times.compute


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
    """Images per second, one inference after the other, at the median latency.

    The median, not the sum of all times: an interruption by the system is no property of the model.
    """
    return 1000 * batch / median_ms


def ratio(first: Array, second: Array, *, seed: int = 0) -> dict[str, Any]:
    """Throughput of the second over the first, with its 95 % interval.

    The ratio is that of the medians over all inferences. The interval is a percentile bootstrap
    over rounds, both participants' turns of a round together (paired): what happened to the machine
    in a round happened to both, and inferences within a round are not independent.

    Args:
        first, second: [rounds, inferences per round] in ms, with the same number of rounds.

    Returns:
        {"ratio", "ci95": [low, high], "rounds", "round_min", "round_max"}, the last two being the
        smallest and the largest ratio of the medians of one round.
    """
    rounds = len(first)
    own = np.median(first, axis=1) / np.median(second, axis=1)
    random = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, rounds, rounds)
        ratios.append(np.median(first[drawn]) / np.median(second[drawn]))
    low, high = np.percentile(ratios, (2.5, 97.5))
    return {
        "ratio": float(np.median(first) / np.median(second)),
        "ci95": [float(low), float(high)],
        "rounds": rounds,
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
