"""Whether INT8 or FP8 pays on this GPU: the quantized engine and its FP16 twin in one run, in
turns; which one the artifact gets.

INT8 ViTs are often no faster than FP16, or slower (NVIDIA/TensorRT #4273, #3186, #1604):
conversions around small matrix products eat what the products save. So the claim is measured where
it can be, as `bench` measures, and withheld where it cannot.

The rule. An engine that is off PyTorch's answers (`EngineFacts.checks`) loses to one that is not,
however fast. Of two that are right the quantized one is taken if, by the GPU's own time, it is at
least 5 % faster at the profile's opt batch, for which both were tuned, and not 5 % slower at batch
1 where the profile has it: who builds for 32 images may still ask for one. `--force-int8`
(`--force-fp8`) overrides the speed. Where nothing can be measured it is taken: it is what
was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ..backends.base import Times as Inference
from ..backends.engine import EngineBackend, TimedEngine
from ..core.artifact import Artifact
from ..core.device import gpus
from ..core.errors import GpuMemoryError, in_words
from ..core.manifest import Narrow, Speed, SpeedAt
from ..engine.fit import EngineFile
from ..engine.stage import Clock
from .measure import Participant, Settings, compute, latency, measure, order, ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

FP16: Final = "fp16"
GAIN = 1.05
"""The quantized engine must be this much faster to replace FP16: less is within what clocks and
other work on a GPU do to a measurement, and not worth any accuracy."""
SETTINGS = Settings(iterations=40, rounds=10, seconds=5.0)
OFF = "outside of tolerance against PyTorch on this GPU"
TURNS = 4
"""Times that each engine is opened where there is no room for both: A B B A A B B A."""

Opener = Callable[[EngineFile], TimedEngine]


def settle(engines: Mapping[str, EngineFile], artifact: Artifact, clock: Clock) -> Speed:
    """Decides which of two engines becomes `model.engine`: see the module.

    Args:
        engines: "int8" or "fp8", and "fp16"; checked where a GPU is.
        artifact: whose engines they are.
        clock: announces the stage "timing".
    """
    ours: Narrow = "int8" if "int8" in engines else "fp8"
    title = ours.upper()
    off = {name for name, engine in engines.items() if engine.facts and engine.facts.is_off}
    if off == {ours}:
        return Speed(FP16, f"{title} is {OFF}, so the FP16 engine is used")
    if off == {FP16}:
        return Speed(ours, f"FP16 is {OFF}")
    rows, unknown = None, f"no GPU is here to time {title} against FP16"
    if gpus():
        try:
            with clock("timing"):
                rows = time_engines(engines, artifact)
        except Exception as error:  # whatever it is, both engines are built and one of them is used
            unknown = f"the engines cannot be timed on this GPU: {in_words(error)}"
    force = artifact.quantization is not None and artifact.quantization.force
    return decide(ours, rows, unknown, force=force)


def decide(ours: Narrow, rows: Sequence[SpeedAt] | None, unknown: str, *, force: bool) -> Speed:
    """Which engine becomes `model.engine`, and why.

    Args:
        ours: the format of the quantized engine.
        rows: of `time_engines`; None where nothing could be measured.
        unknown: why not, in words.
        force: --force-int8 or --force-fp8.
    """
    if not rows:
        return Speed(ours, f"speed unknown: {unknown}")
    best, *others = rows
    figures = "; ".join(
        f"batch {row.batch}: {ours.upper()} {row.ms[ours]:.3f} ms, FP16 {row.ms[FP16]:.3f} ms, "
        f"{row.ratio:.2f}x"
        for row in rows
    )
    figures += f" on this GPU, {'with' if best.cuda_graph else 'without'} CUDA graphs"
    slow = [
        *([f"less than {GAIN:.2f}x at batch {best.batch}"] if best.ratio < GAIN else []),
        *(f"slower at batch {row.batch}" for row in others if row.ratio < 1 / GAIN),
    ]
    measured = best.ratio, dict(best.ms), tuple(rows)
    if not slow:
        return Speed(ours, figures, *measured)
    figures += f": {' and '.join(slow)}, "
    if force:
        return Speed(ours, f"{figures}kept by --force-{ours}", *measured)
    why = f"{figures}so the FP16 engine is used (--force-{ours} overrides)"
    return Speed(FP16, why, *measured)


def time_engines(
    engines: Mapping[str, EngineFile], artifact: Artifact, *, opener: Opener = TimedEngine
) -> list[SpeedAt]:
    """Times both engines, at the profile's opt batch and at batch 1 if the profile has it.

    CUDA graphs are replayed where both can be captured. Both are open at once, for short turns;
    where the GPU has no room for that, they are opened in turns.

    Args:
        opener: in place of `TimedEngine` (tests).

    Raises:
        EngineError: an engine does not run on this GPU.
        KeyboardInterrupt: before all was measured.
    """
    least, best, _ = artifact.batch
    batches = (best, 1) if least == 1 < best else (best,)
    try:
        measured = _together(engines, batches, opener)
    except GpuMemoryError:
        measured = None
    if measured is None:
        measured = _in_turns(engines, batches, opener)
    times, graph = measured
    ours = next(name for name in engines if name != FP16)
    return [_row(ours, batch, times[batch], graph) for batch in batches]


Times = dict[int, dict[str, "NDArray[np.float64]"]]
"""Batch -> engine -> GPU time of its inferences in ms, [rounds, inferences per round]."""


def _together(
    engines: Mapping[str, EngineFile], batches: Sequence[int], opener: Opener
) -> tuple[Times, bool] | None:
    """(times, whether as CUDA graphs); None where there seems to be no room for both.

    Asked before the second is opened: on a Jetson, whose memory is the system's too, an allocation
    that goes too far ends in the kernel's killing a process rather than in an error.
    """
    times: Times = {}
    with ExitStack() as stack:
        opened: dict[str, TimedEngine] = {}
        graphs: list[bool] = []
        for name in sorted(engines, key=lambda name: _size(engines[name]), reverse=True):
            timed = opened[name] = stack.enter_context(closing(opener(engines[name])))
            before = timed.free_memory()
            graphs.append(timed.has_graphs)
            after = timed.free_memory()
            if len(opened) < len(engines) and after < 2 * (before - after):
                return None
        graph = all(graphs)
        for batch in batches:
            participants = [_participant(name, opened[name], batch, graph) for name in engines]
            series, complete = measure(participants, SETTINGS)
            if not complete:
                raise KeyboardInterrupt
            times[batch] = {item.participant.artifact: _times(item.rounds) for item in series}
    return times, graph


def _in_turns(
    engines: Mapping[str, EngineFile], batches: Sequence[int], opener: Opener
) -> tuple[Times, bool]:
    """The same, with one engine open at a time: a round is a visit of each, with a warm-up."""
    graph = True
    for engine in engines.values():
        with closing(opener(engine)) as timed:
            graph = graph and timed.has_graphs
    once = replace(SETTINGS, rounds=1, seconds=SETTINGS.seconds / TURNS)
    names = [*engines]
    visits: dict[int, dict[str, list[list[Inference]]]]
    visits = {batch: {name: [] for name in names} for batch in batches}
    for index in range(TURNS):
        for who in order(len(names), index):
            with closing(opener(engines[names[who]])) as timed:
                for batch in batches:
                    (series,), _ = measure([_participant(names[who], timed, batch, graph)], once)
                    visits[batch][names[who]] += series.rounds
    times = {
        batch: {name: _times(rounds) for name, rounds in by_name.items()}
        for batch, by_name in visits.items()
    }
    return times, graph


def _participant(name: str, timed: TimedEngine, batch: int, graph: bool) -> Participant:
    return Participant(name, EngineBackend.name, batch, timed.prepare(batch, graph), graph)


def _times(rounds: Sequence[Sequence[Inference]]) -> NDArray[np.float64]:
    """GPU times [rounds, inferences], of as many inferences as the shortest round has."""
    count = min(map(len, rounds))
    return np.array([[compute(one) for one in turn[:count]] for turn in rounds], dtype=np.float64)


def _size(engine: EngineFile) -> int:
    return engine.facts.bytes if engine.facts else 0


def _row(ours: str, batch: int, times: Mapping[str, NDArray[np.float64]], graph: bool) -> SpeedAt:
    found = ratio(times[FP16], times[ours])
    low, high = found["ci95"]
    ms = {name: latency(values)["p50"] for name, values in times.items()}
    return SpeedAt(batch, ms, found["ratio"], (low, high), graph)
