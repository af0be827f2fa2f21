"""The pipeline: weights -> patch -> export -> precision -> check -> fuse -> engine -> manifest.

Everything is made in a folder of its own inside the target and moved into place at the end, so an
artifact that is there stays whole until its successor is, and an interrupted build leaves nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .core import artifact, interrupt
from .core.artifact import FILE, Artifact, Reference, refuse_odd_strings
from .core.errors import (
    ArtifactError,
    EngineError,
    GraphError,
    ImageError,
    ModelError,
    ScheduleError,
)
from .core.files import atomic_path, make_writable_dir, staging_dir
from .core.images import (
    ARRAYS,
    MAX_SIDE,
    find_images,
    in_channels,
    label,
    load_readable,
    open_image,
    preprocess,
    require_readable,
    sample_photos,
    spread,
)
from .core.manifest import Check, EngineOptions, Granularity, Jmp, Macs, Model, Precision, Strategy
from .core.outputs import (
    LOGITS,
    POOLED,
    PROBABILITIES,
    Dense,
    asked,
    output_named,
    output_of,
)
from .engine import builder
from .engine.stage import Clock, make_engines
from .jmp.models import OwnModel
from .jmp.schedule import DEFAULT as DEFAULT_SCHEDULE
from .jmp.schedule import check_spelling

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from .jmp.models import LoadedModel
    from .jmp.node import TokenReduce
    from .jmp.schedule import ModelShape
    from .quantize.stage import QuantizeOptions

REFERENCE_IMAGES = 4
CHECK_IMAGES = 64
"""Photos of the check at most, spread evenly over those that are named."""

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
        precision: "fp16", "bf16", "fp32", "int8" (INT8 for linear layers, FP16 for the rest) or
            "fp8" (for attention's products too; GPUs from compute capability 8.9 on).
        fp32: what computes in FP32 all the same: words such as "attention:0-3" (see
            `export.numerics.asked_nodes`). What is too large for FP16 does by itself.
        quantize: images or cache, method and so on, for INT8 and FP8.
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
        embed_plugin: the engine carries the plugin, for runtimes that allow host code: ours does
            not.
        fold_normalization: the model takes 0-255 RGB and normalises it itself.
        softmax: probabilities come out, not logits.
        output: what comes out, as `outputs.asked` takes it: "pooled", what the model gives,
            "dense", the features of every patch, "dense:3,6,9,11", of blocks, or several.
        inline: write `model.inlined.onnx` too, the portable model without local functions.
        images: photos for the check; empty takes sample photos.
        seed: of random weights, and of the draw of calibration images.
    """

    model: str | nn.Module
    out: Path
    weights: str = "auto"
    own: OwnModel = field(default_factory=OwnModel)
    precision: Precision = "fp16"
    fp32: tuple[str, ...] = ()
    quantize: QuantizeOptions | None = None
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
    embed_plugin: bool = False
    fold_normalization: bool = False
    softmax: bool = False
    output: str = POOLED
    inline: bool = False
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
            outside its tolerances is no error: the artifact is kept and `check.ok` is false, or
            `engine.is_off` true.
    """
    from .bench.twin import settle
    from .compare.check import check_engine
    from .quantize.stage import refuse_early

    if not isinstance(options, BuildOptions):
        name = type(options).__name__
        out = Path(out or Path("artifacts") / name)
        said = [name, repr(str(out)), *(f"{key}={value!r}" for key, value in fields.items())]
        fields = {"rebuild": f"jmp_deploy.build({', '.join(said)})", **fields}
        options = BuildOptions(options, out, **fields)
    elif out is not None or fields:
        raise TypeError("out and fields go with a module; BuildOptions has its own")
    least, best, most = options.batch
    if not 1 <= least <= best <= most:
        raise EngineError(
            f"batch {least},{best},{most} is not MIN <= OPT <= MAX with MIN >= 1",
            "write --batch 8 for a fixed batch, or --batch 1,8,32",
        )
    _refuse_contradictions(options)
    engine_options = EngineOptions(
        builder.python_targets(options.targets), options.workspace_mb, options.embed_plugin
    )
    choice = builder.choose(options.engine)
    builder.refuse_targets(choice, engine_options.targets, options.precision)
    refuse_early(options.quantize, options.precision, options.rebuild)
    _refuse_odd_words(options)
    _refuse_odd_target(options.out)
    refuse_odd_strings([options.rebuild, str(options.out), options.weights], options.out / FILE)
    photos = _photos(options)
    is_new = not options.out.exists()
    make_writable_dir(options.out)
    clock = Clock(on_stage)
    try:
        with staging_dir(options.out) as staging:
            made, reference, reductions = _portable(
                options, photos, staging, clock, on_progress, on_model
            )
            # PyTorch's copy of the model is out of reach here; what it held goes back before a
            # builder on a device with little memory starts.
            gc.collect()
            _deployable(staging, clock, reductions)
            if options.inline:
                _inlined(staging, clock)
            made = replace(made, engine_options=engine_options)
            made = make_engines(
                made,
                staging,
                options.out,
                choice,
                partial(check_engine, reference=reference),
                settle,
                clock=clock,
                on_progress=on_progress,
            )
            replace(made, stages=tuple(clock.stages)).write()
            with interrupt.held():
                _move_into_place(staging, options.out)
                interrupt.left(f"the build had ended: {options.out} is whole")
    finally:
        if is_new and not any(options.out.iterdir()):
            options.out.rmdir()
    return Artifact.read(options.out)


_TWIN = "fp16.onnx"
"""The FP16 twin's portable form, while a quantized artifact is made."""


