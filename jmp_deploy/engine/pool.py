"""Device memory that comes again: cudaMalloc takes longer than a small inference, and freeing makes
the whole GPU wait."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import ExitStack, suppress

from ..core.errors import EngineError, GpuMemoryError
from .cuda import Cuda

KEPT = 16
"""Pieces that are kept at most; the one that has waited longest goes."""


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
        self._kept: OrderedDict[int, tuple[int, int]] = OrderedDict()  # address -> size, order
        self._is_open = True
        # give() is called by __del__, which may come while this thread holds the lock
        self._lock = threading.RLock()

    def take(self, size: int, order: int) -> int:
        """A piece of `size` bytes, for use in an order.

        Raises:
            GpuMemoryError: even after what is kept was freed.
        """
        with self._lock:
            for address, kind in self._kept.items():
                if kind == (size, order):
                    del self._kept[address]
                    return address
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
                self._kept[address] = size, order
                if len(self._kept) <= KEPT:
                    return
                address, _ = self._kept.popitem(last=False)
        with suppress(EngineError), self._cuda.current():
            self._cuda.free(address)

    def close(self) -> None:
        """Frees what is kept; what comes back later is freed at once."""
        with self._lock:
            self._is_open = False
        self._free_all()

    def _free_all(self) -> bool:
        """Whether there was anything."""
        with self._lock:
            kept, self._kept = list(self._kept), OrderedDict()
        with ExitStack() as steps:
            for address in kept:
                steps.callback(self._cuda.free, address)
        return bool(kept)
