"""An engine as a benchmark runs it: from pinned memory to pinned memory, with CUDA events between.

The copies and the computation are enqueued on one stream; events around each tell what the GPU
spent on it, and the host's clock what a caller waits. Copies start when the image is in pinned
memory: filling it is the caller's work.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..core.errors import EngineError, install_command
from ..engine.arrays import DeviceArray
from ..engine.cuda import Cuda
from ..engine.fit import EngineFile
from ..engine.runtime import Engine
from .backend import noise
from .measure import Times

CAPTURED_AFTER = 3
"""Inferences after which `Engine` has captured: it does when the same arrays come again."""


class TimedCuda(Cuda):
    """`Cuda` with events that have a time."""

    def timer_create(self) -> int:
        """An event with a time."""
        flags = self._runtime.cudaEventDefault
        return self._keep(self._call("cudaEventCreateWithFlags", flags))

    def elapsed_ms(self, start: int, end: int) -> float:
        """GPU time between two events that were both reached; resolution about 0.5 µs."""
        return float(self._call("cudaEventElapsedTime", self._handles[start], self._handles[end]))


class TimedEngine:
    """An engine, opened once for each way to launch it that is asked for.

    Args:
        file: the engine, and what is known of it.
        open_engine, cuda: in place of the real ones (tests).
    """

    def __init__(
        self,
        file: EngineFile,
        *,
        open_engine: Callable[..., Any] = Engine,
        cuda: TimedCuda | None = None,
    ) -> None:
        assert file.facts is not None
        self.library = f"{file.facts.builder} {file.facts.version}"
        self.file = file
        self._open, self._cuda = open_engine, cuda or _timed_cuda()
        self._engines: dict[bool, tuple[Any, int]] = {}
        self._releases = ExitStack()
        self._has_graphs: bool | None = None

    @property
    def has_graphs(self) -> bool:
        """Whether its inferences can be replayed as CUDA graphs; found out by trying.

        `Engine` goes on without graphs where TensorRT cannot be captured, and warns.
        """
        if self._has_graphs is None:
            infer = self.prepare(self._engine(True)[0].batch[0], True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(CAPTURED_AFTER):
                    infer()
            words = [str(item.message) for item in caught]
            self._has_graphs = not any("CUDA graphs" in text for text in words)
        return self._has_graphs

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """See `bench_runners.Backend`."""
        (engine, stream), cuda = self._engine(cuda_graph), self._cuda
        with cuda.current():
            events = [cuda.timer_create() for _ in range(4)]
            for event in events:
                self._releases.callback(cuda.event_destroy, event)
            inputs = {t.name: self._pair(batch, t) for t in engine.inputs}
            outputs = {t.name: self._pair(batch, t) for t in engine.outputs}
        for tensor in engine.inputs:
            host = inputs[tensor.name][0]
            host[...] = noise(batch, tensor.shape)
        sources = {name: device for name, (_, device) in inputs.items()}
        targets = {name: device for name, (_, device) in outputs.items()}

        def infer() -> Times:
            started = time.perf_counter()
            cuda.event_record(events[0], stream)
            for host, device in inputs.values():
                cuda.copy(device.pointer, host.ctypes.data, device.nbytes, stream)
            cuda.event_record(events[1], stream)
            engine.infer(sources, stream=stream, out=targets)
            cuda.event_record(events[2], stream)
            for host, device in outputs.values():
                cuda.copy(host.ctypes.data, device.pointer, device.nbytes, stream)
            cuda.event_record(events[3], stream)
            enqueued = time.perf_counter()
            cuda.stream_synchronize(stream)
            ended = time.perf_counter()
            spent = [cuda.elapsed_ms(events[k], events[k + 1]) for k in range(3)]
            return Times.of_device(started, enqueued, ended, spent)

        return infer

    def close(self) -> None:
        """Gives back everything on the GPU."""
        self._engines.clear()
        with self._cuda.current():
            self._releases.close()

    def _engine(self, cuda_graph: bool) -> tuple[Any, int]:
        """An engine and its stream: with one for all batches it never waits for another."""
        if cuda_graph not in self._engines:
            engine = self._open(self.file, cuda_graph=cuda_graph, check_finite=False)
            self._releases.callback(engine.close)
            with self._cuda.current():
                stream = self._cuda.stream_create()
            self._releases.callback(self._cuda.stream_destroy, stream)
            self._engines[cuda_graph] = engine, stream
        return self._engines[cuda_graph]

    def _pair(self, batch: int, tensor: Any) -> tuple[Any, DeviceArray]:
        """Pinned and device memory for a tensor of `batch` images."""
        cuda, shape, size = self._cuda, (batch, *tensor.shape), batch * tensor.row_bytes
        address = cuda.malloc(size)
        self._releases.callback(cuda.free, address)
        pinned = cuda.malloc_host(size)
        self._releases.callback(cuda.free_host, pinned)
        return _view(pinned, shape, tensor.dtype, size), DeviceArray(address, shape, tensor.dtype)


def _view(address: int, shape: tuple[int, ...], dtype: Any, size: int) -> Any:
    """Memory at an address as a numpy array; it does not own it."""
    import ctypes

    raw: Any = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _timed_cuda() -> TimedCuda:
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise EngineError(
            f"cuda-bindings is not installed: {error}", install_command("runtime")
        ) from error
    return TimedCuda(runtime, driver)
