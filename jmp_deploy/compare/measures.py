"""How far two outputs are from each other, and how far they may be. Arithmetic only: numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.outputs import output_named

if TYPE_CHECKING:
    from numpy.typing import NDArray

TINY = float(np.finfo(np.float64).tiny)


class Tolerance(NamedTuple):
    """How far a backend of one precision may be from the reference.

    cosine: smallest cosine of an output, for the median image; where no tokens are reduced, for
        every image.
    worst: smallest for every image where tokens are reduced: one token that changes places in a
        near tie moves an image's output by more than rounding does, in any precision (FP16, DINOv2
        ViT-S, 48 crops of photos: median above 0.9999, smallest 0.9988).
    near_tie: how far rounding may move the rating by which a reduction chooses, over the
        interquartile range of an image's ratings. Largest seen without a change of order: 0.016 in
        FP16 (DINOv2 ViT-S, 24 crops of photos, nine reductions); INT8's and FP8's are estimates.
    floor: largest difference that is within tolerance whatever the cosine says. Where an output is
        all but zero (the logits of untrained weights) rounding turns it any way it likes. It is
        half of what a number just above 1 is rounded by, coarsely 16 of them in FP32: a logit that
        is off by that moves no probability by more than 0.05 % of itself in FP16.
    source: where the cosine comes from.
    scatters: single images are so far off in a dense model too that `worst` holds for them.
    """

    cosine: float
    worst: float
    near_tie: float
    floor: float
    source: str
    scatters: bool = False

    def least(self, *, near_ties: bool) -> float:
        """The smallest cosine that any image may have."""
        return self.worst if near_ties or self.scatters else self.cosine


TABLE = {
    "fp32": Tolerance(
        0.99999,
        0.99,
        1e-3,
        2.0**-20,
        "rounding of another order of summation (24 bits of mantissa); between PyTorch and ONNX "
        "Runtime outputs differ by some 1e-6 (DeiT-S)",
    ),
    "fp16": Tolerance(
        0.999,
        0.99,
        0.03,
        2.0**-11,
        "11 bits of mantissa through 12 blocks give 0.9999 and better (DINOv2 ViT-S, photos); the "
        "rest is for near ties that fall the other way, so that another token is kept",
    ),
    "bf16": Tolerance(
        0.99,
        0.95,
        0.25,
        2.0**-8,
        "8 bits of mantissa: eight times the rounding of FP16 in every tensor",
    ),
    "int8": Tolerance(
        0.99,
        0.95,
        0.5,
        2.0**-8,
        "127 levels for a tensor cannot give what FP16 does; a cosine of 0.99 is a signal-to-noise "
        "ratio of 17 dB, which sound scales keep (0.997 on DINOv2 ViT-S with JMP) and attention "
        "quantized at fixed scales does not (17.5 dB; calibration/README.md)",
    ),
    "fp8": Tolerance(
        0.98,
        0.9,
        0.5,
        2.0**-8,
        "4 bits of significand in every product's inputs, attention's too: on DINOv2 ViT-S 0.995 "
        "on average, of 100 crops of photos 0.941 for the farthest (calibration/README.md)",
        scatters=True,
    ),
}
"""The one table of tolerances."""


def coarser(*precisions: str) -> str:
    """The precision whose tolerances hold between two: the one of fewer bits."""
    return max(precisions, key=[*TABLE].index)


TOLERANCES = {name: row.cosine for name, row in TABLE.items()}
"""Its column of cosines: what `build` and `compare` hold outputs against."""


@dataclass(frozen=True)
class Pair:
    """How far output `output` of backend b is from that of a, over all images.

    Attributes:
        precision: the coarser of what a and b compute with; its tolerances hold.
        cosine, cosine_mean, cosine_median: smallest over the images, and their mean and median.
        max_abs, mean_abs: of the differences' magnitudes.
        max_rel: max_abs over a's largest magnitude.
        top1_agreement: share of images with the same top class; None for features.
        top5_agreement: of the five top classes of an image, the share that both name.
        kl_mean, kl_max: Kullback-Leibler divergence of b's softmax from a's, in nats.
        worst: index of the image with the smallest cosine.
        not_finite: {backend: {"nan": values, "inf": values, "images": indices}}, where any are.
        problems: why the pair is outside, in words; empty where it is not.
    """

    a: str
    b: str
    output: str
    precision: str
    cosine: float
    cosine_mean: float
    max_abs: float
    max_rel: float
    top1_agreement: float | None
    ok: bool
    cosine_median: float = 0.0
    mean_abs: float = math.inf
    top5_agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    worst: int | None = None
    not_finite: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def measure(
    a: str,
    b: str,
    output: str,
    ours: NDArray[Any],
    theirs: NDArray[Any],
    precision: str,
    *,
    min_cosine: float | None = None,
    max_abs: float | None = None,
    near_ties: bool = True,
) -> Pair:
    """Compares two outputs of shape [B, ...], in float64; probabilities as the logits that they
    were (`outputs.Probabilities.judged`).

    Args:
        precision: which row of the tolerances holds.
        min_cosine: smallest cosine for every image, in its place; the floor does not hold then.
        max_abs: largest difference allowed; None allows any that the cosine allows.
        near_ties: tokens are reduced, so that near ties are to be expected.
    """
    x, y = (np.asarray(value, dtype=np.float64) for value in (ours, theirs))
    if x.shape != y.shape:
        return _hopeless(
            a, b, output, precision, f"{a} gives {list(x.shape)}, {b} gives {list(y.shape)}"
        )
    shape = x.shape
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    broken = {name: _not_finite(v) for name, v in ((a, x), (b, y)) if not np.isfinite(v).all()}
    if broken:
        words = [_say_not_finite(name, output, counts) for name, counts in broken.items()]
        return _hopeless(a, b, output, precision, *words, not_finite=broken)
    kind = output_named(output)
    x, y = kind.judged(x), kind.judged(y)
    cosine = _median_patch(x, y, shape) if near_ties and len(shape) == 3 else cosines(x, y)
    difference = np.abs(x - y)
    largest = float(difference.max())
    problems = []
    usual = TOLERANCES[precision] if min_cosine is None else min_cosine
    least = TABLE[precision].least(near_ties=near_ties) if min_cosine is None else usual
    median = float(np.median(cosine))
    all_but_equal = min_cosine is None and largest <= TABLE[precision].floor
    if median < usual and not all_but_equal:
        problems.append(f"cosine of the median image, {median:.6f}, is below {usual:g}")
    if cosine.min() < least and not all_but_equal:
        problems.append(f"smallest cosine, {cosine.min():.6f}, is below {least:g}")
    if max_abs is not None and largest > max_abs:
        problems.append(f"largest difference {largest:.3g} is above {max_abs:g}")
    return Pair(
        a=a,
        b=b,
        output=output,
        precision=precision,
        cosine=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        cosine_median=median,
        max_abs=largest,
        mean_abs=float(difference.mean()),
        max_rel=largest / max(float(np.abs(x).max()), TINY),
        worst=int(np.argmin(cosine)),
        ok=not problems,
        problems=tuple(problems),
        **kind.differences(x, y),
    )


def _median_patch(x: NDArray[Any], y: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Of features of patches [B, M, C], each image's cosine is that of its median patch: a near tie
    moves some patches to another token, and those alone."""
    rows = (-1, shape[2])
    return np.asarray(
        np.median(cosines(x.reshape(rows), y.reshape(rows)).reshape(shape[:2]), axis=1)
    )


