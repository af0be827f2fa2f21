"""The part of a build that quantizes: from images or a cache to an INT8 or FP8 model, and what to
say of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import artifact, interrupt
from ..core.errors import CalibrationError
from ..core.manifest import Jmp, Quantization
from ..export.graph import load_model, save_model, weight_types
from ..jmp.models import weights_digest
from . import cache as calibration_cache
from . import images as calibration
from . import qdq, recipes
from .cache import Calibration
from .formats import FORMATS, INT8, INT8_ATTENTION, Format
from .layers import Layer, find_layers, select

if TYPE_CHECKING:
    from ..jmp.models import LoadedModel

OnProgress = Callable[[str, int, int], None]
"""(phase, done, total)"""
Clock = Callable[[str], AbstractContextManager[None]]
"""A stage of the build, by its name."""

SENSITIVITY_IMAGES = 64
FACTOR_IMAGES = 32


@dataclass(frozen=True)
class QuantizeOptions:
    """What `build --precision int8` or `fp8` is asked for besides.

    Attributes:
        calib: folder of images, "sample", or None with a cache.
        images: how many.
        method: see `ranges.parse_method`; None takes the recipe's.
        cache: calibration cache to use instead of images.
        attention: INT8 for attention's products too; FP8 has them in any case.
        max_drop: points that the model may lose; the layers that cost most stay in FP16 until it
            holds. None: those of the recipe stay.
        force: make the quantized engine `model.engine` though it is no faster than FP16.
    """

    calib: str | None = None
    images: int = calibration.DEFAULT_COUNT
    method: str | None = None
    cache: Path | None = None
    attention: bool = False
    max_drop: float | None = None
    force: bool = False

    def form(self, precision: str) -> Format | None:
        """The number format of a precision; None where that has more than 8 bits."""
        asked = precision == INT8.name and self.attention
        return INT8_ATTENTION if asked else FORMATS.get(precision)


@dataclass
class Quantized:
    """What came of it: for the manifest, and for the summary."""

    form: Format
    calibration: Calibration
    layers: list[Layer]
    recipe: str | None = None
    cache: str | None = None
    sensitivity: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_manifest(self) -> Quantization:
        """The manifest's "int8" or "fp8"."""
        made = self.calibration
        return Quantization(
            method=made.method,
            images=made.images,
            recipe=self.recipe,
            from_cache=self.cache,
            keep_fp16=made.keep_fp16,
            attention=self.form.attention is not None,
            equalized=tuple(sorted(made.equalization)),
            sensitivity=self.sensitivity,
            **self.facts,
        )


def refuse_early(options: QuantizeOptions | None, precision: str, rebuild: str) -> None:
    """Says what is missing before any work is done.

    Raises:
        CalibrationError: a format of 8 bits without images and without a cache, or flags that do
            not go together.
    """
    if precision not in FORMATS:
        if options is not None and options != QuantizeOptions():
            raise CalibrationError(
                f"calibration options are for --precision int8 or fp8, this is {precision}",
                "leave out --calib and the flags that belong to it, or add --precision int8",
            )
        return
    asked = options or QuantizeOptions()
    if asked.calib is None and asked.cache is None:
        raise CalibrationError(
            f"{precision.upper()} needs images to find the ranges of its activations, or a cache "
            "of them",
            f"{rebuild} --calib DIR (a few hundred images like those that the model will see), "
            f"or --calib sample for a demonstration, or --calib-cache FILE",
        )
    if asked.cache is not None and asked.calib is not None and asked.max_drop is None:
        raise CalibrationError(
            "--calib-cache and --calib exclude each other: a cache needs no images",
            "choose one (with --max-drop both: the cache has the ranges, the images measure)",
        )
    if asked.max_drop is not None and asked.calib is None:
        raise CalibrationError(
            "--max-drop measures on images", "add --calib DIR; what it finds goes into the cache"
        )
    if asked.max_drop is not None and not 0 < asked.max_drop <= 100:
        raise CalibrationError(
            f"--max-drop {asked.max_drop:g} is not above 0 and at most 100 points"
        )
    if asked.attention and precision != INT8.name:
        raise CalibrationError(
            f"--int8-attention is for --precision int8; {precision.upper()} has attention anyway",
            "leave it out",
        )
    if asked.images < 1:
        raise CalibrationError(f"--calib-images {asked.images} is not at least 1")
    if asked.method is not None:
        from .ranges import parse_method

        if parse_method(asked.method)[0] == "entropy" and precision != INT8.name:
            raise CalibrationError(
                "--calib-method entropy looks for the best of evenly spaced levels, which "
                f"{precision.upper()} does not have",
                "leave it out: the largest magnitude (max) serves a format with an exponent",
            )
        if asked.cache is not None:
            raise CalibrationError(
                "--calib-method does nothing with --calib-cache: the cache has its ranges already",
                "leave one of them out",
            )
    if asked.calib not in (None, calibration.SAMPLE):
        calibration.find(str(asked.calib))
    if asked.cache is not None:
        calibration_cache.read(asked.cache)


