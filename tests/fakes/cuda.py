"""A CUDA driver of host memory, for tests on machines without a GPU.

It stands in for `cuda.bindings.driver` (`tests/engine/test_contract.py` checks that each function
here exists there, with as many arguments). Streams are lazy: work is
done only when somebody waits for it, as late as CUDA allows, so that what forgets to wait, or
overwrites a buffer that is still to be read, computes something else. What CUDA leaves undefined
is written to `violations`; what is not given back is in `leaks()`; `fail_at` makes one call fail.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any

PRIMARY = 0xC0DE
WITHOUT_CONTEXT = (
    *("cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"),
    *("cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent"),
)
CAPABILITY = (8, 6)


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906
    CUDA_ERROR_UNKNOWN = 999


class Handle(int):
    """CUstream and its like: an object that is a number."""


class Stream:
    def __init__(self, number: int, context: int) -> None:
        self.number, self.context = number, context
        self.queue: list[Callable[[], None]] = []
        self.enqueued = self.executed = 0
        self.capture: list[Callable[[], None]] | None = None
        self.capturing_thread: int | None = None
        self.is_broken = False  # its capture
        self.is_alive = True
        self.id = next(_ids)


_ids = count(1)


class FakeCuda:
    """All state, and `driver` as a module.

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
        self.other_gpu: set[int] = set()  # addresses that are not of GPU 0
        self.driver = SimpleNamespace(
            **{n: self._ours(n) for n in dir(self) if re.match("cu[A-Z]", n)},
            CUresult=Status,
            CUstream=Handle,
            CUgraphExec=Handle,
            CUevent_flags=SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2),
            CUstream_flags=SimpleNamespace(CU_STREAM_NON_BLOCKING=1),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1),
            CUstreamCaptureStatus=SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0),
            CUpointer_attribute=SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9),
            CUdevice_attribute=SimpleNamespace(
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
            ),
        )

    # --- For tests ---

    def _ours(self, name: str) -> Callable[..., tuple]:
        """A function as our code sees it: most want a context that is current. Tests, which play
        other libraries, call `cuX` itself."""
        function = getattr(self, name)
        if name in WITHOUT_CONTEXT:
            return function

        @functools.wraps(function)
        def call(*arguments: Any) -> tuple:
            if not self.context_stack():
                self.violations.append(f"{name} while no context is current")
            return function(*arguments)

        return call

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
        self.context_stack().append(context)

    def pop(self) -> None:
        self.context_stack().pop()

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
            return Status.CUDA_ERROR_INVALID_HANDLE
        self._check_context(target.context, f"stream {target.number:#x}")
        if target.capture is not None:
            target.capture.append(work)
        else:
            target.queue.append(work)
            target.enqueued += 1
        return Status.CUDA_SUCCESS

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

    def capturing_here(self) -> list[Stream]:
        me = threading.get_ident()
        every = self.streams.values()
        return [s for s in every if s.capture is not None and s.capturing_thread == me]

    # --- Contexts ---

    def context_stack(self) -> list[int]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def context(self) -> int:
        return self.context_stack()[-1] if self.context_stack() else PRIMARY

    def _check_context(self, owner: int, what: str) -> None:
        if owner and owner != self.context():
            self.violations.append(f"{what} is of another CUDA context")

    def cuInit(self, flags: int) -> tuple:
        if self.fails("cuInit"):
            return (Status.CUDA_ERROR_UNKNOWN,)
        return (Status.CUDA_SUCCESS,)

    def cuCtxGetCurrent(self) -> tuple:
        stack = self.context_stack()
        return Status.CUDA_SUCCESS, (Handle(stack[-1]) if stack else None)

    def cuCtxPushCurrent(self, context: int) -> tuple:
        # never made to fail: it does for a context that is gone, and all that was in it then is
        self.context_stack().append(int(context))
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple:
        return Status.CUDA_SUCCESS, Handle(self.context_stack().pop())

    def cuDeviceGet(self, ordinal: int) -> tuple:
        if self.fails("cuDeviceGet"):
            return Status.CUDA_ERROR_UNKNOWN, None
        return Status.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, dev: int) -> tuple:
        if self.fails("cuDevicePrimaryCtxRetain"):
            return Status.CUDA_ERROR_UNKNOWN, None
        return Status.CUDA_SUCCESS, Handle(PRIMARY + dev)

    def cuCtxGetDevice(self) -> tuple:
        if self.fails("cuCtxGetDevice") or not self.context_stack():
            return Status.CUDA_ERROR_UNKNOWN, None
        primary = range(PRIMARY, PRIMARY + 8)  # of GPU 0, 1, ...
        return Status.CUDA_SUCCESS, (self.context() - PRIMARY if self.context() in primary else 0)

    def cuDeviceGetAttribute(self, attrib: int, dev: int) -> tuple:
        if self.fails("cuDeviceGetAttribute"):
            return Status.CUDA_ERROR_UNKNOWN, None
        return Status.CUDA_SUCCESS, CAPABILITY[attrib == 76]

    def cuDeviceGetName(self, length: int, dev: int) -> tuple:
        if self.fails("cuDeviceGetName"):
            return Status.CUDA_ERROR_UNKNOWN, None
        return Status.CUDA_SUCCESS, b"Fake GPU\0\0"

    def cuPointerGetAttribute(self, attribute: int, ptr: int) -> tuple:
        with self.lock:
            if not self.inside(int(ptr), 1, ("device", "pinned")):
                return Status.CUDA_ERROR_INVALID_VALUE, None
            return Status.CUDA_SUCCESS, int(int(ptr) in self.other_gpu)

    # --- Memory ---

    def cuMemGetInfo(self) -> tuple:
        if self.fails("cuMemGetInfo"):
            return Status.CUDA_ERROR_UNKNOWN, None, None
        return Status.CUDA_SUCCESS, self.memory - self.used, self.memory

    def cuMemAlloc(self, size: int) -> tuple:
        return self._allocate("cuMemAlloc", size, "device")

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple:
        return self._allocate("cuMemHostAlloc", size, "pinned")

    def _allocate(self, name: str, size: int, kind: str) -> tuple:
        with self.lock:
            if self.fails(name):
                return Status.CUDA_ERROR_OUT_OF_MEMORY, None
            if capturing := self.capturing_here():
                capturing[0].is_broken = True
                return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
            if kind == "device" and self.used + size > self.memory:
                return Status.CUDA_ERROR_OUT_OF_MEMORY, None
            buffer = ctypes.create_string_buffer(b"\xff" * (size + 256))
            address = (ctypes.addressof(buffer) + 255) // 256 * 256
            self.allocations[address] = (buffer, size, kind, self.context())
            self.used += size if kind == "device" else 0
            return Status.CUDA_SUCCESS, address

    def cuMemFree(self, address: int) -> tuple:
        return self._free("cuMemFree", address, "device")

    def cuMemFreeHost(self, address: int) -> tuple:
        return self._free("cuMemFreeHost", address, "pinned")

    def _free(self, name: str, address: int, kind: str) -> tuple:
        with self.lock:
            failed = self.fails(name)
            if kind == "device":
                self.drain_all()  # it waits
            elif self.pending():
                self.violations.append(f"{name} while work is pending")
            if self.allocations.get(address, (0, 0, "", 0))[2] != kind:
                self.violations.append(f"{name} of what is not allocated")
                return (Status.CUDA_ERROR_INVALID_VALUE,)
            buffer, size, _, owner = self.allocations.pop(address)
            self._check_context(owner, name)
            ctypes.memset(ctypes.addressof(buffer), 0xFF, size)
            self.used -= size if kind == "device" else 0
            return (Status.CUDA_ERROR_UNKNOWN if failed else Status.CUDA_SUCCESS,)

    def cuMemcpyAsync(self, target: int, source: int, size: int, stream: int) -> tuple:
        with self.lock:
            if self.fails("cuMemcpyAsync"):
                return (Status.CUDA_ERROR_UNKNOWN,)

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
                return (Status.CUDA_ERROR_INVALID_HANDLE,)
            _, value, owner = self.objects.pop(int(handle))
            self._check_context(owner, name)
            if kind == "stream":
                self.drain(self.streams.pop(int(handle)))
            if kind == "executable":
                value.is_alive = False
            return (Status.CUDA_ERROR_UNKNOWN if failed else Status.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple:
        with self.lock:
            if self.fails("cuStreamCreate"):
                return Status.CUDA_ERROR_UNKNOWN, None
            number = self._make("stream", None)
            self.streams[number] = Stream(number, self.context())
            return Status.CUDA_SUCCESS, number

    def cuStreamDestroy(self, stream: int) -> tuple:
        return self._destroy("cuStreamDestroy", "stream", stream)

    def cuStreamGetId(self, stream: int) -> tuple:
        if self.fails("cuStreamGetId") or int(stream) not in self.streams:
            return Status.CUDA_ERROR_INVALID_HANDLE, None
        return Status.CUDA_SUCCESS, self.streams[int(stream)].id

    def cuStreamIsCapturing(self, stream: int) -> tuple:
        if self.fails("cuStreamIsCapturing") or int(stream) not in self.streams:
            return Status.CUDA_ERROR_INVALID_HANDLE, None
        return Status.CUDA_SUCCESS, int(self.streams[int(stream)].capture is not None)

    def cuStreamSynchronize(self, stream: int) -> tuple:
        with self.lock:
            failed = self.fails("cuStreamSynchronize")
            target = self.streams.get(int(stream))
            if target is None:
                return (Status.CUDA_ERROR_INVALID_HANDLE,)
            if target.capture is not None:
                target.is_broken = True
                return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
            self.drain(target)
            return (Status.CUDA_ERROR_UNKNOWN if failed else Status.CUDA_SUCCESS,)

    def cuEventCreate(self, flags: int) -> tuple:
        with self.lock:
            if self.fails("cuEventCreate"):
                return Status.CUDA_ERROR_UNKNOWN, None
            return Status.CUDA_SUCCESS, self._make("event", SimpleNamespace(mark=None))

    def cuEventDestroy(self, event: int) -> tuple:
        return self._destroy("cuEventDestroy", "event", event)

    def cuEventRecord(self, event: int, stream: int) -> tuple:
        with self.lock:
            if self.fails("cuEventRecord"):
                return (Status.CUDA_ERROR_UNKNOWN,)
            target = self.streams[int(stream)]
            self.objects[int(event)][1].mark = (target, target.enqueued)
            return (Status.CUDA_SUCCESS,)

    def cuEventSynchronize(self, event: int) -> tuple:
        with self.lock:
            failed = self.fails("cuEventSynchronize")
            mark = self.objects[int(event)][1].mark
            if mark:
                self.drain(*mark)
            return (Status.CUDA_ERROR_UNKNOWN if failed else Status.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple:
        with self.lock:
            if self.fails("cuStreamWaitEvent"):
                return (Status.CUDA_ERROR_UNKNOWN,)
            mark = self.objects[int(event)][1].mark
            if self.streams[int(stream)].capture is not None:  # what it marks is not in the capture
                self.streams[int(stream)].is_broken = True
                return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
            return (self.enqueue(stream, lambda: self.drain(*mark) if mark else None),)

    # --- Graphs ---

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple:
        with self.lock:
            if self.fails("cuStreamBeginCapture"):
                return (Status.CUDA_ERROR_UNKNOWN,)
            target = self.streams[int(stream)]
            if target.number == 0 or target.capture is not None:
                return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
            target.capture, target.capturing_thread = [], threading.get_ident()
            return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple:
        with self.lock:
            failed = self.fails("cuStreamEndCapture")
            target = self.streams[int(stream)]
            if target.capture is None or target.capturing_thread != threading.get_ident():
                self.violations.append("end of a capture that was not begun here")
                return Status.CUDA_ERROR_INVALID_VALUE, None
            works, target.capture = target.capture, None
            if target.is_broken:
                target.is_broken = False
                return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
            if failed:
                return Status.CUDA_ERROR_UNKNOWN, None
            return Status.CUDA_SUCCESS, self._make("graph", works)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple:
        with self.lock:
            if self.fails("cuGraphInstantiate"):
                return Status.CUDA_ERROR_UNKNOWN, None
            works = list(self.objects[int(graph)][1])
            value = SimpleNamespace(works=works, is_alive=True)
            return Status.CUDA_SUCCESS, self._make("executable", value)

    def cuGraphDestroy(self, graph: int) -> tuple:
        return self._destroy("cuGraphDestroy", "graph", graph)

    def cuGraphExecDestroy(self, graph: int) -> tuple:
        return self._destroy("cuGraphExecDestroy", "executable", graph)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple:
        with self.lock:
            if self.fails("cuGraphLaunch"):
                return (Status.CUDA_ERROR_UNKNOWN,)
            value = self.objects[int(graph)][1]
            if self.streams[int(stream)].capture is not None:
                self.streams[int(stream)].is_broken = True
                return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
            self.launches += 1

            def work() -> None:
                if not value.is_alive:
                    self.violations.append("a graph was destroyed before it ran")
                for step in value.works:
                    step()

            return (self.enqueue(stream, work),)
