"""Paired timing of what benchmarks compare, by the timer of `bench` (jmp_deploy/bench/measure.py).

A machine's speed drifts with its clock, its heat and its neighbours. So no contender is timed alone
and then another: a round times each once, and ratios are taken round by round. What is reported is
the median over rounds and the quartiles beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jmp_deploy.backends.base import Times
from jmp_deploy.bench.measure import Participant, Settings, measure

WARM_SECONDS = 0.5
"""Waiting for stable times, per contender: they were called before."""

Timer = Callable[[], float]
"""Does the work once and returns how long that took, in microseconds."""


def interleave(
    timers: Mapping[str, Timer], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Times all contenders in rounds, there and back, each after an unmeasured call of its own.

    Args:
        timers: name -> Timer.
        rounds: how many at most.
        seconds: about how long; a few rounds are done in any case.

    Returns:
        name -> microseconds, one entry per round; entry i of all was taken in round i.
    """
    settings = Settings(
        warm_iterations=3,
        warm_seconds=WARM_SECONDS,
        iterations=rounds,
        rounds=rounds,
        visit_seconds=0.0,
        seconds=seconds / len(timers),
    )
    contenders = [Participant(name, "", 1, _inference(timer)) for name, timer in timers.items()]
    series, complete = measure(contenders, settings)
    if not complete:
        raise KeyboardInterrupt
    return {
        item.participant.artifact: [1000 * times.total for (times,) in item.rounds]
        for item in series
    }


def _inference(timer: Timer) -> Callable[[], Times]:
    return lambda: Times(start=0.0, total=timer() / 1000)


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
