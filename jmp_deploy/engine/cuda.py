"""The CUDA calls that running an engine takes, through NVIDIA's cuda-bindings 12.6 to 13.x.

Handles and addresses are plain integers outside this module. Every call is checked: an error of
CUDA is an `EngineError` that names the call, and what takes memory that is not there raises
`GpuMemoryError`. The two modules of cuda-bindings come in from outside, so that a driver made of
host memory can stand in for them (tests/fakes/cuda.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import EngineError, GpuMemoryError, install_command, one_line

DEFAULT_STREAM = 0
"""The legacy default stream: what libraries work on that were told nothing else."""


class Cuda:
    """One CUDA context, the one that is current where this is made, and the calls on it.

    A library that made a context of its own (pycuda) and left it current is a guest with all
    rights: streams and arrays of that context are used in it. Where none is current, the primary
    context of `device` is taken, as PyTorch and CuPy do.

    Args:
        runtime, driver: cuda.bindings.runtime and cuda.bindings.driver.
        device: number of the GPU; None for that of the current context, else 0.

    Attributes:
        device: number of the GPU.

    Raises:
        EngineError: no driver, no GPU, or another error of CUDA.
    """

    def __init__(self, runtime: Any, driver: Any, device: int | None = None) -> None:
        self._runtime = runtime
        self._driver = driver
        self._handles: dict[int, Any] = {}
        try:
            self._call("cuInit", 0)
            if device is not None:
                self._call("cudaSetDevice", device)
            elif self._current() == 0:
                self._call("cudaSetDevice", 0)
                # before CUDA 12 it does not make the context; this does
                self._call("cudaFree", 0)
            self.device = int(self._call("cudaGetDevice"))
            self._context = self._current()
        except (RuntimeError, OSError) as error:  # cuda-bindings finds no libcuda
            raise EngineError(
                f"CUDA cannot be used: {one_line(error)}",
                "run `python -m jmp_deploy doctor`",
            ) from error

    # --- Context ---

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within, the context is current in this thread; a thread begins with none."""
        if self._current() == self._context:
            yield
            return
        self._call("cuCtxPushCurrent", self._driver.CUcontext(self._context))
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def compute_capability(self) -> tuple[int, int]:
        """Of the GPU, such as (8, 7)."""
        attributes = self._runtime.cudaDeviceAttr
        major = self._call(
            "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, self.device
        )
        minor = self._call(
            "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, self.device
        )
        return int(major), int(minor)

    def device_name(self) -> str:
        """Of the GPU."""
        name = self._call("cudaGetDeviceProperties", self.device).name
        return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)

    def free_memory(self) -> int:
        """Bytes that the GPU has left."""
        return int(self._call("cudaMemGetInfo")[0])

    # --- Memory ---

    def malloc(self, size: int) -> int:
        """Device memory, aligned to 256 bytes. Raises GpuMemoryError."""
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Gives device memory back; waits for work that uses it."""
        self._call("cudaFree", address)

    def malloc_host(self, size: int) -> int:
        """Pinned host memory: copies from and to it run beside the GPU's work."""
        flags = self._runtime.cudaHostAllocDefault
        return int(self._call("cudaHostAlloc", max(size, 1), flags))

    def free_host(self, address: int) -> None:
        """Gives pinned memory back."""
        self._call("cudaFreeHost", address)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueues a copy; CUDA tells host from device by the addresses."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, size, kind, self._stream(stream))

    # --- Streams and events ---

    def stream_create(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        stream = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        return self._keep(stream)

    def stream_destroy(self, stream: int) -> None:
        """Destroys a stream of `stream_create`."""
        self._call("cudaStreamDestroy", self._handles.pop(stream))

    def stream_synchronize(self, stream: int) -> None:
        """Waits for all that is on a stream."""
        self._call("cudaStreamSynchronize", self._stream(stream))

    def event_create(self) -> int:
        """An event for order alone, without a time."""
        flags = self._runtime.cudaEventDisableTiming
        return self._keep(self._call("cudaEventCreateWithFlags", flags))

    def timer_create(self) -> int:
        """An event with a time."""
        flags = self._runtime.cudaEventDefault
        return self._keep(self._call("cudaEventCreateWithFlags", flags))

    def elapsed_ms(self, start: int, end: int) -> float:
        """GPU time between two events that were both reached; resolution about 0.5 µs."""
        return float(self._call("cudaEventElapsedTime", self._handles[start], self._handles[end]))

    def event_record(self, event: int, stream: int) -> None:
        """Marks the end of what is on a stream now."""
        self._call("cudaEventRecord", self._handles[event], self._stream(stream))

    def event_synchronize(self, event: int) -> None:
        """Waits for what an event marks; at once if it was never recorded."""
        self._call("cudaEventSynchronize", self._handles[event])

    def event_destroy(self, event: int) -> None:
        """Destroys an event."""
        self._call("cudaEventDestroy", self._handles.pop(event))

    def wait_event(self, stream: int, event: int) -> None:
        """Lets a stream wait for what an event marks."""
        self._call("cudaStreamWaitEvent", self._stream(stream), self._handles[event], 0)

    # --- Graphs ---

    def begin_capture(self, stream: int) -> None:
        """From here on a stream records instead of working.

        Thread-local: other threads may allocate meanwhile.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream(stream), mode)

    def end_capture(self, stream: int) -> int:
        """Ends a capture; the graph that can be launched. Nothing is left where it fails."""
        graph = self._call("cudaStreamEndCapture", self._stream(stream))
        try:
            return self._keep(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            # unchecked: an error here must not lose the graph that can be launched
            self._runtime.cudaGraphDestroy(graph)

    def abandon_capture(self, stream: int) -> None:
        """Ends a capture that went wrong, and forgets the error that this may give."""
        status, graph = self._runtime.cudaStreamEndCapture(self._stream(stream))
        if self._is_success(status) and graph is not None:
            self._runtime.cudaGraphDestroy(graph)
        self._runtime.cudaGetLastError()

    def graph_launch(self, graph: int, stream: int) -> None:
        """Enqueues a graph on a stream."""
        self._call("cudaGraphLaunch", self._handles[graph], self._stream(stream))

    def graph_destroy(self, graph: int) -> None:
        """Destroys what `end_capture` gave."""
        self._call("cudaGraphExecDestroy", self._handles.pop(graph))

    # --- Calls ---

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call; its value, a tuple of them, or None. Raises for anything but success."""
        module = self._runtime if name.startswith("cuda") else self._driver
        status, *values = getattr(module, name)(*arguments)
        if not self._is_success(status):
            # What is not an error of the context's is kept by the runtime and would be reported
            # again by whoever asks next.
            self._runtime.cudaGetLastError()
            reason = str(getattr(status, "name", status)).removeprefix("cudaError")
            if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
                raise GpuMemoryError(f"{name}: out of memory")
            raise EngineError(f"{name} failed: {reason}")
        return values[0] if len(values) == 1 else tuple(values) or None

    def _current(self) -> int:
        return int(self._call("cuCtxGetCurrent") or 0)

    @staticmethod
    def _is_success(status: Any) -> bool:
        return int(status) == 0

    def _stream(self, stream: int) -> Any:
        return self._handles.get(stream) or self._runtime.cudaStream_t(stream)

    def _keep(self, handle: Any) -> int:
        """Handles are objects of cuda-bindings that free nothing; kept by their number."""
        number = int(handle)
        self._handles[number] = handle
        return number


def open_cuda(device: int | None = None) -> Cuda:
    """CUDA through cuda-bindings.

    Raises:
        EngineError: cuda-bindings is not installed, or CUDA cannot be used here.
    """
    try:
        from cuda.bindings import driver, runtime
    except ImportError as error:
        raise EngineError(
            f"cuda-bindings is not installed: {error}", install_command("runtime")
        ) from error
    return Cuda(runtime, driver, device)
