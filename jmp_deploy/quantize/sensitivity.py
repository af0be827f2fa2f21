"""`--max-drop`: which layers stay in FP16 so that the others cost no more than so many points.

Each kind of layer, each block, and then single layers are quantized alone and held against the
unquantized model; noise of different layers adds up, nearly, so the layers with the most noise for
the fewest multiply-adds are the ones to keep. How many of them, models decide that are measured
whole, on all images: the fewest that hold the budget.

Needs no GPU: ONNX Runtime runs the layers in FP32 with the scales and numbers of the INT8 or FP8
model.
And no labels: what a changed output costs, in points of accuracy, is estimated.

Two estimates, by what the model gives:

*Logits.* The change of an image's logits is taken for noise: its size is the root mean square, over
the classes, of how far their distance to the best class moved, and the chance that a class
overtakes the best one is that of a normal deviate larger than the margin. (Counting flips outright
would resolve 1.6 points with 64 images.) The flips in percent bound the loss from above, but most
of them are between classes that the model can hardly tell apart, of which it is right about one as
often as about the other. So the loss is what the model itself thinks of it: the confidence that it
has in the class that it leaves, less that in the one that it takes. Models that were trained with
mixed or smoothed labels have less confidence than they deserve; where its mean is below
`LEAST_CONFIDENCE`, the logits are scaled up until it is not. (Too much confidence makes the
estimate too large, which costs speed; too little would break the promise.)

*Features.* There is no classifier to ask, so the loss follows from the relative noise
r = |change| / |features less their mean over the images|, as `POINTS_PER_NOISE * r**2`. A linear
law in r**2: flips grow with r, and what each costs does as well. The constant is measured, see
calibration/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import CalibrationError
from .formats import INT8, Format

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .gated import Gated
    from .layers import Layer

LEAST_IMAGES = 8
SCREEN_IMAGES = 12
"""For the ranking; what is kept is decided on all."""
NEGLIGIBLE = 0.1
"""Layers that, all together, have at most this share of the noise are not measured one by one."""

POINTS_PER_NOISE = 60.0
LEAST_CONFIDENCE = 0.8
"""About the accuracy of the ImageNet models that are deployed."""
MOST_SCALE = 20.0
"""As a power of two."""
SHRINKAGE = 4
"""Classes' worth of weight that the noise of the average image has in that of each."""

OnProgress = Callable[[int, int], None]
"""(forward passes done, passes in all as far as is known)"""


@dataclass(frozen=True)
class Drop:
    """What a change of the outputs costs.

    Attributes:
        points: estimated loss of accuracy, in percent.
        noise: relative noise, squared: mean square of the change over that of what tells images
            apart. Layers that are quantized together add up in it, nearly.
        flips: estimated share of images whose best class changes, percent; None without classes.
    """

    points: float
    noise: float
    flips: float | None = None


@dataclass(frozen=True)
class Choice:
    """What to leave in FP16.

    Attributes:
        keep_fp16: layer name -> why.
        drop: estimated loss of the rest, quantized, in points.
        result: for the manifest, see `choose`.
    """

    keep_fp16: dict[str, str]
    drop: float
    result: dict[str, Any]


def choose(
    model: Path,
    scales: Mapping[str, float],
    images: NDArray[np.float32],
    form: Format = INT8,
    *,
    max_drop: float,
    keep_float: Collection[str] = (),
    on_progress: OnProgress = lambda done, total: None,
) -> Choice:
    """Measures layers and keeps the worst in floating point until the drop is inside `max_drop`.

    Args:
        model: portable FP32 ONNX.
        scales, form: as for `qdq.quantize`.
        images: [n, 3, H, W], prepared calibration images.
        max_drop: points.
        keep_float: words (`layers.select`) for layers that stay in floating point in any case.

    Returns:
        The choice. Its `result` has "budget" and "drop" in points, "flips" in percent or None,
        "macs_share" (of the gated layers' MACs, quantized), "precision", "all_quantized" (every
        layer), and lists of rows: "groups"
        (kinds and blocks, each alone), "ranking" (single layers, the first to keep first) and
        "tried" (whole models). A row's "noise" is squared and relative, see `Drop`.

    Raises:
        CalibrationError: too few images, outputs that are not finite or the same for all images,
            or a budget that holds only with every layer in FP16.
    """
    if len(images) < LEAST_IMAGES:
        raise CalibrationError(
            f"--max-drop needs at least {LEAST_IMAGES} images to measure on, not {len(images)}",
            "put more images into the folder of --calib; 64 are used",
        )
    from . import ranges
    from .gated import Gated

    gated = Gated(model, scales, form, keep_float=keep_float)
    if not gated.layers:
        raise CalibrationError("no layer is left to quantize: none has a range")
    seen = ranges.observe(model, gated.layers, [images[:1]])
    macs = {
        layer.name: seen[layer.reads[0].name].rows * layer.macs_per_row for layer in gated.layers
    }
    bench = _Bench(gated, images, on_progress)
    whole = bench.drop(macs)
    groups = _groups(bench, gated.layers)
    needs_layers = whole.points > max_drop
    ranking = _ranking(bench, gated.layers, groups, macs, single=needs_layers)
    kept: list[str] = []
    tried = [{"kept": 0, **asdict(whole)}]
    final = whole
    if needs_layers:
        count, final = _fewest(bench, ranking, whole, max_drop, tried)
        kept = [row["name"] for row in ranking[:count]]
    bench.finish()
    for row in ranking:
        row["kept"] = row["name"] in kept
    result = {
        "budget": max_drop,
        "drop": final.points,
        "flips": final.flips,
        "noise": final.noise,
        "measure": _measure(gated.classifies),
        "images": len(images),
        "screened_on": bench.few,
        "macs_share": 1 - sum(macs[name] for name in kept) / sum(macs.values()),
        "precision": form.name,
        "all_quantized": asdict(whole),
        "groups": groups,
        "ranking": ranking,
        "tried": tried,
    }
    return Choice(_reasons(ranking), final.points, result)


