"""The pipeline: weights -> patch -> export -> precision -> check -> fuse -> engine -> manifest.

Everything is made in a folder of its own inside the target and moved into place at the end, so an
artifact that is there stays whole until its successor is, and an interrupted build leaves nothing.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .core import artifact
from .core.artifact import (
    Artifact,
    Check,
    EngineOptions,
    Granularity,
    Jmp,
    Macs,
    Model,
    Precision,
    Strategy,
)
from .core.errors import ArtifactError, EngineError, ScheduleError
from .core.files import atomic_path, make_writable_dir
from .core.images import find_images, in_channels, load_batch, preprocess, sample_photos
from .core.outputs import output_of
from .engine import builder
from .engine.stage import Clock, make_engines
from .jmp.models import OwnModel
from .jmp.schedule import DEFAULT as DEFAULT_SCHEDULE

if TYPE_CHECKING:
    from torch import nn

    from .jmp.models import LoadedModel
    from .jmp.node import TokenReduce
    from .quantize.int8 import Int8Options

REFERENCE_IMAGES = 4

OnStage = Callable[[str], None]
OnModel = Callable[["LoadedModel"], None]


@dataclass(frozen=True)
class BuildOptions:
    """What `build` is asked for; the command line's flags of the same names.

    Attributes:
        model: as for `models.load_model`: a name, or a module in hand.
        out: artifact folder.
        weights: "auto", "pretrained", "random" or a path.
        own: what else is to be said of a model of one's own.
        precision: "fp16", "fp32" or "int8" (INT8 for linear layers, FP16 for the rest).
        int8: images or cache, method and so on, for INT8.
        schedule: spelling for `schedule.parse`.
        keep_rate, blocks: the other way to write a schedule; both or neither.
        tau, granularity: see `node.TokenReduce`; tau None takes the schedule's.
        strategy: "jmp" uses tau; "merge" and "prune" are tau = -1 and tau = 2.
        proportional: proportional attention.
        dense: no JMP: the baseline.
        img_size: pixels of a square or (height, width), or None for the model's own.
        batch: (min, opt, max) of the engine's profile.
        engine: "auto", "tensorrt", "rtx" or "none".
        targets: architectures for TensorRT-RTX.
        workspace_mb: builder memory in MiB.
        images: photos for the check; empty takes sample photos.
        seed: of random weights, and of the draw of calibration images.
    """

    model: str | nn.Module
    out: Path
    weights: str = "auto"
    own: OwnModel = field(default_factory=OwnModel)
    precision: Precision = "fp16"
    int8: Int8Options | None = None
    schedule: str = DEFAULT_SCHEDULE
    keep_rate: float | None = None
    blocks: tuple[int, ...] | None = None
    tau: float | None = None
    granularity: Granularity = "token"
    strategy: Strategy = "jmp"
    proportional: bool = True
    dense: bool = False
    img_size: int | tuple[int, int] | None = None
    batch: tuple[int, int, int] = (1, 8, 32)
    engine: str = "auto"
    targets: tuple[str, ...] = ()
    workspace_mb: int | None = None
    images: tuple[Path, ...] = ()
    seed: int = 0
    rebuild: str = field(default="python -m jmp_deploy build", compare=False)


def build(
    options: BuildOptions | nn.Module,
    out: Path | str | None = None,
    *,
    on_stage: OnStage = lambda name: None,
    on_progress: builder.Progress | None = None,
    on_model: OnModel = lambda loaded: None,
    **fields: Any,
) -> Artifact:
    """Builds an artifact.

        build(BuildOptions("deit_s", Path("artifacts/deit_s")))
        build(model, "artifacts/mine", precision="fp32")  # a module in hand; it stays as it is

    Args:
        options: what is asked for, or a module.
        out, fields: with a module, the other fields of `BuildOptions`.
        on_stage, on_progress: told how far it is.
        on_model: told what was loaded, before the long work starts.

    Raises:
        JmpDeployError: with what went wrong; the target folder is as it was before. A check
            outside its tolerances is no error: the artifact is kept and `check.ok` is false.
    """
    from .bench.int8 import settle
    from .quantize.int8 import refuse_early

    if not isinstance(options, BuildOptions):
        name = type(options).__name__
        options = BuildOptions(options, Path(out or Path("artifacts") / name), **fields)
    elif out is not None or fields:
        raise TypeError("out and fields go with a module; BuildOptions has its own")
    least, best, most = options.batch
    if not 1 <= least <= best <= most:
        raise EngineError(
            f"batch {least},{best},{most} is not MIN <= OPT <= MAX with MIN >= 1",
            "write --batch 8 for a fixed batch, or --batch 1,8,32",
        )
    if (options.keep_rate is None) != (options.blocks is None):
        raise ScheduleError("--keep-rate and --blocks go together: --keep-rate 0.7 --blocks 3,6,9")
    engine_options = EngineOptions(builder.python_targets(options.targets), options.workspace_mb)
    choice = builder.choose(options.engine)
    refuse_early(options.int8, options.precision, options.rebuild)
    _refuse_odd_target(options.out)
    is_new = not options.out.exists()
    make_writable_dir(options.out)
    clock = Clock(on_stage)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=options.out))
    try:
        made, reductions = _portable(options, staging, clock, on_progress, on_model)
        # PyTorch's copy of the model is out of reach here; what it held goes back before a builder
        # on a device with little memory starts.
        gc.collect()
        _deployable(staging, clock, reductions)
        made = replace(made, engine_options=engine_options)
        made = make_engines(
            made, staging, options.out, choice, settle, clock=clock, on_progress=on_progress
        )
        replace(made, stages=tuple(clock.stages)).write()
        _move_into_place(staging, options.out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(options.out.iterdir()):
            options.out.rmdir()
    return Artifact.read(options.out)


_TWIN = "fp16.onnx"
"""The FP16 twin's portable form, while an INT8 artifact is made."""


