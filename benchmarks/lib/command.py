"""What the benchmarks' commands share."""

from __future__ import annotations

from collections.abc import Callable

from jmp_deploy.core.errors import JmpDeployError, fail


def exit_code(work: Callable[[], object]) -> int:
    """Does the work; an error of ours becomes one message with a hint, and the exit code."""
    try:
        work()
    except JmpDeployError as error:
        return fail(error.message, error.hint, error.exit_code)
    return 0