def estimate(reference: NDArray[Any], changed: NDArray[Any], *, classifies: bool) -> Drop:
    """The cost of `changed` in place of `reference`.

    Args:
        reference: [n, C], outputs of the model as it was, for n >= 2 different images.
        changed: [n, C], of the changed model for the same images.
        classifies: outputs are logits.
    """
    before, after = reference.astype(np.float64), changed.astype(np.float64)
    spread = np.square(before - before.mean(axis=0)).sum()
    noise = float(np.square(after - before).sum() / max(spread, np.finfo(np.float64).tiny))
    if not classifies or before.shape[1] < 2:
        return Drop(POINTS_PER_NOISE * noise, noise)
    flips, loss = _flips(before, after)
    return Drop(float(100 * loss.mean()), noise, float(100 * flips.mean()))


def summary(result: dict[str, Any]) -> str:
    """What `choose` came to, in one sentence; `result` is that of a `Choice`."""
    kept = sum(row["kept"] for row in result["ranking"])
    title = result["precision"].upper()
    flips = "" if result["flips"] is None else f", {result['flips']:.2g} % of answers change"
    return (
        f"estimated drop {result['drop']:.2g} points of {result['budget']:g} allowed{flips}: "
        f"{kept} of {len(result['ranking'])} layers stay in FP16 "
        f"({result['macs_share']:.0%} of their MACs in {title}); "
        f"all in {title}: {result['all_quantized']['points']:.2g} points"
    )


class _Bench:
    """Runs sets of layers, and counts for the progress bar."""

    def __init__(self, gated: Gated, images: NDArray[np.float32], on_progress: OnProgress) -> None:
        self.gated, self.images, self.on_progress = gated, images, on_progress
        self.title = gated.form.title
        self.few = min(SCREEN_IMAGES, len(images))
        kinds = len({layer.kind for layer in gated.layers})
        blocks = len({layer.block for layer in gated.layers} - {None})
        alone = kinds + blocks + len(gated.layers)
        self.done = 0
        self.total = self.few * alone + len(images) * (2 + max(1, len(gated.layers).bit_length()))
        on_progress(0, self.total)
        self.reference = self._run((), len(images))
        if np.ptp(self.reference[: self.few], axis=0).max() == 0:
            raise CalibrationError(
                "the model gives the same output for every calibration image: nothing can be "
                "told from it",
                "are the weights sound, and the images different?",
            )

    def drop(self, names: Collection[str], *, screen: bool = False) -> Drop:
        """What these layers cost, the others unquantized."""
        count = self.few if screen else len(self.images)
        outputs = self._run(names, count)
        return estimate(self.reference[:count], outputs, classifies=self.gated.classifies)

    def finish(self) -> None:
        """What was not needed is done too."""
        self.on_progress(self.total, self.total)

    def _run(self, names: Collection[str], count: int) -> NDArray[Any]:
        outputs = self.gated.run(names, self.images[:count])
        if not np.isfinite(outputs).all():
            what = "with quantized layers " if names else ""
            raise CalibrationError(
                f"the model's outputs {what}are not finite on the calibration images",
                "are the weights sound? `build --precision fp32` and `compare` show more",
            )
        self.done += count
        self.on_progress(min(self.done, self.total - 1), self.total)
        return outputs


