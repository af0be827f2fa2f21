"""Decodes and preprocesses images in worker processes, a bounded number of batches ahead."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import interrupt
from .errors import ImageError, JmpDeployError
from .images import Preprocess, open_image, preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

AHEAD = 2
"""Batches decoded beyond one for each worker, so that none waits while a batch is handed over."""
MOST_WORKERS = 8


@dataclass(frozen=True)
class Batch:
    """The readable images of a batch.

    Attributes:
        images: [b, 3, H, W] float32.
        kept: for each of them its position in what was asked for.
        unreadable: (position, reason) of the others.
    """

    images: NDArray[Any]
    kept: tuple[int, ...]
    unreadable: tuple[tuple[int, str], ...]


def default_workers() -> int:
    """One for each CPU that this process may use, at most eight."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def load(paths: Sequence[Path], spec: Preprocess) -> Batch:
    """Decodes and preprocesses one batch in this process. An unreadable image is no error."""
    images, kept, unreadable = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow on odd EXIF data and large photos
        for position, path in enumerate(paths):
            try:
                images.append(preprocess(open_image(path), spec))
                kept.append(position)
            except JmpDeployError as error:
                unreadable.append((position, error.message))
            except Exception as error:  # a decoder's own slip on a broken file (struct.error, ...)
                reason = f"cannot read {path} as an image: {type(error).__name__}: {error}"
                unreadable.append((position, reason))
    shape = (0, 3, spec.height, spec.width)
    stacked = np.stack(images) if images else np.zeros(shape, dtype=np.float32)
    return Batch(stacked, tuple(kept), tuple(unreadable))


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
    if workers == 0:
        for group in groups:
            yield load(group, spec)
        return
    context = multiprocessing.get_context("spawn")  # fork is not safe beside CUDA or threads
    pool = ProcessPoolExecutor(min(workers, len(groups)) or 1, context, initializer=_prepare)
    waiting: deque[Future[Batch]] = deque()
    try:
        rest = iter(groups)
        for _ in range(workers + AHEAD):
            _submit(pool, waiting, rest, spec)
        while waiting:
            batch = waiting.popleft().result()
            _submit(pool, waiting, rest, spec)
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
    waiting: deque[Future[Batch]],
    rest: Iterator[Sequence[Path]],
    spec: Preprocess,
) -> None:
    group = next(rest, None)
    if group is None:
        return
    with _no_interrupts():
        waiting.append(pool.submit(load, group, spec))


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C goes to the whole process group: workers start with it blocked and never see it.

    `submit` starts them, and a new process inherits the mask; ours gets the signal on leaving.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare() -> None:
    """Ends a worker whose parent was killed: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