def cosines(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Cosine of rows: [..., D] and [..., D] to [...]; 1 where both are zero, 0 where one is."""
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    both_zero = ~x.any(axis=-1) & ~y.any(axis=-1)
    return np.where(both_zero, 1.0, (x * y).sum(axis=-1) / np.maximum(norms, TINY))


def relative(difference: NDArray[Any], of: NDArray[Any]) -> float:
    """Norm of a difference over the norm of what it is a difference of."""
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(of)), TINY))


def _not_finite(values: NDArray[Any]) -> dict[str, Any]:
    nan, inf = np.isnan(values), np.isinf(values)
    images = np.flatnonzero((nan | inf).any(axis=1))
    return {"nan": int(nan.sum()), "inf": int(inf.sum()), "images": [int(i) for i in images]}


def _say_not_finite(backend: str, output: str, counts: dict[str, Any]) -> str:
    what = " and ".join(
        f"{counts[key]} {word}" for key, word in (("nan", "NaN"), ("inf", "inf")) if counts[key]
    )
    return f"{output} of {backend} holds {what}, in {len(counts['images'])} images"


def _hopeless(a: str, b: str, output: str, precision: str, *problems: str, **more: Any) -> Pair:
    figures = (0.0, 0.0, math.inf, math.inf, None)
    return Pair(a, b, output, precision, *figures, ok=False, problems=problems, **more)