def _portable(
    options: BuildOptions,
    staging: Path,
    clock: Clock,
    on_progress: builder.Progress | None,
    on_model: OnModel,
) -> tuple[Artifact, list[TokenReduce]]:
    """Model to checked portable ONNX and reference.

    Returns:
        The artifact so far, and the reductions that the ONNX must have.
    """
    from .export import export, fp16
    from .jmp.models import load_model
    from .quantize import int8

    with clock("weights"):
        loaded = load_model(
            options.model,
            options.weights,
            img_size=options.img_size,
            seed=options.seed,
            own=options.own,
        )
    on_model(loaded)
    with clock("patch"):
        jmp = None if options.dense else _patch(loaded, options)
    size = (loaded.preprocess.height, loaded.preprocess.width)
    output = output_of(loaded.model).name
    with clock("export"):
        portable = staging / artifact.PORTABLE
        fp32 = portable if options.precision == "fp32" else staging / "fp32.onnx"
        export.export_onnx(loaded.model, fp32, image_size=size)
    if options.precision == "fp16":
        with clock("fp16"):
            fp16.to_fp16(fp32, portable)
            fp32.unlink()
    macs = _macs(loaded, jmp)
    quantized = None
    if options.precision == "int8":
        fp16.to_fp16(fp32, staging / _TWIN)
        asked = options.int8 or int8.Int8Options()
        quantized = int8.make(
            asked, loaded, jmp, macs.model, fp32, options.seed, clock, on_progress
        )
    with clock("check"):
        check = _check(options, loaded, portable, output)
    patched = loaded.model.blocks.reductions if jmp else {}
    reductions = [patched[block].stored() for block in sorted(patched)]
    made = Artifact(
        folder=staging,
        tools=artifact.tool_versions(),
        model=Model(
            loaded.name,
            size[0],
            output,
            asked_for=_asked_for(options, loaded),
            settings=loaded.settings,
            function=loaded.function,
        ),
        weights=loaded.origin,
        preprocess=loaded.preprocess,
        class_names=loaded.class_names,
        synsets=loaded.synsets,
        multi_label=loaded.multi_label,
        jmp=jmp,
        macs=macs,
        precision=options.precision,
        int8=quantized,
        batch=options.batch,
        check=check,
        rebuild=options.rebuild,
    )
    return made, reductions


def _asked_for(options: BuildOptions, loaded: LoadedModel) -> str:
    by_name = isinstance(options.model, str) and not loaded.function
    return str(options.model if by_name else loaded.origin.source)