def _groups(bench: _Bench, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """A row for each kind of layer and each block, quantized alone."""
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(layer.kind, []).append(layer.name)
    for layer in layers:
        if layer.block is not None:
            members.setdefault(f"blocks.{layer.block}", []).append(layer.name)
    return [
        {"name": name, "layers": len(names), **asdict(bench.drop(names, screen=True))}
        for name, names in members.items()
    ]


def _ranking(
    bench: _Bench,
    layers: Sequence[Layer],
    groups: Sequence[dict[str, Any]],
    macs: Mapping[str, float],
    *,
    single: bool,
) -> list[dict[str, Any]]:
    """A row for each layer, most noise per multiply-add first.

    A layer has no more noise than its kind and its block. Where that is negligible, or the ranking
    will not be used (`single` is False), it is taken for the layer's own.
    """
    group = {row["name"]: row for row in groups}
    whole = sum(row["noise"] for row in groups if not row["name"].startswith("blocks."))
    worth = NEGLIGIBLE * whole / len(layers)
    rows = []
    for layer in layers:
        above = [group[layer.kind]]
        if layer.block is not None:
            above.append(group[f"blocks.{layer.block}"])
        bound = min(above, key=lambda row: (row["noise"], row["layers"]))
        alone = bound["layers"] == 1
        cost = {key: bound[key] for key in ("points", "noise", "flips")}
        if single and not alone and bound["noise"] > worth:
            cost, alone = asdict(bench.drop((layer.name,), screen=True)), True
        share = macs[layer.name] / sum(macs.values())
        rows.append({"name": layer.name, **cost, "measured": alone, "macs_share": share})
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["noise"] / rows[i]["macs_share"])
    return [rows[i] for i in order]


def _fewest(
    bench: _Bench,
    ranking: Sequence[dict[str, Any]],
    whole: Drop,
    max_drop: float,
    tried: list[dict[str, Any]],
) -> tuple[int, Drop]:
    """How many layers of the ranking's head must be kept, by bisection over whole models.

    The first guesses are where the noise that is left, in proportion to what was measured last,
    would hold the budget.
    """
    noise = np.array([row["noise"] for row in ranking])
    left = np.append(np.cumsum(noise[::-1])[::-1], 0.0)  # [k] of the layers from k on
    names = [row["name"] for row in ranking]
    fails, holds = 0, len(names)
    found, last, at = Drop(0.0, 0.0), whole, 0
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if len(tried) <= 2 and np.isfinite(last.points) and left[at] > 0:
            fits = left * (last.points / left[at]) <= max_drop
            middle = int(np.clip(fits.argmax(), fails + 1, holds - 1))
        last, at = bench.drop(names[middle:]), middle
        tried.append({"kept": middle, **asdict(last)})
        if last.points <= max_drop:
            holds, found = middle, last
        else:
            fails = middle
    if holds == len(names):
        raise CalibrationError(
            f"no layer can be in {bench.title} within {max_drop:g} points: with only "
            f"{names[-1]} it is {last.points:.2g}",
            f"all in {bench.title} are estimated to cost {whole.points:.2g}; allow more with "
            "--max-drop, calibrate with more images, or build --precision fp16",
        )
    return holds, found


def _reasons(ranking: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {
        row["name"]: f"sensitivity: {row['points']:.2g} points alone, rank {rank} of {len(ranking)}"
        for rank, row in enumerate(ranking, 1)
        if row["kept"]
    }


def _measure(classifies: bool) -> str:
    """What "points" are, in words."""
    if classifies:
        return "expected loss of top-1 accuracy, by the model's own confidence; no labels"
    return f"{POINTS_PER_NOISE:g} times the squared relative noise of the features; no labels"


def _flips(before: NDArray[Any], after: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Per image: the chance that its best class changes, and the loss of expected accuracy."""
    rows = np.arange(len(before))
    best = before.argmax(axis=1)
    margin = before[rows, best][:, None] - before
    moved = after - before
    moved = moved[rows, best][:, None] - moved
    others = before.shape[1] - 1
    energy = np.square(moved).sum(axis=1)
    # An image of few classes says little of its own noise: the average image is asked too.
    energy = (energy + SHRINKAGE * energy.mean() / others) / (others + SHRINKAGE)
    noise = np.sqrt(energy)[:, None]
    far = np.divide(margin, noise, out=np.full_like(margin, np.inf), where=noise > 0)
    overtakes = _upper_tail(far)
    overtakes[rows, best] = 0.0
    flips = 1 - np.prod(1 - overtakes, axis=1)
    confidence = _confidence(margin)
    share = overtakes / np.maximum(overtakes.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    taken = (share * confidence).sum(axis=1)
    return flips, flips * (confidence[rows, best] - taken)


def _confidence(margin: NDArray[Any]) -> NDArray[Any]:
    """Softmax over the classes [n, C] by their distance to the best, scaled if it is too flat."""

    def softmax(power: float) -> NDArray[Any]:
        values = np.exp(-margin * 2.0**power)
        return values / values.sum(axis=1, keepdims=True)

    low, high = 0.0, MOST_SCALE
    if softmax(low).max(axis=1).mean() >= LEAST_CONFIDENCE:
        return softmax(low)
    for _ in range(40):
        middle = (low + high) / 2
        flat = softmax(middle).max(axis=1).mean() < LEAST_CONFIDENCE
        low, high = (middle, high) if flat else (low, middle)
    return softmax(high)


def _upper_tail(values: NDArray[Any]) -> NDArray[Any]:
    """Chance that a standard normal deviate is larger."""
    return np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in values.ravel()]).reshape(
        values.shape
    )
