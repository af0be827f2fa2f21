"""A TensorRT that runs on `fake_cuda`: one fixed function, and TensorRT's rules of order.

A plan is JSON (`plan`). The function is y[b, k] = (k + 1) * mean(x[b]) + sum(x[b, 0]) / 100,
computed when the stream gets there, from the addresses that were bound at enqueue.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.fakes.cuda import FakeCuda

IMAGE = (3, 4, 4)
CLASSES = 5


def plan(batch: tuple[int, int, int] = (1, 4, 8), **changes: Any) -> bytes:
    """A serialized engine; `scratch` bytes per image, `weights` bytes of device memory; `nan` and
    `off` plant faults: NaN for the last image, and each class with its neighbour's answer."""
    facts = {"batch": batch, "scratch": 1000, "image": IMAGE, "classes": CLASSES}
    facts |= {"nan": False, "off": False}
    return json.dumps({**facts, **changes}).encode()


def answer(images: np.ndarray) -> np.ndarray:
    """The function, in float64."""
    wide = np.asarray(images, dtype=np.float64)
    mean = wide.mean(axis=(1, 2, 3))
    extra = wide[:, 0].sum(axis=(1, 2)) / 100
    return mean[:, None] * (np.arange(CLASSES) + 1)[None] + extra[:, None]


class FakeTensorRT:
    """Stands in for the module `tensorrt` or `tensorrt_rtx`."""

    def __init__(self, cuda: FakeCuda, flavour: str = "tensorrt", version: str = "10.13.0.35"):
        self.cuda = cuda
        self.__name__ = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[flavour]
        self.__version__ = version
        self.TensorIOMode = IntEnum("TensorIOMode", ["INPUT", "OUTPUT"])
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")
        self.nptype = lambda dtype: dtype
        self.ILogger = _Logger
        self.kernels = b"compiled by the first process"
        self.loaded_kernels: bytes | None = None
        self.graph_strategy: str | None = None
        self.specialization: str | None = None
        self.capturable = True  # what TensorRT-RTX answers
        self.verdict = (0, 0)
        self.seen: np.ndarray | None = None  # the last input
        self.context_type: Any = None  # another than those of this module
        fake = self

        class Runtime(_Runtime):
            def __init__(self, logger: Any) -> None:
                super().__init__(fake, logger)

        self.Runtime = Runtime
        if flavour == "rtx":
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="off")
            self.EngineValidity = SimpleNamespace(INVALID=2)
            self.EngineInvalidityDiagnostics = IntEnum(
                "EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2}
            )


class _Logger:
    """The base class of TensorRT's loggers."""

    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})

    def __init__(self) -> None:
        pass


class _Counted:
    """Counts itself among what is alive; `dies` tells who outlived what it needs."""

    kind = ""

    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake = fake
        fake.cuda.alive[self.kind] += 1

    def __del__(self) -> None:
        self.fake.cuda.alive[self.kind] -= 1
        if not getattr(self.fake.cuda, "context_stack", lambda: True)():
            self.violation(f"{self.kind} freed while no context is current")
        self.dies()

    def dies(self) -> None:
        pass

    def violation(self, text: str) -> None:
        self.fake.cuda.violations.append(text)


class _Runtime(_Counted):
    kind = "runtime"

    def __init__(self, fake: FakeTensorRT, logger: _Logger) -> None:
        super().__init__(fake)
        self.log = logger.log

    def dies(self) -> None:
        if self.fake.cuda.alive["engine"]:
            self.violation("the runtime went before its engine")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "engine_host_code_allowed":
            self.violation("the plan's own code may run on this machine")
        super().__setattr__(name, value)

    def get_engine_validity(self, buffer: bytes) -> tuple[int, int]:
        return self.fake.verdict

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        if self.fake.cuda.fails("deserialize_cuda_engine"):
            self.log(_Logger.Severity.ERROR, "injected")
            return None
        try:
            facts = json.loads(bytes(serialized_engine))
        except ValueError:
            self.log(_Logger.Severity.ERROR, "Serialization assertion failed: magicTag")
            return None
        if facts.get("weights", 0) > self.fake.cuda.memory - self.fake.cuda.used:
            self.log(_Logger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was ...)")
            return None
        return _Engine(self.fake, facts, self.log)


class _Engine(_Counted):
    kind = "engine"

    def __init__(self, fake: FakeTensorRT, facts: dict[str, Any], log: Any) -> None:
        super().__init__(fake)
        self.facts, self.log = facts, log
        self.names = ["images", "logits"]
        self.num_io_tensors = 2

    def dies(self) -> None:
        if self.fake.cuda.alive["context"]:
            self.violation("the engine went before its context")

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        image, classes = self.facts["image"], self.facts["classes"]
        batch = self.facts["batch"][0] if self.facts.get("static") else -1
        return (batch, *image) if name == "images" else (batch, classes)

    def get_tensor_dtype(self, name: str) -> Any:
        return np.float32

    def get_tensor_mode(self, name: str) -> int:
        modes = self.fake.TensorIOMode
        return modes.INPUT if name == "images" else modes.OUTPUT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        if self.facts.get("static"):
            raise RuntimeError("a static network has no profile")
        return [(batch, *self.facts["image"]) for batch in self.facts["batch"]]

    def create_engine_inspector(self) -> Any:
        layers = json.dumps({"Layers": ["a", "b"]})
        return SimpleNamespace(get_engine_information=lambda form: layers)

    device_memory_size_v2 = 1000
    num_optimization_profiles = 1

    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig(self.fake)

    def create_execution_context(self, config: Any) -> _Context | None:
        if isinstance(config, _RuntimeConfig):
            self.fake.graph_strategy = config.cuda_graph_strategy
            self.fake.specialization = config.dynamic_shapes_kernel_specialization_strategy
            config = config.strategy
        if config != "user managed":
            self.violation("a context with memory of its own")
        if self.fake.cuda.fails("create_execution_context"):
            self.log(_Logger.Severity.ERROR, "injected")
            return None
        usual = _OldContext if self.fake.__version__.startswith("10.0.") else NewContext
        usual = _RTXContext if self.fake.__name__ == "tensorrt_rtx" else usual
        return (self.fake.context_type or usual)(self.fake, self)


