"""The calibration cache: the scales of a model in a readable file, and whose they are.

With it a model is quantized again without images, bit for bit the same with the same versions of
PyTorch and ONNX; ranges belong to layers ("blocks.3.qkv"), not to the exporter's tensor names, so a
cache from one machine serves another with other versions. A cache of another model, other weights,
another schedule or image size is refused with what differs.

The file is JSON: {"format", "identity", "method", "images", "versions", "layers": {name of what is
read: {"amax", "threshold", "scale", "rows", "channels"}}, "keep_fp16": {name: reason},
"equalization": {name: exponents of two, one per input channel}, "sha256"}; the digest is over all
the rest, so that a scale changed by hand is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..core.artifact import refuse_odd_strings, tool_versions
from ..core.errors import CalibrationError
from ..core.files import of_form, read_json, write_json
from ..core.manifest import Calibrated, Meta
from .ranges import Range

if TYPE_CHECKING:
    from .formats import Format
    from .layers import Layer

FORMAT = 1

IDENTITY_WORDS = {
    "model": "model",
    "image_size": "image size",
    "weights": "weights (sha256)",
    "preprocess": "preprocessing",
    "jmp": "schedule and decision",
    "precision": "number format",
    "attention": "attention in 8 bits (--int8-attention)",
    "layers": "layers of the graph (sha256)",
}


@dataclass(frozen=True)
class Calibration:
    """What a quantized model is made with.

    Attributes:
        identity: whose ranges these are (`identity`).
        method: as `ranges.parse_method` takes it.
        images: of `CalibrationImages.to_manifest`.
        ranges: name of what is read (`layers.Read`) -> range.
        keep_fp16: layer name -> why it stays in FP16.
        equalization: layer name -> factor per input channel (`equalize.factors`).
        versions: of the tools that made it.
    """

    identity: dict[str, Any]
    method: str
    images: dict[str, Any]
    ranges: dict[str, Range]
    keep_fp16: dict[str, str] = field(default_factory=dict)
    equalization: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=tool_versions)

    @property
    def scales(self) -> dict[str, float]:
        """Name of what is read -> scale, for `qdq.quantize`."""
        return {name: found.scale for name, found in self.ranges.items()}


def identity(
    *,
    model: str,
    image_size: int,
    weights: str,
    preprocess: Mapping[str, Any],
    jmp: Mapping[str, Any] | None,
    form: Format,
    layers: list[Layer],
) -> dict[str, Any]:
    """What a cache must agree in to be used for a model.

    Args:
        model: timm name.
        image_size: pixels.
        weights: of `models.weights_digest`.
        preprocess: fields of `images.Preprocess`.
        jmp: the manifest's "jmp", or None for a dense model.
        form: the number format that the scales are for.
        layers: of the portable FP32 graph.
    """
    shape = [[layer.name, list(layer.shape), layer.axis] for layer in layers]
    decision = None
    if jmp is not None:
        # what it is called makes no difference to what it computes
        decision = {key: value for key, value in jmp.items() if key != "schedule_name"}
    return _plain(
        {
            "model": model,
            "image_size": image_size,
            "weights": weights,
            "preprocess": dict(preprocess),
            "jmp": decision,
            "precision": form.name,
            "attention": form.attention is not None,
            "layers": hashlib.sha256(json.dumps(shape).encode()).hexdigest(),
        }
    )


@dataclass(frozen=True)
class _File:
    identity: dict[str, Any]
    method: str
    images: Calibrated
    layers: dict[str, Range]
    keep_fp16: dict[str, str]
    equalization: dict[str, Annotated[str, Meta(pattern="^ *(-?[0-9]{1,2}( +|$))*$")]]
    versions: dict[str, str]


def write(path: Path, calibration: Calibration) -> None:
    """Writes a cache, whole or not at all."""
    data = _plain(
        {
            "format": FORMAT,
            "identity": calibration.identity,
            "method": calibration.method,
            "images": calibration.images,
            "versions": calibration.versions,
            "keep_fp16": calibration.keep_fp16,
            "equalization": {
                name: " ".join(f"{math.log2(value):.0f}" for value in values)
                for name, values in calibration.equalization.items()
            },
            "layers": {name: asdict(found) for name, found in calibration.ranges.items()},
        }
    )
    write_json(path, {**data, "sha256": _digest(data)})


def read(path: Path) -> Calibration:
    """Reads a cache; see `check` for whether it is the right one.

    Raises:
        CalibrationError: missing, truncated, changed, or of another format.
    """
    about: dict[str, Any] = {
        "what": "calibration cache",
        "hint": "take a whole copy, or make one with `build ... --calib DIR`",
        "error": CalibrationError,
    }
    data = read_json(path, dict[str, Any], **about)
    if data.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} has format {data.get('format')!r:.20}, this version reads {FORMAT}",
            "calibrate again with --calib DIR",
        )
    claimed = data.pop("sha256", None)
    if claimed != _digest(data):
        raise CalibrationError(
            f"{path} was changed after it was written",
            "scales that were edited by hand are not what was measured: calibrate again",
        )
    found = of_form(data, _File, path, **about)
    refuse_odd_strings(data, path)
    # keys that are missing are of what there was no choice in yet
    precision = found.identity.setdefault("precision", "int8")
    found.identity.setdefault("attention", precision == "fp8")
    return Calibration(
        identity=found.identity,
        method=found.method,
        images=data["images"],
        ranges=found.layers,
        keep_fp16=found.keep_fp16,
        equalization={
            name: [2.0 ** int(exponent) for exponent in text.split()]
            for name, text in found.equalization.items()
        },
        versions=found.versions,
    )


def check(path: Path, calibration: Calibration, wanted: Mapping[str, Any]) -> None:
    """Refuses a cache of another model.

    Args:
        path: for the message.
        wanted: `identity` of the model that is being built.

    Raises:
        CalibrationError: with every field that differs, as found and as expected.
    """
    found = calibration.identity
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if not differing:
        return
    lines = [
        f"{IDENTITY_WORDS.get(key, key)}: {_differences(found.get(key), wanted[key])}"
        for key in differing
    ]
    raise CalibrationError(
        f"{path} is the cache of another model; " + "; ".join(lines),
        "name the cache of this one, or calibrate with --calib DIR",
    )


def _differences(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in wanted if found.get(key) != wanted[key]]
        return ", ".join(
            f"{key} {_short(found.get(key))}, not {_short(wanted[key])}" for key in keys
        )
    return f"{_short(found)}, not {_short(wanted)}"


def _short(value: Any) -> str:
    if value is None:
        return "none (dense)"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and not text.strip("0123456789abcdef"):
        return text[:12] + "..."
    return text if len(text) <= 100 else text[:97] + "..."


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists, so that what was read equals what was made."""
    return json.loads(json.dumps(data, allow_nan=False))
