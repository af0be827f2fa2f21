"""TensorRT versions that are known to compute a vision transformer's attention wrongly.

Such a fault is silent: the build succeeds, the ONNX is right, the engine's answers are not. What
was reported, by whom and for which versions stands in the threads; nobody here has reproduced it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

ALL = frozenset({"fp32", "fp16", "bf16", "int8", "fp8"})
REDUCED = ALL - {"fp32"}
"""INT8 and FP8 too: an attention that is not quantized is FP16, and the threads say nothing of the
others."""


@dataclass(frozen=True)
class Fault:
    """A fault of TensorRT (not of TensorRT-RTX, of which none is known).

    Attributes:
        first, last: versions that have it, both included, as far as they are written out: a last
            of (10, 4) includes 10.4.0.26.
        what: went wrong, in words.
        threads: where it was reported.
        targets: architectures, such as "sm_120"; empty for all.
        precisions: of engines that are affected.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    what: str
    threads: tuple[str, ...]
    targets: frozenset[str] = frozenset()
    precisions: frozenset[str] = REDUCED

    def affects(self, version: str, targets: Collection[str] = (), precision: str = "fp16") -> bool:
        """Whether an engine may have it.

        Args:
            version: of TensorRT, as "10.3.0.30".
            targets: architectures that it is for; none are taken for any.
        """
        found = tuple(map(int, re.findall(r"\d+", version)))
        return (
            self.first <= found
            and found[: len(self.last)] <= self.last
            and precision in self.precisions
            and (not self.targets or not targets or not self.targets.isdisjoint(targets))
        )


FAULTS = (
    Fault(
        (10, 3),
        (10, 4),
        "transformers give wrong results or NaN, in FP16 above all; right in 10.5 to 10.8",
        (
            "NVIDIA/TensorRT#4723",
            "NVIDIA/TensorRT#4419",
            "Intellindust-AI-Lab/DEIMv2#112",
            "ika-rwth-aachen/ros2-depth-anything-v3-trt#16",
        ),
    ),
    Fault(
        (10, 4),
        (10, 4),
        "a DINOv3 ViT-B is wrong in FP32 too (cosine 0.018)",
        ("NVIDIA/TensorRT#4742",),
        precisions=frozenset({"fp32"}),
    ),
    Fault(
        (10,),
        (10, 16, 1),
        "fused attention of SAM 3 is wrong in FP16 and BF16 on sm_120, right in FP32",
        ("NVIDIA/TensorRT#4837",),
        targets=frozenset({"sm_120"}),
    ),
)
REMEDY = (
    "take another version, or check the engine with `compare` on the device, and where it is wrong "
    "build with --fp32 attention"
)


def warnings(
    flavour: str, version: str, targets: Collection[str] = (), precision: str = "fp16"
) -> list[str]:
    """What is known against engines of a TensorRT, one sentence each.

    Args:
        flavour: "tensorrt" or "rtx".
        version, targets, precision: as for `Fault.affects`.
    """
    if flavour != "tensorrt":
        return []
    return [
        f"TensorRT {version}: {fault.what} ({', '.join(fault.threads)}): {REMEDY}"
        for fault in FAULTS
        if fault.affects(version, targets, precision)
    ]
