"""Whether INT8 pays on this GPU: both engines in one run, in turns; which one the artifact gets.

INT8 ViTs are often no faster than FP16, or slower (NVIDIA/TensorRT #4273, #3186, #1604):
conversions around small matrix products eat what the products save. So the claim is measured where
it can be and withheld where it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from ..backends.engine import EngineBackend, TimedEngine
from ..core.artifact import Artifact, Speed
from ..core.device import gpus
from ..core.errors import JmpDeployError
from ..engine.fit import EngineFile
from ..engine.stage import Clock
from .measure import Participant, Settings, by_round, compute, latency, measure

GAIN = 1.05
"""INT8 must be this much faster to replace FP16: less is within what clocks and other work on a
GPU do to a measurement, and not worth any accuracy."""
SETTINGS = Settings(iterations=40, rounds=10, seconds=5.0)


def settle(engines: Mapping[str, EngineFile], artifact: Artifact, clock: Clock) -> Speed:
    """Decides which of two engines becomes `model.engine`: INT8 unless it is measured to be no
    faster.

    Args:
        engines: "int8" and "fp16".
        artifact: whose engines they are.
        clock: announces the stage "timing".
    """
    times, unknown = None, "no GPU is here to time INT8 against FP16"
    if gpus():
        try:
            with clock("timing"):
                times = time_engines(engines, (artifact.batch[1], *artifact.image_shape))
        except JmpDeployError as error:
            unknown = f"the engines do not run on this GPU: {error.message}"
    force = artifact.int8 is not None and artifact.int8.force
    return decide(times, unknown, force=force)


def decide(times: Mapping[str, float] | None, unknown: str, *, force: bool) -> Speed:
    """Which engine becomes `model.engine`, and why.

    Args:
        times: of `measure`, with "int8" and "fp16"; None where nothing could be measured.
        unknown: why not, in words.
        force: --force-int8.
    """
    if times is None:
        return Speed("int8", f"speed unknown: {unknown}")
    ratio = times["fp16"] / times["int8"]
    figures = (
        f"INT8 {times['int8']:.3f} ms, FP16 {times['fp16']:.3f} ms, {ratio:.2f}x in one run on "
        "this GPU"
    )
    if ratio >= GAIN:
        return Speed("int8", figures, ratio, dict(times))
    slow = f"{figures}: less than {GAIN:.2f}x, "
    if force:
        return Speed("int8", f"{slow}kept by --force-int8", ratio, dict(times))
    why = f"{slow}so the FP16 engine is used (--force-int8 overrides)"
    return Speed("fp16", why, ratio, dict(times))


def time_engines(engines: Mapping[str, EngineFile], shape: tuple[int, ...]) -> dict[str, float]:
    """Opens engines on the GPU that is here and times them on one batch that is already there.

    Untested: no GPU was at hand when this was written.

    Args:
        shape: of the input, [B, 3, H, W].

    Raises:
        EngineError: an engine does not fit this GPU.
    """
    batch = shape[0]
    with ExitStack() as stack:
        participants = []
        for name, engine in engines.items():
            timed = TimedEngine(engine)
            stack.callback(timed.close)
            graph = timed.has_graphs
            participants.append(
                Participant(name, EngineBackend.name, batch, timed.prepare(batch, graph), graph)
            )
        series, complete = measure(participants, SETTINGS)
    if not complete:
        raise KeyboardInterrupt
    found = {}
    for item in series:
        times = by_round(item, compute)
        assert times is not None  # engines tell what the GPU spends
        found[item.participant.artifact] = latency(times)["p50"]
    return found
