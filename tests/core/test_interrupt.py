"""Ctrl-C at awkward moments."""

from __future__ import annotations

import signal
import threading

import pytest

from jmp_deploy.core import interrupt


@pytest.fixture
def interruptible():
    """SIGINT as it is in a terminal: tests that a script starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_held_interrupt_comes_after_the_block_whichever_thread_took_the_signal(interruptible):
    done = []
    before = signal.getsignal(signal.SIGINT)

    def held_work() -> None:
        with interrupt.held():
            # Blocked here, so that the other thread takes it, as ONNX Runtime's may.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            other = threading.Thread(target=unblocked)
            other.start()
            other.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            done.append("all of it")

    def unblocked() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        held_work()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_ends_with_the_work_that_it_ended():
    """A program that calls `main` goes on after it: its own calls of long work must not end too."""
    with pytest.raises(KeyboardInterrupt), interrupt.remembered():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as a library may swallow it
            interrupt.check()
    interrupt.check()


def test_nothing_comes_where_nothing_was_sent():
    with interrupt.held():
        pass
