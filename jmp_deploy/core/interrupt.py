"""Ctrl-C, and SIGTERM, that are not lost.

Python raises KeyboardInterrupt wherever it happens to be; in a destructor or in a callback from a
library's C++ it is printed and dropped, and the work goes on. So the signal is remembered too, and
long work asks between its steps. SIGTERM, of which Python would die on the spot, ends work in the
same way: what is half-written goes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
UNFINISHED = "nothing half-written is left behind"

_seen = threading.Event()
_number: int = signal.SIGINT
_left = UNFINISHED


@contextmanager
def remembered() -> Iterator[None]:
    """Remembers `SIGNALS` within; the handlers of before are put back. For the main thread only."""
    global _left, _number
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _seen.clear()
    _left, _number = UNFINISHED, int(signal.SIGINT)
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _seen.clear()  # what this process does next was not interrupted


def left(words: str) -> None:
    """Says what an interrupt from now on leaves behind, in place of `UNFINISHED`."""
    global _left
    _left = words


def farewell() -> tuple[str, int]:
    """What to say at the end of interrupted work, and its exit code (128 and the signal)."""
    word = "interrupted" if _number == signal.SIGINT else "terminated"
    return f"{word}; {_left}", 128 + _number


@contextmanager
def held() -> Iterator[None]:
    """Holds `SIGNALS` back until the block has ended. Outside the main thread: does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


def check() -> None:
    """Raises KeyboardInterrupt if an end was asked for since `remembered` began."""
    if _seen.is_set():
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    global _number
    _number = number
    _seen.set()
    raise KeyboardInterrupt