def _portable(
    options: BuildOptions,
    photos: list[Path],
    staging: Path,
    clock: Clock,
    on_progress: builder.Progress | None,
    on_model: OnModel,
) -> tuple[Artifact, Reference, list[TokenReduce]]:
    """Model to checked portable ONNX and reference.

    Returns:
        The artifact so far, the reference, and the reductions that the ONNX must have.
    """
    from .export import export, numerics, precision
    from .jmp import fold
    from .jmp.models import load_model
    from .quantize import stage as quantizing

    with clock("weights"):
        loaded = load_model(
            options.model,
            options.weights,
            img_size=options.img_size,
            seed=options.seed,
            own=options.own,
        )
        if options.fold_normalization:
            loaded.preprocess = fold.fold_normalization(loaded.model, loaded.preprocess)
        outputs = tuple(
            _given(loaded, options) if name == POOLED else name
            for name in asked(options.output, len(loaded.model.blocks))
        )
    on_model(loaded)
    names, images = _load(photos, loaded)
    with clock("patch"):
        jmp = None if options.dense else _patch(loaded, options)
    size = (loaded.preprocess.height, loaded.preprocess.width)
    with clock("export"):
        portable = staging / artifact.PORTABLE
        fp32 = portable if options.precision == "fp32" else staging / "fp32.onnx"
        before = [LOGITS.name if name == PROBABILITIES.name else name for name in outputs]
        dense = before if _restores(options) else None
        export.export_onnx(loaded.model, fp32, image_size=size, outputs=dense)
    kept = None
    if options.precision != "fp32":
        with clock("magnitudes"):
            reach = options.precision != "bf16"
            kept = numerics.keep_fp32(fp32, images, options.fp32, measure=reach)
    quantize = options.quantize or quantizing.QuantizeOptions()
    form = quantize.form(options.precision)
    if kept and not form:
        with clock(options.precision):
            precision.to_low(fp32, portable, options.precision, kept.nodes)
            fp32.unlink()
    macs = _macs(loaded, jmp, options)
    quantized = None
    if kept and form:
        precision.to_low(fp32, staging / _TWIN, "fp16", kept.nodes)
        quantized = quantizing.make(
            form,
            quantize,
            loaded,
            jmp,
            macs.model,
            fp32,
            options.seed,
            clock,
            on_progress,
            kept.nodes,
        )
    if options.softmax:
        for name in (artifact.PORTABLE, _TWIN):
            if (staging / name).is_file():
                export.append_softmax(staging / name)
    with clock("check"):
        check, reference = _check(options, loaded, portable, outputs, names, images)
    patched = loaded.model.blocks.reductions if jmp else {}
    reductions = [patched[block].stored() for block in sorted(patched)]
    has_classes = not isinstance(output_named(outputs[0]), Dense)
    made = Artifact(
        folder=staging,
        tools=artifact.tool_versions(),
        model=Model(
            loaded.name,
            size[0],
            outputs[0],
            also=outputs[1:],
            asked_for=_asked_for(options, loaded),
            settings=loaded.settings,
            function=loaded.function,
        ),
        weights=loaded.origin,
        preprocess=loaded.preprocess,
        class_names=loaded.class_names if has_classes else None,
        synsets=loaded.synsets if has_classes else None,
        multi_label=loaded.multi_label,
        jmp=jmp,
        macs=macs,
        precision=options.precision,
        fp32=kept,
        batch=options.batch,
        check=check,
        rebuild=options.rebuild,
    )
    return made.with_quantization(quantized) if quantized else made, reference, reductions


