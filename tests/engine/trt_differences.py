"""What one TensorRT lacks that another has: name, versions, reason. `api.py` deals with it."""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple["tuple[int, ...] | None", "tuple[int, ...] | None"]


@dataclass(frozen=True)
class Difference:
    """A name that some TensorRT lacks.

    Attributes:
        name: "Class.attribute" or a name of the module.
        lacking: flavour -> first and last version (exclusive) without it, as tuples; None is open.
        reason: why, with its source.
    """

    name: str
    lacking: dict[str, Range]
    reason: str


_ALL: Range = (None, None)
_RTX_RUNTIME = (
    "TensorRT-RTX compiles kernels when it runs: its runtime configuration, the cache of what was "
    "compiled (1.0) and its own CUDA graphs (1.2) have no counterpart in TensorRT (10.13 stubs)"
)
_WEAK = (
    "of weakly typed networks, which 11 and TensorRT-RTX do not have; used before 10.6 alone "
    "(bindings of 11.1; tensorrt_rtx 1.7.1)"
)
_TARGETS = (
    "TensorRT-RTX builds ahead of time for compute capabilities; TensorRT builds for the GPU "
    "that is here (10.13 stubs)"
)
_WEAK = "weakly typed networks, the fallback before 10.6, are gone in 11 (bindings of 11.1)"

DIFFERENCES = (
    Difference(
        "ICudaEngine.device_memory_size",
        {"tensorrt": ((11,), None), "rtx": _ALL},
        "int32 semantics of old; replaced by device_memory_size_v2 (removed list of the 11.0 "
        "migration guide)",
    ),
    Difference(
        "ICudaEngine.device_memory_size_v2",
        {"tensorrt": (None, (10, 1))},
        "came with weight streaming v2 in 10.1; JetPack 6.0 era 10.0 has device_memory_size",
    ),
    Difference(
        "IExecutionContext.set_device_memory",
        {"tensorrt": (None, (10, 1))},
        "came with 10.1; before, the attribute device_memory takes the address",
    ),
    Difference("ILayer.precision", {"tensorrt": ((11,), None), "rtx": _ALL}, _WEAK),
    Difference("ILayer.set_output_type", {"tensorrt": ((11,), None), "rtx": _ALL}, _WEAK),
    Difference("ComputeCapability", {"tensorrt": _ALL}, _TARGETS),
    Difference("CudaGraphStrategy", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference("IRuntimeConfig.cuda_graph_strategy", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference("DynamicShapesKernelSpecializationStrategy", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference(
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        {"tensorrt": _ALL},
        _RTX_RUNTIME,
    ),
    Difference(
        "IExecutionContext.is_stream_capturable",
        {"tensorrt": _ALL},
        "TensorRT-RTX tells whether kernels are still to be compiled; a capture by TensorRT is "
        "tried",
    ),
    Difference("IRuntimeConfig.create_runtime_cache", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference("IRuntimeConfig.set_runtime_cache", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference("IRuntimeCache.deserialize", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference("IRuntimeCache.serialize", {"tensorrt": _ALL}, _RTX_RUNTIME),
    Difference(
        "ICudaEngine.create_runtime_config",
        {"tensorrt": (None, (10, 11))},
        "used for TensorRT-RTX only; older TensorRT takes the allocation strategy itself",
    ),
    Difference(
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        {"tensorrt": (None, (10, 11))},
        "used for TensorRT-RTX only; the class came with create_runtime_config (bindings of 10.10, "
        "10.11)",
    ),
    Difference(
        "Runtime.get_engine_validity",
        {"tensorrt": _ALL},
        "TensorRT-RTX says in one code what does not fit; TensorRT logs it while it deserializes",
    ),
    Difference(
        "EngineInvalidityDiagnostics",
        {"tensorrt": _ALL},
        "the bits of what get_engine_validity answers",
    ),
    Difference(
        "EngineValidity",
        {"tensorrt": _ALL},
        "the verdict of get_engine_validity",
    ),
)


def lacks(name: str, flavour: str, version: str) -> bool:
    """Whether a flavour and version lacks a name, or what the name is a member of."""
    have = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    for difference in DIFFERENCES:
        is_it = name == difference.name or name.startswith(f"{difference.name}.")
        if is_it and flavour in difference.lacking:
            since, until = difference.lacking[flavour]
            return (since is None or have >= since) and (until is None or have < until)
    return False