class _RuntimeConfig:
    def __init__(self, fake: FakeTensorRT) -> None:
        self.fake, self.strategy, self.cuda_graph_strategy = fake, "static", "off"
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        def deserialize(blob: bytes) -> bool:
            self.fake.loaded_kernels = bytes(blob)
            return True

        return SimpleNamespace(deserialize=deserialize, serialize=lambda: self.fake.kernels)

    def set_runtime_cache(self, cache: Any) -> bool:
        return True


class _Context(_Counted):
    kind = "context"

    def __init__(self, fake: FakeTensorRT, engine: _Engine) -> None:
        super().__init__(fake)
        self.facts, self.log = engine.facts, engine.log
        self.state = SimpleNamespace(is_alive=True, generation=0, pending=0)
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.warm: int | None = None
        self.busy = threading.Lock()

    def dies(self) -> None:
        self.state.is_alive = False

    def give(self, memory: int, size: int) -> None:
        if memory % 256 or not self.fake.cuda.inside(memory, size):
            self.violation("scratch memory that is not allocated, or not aligned")
        self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.facts["batch"]
        if self.fake.cuda.fails("set_input_shape") or not least <= shape[0] <= most:
            self.log(_Logger.Severity.ERROR, f"shape {shape} is outside of the profile")
            return False
        self.shape = tuple(shape)
        self.state.generation += 1
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self.shape is None:
            self.violation("memory asked for before the shape is known")
            return 0
        return self.facts["scratch"] * self.shape[0]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self.fake.cuda.fails("set_tensor_address"):
            self.log(_Logger.Severity.ERROR, "injected")
            return False
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self.busy.acquire(blocking=False):
            self.violation("two threads in one context")
        try:
            time.sleep(0)
            return self._execute(int(stream_handle))
        finally:
            self.busy.release()

    def _execute(self, stream: int) -> bool:
        cuda = self.fake.cuda
        if cuda.fails("execute_async_v3"):
            self.log(_Logger.Severity.ERROR, "injected")
            return False
        for missing, what in (
            (self.shape is None, "its shape"),
            (set(self.addresses) != {"images", "logits"}, "its addresses"),
            (self.scratch is None, "its scratch memory"),
        ):
            if missing:
                self.violation(f"executed before {what}")
                self.log(_Logger.Severity.ERROR, f"executed before {what}")
                return False
        assert self.shape is not None and self.scratch is not None
        capturing = cuda.streams[stream].capture is not None
        if capturing and self.warm != self.state.generation:
            self.violation("captured before it was enqueued once with this shape")
        if capturing and self.state.pending:
            self.violation("captured while it still runs")
        if not capturing:
            self.warm = self.state.generation
            self.state.pending += 1
        work = _work(self, dict(self.addresses), self.shape, self.scratch[0])
        return cuda.enqueue(stream, work) == 0


class _OldContext(_Context):
    """Of TensorRT 10.0."""

    @property
    def device_memory(self) -> int:
        raise AttributeError("can be set only")

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self.give(memory, 1)


class NewContext(_Context):
    """Of TensorRT 10.1 and later, and of TensorRT-RTX."""

    def set_device_memory(self, memory: int, size: int) -> None:
        self.give(memory, size)


class _RTXContext(NewContext):
    def is_stream_capturable(self, stream: int) -> bool:
        if self.warm != self.state.generation:
            self.violation("asked before the kernels are compiled")
        return self.fake.capturable


def _work(
    context: _Context, addresses: dict[str, int], shape: tuple[int, ...], scratch: int
) -> Any:
    fake, cuda, facts = context.fake, context.fake.cuda, context.facts
    state, generation = context.state, context.state.generation

    def work() -> None:
        state.pending = 0
        size = facts["scratch"] * shape[0]
        images, logits = shape[0] * 4 * int(np.prod(shape[1:])), shape[0] * facts["classes"] * 4
        for wrong, what in (
            (not state.is_alive, "a context went before its work was done"),
            (state.generation != generation, "a context changed its shape under its work"),
            (not cuda.inside(scratch, size), "scratch memory went before the work was done"),
            (not cuda.inside(addresses["images"], images), "input is not device memory"),
            (not cuda.inside(addresses["logits"], logits), "output is not device memory"),
        ):
            if wrong:
                cuda.violations.append(what)
                return
        ctypes.memset(scratch, 0xAB, size)
        source = np.frombuffer(ctypes.string_at(addresses["images"], images), np.float32)
        fake.seen = source.reshape(shape)
        values = answer(fake.seen).astype(np.float32)
        if facts["off"]:
            values = np.roll(values, 1, axis=1)
        if facts["nan"]:
            values[-1] = np.nan
        ctypes.memmove(addresses["logits"], values.tobytes(), logits)

    return work