def _restores(options: BuildOptions) -> bool:
    """Whether features of patches are asked for."""
    return asked(options.output) != (POOLED,)


def _given(loaded: LoadedModel, options: BuildOptions) -> str:
    """What the model gives itself; raises ModelError where a softmax makes no sense."""
    given = output_of(loaded.model)
    if not options.softmax:
        return given.name
    why = None
    if given != LOGITS:
        why = f"{loaded.name} gives {given.name}"
    elif loaded.multi_label:
        why = "each class is a question of its own, whose probability is a sigmoid"
    elif loaded.model.num_classes == 1:
        why = "the softmax of a single class is 1 whatever it is"
    if why:
        raise ModelError(f"--softmax is for one of several classes: {why}", "leave out --softmax")
    return PROBABILITIES.name


def _asked_for(options: BuildOptions, loaded: LoadedModel) -> str:
    by_name = isinstance(options.model, str) and not loaded.function
    return str(options.model if by_name else loaded.origin.source)


def _patch(loaded: LoadedModel, options: BuildOptions) -> Jmp:
    from .jmp import schedule as schedules
    from .jmp.patch import patch
    from .jmp.published import expected

    shape = _shape(loaded, options)
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
        restore=_restores(options),
    )
    as_published = options.strategy == "jmp" and options.granularity == "token"
    as_published = as_published and options.proportional and loaded.origin.kind != "random"
    as_published = as_published and not loaded.origin.recovered  # measured with others
    return replace(
        schedules.to_manifest(schedule),
        caution=schedules.caution(schedule, shape),
        expected=expected(replace(schedule, tau=tau), shape) if as_published else "",
        strategy=options.strategy,
        tau=tau,
        granularity=options.granularity,
        proportional=options.proportional,
    )


def _shape(loaded: LoadedModel, options: BuildOptions) -> ModelShape:
    from .jmp.patch import model_shape

    shape = model_shape(loaded.model)
    return shape.for_patches() if _restores(options) else shape


def _macs(loaded: LoadedModel, jmp: Jmp | None, options: BuildOptions) -> Macs:
    from .jmp import schedule as schedules

    shape = _shape(loaded, options)
    dense = schedules.macs(shape)
    if jmp is None:
        return Macs(dense, dense)
    return Macs(schedules.macs(shape, schedules.from_manifest(jmp)), dense)


def _load(photos: list[Path], loaded: LoadedModel) -> tuple[list[str], NDArray[np.float32]]:
    """What the model is checked on: names, and images [B, C, H, W].

    Raises:
        ImageError: too many cannot be read for a model of so many channels.
    """
    if photos:
        batch = load_readable(photos, loaded.preprocess)
        return [label(photos[k]) for k in batch.kept], batch.require()
    samples, spec = sample_photos(), loaded.preprocess
    fitting = [in_channels(photo, spec.channels) for _, photo in samples]
    return [name for name, _ in samples], np.stack([preprocess(photo, spec) for photo in fitting])


def _check(
    options: BuildOptions,
    loaded: LoadedModel,
    portable: Path,
    outputs: tuple[str, ...],
    names: list[str],
    images: NDArray[np.float32],
) -> tuple[Check, Reference]:
    """Portable ONNX, rounded as an engine rounds, against PyTorch; writes reference.npz beside."""
    from .backends.torch import torch_runner
    from .compare import compare
    from .core import ort
    from .export.graph import load_model
    from .export.numerics import first_not_finite
    from .export.precision import emulated

    ort.quiet_polygraphy()
    runners = [torch_runner(loaded.model, outputs), ort.session_runner(emulated(portable))]
    precisions: dict[str, str] = {runners[0].name: "fp32", runners[1].name: options.precision}
    twin = portable.parent / _TWIN
    if twin.is_file():
        runners.append(ort.session_runner(emulated(twin), "onnxruntime (FP16 twin)"))
        precisions[runners[2].name] = "fp16"
    pairs, times, values = compare.run_and_pair(
        runners, images, options.batch, precisions, near_ties=not options.dense
    )
    some = slice(REFERENCE_IMAGES)
    by_torch = {name: values[runners[0].name][name][some] for name in outputs}
    reference = Reference(images[some], by_torch, np.array(names[some]))
    with (
        atomic_path(portable.parent / artifact.REFERENCE) as temporary,
        temporary.open("wb") as file,
    ):
        arrays: Any = reference.arrays()
        np.savez_compressed(file, **arrays)
    check = Check(
        ok=all(pair.ok for pair in pairs),
        images=tuple(names),
        pairs=tuple(vars(pair) for pair in pairs),
        runtime_ms=times,
        not_finite=first_not_finite(load_model(portable), images)
        if any(pair.not_finite for pair in pairs)
        else None,
    )
    return check, reference


