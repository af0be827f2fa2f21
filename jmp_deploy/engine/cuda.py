"""The CUDA calls that running an engine takes: the driver's, through NVIDIA's cuda-bindings 12.6 to
13.x (`cuda.bindings.driver`).

Not `cuda.bindings.runtime`: that module holds a CUDA runtime of its own version, linked into it.
On a Jetson, whose driver is JetPack's, a runtime newer than the driver ends with
cudaErrorInsufficientDriver (anduril/jetpack-nixos #328: 12.8 on JetPack 6; NVlabs/FoundationStereo
#209: cuda-python's `cudaFree(0)` there). The driver's module holds none: it opens libcuda.so.1,
asks cuGetProcAddress (of CUDA 12.0) for every function by the version that brought it, and a
function that a driver lacks fails only when it is called (`_internal/driver.pyx` of the wheel of
12.9.10 for aarch64). The newest that is called here is cuStreamGetId of 12.0, so that
cuda-bindings 12.9 beside JetPack 6's driver of 12.6 lacks nothing.

Handles and addresses are plain integers outside this module. Every call is checked: an error of
CUDA is an `EngineError` that names the call, and what takes memory that is not there raises
`GpuMemoryError`. The module of cuda-bindings comes in from outside, so that a driver made of host
memory can stand in for it (tests/fakes/cuda.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import EngineError, GpuMemoryError, install_command, one_line

DEFAULT_STREAM = 0
"""The legacy default stream: what libraries work on that were told nothing else."""


class Cuda:
    """One CUDA context, the one that is current where this is made, and the calls on it.

    A library that made a context of its own (pycuda) and left it current is a guest with all
    rights: streams and arrays of that context are used in it. Where none is current, or `device` is
    given, the primary context of that GPU is taken, as PyTorch and CuPy do, and kept until the
    process ends. Which context is current in a thread stays as it is: ours is there only within
    `current`.

    Args:
        driver: cuda.bindings.driver.
        device: number of the GPU; None for that of the current context, else 0.

    Attributes:
        device: number of the GPU.

    Raises:
        EngineError: no driver, no GPU, or another error of CUDA.
    """

    def __init__(self, driver: Any, device: int | None = None) -> None:
        self._driver = driver
        try:
            self._call("cuInit", 0)
            self._context = 0 if device is not None else self._current()
            if self._context == 0:
                chosen = self._call("cuDeviceGet", device or 0)
                self._context = int(self._call("cuDevicePrimaryCtxRetain", chosen))
        except (RuntimeError, OSError) as error:  # cuda-bindings finds no libcuda
            raise EngineError(
                f"CUDA cannot be used: {one_line(error)}",
                "run `python -m jmp_deploy doctor`",
            ) from error
        with self.current():
            self.device = int(self._call("cuCtxGetDevice"))

    # --- Context ---

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within, the context is current in this thread; a thread begins with none."""
        if self.is_current():
            yield
            return
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def is_current(self) -> bool:
        """Whether the context is the one that is current in this thread."""
        return self._current() == self._context

    def compute_capability(self) -> tuple[int, int]:
        """Of the GPU, such as (8, 7)."""
        attributes = self._driver.CUdevice_attribute
        major = attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        minor = attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        return (
            int(self._call("cuDeviceGetAttribute", major, self.device)),
            int(self._call("cuDeviceGetAttribute", minor, self.device)),
        )

    def device_name(self) -> str:
        """Of the GPU."""
        name = self._call("cuDeviceGetName", 256, self.device)
        return str(name.decode().rstrip("\0"))

    def free_memory(self) -> int:
        """Bytes that the GPU has left."""
        return int(self._call("cuMemGetInfo")[0])

    def device_of(self, address: int) -> int | None:
        """Number of the GPU that an address belongs to; None for memory that CUDA does not know."""
        attribute = self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        status, number = self._driver.cuPointerGetAttribute(attribute, address)
        return int(number) if self._is_success(status) else None

    # --- Memory ---

    def malloc(self, size: int) -> int:
        """Device memory, aligned to 256 bytes. Raises GpuMemoryError."""
        return int(self._call("cuMemAlloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Gives device memory back; waits for work that uses it."""
        self._call("cuMemFree", address)

    def malloc_host(self, size: int) -> int:
        """Pinned host memory: copies from and to it run beside the GPU's work."""
        return int(self._call("cuMemHostAlloc", max(size, 1), 0))

    def free_host(self, address: int) -> None:
        """Gives pinned memory back."""
        self._call("cuMemFreeHost", address)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Enqueues a copy; CUDA tells host from device by the addresses."""
        self._call("cuMemcpyAsync", target, source, size, stream)

    # --- Streams and events ---

    def stream_create(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", int(flags)))

    def stream_destroy(self, stream: int) -> None:
        """Destroys a stream of `stream_create`."""
        self._call("cuStreamDestroy", stream)

    def stream_id(self, stream: int) -> int:
        """Of a stream alone, for ever: its handle may be another stream's when it is gone."""
        return int(self._call("cuStreamGetId", stream))

    def stream_synchronize(self, stream: int) -> None:
        """Waits for all that is on a stream."""
        self._call("cuStreamSynchronize", stream)

    def event_create(self) -> int:
        """An event for order alone, without a time."""
        flags = self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return int(self._call("cuEventCreate", int(flags)))

    def timer_create(self) -> int:
        """An event with a time."""
        return int(self._call("cuEventCreate", int(self._driver.CUevent_flags.CU_EVENT_DEFAULT)))

    def elapsed_ms(self, start: int, end: int) -> float:
        """GPU time between two events that were both reached; resolution about 0.5 µs."""
        return float(self._call("cuEventElapsedTime", start, end))

    def event_record(self, event: int, stream: int) -> None:
        """Marks the end of what is on a stream now."""
        self._call("cuEventRecord", event, stream)

    def event_synchronize(self, event: int) -> None:
        """Waits for what an event marks; at once if it was never recorded."""
        self._call("cuEventSynchronize", event)

    def event_destroy(self, event: int) -> None:
        """Destroys an event."""
        self._call("cuEventDestroy", event)

    def wait_event(self, stream: int, event: int) -> None:
        """Lets a stream wait for what an event marks."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    # --- Graphs ---

    def is_capturing(self, stream: int) -> bool:
        """Whether somebody records what is enqueued on a stream; for the legacy default stream,
        what is enqueued on a stream that it waits for. Asking breaks no capture."""
        status, state = self._driver.cuStreamIsCapturing(stream)
        if status == self._driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
            return True
        self._check("cuStreamIsCapturing", status)
        return bool(state != self._driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)

    def begin_capture(self, stream: int) -> None:
        """From here on a stream records instead of working.

        Thread-local: other threads may allocate meanwhile.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """Ends a capture; the graph that can be launched. Nothing is left where it fails."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            # unchecked: an error here must not lose the graph that can be launched
            self._driver.cuGraphDestroy(graph)

    def abandon_capture(self, stream: int) -> None:
        """Ends a capture that went wrong, and forgets the error that this may give."""
        status, graph = self._driver.cuStreamEndCapture(stream)
        if self._is_success(status) and graph is not None:
            self._driver.cuGraphDestroy(graph)

    def graph_launch(self, graph: int, stream: int) -> None:
        """Enqueues a graph on a stream."""
        self._call("cuGraphLaunch", graph, stream)

    def graph_launcher(self, graph: int, stream: int) -> Callable[[], None]:
        """`graph_launch` with everything looked up beforehand: a call of CUDA and little more."""
        launch, check = self._driver.cuGraphLaunch, self._check
        # objects of cuda-bindings: of integers it would make them anew at each call
        executable, target = self._driver.CUgraphExec(graph), self._driver.CUstream(stream)

        def call() -> None:
            (status,) = launch(executable, target)
            if status:
                check("cuGraphLaunch", status)

        return call

    def graph_destroy(self, graph: int) -> None:
        """Destroys what `end_capture` gave."""
        self._call("cuGraphExecDestroy", graph)

    # --- Calls ---

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call; its value, a tuple of them, or None. Raises for anything but success."""
        status, *values = getattr(self._driver, name)(*arguments)
        self._check(name, status)
        return values[0] if len(values) == 1 else tuple(values) or None

    def _check(self, name: str, status: Any) -> None:
        if self._is_success(status):
            return
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise GpuMemoryError(f"{name}: out of memory")
        raise EngineError(f"{name} failed: {getattr(status, 'name', status)}")

    def _current(self) -> int:
        return int(self._call("cuCtxGetCurrent") or 0)

    @staticmethod
    def _is_success(status: Any) -> bool:
        return int(status) == 0


def open_cuda(device: int | None = None) -> Cuda:
    """CUDA through cuda-bindings.

    Raises:
        EngineError: cuda-bindings is not installed, or CUDA cannot be used here.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError(
            f"cuda-bindings is not installed: {error}", install_command("runtime")
        ) from error
    return Cuda(driver, device)
