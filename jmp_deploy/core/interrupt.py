"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever it happens to be; in a destructor or in a callback from a
library's C++ it is printed and dropped, and the work goes on. So the signal is remembered too, and
long work asks between its steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Remembers SIGINT within; the handler of before is put back. For the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _seen.clear()
    before = signal.signal(signal.SIGINT, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held() -> Iterator[None]:
    """Holds a SIGINT back until the block has ended. Outside the main thread: does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def check() -> None:
    """Raises KeyboardInterrupt if one was asked for since `remembered` began."""
    if _seen.is_set():
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    _seen.set()
    raise KeyboardInterrupt