def _deployable(staging: Path, clock: Clock, reductions: list[TokenReduce]) -> None:
    from .export.fuse import to_deployable

    forms = {artifact.PORTABLE: artifact.DEPLOYABLE, _TWIN: artifact.TWIN_DEPLOYABLE}
    with clock("fuse"):
        for portable, deployable in forms.items():
            if (staging / portable).is_file():
                to_deployable(staging / portable, staging / deployable, expected=reductions)
        (staging / _TWIN).unlink(missing_ok=True)


def _inlined(staging: Path, clock: Clock) -> None:
    from .export.fuse import to_inlined

    with clock("inline"):
        to_inlined(staging / artifact.PORTABLE, staging / artifact.INLINED)


def _refuse_contradictions(options: BuildOptions) -> None:
    """Raises JmpDeployError for options that cannot work, or of which one makes another vain."""
    if (options.keep_rate is None) != (options.blocks is None):
        raise ScheduleError("--keep-rate and --blocks go together: --keep-rate 0.7 --blocks 3,6,9")
    plain = BuildOptions(options.model, options.out)
    flags = {"schedule": "--schedule", "keep_rate": "--keep-rate", "tau": "--tau"}
    flags |= {"strategy": "--strategy", "granularity": "--granularity"}
    flags |= {"proportional": "--no-proportional"}
    vain = [flag for name, flag in flags.items() if getattr(options, name) != getattr(plain, name)]
    if options.dense and vain:
        raise ScheduleError(
            f"--dense builds the model without JMP, and {', '.join(vain)} says how JMP works",
            "leave out --dense, or the others",
        )
    if options.embed_plugin and (options.dense or options.engine == "none"):
        without = "--dense" if options.dense else "--engine none"
        raise EngineError(
            f"--embed-plugin puts the plugin into the engine, and {without} has none",
            "leave one of them out",
        )
    if POOLED not in asked(options.output):
        words = f"--output {options.output} gives features of patches alone"
        if options.softmax:
            raise ModelError(
                f"{words}, and --softmax is of classes", f"--output {POOLED},{options.output}"
            )
        if options.quantize and options.quantize.max_drop is not None:
            raise ModelError(
                f"{words}, and --max-drop promises points of accuracy, which one answer per image "
                "has",
                f"leave it out, or let what the model gives decide: --output "
                f"{POOLED},{options.output}",
            )
    check_spelling(options.schedule)
    if options.strategy != "jmp" and options.tau is not None:
        raise ScheduleError(
            f"--strategy {options.strategy} decides without --tau", "leave one of them out"
        )
    size = options.img_size
    sides = (size,) if isinstance(size, int) else size or ()
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise ModelError(f"an image size of {size} is not in 1 to {MAX_SIDE}")
    if not 0 <= options.seed < 1 << 63:
        raise ModelError(f"seed {options.seed} is not in 0 to {(1 << 63) - 1}")


def _photos(options: BuildOptions) -> list[Path]:
    """The photos of the check, at most `CHECK_IMAGES` of those named; empty for the sample photos.

    Raises:
        ImageError: none are there, or too many are no images, whatever channels the model takes.
    """
    found = spread(find_images(options.images), CHECK_IMAGES) if options.images else []
    pictures = [path for path in found if path.suffix.lower() != ARRAYS]
    unreadable = []
    for path in pictures:  # before a model is loaded; any picture can be had in three channels
        try:
            open_image(path)
        except ImageError as error:
            unreadable.append(error.message)
    require_readable(unreadable, len(pictures) - len(unreadable))
    return found


def _refuse_odd_words(options: BuildOptions) -> None:
    from .export.numerics import parse_asked

    for word in options.fp32:
        parse_asked(word)
    if options.fp32 and options.precision == "fp32":
        raise GraphError(
            "--fp32 names what stays in FP32 in a coarser precision; all of this model does",
            "leave out --fp32, or choose another --precision",
        )


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
