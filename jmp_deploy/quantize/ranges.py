"""Calibration: the ranges that quantized activations need, observed on images and chosen by a
method.

ONNX Runtime runs the FP32 model; what is kept of each tensor that a layer reads is its largest
magnitude, in all and per channel, and a histogram of magnitudes. Nothing else stays in memory,
however many images come.

Why not ONNX Runtime's own calibrators (1.32): their entropy method has 128 bins and as many levels,
so its only candidate is the largest magnitude; the histogram methods observe every tensor of the
graph, the attention matrices included, and keep a chunk of them in memory. `calibration/README.md`
has the measurement.

Methods (`--calib-method`):
    max             the largest magnitude seen; clips nothing
    percentile:P    the magnitude below which P % of the values lie (99.999)
    entropy         the threshold whose 8-bit histogram is nearest to the true one in the sense of
                    Kullback and Leibler, as TensorRT's calibrator did (S. Migacz, "8-bit inference
                    with TensorRT", GTC 2017); for INT8 alone, whose levels are even
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from ..core import ort
from ..core.errors import CalibrationError
from ..core.manifest import Count, Meta
from ..export.graph import load_model, temporary_file
from .formats import INT8, Format
from .layers import Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

Magnitude = Annotated[float, Meta(ge=0, le=1e38)]
METHODS = ("max", "percentile", "entropy")
PERCENTILE = 99.999
BINS = 8192
"""Of a histogram over [0, a power of two]: at least half of them hold values."""
LEVELS = 128

OnProgress = Callable[[int, int], None]
"""(images done, images in all)"""


@dataclass
class Observed:
    """What a tensor that a layer reads was like on all calibration images.

    Attributes:
        amax: largest magnitude.
        channel_amax: [C] float64, the same per channel (last axis; axis 1 for a convolution).
        rows: tokens per image that the layer works on (patches, for the patch embedding; in
            attention, those of each head).
        histogram: [BINS] int64, counts of magnitudes in equal bins over [0, limit].
        limit: upper end of the histogram, a power of two.
    """

    amax: float = 0.0
    channel_amax: NDArray[Any] = field(default_factory=lambda: np.zeros(0))
    rows: float = 0.0
    histogram: NDArray[Any] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    limit: float = 0.0

    def add(self, values: NDArray[Any], channel_axis: int) -> None:
        """Takes in one batch's tensor."""
        size = np.abs(values)
        others = tuple(i for i in range(size.ndim) if i != channel_axis % size.ndim)
        channels = size.max(axis=others).astype(np.float64)
        amax = float(np.max(channels))
        if not math.isfinite(amax):
            self.amax = math.nan
            return
        self.amax = max(self.amax, amax)
        same = channels.shape == self.channel_amax.shape
        self.channel_amax = np.maximum(self.channel_amax, channels) if same else channels
        if amax == 0.0:
            self.histogram[0] += size.size
            return
        self._widen(2.0 ** math.ceil(math.log2(amax)))
        # A power of two over a power of two: the product is exact, so bins do not depend on the
        # order of the batches.
        bins = (size.ravel() * np.float32(BINS / self.limit)).astype(np.int32)
        counts = np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)
        self.histogram += counts

    def divided(self, factors: Sequence[float] | None) -> Observed:
        """The same had each channel been divided by its factor, a power of two.

        The histogram does not tell channels apart and is left out: good for method "max" alone.
        """
        if factors is None:
            return self
        channels = self.channel_amax / np.asarray(factors)
        return Observed(amax=float(channels.max()), channel_amax=channels, rows=self.rows)

    def _widen(self, limit: float) -> None:
        if self.limit == 0.0:
            self.limit = limit
        while self.limit < limit:
            halved = self.histogram.reshape(-1, 2).sum(axis=1)
            self.histogram = np.concatenate([halved, np.zeros_like(halved)])
            self.limit *= 2


@dataclass(frozen=True)
class Range:
    """The range of one tensor.

    Attributes:
        amax: largest magnitude seen.
        threshold: magnitude that becomes the format's largest number; larger ones are clipped.
        scale: threshold over that number as FP16 holds it: what is written into the model.
        rows: see `Observed`.
        channels: of the input.
    """

    amax: Magnitude
    threshold: Magnitude
    scale: Annotated[float, Meta(gt=0, le=65504)]
    rows: Magnitude
    channels: Count


def parse_method(text: str) -> tuple[str, float | None]:
    """ "max", "entropy", "percentile" or "percentile:99.99" -> (method, percentile or None).

    Raises:
        CalibrationError: none of them.
    """
    name, _, number = text.partition(":")
    if text in METHODS:
        return name, PERCENTILE if name == "percentile" else None
    try:
        percentile = float(number)
    except ValueError:
        percentile = math.nan
    if name == "percentile" and 50 < percentile <= 100:
        return name, percentile
    raise CalibrationError(
        f"unknown calibration method {text!r}",
        "use max, entropy, percentile, or percentile:99.99 for another percentage above 50",
    )