def make(
    form: Format,
    options: QuantizeOptions,
    loaded: LoadedModel,
    jmp: Jmp | None,
    macs: int,
    fp32: Path,
    seed: int,
    clock: Clock,
    on_progress: OnProgress | None,
    kept: Collection[str] = (),
) -> Quantization:
    """Portable FP32 -> portable quantized model and calibration cache beside it; `fp32` is used up.

    Args:
        form: the number format.
        jmp: the reductions.
        macs: of the whole model per image.
        seed: of the draw of images.
        clock: announces stages.
        kept: names of nodes whose floating-point numbers are FP32, not FP16.

    Returns:
        The manifest's "int8" or "fp8".
    """
    with clock("calibrate"):
        report = on_progress or (lambda phase, done, total: None)
        result = calibrate(form, options, loaded, fp32, jmp, seed=seed, on_progress=report)
    with clock(form.name):
        quantize(result, fp32, fp32.parent / artifact.PORTABLE, macs=macs, kept=kept)
        calibration_cache.write(fp32.parent / artifact.CALIBRATION, result.calibration)
        fp32.unlink()
    return replace(result.to_manifest(), force=options.force)


def calibrate(
    form: Format,
    options: QuantizeOptions,
    loaded: LoadedModel,
    fp32: Path,
    jmp: Jmp | None,
    *,
    seed: int = 0,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> Quantized:
    """Ranges for a portable FP32 model, from a cache or from images.

    Args:
        form: the number format.
        loaded: the model that `fp32` was exported from.
        fp32: portable FP32 ONNX. Rewritten where outlier channels are equalised.
        jmp: the reductions.
        seed: of the draw of images.

    Raises:
        CalibrationError: the cache is another model's, no image can be used, values not finite.
    """
    from . import equalize

    proto = load_model(fp32)
    found = find_layers(proto, form)
    if options.attention and form.attention and not any(layer.products for layer in found):
        raise CalibrationError(
            f"TensorRT has no INT8 kernel for the attentions of {loaded.name}: it wants heads of "
            f"{', '.join(map(str, form.attention.heads))} columns and at most "
            f"{form.attention.most} tokens",
            "leave out --int8-attention: attention stays in FP16, the rest is INT8",
        )
    spec = loaded.preprocess
    wanted = calibration_cache.identity(
        model=loaded.name,
        image_size=spec.height,
        weights=weights_digest(loaded.model),
        preprocess=asdict(spec),
        jmp=jmp.to_json() if jmp else None,
        form=form,
        layers=found,
    )
    images = None
    if options.calib is not None:
        images = calibration.gather(
            options.calib,
            spec,
            count=options.images,
            seed=seed,
            on_progress=_phase(on_progress, "looking at images"),
        )
    if options.cache is not None:
        made = calibration_cache.read(options.cache)
        calibration_cache.check(options.cache, made, wanted)
        result = Quantized(form, made, found, cache=str(options.cache))
        if made.equalization:
            equalize.apply(proto, found, made.equalization)
            save_model(proto, fp32)
    else:
        assert images is not None
        result = _observe(form, options, loaded.name, fp32, images, wanted, on_progress)
    if options.max_drop is not None and images is not None:
        _measure(options.max_drop, fp32, images, result, on_progress)
    return result


def quantize(
    result: Quantized, fp32: Path, target: Path, *, macs: int, kept: Collection[str] = ()
) -> None:
    """Writes the quantized model and completes the facts about it.

    Args:
        fp32: what `calibrate` left.
        target: portable quantized model.
        macs: of the whole model per image, to say what share is quantized.
        kept: as for `make`.
    """
    made = result.calibration
    form = result.form
    wide = {x.name for x in result.layers if x.products and {r.node for r in x.reads} & {*kept}}
    keep = {*made.keep_fp16, *wide}  # an attention in FP32 is not to be one of 8 bits
    done = qdq.quantize(fp32, target, made.scales, form, keep_float=keep, fp32=kept)
    names = {layer.name for layer in done}
    products = inputs = narrow = 0.0
    for layer in result.layers:
        seen = made.ranges.get(layer.reads[0].name)
        if seen is None:
            continue
        if layer.name in names:
            products += seen.rows * layer.macs_per_row
        if layer.weight is not None:
            values = seen.rows * layer.macs_per_row / layer.shape[layer.axis]
            inputs += 2 * values
            narrow += values if layer.name in names else 2 * values
    result.facts = {
        "layers": len(result.layers),
        "layers_quantized": len(done),
        "macs_share": products / macs,
        "weights_bytes": weight_types(load_model(target)),
        "activations_bytes": {"fp16": int(inputs), form.name: int(narrow)},
    }


def _observe(
    form: Format,
    options: QuantizeOptions,
    timm_name: str,
    fp32: Path,
    images: calibration.CalibrationImages,
    wanted: dict[str, Any],
    on_progress: OnProgress,
) -> Quantized:
    from . import equalize, ranges

    recipe = recipes.for_model(timm_name, precision=form.name)
    method = options.method or recipe.method
    proto = load_model(fp32)
    found = find_layers(proto, form)
    kept = select(found, recipe.keep_fp16)
    reasons = {layer.name: f"recipe {recipe.name}" for layer in found if layer.name in kept}

    def observe(layers: list[Layer], phase: str, count: int) -> dict[str, ranges.Observed]:
        return ranges.observe(
            fp32,
            layers,
            images.batches(stop=count),
            total=count,
            on_progress=_phase(on_progress, phase),
        )

    # With "max", what divided channels were like is known exactly, factors being powers of two; a
    # histogram has to be taken anew, and then a few images will do for the factors.
    twice = bool(recipe.equalize) and ranges.parse_method(method)[0] != "max"
    few = min(len(images), FACTOR_IMAGES) if twice else len(images)
    seen = observe(found, "looking for outliers" if twice else "running images", few)
    factors: dict[str, list[float]] = {}
    if recipe.equalize:
        factors = equalize.factors(proto, found, seen, recipe.equalize, keep_float=kept)
        equalize.apply(proto, found, factors)
        save_model(proto, fp32)
        found = find_layers(proto, form)
        seen = {name: one.divided(factors.get(name)) for name, one in seen.items()}
    if twice:
        seen = observe(found, "running images", len(images))
    chosen = ranges.choose(seen, method, form)
    for layer in found:
        if layer.lacks(chosen):
            reasons[layer.name] = "its input was zero on every calibration image"
    made = Calibration(
        identity=wanted,
        method=method,
        images=images.to_manifest(),
        ranges=chosen,
        keep_fp16=reasons,
        equalization=factors,
    )
    return Quantized(form, made, found, recipe=recipe.name)


def _measure(
    max_drop: float,
    fp32: Path,
    images: calibration.CalibrationImages,
    result: Quantized,
    on_progress: OnProgress,
) -> None:
    """Replaces the recipe's layers by those that measurement keeps in FP16."""
    from . import sensitivity

    made = result.calibration
    without = {layer.name for layer in result.layers if layer.lacks(made.ranges)}
    unknown = {name: why for name, why in made.keep_fp16.items() if name in without}
    choice = sensitivity.choose(
        fp32,
        made.scales,
        images.first(SENSITIVITY_IMAGES),
        result.form,
        max_drop=max_drop,
        keep_float=set(unknown),
        on_progress=_phase(on_progress, "measuring layers"),
    )
    made.keep_fp16.clear()
    made.keep_fp16.update({**unknown, **choice.keep_fp16})
    result.sensitivity = choice.result


def _phase(on_progress: OnProgress, phase: str) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        interrupt.check()
        on_progress(phase, done, total)

    return report
