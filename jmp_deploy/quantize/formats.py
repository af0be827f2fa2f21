"""The number formats that layers are quantized to: their numbers, and scales for them.

INT8: the integers from -127 to 127, evenly spaced; weights with a scale per output channel, as a
channel of small weights would have few levels otherwise. FP8: E4M3 (P. Micikevicius et al., "FP8
formats for deep learning", 2022), four bits of exponent and three of mantissa, up to 448, without
infinity; its numbers lie as close, in proportion, at any size, so one scale per tensor does, and
what is small in attention is not lost.

Every scale is a number that FP16 holds exactly, chosen before the weights are rounded with it. So
the FP32 form of a quantized model and its FP16 form have the same scales and the same numbers, and
accuracy that is measured on one is that of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import CalibrationError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from ..core.manifest import Narrow

FP16_LEAST, FP16_MOST = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Fused:
    """Attentions that TensorRT makes one kernel of when their products have 8 bits.

    Attributes:
        least, most: tokens, of queries and keys each.
        heads: their sizes; empty for any.
        softmax: how the range of the softmax is chosen, as `ranges.parse_method` takes it; None:
            it is 1, which nothing exceeds.
    """

    least: int
    most: int | None = None
    heads: tuple[int, ...] = ()
    softmax: str | None = None

    def takes(self, queries: int, keys: int, head: int) -> bool:
        """Whether one of this size is."""
        fits = self.most is None or max(queries, keys) <= self.most
        return fits and min(queries, keys) >= self.least and (not self.heads or head in self.heads)


@dataclass(frozen=True)
class Format:
    """A number format of 8 bits.

    Attributes:
        name: as `--precision` has it.
        most: the largest number.
        clips_from: the smallest that is rounded to `most` only because nothing larger is there.
        onnx_type: of `onnx.TensorProto`.
        per_channel: weights have a scale for each output channel, not one in all.
        attention: which attentions have both products quantized; None for none of them.
        least_side: products with a shorter side are left alone: the matrix units have nothing to
            gain there.
    """

    name: Narrow
    most: float
    clips_from: float
    onnx_type: int
    per_channel: bool
    attention: Fused | None
    least_side: int

    @property
    def title(self) -> str:
        """ "INT8" """
        return self.name.upper()

    def scale(self, threshold: float) -> float:
        """The scale that maps [-threshold, threshold] to [-most, most], as FP16 holds it.

        Raises:
            CalibrationError: the threshold is not a positive finite number.
        """
        if not (threshold > 0 and np.isfinite(threshold)):
            raise CalibrationError(f"a range of {threshold} cannot be quantized")
        return float(self._as_half(np.array([threshold]))[0])

    def weight_scales(self, weight: NDArray[Any], axis: int) -> NDArray[Any]:
        """Scales of a weight, float32, each exact in FP16: [channels], or [] for one in all.

        A channel of zeros gets the scale 1: any would do, and 0 would divide by zero.

        Args:
            axis: of the output channels.

        Raises:
            CalibrationError: a weight is not finite.
        """
        others = tuple(i for i in range(weight.ndim) if i != axis or not self.per_channel)
        most = np.abs(weight.astype(np.float64)).max(axis=others)
        if not np.isfinite(most).all():
            raise CalibrationError("a weight is not finite", "are the weights sound?")
        return np.where(most > 0, self._as_half(most), 1.0).astype(np.float32)

    def tensor(self, name: str, values: NDArray[Any]) -> onnx.TensorProto:
        """float32 values, already divided by their scale, to the nearest numbers of the format
        (ties to the even one), as ONNX stores them."""
        from onnx import helper

        limited = np.asarray(np.clip(values, -self.most, self.most))
        if self.name == "int8":
            codes = np.rint(limited).astype(np.int8)
        else:
            import torch

            codes = torch.from_numpy(limited).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return helper.make_tensor(name, self.onnx_type, values.shape, codes.tobytes(), raw=True)

    def _as_half(self, thresholds: NDArray[Any]) -> NDArray[Any]:
        """thresholds / most by nearby numbers that FP16 holds exactly; upwards where the nearest
        would clip.

        The nearest one is within 2**-11, which clips the largest value by less than half a step.
        Below FP16's normal numbers that is no longer so, and the next one up is taken.
        """
        wide = np.asarray(thresholds, dtype=np.float64)
        half = np.clip(wide / self.most, FP16_LEAST, FP16_MOST).astype(np.float16)
        clips = half.astype(np.float64) * self.clips_from < wide
        up = np.nextafter(half, np.float16(np.inf))
        return np.where(clips, up, half).astype(np.float64)


# onnx.TensorProto.INT8 and .FLOAT8E4M3FN
INT8 = Format("int8", 127.0, 127.5, 3, per_channel=True, attention=None, least_side=1)
INT8_ATTENTION = replace(
    INT8, attention=Fused(least=2, most=512, heads=(16, 32, 64), softmax="percentile:99.99")
)
"""`--int8-attention`. Sizes: NVIDIA/TensorRT #2981, and what TensorRT-RTX 1.7.1 did (one kernel of
512 tokens and of 3, several of 530, of heads of 48, of one query). Softmax: half of its values are
below the 1/254 that 127 levels up to 1 round to 0; calibration/README.md has the figures."""
FP8 = Format("fp8", 448.0, 464.0, 17, per_channel=False, attention=Fused(least=32), least_side=16)
"""Attention: TensorRT-RTX 1.7.1 makes one kernel of an FP8 attention with a mask from 32 tokens on,
several of one with 31; of FP16 it is one kernel at any size."""
FORMATS: dict[str, Format] = {known.name: known for known in (INT8, FP8)}
