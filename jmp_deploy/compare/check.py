"""An engine held against PyTorch's stored outputs, on the GPU that is here.

The check of `build` is of the portable ONNX on a CPU. What TensorRT makes of it is checked by this,
after every build of an engine and when an artifact first runs on another GPU: builders have been
silently wrong (fused FP16 attention in TensorRT 10.3: NVIDIA/TensorRT #4723, #4742). Needs what
running an engine needs: neither PyTorch nor Polygraphy.
"""

from __future__ import annotations

from datetime import datetime, timezone

from ..backends.base import Outputs
from ..core.artifact import Artifact, Reference
from ..core.device import gpus
from ..core.errors import EngineError, GpuMemoryError, engine_errors, in_words
from ..core.images import INPUT
from ..core.manifest import EngineCheck
from ..engine.fit import EngineFile
from ..engine.runtime import Engine
from .measures import coarser, measure

NAMES = "torch", "engine"


def check_engine(
    engine: EngineFile, artifact: Artifact, reference: Reference | None = None
) -> EngineCheck:
    """Runs the images of `reference.npz` through an engine, and compares as `compare` does.

    Args:
        engine: of which the facts are known.
        artifact: that it belongs to.
        reference: None reads the artifact's.

    Returns:
        The check; not ok too where the engine opens and then fails on its first batch.

    Raises:
        ArtifactError: the reference cannot be read.
        EngineError: the engine cannot be opened here, which says nothing of what it answers.
    """
    assert engine.facts is not None
    reference = reference or artifact.reference()
    precision = coarser("fp32", engine.facts.precision)
    gpu = gpus()[0].name
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    least, _, most = artifact.batch
    # No more memory than it takes: `run --batch` may be how this artifact runs on this device.
    size = max(least, min(most, len(reference.images)))
    is_open = False
    try:
        with (
            engine_errors("the engine cannot be run"),
            Engine(engine, check_finite=False, max_batch=size) as opened,
        ):
            is_open = True
            answers = Outputs(opened.infer({INPUT: reference.images}))
    except EngineError as error:
        if not is_open or isinstance(error, GpuMemoryError):
            raise
        return EngineCheck(False, gpu, date, (f"it does not run: {in_words(error)}",))
    reduces = artifact.jmp is not None
    pairs = [
        measure(*NAMES, name, stored, answers[name], precision, near_ties=reduces)
        for name, stored in reference.outputs.items()
    ]
    several = len(pairs) > 1
    problems = tuple(
        f"{pair.output}: {problem}" if several else problem
        for pair in pairs
        for problem in pair.problems
    )
    shown = tuple({**vars(pair), "problems": list(pair.problems)} for pair in pairs)
    return EngineCheck(not problems, gpu, date, problems, shown)
