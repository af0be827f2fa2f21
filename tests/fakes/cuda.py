"""A CUDA runtime and driver of host memory, for tests on machines without a GPU.

It stands in for `cuda.bindings.runtime` and `cuda.bindings.driver` (`tests/engine/test_contract.py`
checks that each function here exists there, with as many arguments). Streams are lazy: work is
done only when somebody waits for it, as late as CUDA allows, so that what forgets to wait, or
overwrites a buffer that is still to be read, computes something else. What CUDA leaves undefined
is written to `violations`; what is not given back is in `leaks()`; `fail_at` makes one call fail.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

PRIMARY = 0xC0DE
CAPABILITY = (8, 6)


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidResourceHandle = 400
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorUnknown = 999


class Handle(int):
    """cudaStream_t and its like: an object that is a number."""


class Stream:
    def __init__(self, number: int, context: int) -> None:
        self.number, self.context = number, context
        self.queue: list[Callable[[], None]] = []
        self.enqueued = self.executed = 0
        self.capture: list[Callable[[], None]] | None = None
        self.capturing_thread: int | None = None
        self.is_alive = True


class FakeCuda:
    """All state, and `runtime` and `driver` as modules.

    Args:
        memory: bytes of device memory; an allocation past it fails.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        self.lock = threading.RLock()
        self.memory, self.used = memory, 0
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.fail_at: int | None = None
        self.failed: str | None = None
        self.allocations: dict[int, tuple[Any, int, str, int]] = {}
        self.objects: dict[int, tuple[str, Any, int]] = {}
        self.streams: dict[int, Stream] = {0: Stream(0, 0)}
        self.alive: Counter[str] = Counter()
        self.launches = 0
        self._numbers = iter(range(0x1000, 1 << 40, 0x10))
        self._local = threading.local()
        self.runtime = SimpleNamespace(
            **{n: getattr(self, n) for n in dir(self) if n.startswith("cuda")},
            cudaError_t=Status,
            cudaStream_t=Handle,
            cudaHostAllocDefault=0,
            cudaEventDisableTiming=2,
            cudaStreamNonBlocking=1,
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyDefault=4),
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
            cudaDeviceAttr=SimpleNamespace(
                cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
            ),
        )
        names = ("cuInit", "cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent")
        self.driver = SimpleNamespace(**{n: getattr(self, n) for n in names}, CUcontext=Handle)

    # --- For tests ---

    def leaks(self) -> list[str]:
        """What was made and not given back."""
        found = [f"{kind} of {size} bytes" for _, size, kind, _ in self.allocations.values()]
        found += [kind for kind, _, _ in self.objects.values()]
        found += [name for name, count in self.alive.items() for _ in range(count)]
        return found

    def fails(self, name: str) -> bool:
        """Counts a call; whether it is the one that must fail."""
        with self.lock:
            self.calls.append(name)
            if self.fail_at is not None and len(self.calls) - 1 == self.fail_at:
                self.failed = name
                return True
            return False

    def count(self, name: str) -> int:
        return self.calls.count(name)

    def push(self, context: int) -> None:
        """Makes a context current, as pycuda's `make_context` does."""
        self._stack().append(context)

    def pop(self) -> None:
        self._stack().pop()

    def inside(self, address: int, size: int, kinds: tuple[str, ...] = ("device",)) -> bool:
        """Whether a range lies in one live allocation of these kinds."""
        return any(
            kind in kinds and start <= address and address + size <= start + length
            for start, (_, length, kind, _) in self.allocations.items()
        )

    def enqueue(self, stream: int, work: Callable[[], None]) -> Status:
        """Puts work on a stream, or into its capture."""
        target = self.streams.get(int(stream))
        if target is None:
            return Status.cudaErrorInvalidResourceHandle
        self._check_context(target.context, f"stream {target.number:#x}")
        if target.capture is not None:
            target.capture.append(work)
        else:
            target.queue.append(work)
            target.enqueued += 1
        return Status.cudaSuccess

    def drain(self, stream: Stream, until: int | None = None) -> None:
        """Does the work of a stream, up to a mark."""
        while stream.queue and (until is None or stream.executed < until):
            work = stream.queue.pop(0)
            stream.executed += 1
            work()

    def drain_all(self) -> None:
        for stream in list(self.streams.values()):
            self.drain(stream)

    def pending(self) -> bool:
        return any(stream.queue for stream in self.streams.values())

    def is_capturing_here(self) -> bool:
        me = threading.get_ident()
        return any(
            s.capture is not None and s.capturing_thread == me for s in self.streams.values()
        )

    # --- Contexts ---

    def _stack(self) -> list[int]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def context(self) -> int:
        return self._stack()[-1] if self._stack() else PRIMARY

    def _check_context(self, owner: int, what: str) -> None:
        if owner and owner != self.context():
            self.violations.append(f"{what} is of another CUDA context")

    def cuInit(self, flags: int) -> tuple:
        if self.fails("cuInit"):
            return (Status.cudaErrorUnknown,)
        return (Status.cudaSuccess,)

    def cuCtxGetCurrent(self) -> tuple:
        stack = self._stack()
        return Status.cudaSuccess, (Handle(stack[-1]) if stack else None)

    def cuCtxPushCurrent(self, context: int) -> tuple:
        if self.fails("cuCtxPushCurrent"):
            return (Status.cudaErrorUnknown,)
        self._stack().append(int(context))
        return (Status.cudaSuccess,)

    def cuCtxPopCurrent(self) -> tuple:
        return Status.cudaSuccess, Handle(self._stack().pop())

    def cudaSetDevice(self, device: int) -> tuple:
        if self.fails("cudaSetDevice"):
            return (Status.cudaErrorUnknown,)
        self._stack()[:] = [PRIMARY]
        return (Status.cudaSuccess,)

    def cudaGetDevice(self) -> tuple:
        if self.fails("cudaGetDevice"):
            return Status.cudaErrorUnknown, None
        return Status.cudaSuccess, 0

    def cudaDeviceGetAttribute(self, attribute: str, device: int) -> tuple:
        if self.fails("cudaDeviceGetAttribute"):
            return Status.cudaErrorUnknown, None
        return Status.cudaSuccess, CAPABILITY[attribute == "minor"]

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        if self.fails("cudaGetDeviceProperties"):
            return Status.cudaErrorUnknown, None
        return Status.cudaSuccess, SimpleNamespace(name=b"Fake GPU\0\0")

    def cudaGetLastError(self) -> tuple:
        return (Status.cudaSuccess,)

    # --- Memory ---

    def cudaMemGetInfo(self) -> tuple:
        if self.fails("cudaMemGetInfo"):
            return Status.cudaErrorUnknown, None, None
        return Status.cudaSuccess, self.memory - self.used, self.memory

    def cudaMalloc(self, size: int) -> tuple:
        return self._allocate("cudaMalloc", size, "device")

    def cudaHostAlloc(self, size: int, flags: int) -> tuple:
        return self._allocate("cudaHostAlloc", size, "pinned")

    def _allocate(self, name: str, size: int, kind: str) -> tuple:
        with self.lock:
            if self.fails(name):
                return Status.cudaErrorMemoryAllocation, None
            if self.is_capturing_here():
                return Status.cudaErrorStreamCaptureUnsupported, None
            if kind == "device" and self.used + size > self.memory:
                return Status.cudaErrorMemoryAllocation, None
            buffer = ctypes.create_string_buffer(b"\xff" * (size + 256))
            address = (ctypes.addressof(buffer) + 255) // 256 * 256
            self.allocations[address] = (buffer, size, kind, self.context())
            self.used += size if kind == "device" else 0
            return Status.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple:
        return self._free("cudaFree", address, "device")

    def cudaFreeHost(self, address: int) -> tuple:
        return self._free("cudaFreeHost", address, "pinned")

    def _free(self, name: str, address: int, kind: str) -> tuple:
        with self.lock:
            failed = self.fails(name)
            if address == 0:
                self._stack()[:] = self._stack() or [PRIMARY]
                return (Status.cudaErrorUnknown if failed else Status.cudaSuccess,)
            if kind == "device":
                self.drain_all()  # it waits
            elif self.pending():
                self.violations.append(f"{name} while work is pending")
            if self.allocations.get(address, (0, 0, "", 0))[2] != kind:
                self.violations.append(f"{name} of what is not allocated")
                return (Status.cudaErrorInvalidValue,)
            buffer, size, _, owner = self.allocations.pop(address)
            self._check_context(owner, name)
            ctypes.memset(ctypes.addressof(buffer), 0xFF, size)
            self.used -= size if kind == "device" else 0
            return (Status.cudaErrorUnknown if failed else Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple:
        with self.lock:
            if self.fails("cudaMemcpyAsync"):
                return (Status.cudaErrorUnknown,)

            def work() -> None:
                for address, name in ((target, "to"), (source, "from")):
                    if not self.inside(address, size, ("device", "pinned")):
                        self.violations.append(f"copy {name} memory that is not allocated")
                        return
                ctypes.memmove(target, source, size)

            return (self.enqueue(stream, work),)

    # --- Streams and events ---

    def _make(self, kind: str, value: Any) -> Handle:
        number = Handle(next(self._numbers))
        self.objects[number] = (kind, value, self.context())
        return number

    def _destroy(self, name: str, kind: str, handle: int) -> tuple:
        with self.lock:
            failed = self.fails(name)
            if self.objects.get(int(handle), ("",))[0] != kind:
                self.violations.append(f"{name} of no {kind}")
                return (Status.cudaErrorInvalidResourceHandle,)
            _, value, owner = self.objects.pop(int(handle))
            self._check_context(owner, name)
            if kind == "stream":
                self.drain(self.streams.pop(int(handle)))
            if kind == "executable":
                value.is_alive = False
            return (Status.cudaErrorUnknown if failed else Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        with self.lock:
            if self.fails("cudaStreamCreateWithFlags"):
                return Status.cudaErrorUnknown, None
            number = self._make("stream", None)
            self.streams[number] = Stream(number, self.context())
            return Status.cudaSuccess, number

    def cudaStreamDestroy(self, stream: int) -> tuple:
        return self._destroy("cudaStreamDestroy", "stream", stream)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        with self.lock:
            failed = self.fails("cudaStreamSynchronize")
            target = self.streams.get(int(stream))
            if target is None:
                return (Status.cudaErrorInvalidResourceHandle,)
            if target.capture is not None:
                return (Status.cudaErrorStreamCaptureUnsupported,)
            self.drain(target)
            return (Status.cudaErrorUnknown if failed else Status.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple:
        with self.lock:
            if self.fails("cudaEventCreateWithFlags"):
                return Status.cudaErrorUnknown, None
            return Status.cudaSuccess, self._make("event", SimpleNamespace(mark=None))

    def cudaEventDestroy(self, event: int) -> tuple:
        return self._destroy("cudaEventDestroy", "event", event)

    def cudaEventRecord(self, event: int, stream: int) -> tuple:
        with self.lock:
            if self.fails("cudaEventRecord"):
                return (Status.cudaErrorUnknown,)
            target = self.streams[int(stream)]
            self.objects[int(event)][1].mark = (target, target.enqueued)
            return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple:
        with self.lock:
            failed = self.fails("cudaEventSynchronize")
            mark = self.objects[int(event)][1].mark
            if mark:
                self.drain(*mark)
            return (Status.cudaErrorUnknown if failed else Status.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple:
        with self.lock:
            if self.fails("cudaStreamWaitEvent"):
                return (Status.cudaErrorUnknown,)
            mark = self.objects[int(event)][1].mark
            return (self.enqueue(stream, lambda: self.drain(*mark) if mark else None),)

    # --- Graphs ---

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        with self.lock:
            if self.fails("cudaStreamBeginCapture"):
                return (Status.cudaErrorUnknown,)
            target = self.streams[int(stream)]
            if target.number == 0 or target.capture is not None:
                return (Status.cudaErrorStreamCaptureUnsupported,)
            target.capture, target.capturing_thread = [], threading.get_ident()
            return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        with self.lock:
            failed = self.fails("cudaStreamEndCapture")
            target = self.streams[int(stream)]
            if target.capture is None or target.capturing_thread != threading.get_ident():
                self.violations.append("end of a capture that was not begun here")
                return Status.cudaErrorInvalidValue, None
            works, target.capture = target.capture, None
            if failed:
                return Status.cudaErrorUnknown, None
            return Status.cudaSuccess, self._make("graph", works)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        with self.lock:
            if self.fails("cudaGraphInstantiate"):
                return Status.cudaErrorUnknown, None
            works = list(self.objects[int(graph)][1])
            value = SimpleNamespace(works=works, is_alive=True)
            return Status.cudaSuccess, self._make("executable", value)

    def cudaGraphDestroy(self, graph: int) -> tuple:
        return self._destroy("cudaGraphDestroy", "graph", graph)

    def cudaGraphExecDestroy(self, graph: int) -> tuple:
        return self._destroy("cudaGraphExecDestroy", "executable", graph)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple:
        with self.lock:
            if self.fails("cudaGraphLaunch"):
                return (Status.cudaErrorUnknown,)
            value = self.objects[int(graph)][1]
            self.launches += 1

            def work() -> None:
                if not value.is_alive:
                    self.violations.append("a graph was destroyed before it ran")
                for step in value.works:
                    step()

            return (self.enqueue(stream, work),)