def _patch(loaded: LoadedModel, options: BuildOptions) -> Jmp:
    from .jmp import schedule as schedules
    from .jmp.patch import model_shape, patch

    shape = model_shape(loaded.model)
    if options.keep_rate is not None and options.blocks is not None:
        schedule = schedules.keep_rate(options.keep_rate, options.blocks, shape)
    else:
        schedule = schedules.parse(options.schedule, shape)
    if not schedule.steps:
        raise ScheduleError(
            "the schedule keeps every token", "use --dense to build the model without JMP"
        )
    tau = schedule.tau if options.tau is None else options.tau
    tau = {"jmp": tau, "merge": -1.0, "prune": 2.0}[options.strategy]
    patch(
        loaded.model,
        schedule,
        tau=tau,
        granularity=options.granularity,
        proportional=options.proportional,
    )
    return replace(
        schedules.to_manifest(schedule),
        strategy=options.strategy,
        tau=tau,
        granularity=options.granularity,
        proportional=options.proportional,
    )


def _macs(loaded: LoadedModel, jmp: Jmp | None) -> Macs:
    from .jmp import schedule as schedules
    from .jmp.patch import model_shape

    shape = model_shape(loaded.model)
    dense = schedules.macs(shape)
    if jmp is None:
        return Macs(dense, dense)
    return Macs(schedules.macs(shape, schedules.from_manifest(jmp)), dense)


def _check(options: BuildOptions, loaded: LoadedModel, portable: Path, output: str) -> Check:
    """Portable ONNX against PyTorch on photos; writes reference.npz beside the model."""
    from .backends.torch import torch_runner
    from .compare import compare
    from .core import ort

    if options.images:
        paths = find_images(options.images)
        names = [path.name for path in paths]
        images = load_batch(paths, loaded.preprocess)
    else:
        photos = sample_photos()
        names = [name for name, _ in photos]
        spec = loaded.preprocess
        fitting = [in_channels(photo, spec.channels) for _, photo in photos]
        images = np.stack([preprocess(photo, spec) for photo in fitting])
    ort.quiet_polygraphy()
    runners = [torch_runner(loaded.model, output), ort.session_runner(portable)]
    precisions: dict[str, str] = {runners[0].name: "fp32", runners[1].name: options.precision}
    twin = portable.parent / _TWIN
    if twin.is_file():
        runners.append(ort.session_runner(twin, "onnxruntime (FP16 twin)"))
        precisions[runners[2].name] = "fp16"
    pairs, times, outputs = compare.run_and_pair(
        runners, images, options.batch, precisions, near_ties=not options.dense
    )
    with (
        atomic_path(portable.parent / artifact.REFERENCE) as temporary,
        temporary.open("wb") as file,
    ):
        np.savez_compressed(
            file,
            images=images[:REFERENCE_IMAGES],
            output=outputs[output][:REFERENCE_IMAGES],
            names=np.array(names[:REFERENCE_IMAGES]),
        )
    return Check(
        ok=all(pair.ok for pair in pairs),
        images=tuple(names),
        pairs=tuple(vars(pair) for pair in pairs),
        runtime_ms=times,
    )


def _deployable(staging: Path, clock: Clock, reductions: list[TokenReduce]) -> None:
    from .export.fuse import to_deployable

    forms = {artifact.PORTABLE: artifact.DEPLOYABLE, _TWIN: artifact.TWIN_DEPLOYABLE}
    with clock("fuse"):
        for portable, deployable in forms.items():
            if (staging / portable).is_file():
                to_deployable(staging / portable, staging / deployable, expected=reductions)
        (staging / _TWIN).unlink(missing_ok=True)


def _refuse_odd_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file, not a folder", "choose another folder with -o")


def _move_into_place(staging: Path, out: Path) -> None:
    """Replaces the files of an artifact one by one, the manifest last."""
    made = {path.name for path in staging.iterdir()}
    (out / artifact.FILE).unlink(missing_ok=True)
    for name in artifact.LISTED:
        if name not in made:
            (out / name).unlink(missing_ok=True)
    if artifact.TWIN_DEPLOYABLE not in made:
        (out / artifact.TWIN_BUILD_LOG).unlink(missing_ok=True)
    for name in sorted(made - {artifact.FILE}):
        (staging / name).replace(out / name)
    (staging / artifact.FILE).replace(out / artifact.FILE)
