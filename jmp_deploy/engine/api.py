"""The seam: every call to TensorRT 10.0 to 11.x and TensorRT-RTX, and all that differs among them.

Both modules have the same classes, so most calls are the same. What one of them lacks stands in
`tests/engine/trt_differences.py`, with version and reason. `tests/engine/test_contract.py` walks
this file and holds every attribute that it uses against NVIDIA's bindings of many versions (as
looked up by `scripts/bindings_check.py`), TensorRT's type stubs (10.13) and the installed
TensorRT-RTX, so that a misspelt or removed name is found on a machine without a GPU.

Two conventions make that possible: a module of TensorRT is called `trt`, and an object of it has
its class as annotation, or one of the names of `OBJECT_NAMES`.
"""

from __future__ import annotations

import importlib
import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import EngineError, install_command
from ..core.packages import importable

if TYPE_CHECKING:
    import tensorrt

Buffer = bytes | mmap.mmap
"""A plan in memory."""

FLAVOURS = ("tensorrt", "rtx")
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
TITLES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}

OBJECT_NAMES = {
    "registry": "IPluginRegistry",
    "creator": "IPluginCreatorV3One",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
"""Variables without an annotation (or of another module of ours) and the class that they hold."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine: shape without the batch, which is its first dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_input: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


# --- Modules ------------------------------------------------------------------------------------


def installed(flavour: str) -> bool:
    """Whether a flavour is there."""
    return importable(MODULES[flavour])


def load(flavour: str) -> Any:
    """The module of a flavour.

    Raises:
        EngineError: it is not installed, or cannot be imported.
    """
    name = MODULES[flavour]
    if not installed(flavour):
        raise EngineError(f"{name} is not installed", install_command(flavour))
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a shared library that is missing
        raise EngineError(
            f"{name} cannot be imported: {error}", "run `python -m jmp_deploy doctor`"
        ) from error


def make_logger(trt: Any, sink: Callable[[str], None]) -> tensorrt.ILogger:
    """A logger that hands errors and warnings to `sink`; it must outlive what it is given to."""

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                sink(msg)

    return Logger()


# --- Building -----------------------------------------------------------------------------------


def strongly_typed(trt: Any) -> bool:
    """Whether the network must be asked to be strongly typed.

    10.x knows both kinds and needs the flag. In 11 every network is strongly typed and the flag is
    without effect and may go; TensorRT-RTX never had the other kind, and has the flag.
    """
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def may_fall_back(trt: Any) -> bool:
    """Whether a network that was refused strongly typed may be tried weakly typed: before 10.6."""
    version = tuple(int(part) for part in str(trt.__version__).split(".")[:2])
    return trt.__name__ == MODULES["tensorrt"] and version < (10, 6)


def weakly_typed_options(trt: Any, network: tensorrt.INetworkDefinition) -> dict[str, Any]:
    """Builder options by which a weakly typed network computes what the ONNX says all the same,
    and the network's layers bound to it.

    Each layer is told the type of its outputs, and the builder that it has to obey. (Normalization
    keeps the compute precision that the parser chose, FP32.)
    """
    for index in range(network.num_layers):
        layer: tensorrt.ILayer = network.get_layer(index)
        outputs = [layer.get_output(position) for position in range(layer.num_outputs)]
        floats = (trt.DataType.FLOAT, trt.DataType.HALF, trt.DataType.BF16)
        kinds = [tensor.dtype for tensor in outputs if tensor is not None]
        if not kinds or any(kind not in floats for kind in kinds):
            continue
        for position, kind in enumerate(kinds):
            layer.set_output_type(position, kind)
        if layer.type not in (trt.LayerType.CAST, trt.LayerType.CONSTANT, trt.LayerType.PLUGIN_V3):
            layer.precision = kinds[0]
    return {"fp16": True, "bf16": True, "int8": True, "precision_constraints": "obey"}


def multiplies_in_half_only(trt: Any, network: tensorrt.INetworkDefinition) -> bool:
    """Whether every matrix product and convolution of a network gives FP16."""
    products = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION)
    for index in range(network.num_layers):
        layer: tensorrt.ILayer = network.get_layer(index)
        if layer.type in products:
            tensor: tensorrt.ITensor = layer.get_output(0)
            if tensor.dtype != trt.DataType.HALF:
                return False
    return True


def workspace_limit(trt: Any, mebibytes: int) -> dict[Any, int]:
    """The limit of the builder's scratch memory, as `memory_pool_limits`."""
    return {trt.MemoryPoolType.WORKSPACE: mebibytes << 20}


def embed_plugin(config: tensorrt.IBuilderConfig, library: str) -> None:
    """Has an engine carry a plugin's library, which a runtime opens that allows host code
    (`IBuilderConfig::setPluginsToSerialize`)."""
    config.plugins_to_serialize = [library]


def compute_capabilities(trt: Any) -> list[tuple[int, int]]:
    """What a TensorRT-RTX can build for: (major, minor), sorted."""
    names = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return sorted((int(name[2:-1]), int(name[-1])) for name in names)


def input_names(network: tensorrt.INetworkDefinition) -> list[str]:
    """Names of a network's inputs."""
    return [network.get_input(index).name for index in range(network.num_inputs)]


def describe_network(network: tensorrt.INetworkDefinition) -> dict[str, Any]:
    """{"inputs", "outputs", "layers"} of a parsed network."""
    layers = []
    for index in range(network.num_layers):
        layer: tensorrt.ILayer = network.get_layer(index)
        outputs = [layer.get_output(position) for position in range(layer.num_outputs)]
        kept = [_describe_tensor(tensor) for tensor in outputs if tensor is not None]
        layers.append({"name": layer.name, "type": layer.type.name, "outputs": kept})
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    results = [network.get_output(index) for index in range(network.num_outputs)]
    return {
        "inputs": [_describe_tensor(tensor) for tensor in inputs],
        "outputs": [_describe_tensor(tensor) for tensor in results],
        "layers": layers,
    }


def _describe_tensor(tensor: tensorrt.ITensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(_shape(tensor.shape))}


def _shape(dims: tensorrt.Dims) -> tuple[int, ...]:
    """TensorRT's Dims as a tuple; it has a length and items, but says nothing of iteration."""
    return tuple(int(dims[index]) for index in range(len(dims)))


def count_plugins(trt: Any, network: tensorrt.INetworkDefinition) -> int:
    """Layers that are plugins of the kind that ours is."""
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return sum(kind == trt.LayerType.PLUGIN_V3 for kind in kinds)


def progress_monitor(trt: Any, report: Callable[[str, int, int], None]) -> Any:
    """Reports (phase, steps done, steps in all). An exception in it would end the process."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            report(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            report(phase, step + 1, self.totals.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            total = self.totals.pop(phase, 0)
            report(phase, total, total)

    return Monitor()


def describe_engine(trt: Any, engine: tensorrt.ICudaEngine) -> dict[str, Any]:
    """{"device_memory", "profiles", "layers"} of a built engine."""
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return {
        "device_memory": device_memory(engine),
        "profiles": engine.num_optimization_profiles,
        "layers": json.loads(text).get("Layers", []),
    }


def device_memory(engine: tensorrt.ICudaEngine) -> int:
    """Bytes of scratch memory of one context for the largest shapes."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


# --- Running ------------------------------------------------------------------------------------


def invalidity(trt: Any, runtime: tensorrt.Runtime, plan: Buffer) -> str | None:
    """What TensorRT-RTX has against a plan here, in words; None where it is fit, or for TensorRT,
    which cannot tell before it deserializes."""
    if not hasattr(trt, "EngineInvalidityDiagnostics"):
        return None
    verdict, bits = runtime.get_engine_validity(plan)  # type: ignore[attr-defined,unused-ignore]
    if verdict != trt.EngineValidity.INVALID:
        return None
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    names = [name for name, value in known if int(bits) & int(value)]
    return ", ".join(name.lower().replace("_", " ") for name in names) or f"code {bits}"


def make_runtime(trt: Any, logger: tensorrt.ILogger) -> tensorrt.Runtime:
    """What deserializes engines; it must outlive them."""
    return trt.Runtime(logger)


def deserialize(runtime: tensorrt.Runtime, plan: Buffer) -> tensorrt.ICudaEngine | None:
    """The engine, or None where TensorRT refuses it (the reason is in its log).

    Args:
        plan: any object with Python's buffer protocol (`runtime_deserialize_cuda_engine` in
            pyCore.cpp of the bindings of 10.0 to 11.1); it may go when this returns.
    """
    return runtime.deserialize_cuda_engine(plan)


def engine_tensors(trt: Any, engine: tensorrt.ICudaEngine) -> list[Tensor]:
    """Inputs and outputs in the engine's order.

    Raises:
        EngineError: a dimension other than the first is dynamic, or a type that numpy lacks.
    """
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = _shape(engine.get_tensor_shape(name))
        if not shape or any(size < 0 for size in shape[1:]):
            raise EngineError(
                f"tensor {name!r} has shape {list(shape)}: only the batch may be dynamic"
            )
        try:
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        except TypeError as error:  # BF16, FP8: numpy has no such type
            raise EngineError(f"tensor {name!r}: {error}") from error
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        tensors.append(Tensor(name, dtype, shape[1:], is_input))
    return tensors


def profile_batches(engine: tensorrt.ICudaEngine, name: str) -> tuple[int, int, int]:
    """(min, opt, max) images of profile 0, by the first dimension of input `name`."""
    fixed = _shape(engine.get_tensor_shape(name))[0]
    if fixed >= 0:  # then there need be no profile
        return fixed, fixed, fixed
    least, best, most = (int(shape[0]) for shape in engine.get_tensor_profile_shape(name, 0))
    return least, best, most


@dataclass(frozen=True)
class ContextFactory:
    """Makes execution contexts whose scratch memory is ours to give.

    Attributes:
        engine: of either flavour.
        strategy: trt.ExecutionContextAllocationStrategy.USER_MANAGED.
        runtime_config: TensorRT-RTX's, or None.
        runtime_cache: TensorRT-RTX's compiled kernels, or None.
    """

    engine: Any
    strategy: Any
    runtime_config: Any = None
    runtime_cache: Any = None

    def make(self) -> tensorrt.IExecutionContext | None:
        """A context on profile 0, or None where TensorRT cannot make one (its log says why)."""
        engine: tensorrt.ICudaEngine = self.engine
        if self.runtime_config is not None:
            return engine.create_execution_context(self.runtime_config)
        return engine.create_execution_context(self.strategy)


def context_factory(
    trt: Any, engine: tensorrt.ICudaEngine, *, cuda_graph: bool, eager: bool, cache: bytes | None
) -> ContextFactory:
    """Prepares contexts.

    TensorRT-RTX (1.2 on) captures CUDA graphs by itself, since it alone knows when the kernels
    for a shape are compiled; a capture of ours would catch the provisional ones.

    Args:
        cuda_graph: let TensorRT-RTX capture; without effect on TensorRT.
        eager: let TensorRT-RTX compile the kernels of a shape before it first runs. By default it
            does so in the background and runs provisional ones meanwhile: fine for a service, but
            whoever measures would measure those. Without effect on TensorRT.
        cache: TensorRT-RTX's compiled kernels of an earlier process; refused silently where they
            do not fit.
    """
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not captures_itself(trt):
        return ContextFactory(engine, strategy)
    runtime_config: Any = engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(strategy)
    strategies = trt.CudaGraphStrategy
    runtime_config.cuda_graph_strategy = (
        strategies.WHOLE_GRAPH_CAPTURE if cuda_graph else strategies.DISABLED
    )
    if eager:
        specialization = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = specialization
    runtime_cache = runtime_config.create_runtime_cache()
    if cache:
        runtime_cache.deserialize(cache)
    runtime_config.set_runtime_cache(runtime_cache)
    return ContextFactory(engine, strategy, runtime_config, runtime_cache)


def captures_itself(trt: Any) -> bool:
    """Whether the runtime makes CUDA graphs by itself: TensorRT-RTX from 1.2 on."""
    return hasattr(trt, "CudaGraphStrategy")


def cache_bytes(factory: ContextFactory) -> bytes:
    """TensorRT-RTX's compiled kernels, to be kept for the next process; empty for TensorRT."""
    if factory.runtime_cache is None:
        return b""
    runtime_cache = factory.runtime_cache
    return bytes(memoryview(runtime_cache.serialize()))


def set_batch(
    context: tensorrt.IExecutionContext, inputs: Sequence[Tensor], batch: int
) -> int | None:
    """Fixes a context's batch; returns the bytes of scratch memory that it then needs.

    None where TensorRT refuses the shape, or cannot tell the size (0 is its word for an error).
    """
    for tensor in inputs:
        if not context.set_input_shape(tensor.name, (batch, *tensor.shape)):
            return None
    return int(context.update_device_memory_size_for_shapes()) or None


def set_scratch(context: tensorrt.IExecutionContext, address: int, size: int) -> None:
    """Gives a context its scratch memory."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, size)
    else:  # 10.0; its stub has the attribute in the text only
        context.device_memory = address  # type: ignore[attr-defined,unused-ignore]


def bind(context: tensorrt.IExecutionContext, name: str, address: int) -> bool:
    """Says where a tensor lies; False where TensorRT refuses."""
    return bool(context.set_tensor_address(name, address))


def enqueue(context: tensorrt.IExecutionContext, stream: int) -> bool:
    """Enqueues one inference on a stream; False where TensorRT refuses (its log says why)."""
    return bool(context.execute_async_v3(stream))


def can_be_captured(context: tensorrt.IExecutionContext, stream: int) -> bool:
    """Whether what a context enqueues on a stream can be recorded as a CUDA graph.

    TensorRT-RTX tells, and only after the kernels of the shape are compiled (`eager`); TensorRT
    cannot be asked: there a capture fails, or does not.
    """
    if not hasattr(context, "is_stream_capturable"):
        return True
    return bool(context.is_stream_capturable(stream))  # type: ignore[unused-ignore]
