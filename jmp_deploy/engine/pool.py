"""Device memory that comes again: cudaMalloc takes longer than a small inference, and freeing makes
the whole GPU wait."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress

from ..core.errors import EngineError, GpuMemoryError
from .cuda import Cuda

KEPT = 16
"""Pieces that are kept at most; one of the kind that came first goes."""


class Pool:
    """Pieces of device memory by size and by the stream in whose order they were used.

    A piece is given out again in the same order only, as PyTorch's and CuPy's pools do: what was
    enqueued on the stream before it came back is done before what comes next on that stream. For
    any number of threads.

    Args:
        cuda: the context; `take` and `close` are called within `Cuda.current`, `give` anywhere.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._kept: dict[tuple[int, int], list[int]] = {}  # (size, order) -> addresses, never none
        self._is_open = True
        # give() is called by __del__, which may come while this thread holds the lock
        self._lock = threading.RLock()

    def take(self, size: int, order: int) -> int:
        """A piece of `size` bytes, for use in an order.

        Raises:
            GpuMemoryError: even after what is kept was freed.
        """
        with self._lock:
            if (size, order) in self._kept:
                return self._pop((size, order))
        try:
            return self._cuda.malloc(size)
        except GpuMemoryError:
            if not self._free_all():
                raise
            return self._cuda.malloc(size)

    def give(self, address: int, size: int, order: int) -> None:
        """Takes a piece back; never raises."""
        with self._lock:
            if self._is_open:
                self._kept.setdefault((size, order), []).append(address)
                if sum(map(len, self._kept.values())) <= KEPT:
                    return
                address = self._pop(next(iter(self._kept)))
        with suppress(EngineError), self._cuda.current():
            self._cuda.free(address)

    def close(self) -> None:
        """Frees what is kept; what comes back later is freed at once."""
        with self._lock:
            self._is_open = False
        self._free_all()

    def _pop(self, kind: tuple[int, int]) -> int:
        address = self._kept[kind].pop()
        if not self._kept[kind]:
            del self._kept[kind]
        return address

    def _free_all(self) -> bool:
        """Whether there was anything."""
        with self._lock:
            kept, self._kept = self._kept, {}
        with ExitStack() as steps:
            for addresses in kept.values():
                for address in addresses:
                    steps.callback(self._cuda.free, address)
        return bool(kept)
