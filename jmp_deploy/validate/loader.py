"""Decodes and preprocesses images in worker processes, a bounded number of batches ahead."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import interrupt
from ..core.errors import ImageError
from ..core.images import Batch, Preprocess, load_readable

if TYPE_CHECKING:
    from numpy.typing import NDArray

AHEAD = 2
"""Batches decoded beyond one for each worker, so that none waits while a batch is handed over."""
MOST_WORKERS = 8

_memory: SharedMemory | None = None
"""In a worker: where the pixels go."""


def default_workers() -> int:
    """One for each CPU that this process may use, at most eight."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def batches(
    groups: Sequence[Sequence[Path]], spec: Preprocess, workers: int
) -> Generator[Batch, None, None]:
    """Yields the batches in the order asked for, however many processes decode them.

    Close the generator (or end it) to stop the workers.

    Args:
        groups: the files of each batch.
        spec: preprocessing.
        workers: processes; 0 decodes in this one.

    Raises:
        ImageError: a worker process died.
    """
    if workers == 0 or not groups:
        for group in groups:
            yield load_readable(group, spec)
        return
    workers = min(workers, len(groups))
    context = multiprocessing.get_context("spawn")  # fork is not safe beside CUDA or threads
    with _shared(workers + AHEAD, max(map(len, groups)), spec) as memory:
        name = memory.name if memory else None
        pool = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(name,))
        waiting: deque[tuple[int, Future[Batch]]] = deque()
        rest = iter(groups)
        size = max(map(len, groups))
        try:
            for slot in range(workers + AHEAD):
                _submit(pool, waiting, rest, (slot, size), spec)
            while waiting:
                slot, future = waiting.popleft()
                batch = future.result()
                if memory:
                    # a copy: the slot goes to the next batch at once
                    ready = np.array(_slot(memory, slot, size, spec)[: len(batch.kept)])
                    batch = replace(batch, images=ready)
                _submit(pool, waiting, rest, (slot, size), spec)
                yield batch
        except BrokenProcessPool as error:
            interrupt.check()
            raise ImageError(
                "a worker process that decodes images died (killed for memory, or by a decoder)",
                "use fewer --workers or a smaller --batch; --workers 0 decodes in one process",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor,
    waiting: deque[tuple[int, Future[Batch]]],
    rest: Iterator[Sequence[Path]],
    place: tuple[int, int],
    spec: Preprocess,
) -> None:
    group = next(rest, None)
    if group is None:
        return
    with _no_interrupts():
        waiting.append((place[0], pool.submit(_task, group, spec, place)))


def _task(group: Sequence[Path], spec: Preprocess, place: tuple[int, int]) -> Batch:
    """What a worker does: the pixels into shared memory, the rest back through the pipe."""
    batch = load_readable(group, spec)
    if _memory is None:
        return batch
    _slot(_memory, *place, spec)[: len(batch.kept)] = batch.images
    return replace(batch, images=batch.images[:0])


@contextlib.contextmanager
def _shared(slots: int, size: int, spec: Preprocess) -> Iterator[SharedMemory | None]:
    """Memory for `slots` batches of `size` images, so that 600 kB an image pass through no pipe.

    None where /dev/shm is too small (64 MB in a container by default): a page that it cannot
    give would end the process with SIGBUS, so twice the room is asked for.
    """
    total = slots * size * _image_bytes(spec)
    try:
        there = os.statvfs("/dev/shm")
        roomy = there.f_bavail * there.f_frsize >= 2 * total
        memory = SharedMemory(create=True, size=total) if roomy else None
    except OSError:
        memory = None
    try:
        yield memory
    finally:
        if memory:
            memory.close()
            memory.unlink()


def _slot(memory: SharedMemory, slot: int, size: int, spec: Preprocess) -> NDArray[Any]:
    shape = (size, spec.channels, spec.height, spec.width)
    offset = slot * size * _image_bytes(spec)
    return np.ndarray(shape, dtype=np.float32, buffer=memory.buf, offset=offset)


def _image_bytes(spec: Preprocess) -> int:
    return spec.channels * spec.height * spec.width * np.dtype(np.float32).itemsize


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C goes to the whole process group: workers start with it blocked and never see it.

    `submit` starts them, and a new process inherits the mask; ours gets the signal on leaving. The
    mask is this thread's alone: another (ONNX Runtime's) may take the signal, and Python would
    interrupt this one before a worker has been told what it is. Hence `held`.
    """
    with interrupt.held():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(name: str | None) -> None:
    """Opens the shared memory; ends a worker whose parent was killed, as nobody else would."""
    global _memory
    if name is not None:
        _memory = SharedMemory(name)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
