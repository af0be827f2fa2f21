"""Paired, interleaved timing: everything that is compared is timed in every round.

A machine's speed drifts with its clock, its heat and its neighbours. So no contender is timed alone
and then another: a round times each once, in an order drawn anew, and ratios are taken round by
round. (Drawn, not there and back: whoever is last in one round and first in the next finds its own
data in the caches, which was worth a percent.) What is reported is the median over rounds and the
quartiles beside it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Timer = Callable[[], float]
"""Does the work once and returns how long that took, in microseconds."""


def interleave(
    timers: Mapping[str, Timer], *, rounds: int, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Times all contenders in rounds.

    Args:
        timers: name -> Timer, warmed up.
        rounds: how many at most.
        seconds: no new round begins after this much time,
        least: but that many rounds are done in any case.

    Returns:
        name -> microseconds, one entry per round; entry i of all was taken in round i.
    """
    taken: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    order = random.Random(0)
    start = time.monotonic()
    for done in range(rounds):
        if done >= least and time.monotonic() - start > seconds:
            break
        order.shuffle(names)
        for name in names:
            taken[name].append(timers[name]())
    return taken


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of values."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": round(statistics.median(values), 3),
        "q1": round(low, 3),
        "q3": round(high, 3),
        "n": len(values),
    }


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of values that were taken in the same round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def wall(work: Callable[[], Any]) -> Timer:
    """A timer of work on the CPU."""

    def timer() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6

    return timer


def cuda(work: Callable[[], Any], calls: int = 1) -> Timer:
    """A timer of work that is enqueued on the current CUDA stream: per call, by events.

    `calls`: how many calls `work` stands for.
    """
    import torch

    def timer() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls

    return timer


def captured(calls: Sequence[Callable[[], Any]], repeats: int = 1) -> Callable[[], None]:
    """One CUDA graph of all `calls` in turn, `repeats` times over; replays it when called.

    The calls are warmed up first on a side stream, as PyTorch asks for.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()

    def replay(kept: Sequence[Callable[[], Any]] = calls) -> None:
        graph.replay()  # reads and writes tensors that only `kept` holds

    return replay