def observe(
    model: Path,
    layers: Sequence[Layer],
    batches: Iterable[NDArray[np.float32]],
    *,
    total: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Observed]:
    """Runs a portable FP32 model and observes what its layers read.

    Args:
        model: portable FP32 ONNX.
        layers: of this model (`layers.find_layers`).
        batches: [B, 3, H, W] float32, preprocessed.
        total: images in all, for on_progress.

    Returns:
        Name of what is read -> what it was like. Of what is known without looking there is nothing.

    Raises:
        CalibrationError: no images, or values that are not finite.
    """
    reads = [(read, layer) for layer in layers for read in layer.reads if read.most is None]
    first: dict[str, Layer] = {}  # of those that read a tensor
    for read, layer in reads:
        first.setdefault(read.tensor, layer)
    seen = {tensor: Observed() for tensor in first}
    session, image_input = _session(model, first)
    names = [name for name in first if name != image_input]
    done = 0
    for batch in batches:
        values = dict(zip(names, session.run(names, {image_input: batch}), strict=True))
        values[image_input] = batch
        for tensor, layer in first.items():
            seen[tensor].add(values[tensor], 1 if len(layer.shape) == 4 else -1)
            seen[tensor].rows = _rows(values[tensor], layer)
        done += len(batch)
        on_progress(done, max(total, done))
    if not done:
        raise CalibrationError("no images to calibrate with")
    for tensor, layer in first.items():
        if not math.isfinite(seen[tensor].amax):
            raise CalibrationError(
                f"the input of {layer.name} is not finite on the calibration images",
                "are the weights sound? `build --precision fp32` and `compare` show more",
            )
    return {read.name: seen[read.tensor] for read, _ in reads}


def choose(observed: dict[str, Observed], method: str, form: Format = INT8) -> dict[str, Range]:
    """Turns observations into ranges.

    Args:
        observed: of `observe`.
        method: as `parse_method` takes it; a softmax has the format's own.
        form: the number format that the scales are for.

    Returns:
        Name of what is read -> range. What was zero throughout has none: nothing is known of it,
        so its layer stays in FP16.
    """
    ranges = {}
    for read, seen in observed.items():
        if seen.amax == 0.0:
            continue
        own = form.attention.softmax if form.attention and read.endswith(".softmax") else None
        name, percentile = parse_method(own or method)
        limit = seen.amax
        if name == "percentile":
            limit = _percentile(seen, percentile or PERCENTILE)
        elif name == "entropy":
            limit = _entropy(seen)
        threshold = min(limit, seen.amax)
        ranges[read] = Range(
            amax=seen.amax,
            threshold=threshold,
            scale=form.scale(threshold),
            rows=seen.rows,
            channels=len(seen.channel_amax),
        )
    return ranges


def _percentile(seen: Observed, percentile: float) -> float:
    """Upper edge of the bin in which the percentile lies."""
    below = np.cumsum(seen.histogram)
    index = int(np.searchsorted(below, percentile / 100 * below[-1]))
    return (index + 1) * seen.limit / BINS


def _entropy(seen: Observed) -> float:
    """The threshold of least divergence.

    For each candidate the histogram P up to it, all beyond put into its last bin, is compared with
    Q, the same histogram without what lies beyond, in LEVELS equal levels, each spread over those
    of its bins that hold anything. Bins where Q has nothing take a small share of it, as P would
    be infinitely far otherwise.
    """
    # 2048 bins over what was seen, as TensorRT's had; finer ones only take longer
    used = max(1, math.ceil(seen.amax * BINS / seen.limit))
    width = max(1, used // (16 * LEVELS))
    padded = np.zeros(-(-used // width) * width)
    padded[:used] = seen.histogram[:used]
    counts = padded.reshape(-1, width).sum(axis=1)
    if len(counts) <= LEVELS:
        return seen.amax
    counts[0] = counts[1]  # exact zeros, of which GELU and padding make many, are free in INT8
    beyond = counts.sum() - np.cumsum(counts)
    best, best_divergence = len(counts), math.inf
    for stop in [*range(LEVELS, len(counts), LEVELS // 16), len(counts)]:
        kept = counts[:stop]
        p = kept.copy()
        p[-1] += beyond[stop - 1]
        starts = np.arange(LEVELS) * stop // LEVELS
        sums = np.add.reduceat(kept, starts)
        filled = np.add.reduceat((p > 0).astype(np.float64), starts)
        lengths = np.diff([*starts, stop])
        q = np.repeat(sums / np.maximum(filled, 1), lengths) * (p > 0)
        divergence = _divergence(p, q)
        if divergence < best_divergence:
            best, best_divergence = stop, divergence
    return best * width * seen.limit / BINS


def _divergence(p: NDArray[Any], q: NDArray[Any], floor: float = 1e-4) -> float:
    if p.sum() == 0 or q.sum() == 0:
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    held = p > 0
    q = np.maximum(q[held], floor / len(p))
    return float((p[held] * np.log(p[held] / q)).sum())


def _rows(values: NDArray[Any], layer: Layer) -> float:
    """Rows of the layer's matrix product per image."""
    if len(layer.shape) == 4:
        area = layer.shape[2] * layer.shape[3]
        return values.shape[2] * values.shape[3] / area
    return float(np.prod(values.shape[1:-1])) if values.ndim > 2 else 1.0


def _session(model: Path, tensors: Iterable[str]) -> tuple[Any, str]:
    """A session that gives these tensors as well, and the name of its input."""
    import onnx

    proto = load_model(model)
    image_input = proto.graph.input[0].name
    del proto.graph.output[:]
    for name in tensors:
        if name != image_input:
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            proto.graph.output.append(value)
    with temporary_file(proto) as path:
        del proto
        return ort.session(path, keep_memory=False), image_input
