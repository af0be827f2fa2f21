"""Exceptions that carry a hint.

Every error that a user can cause or mend derives from `JmpDeployError`. The command line prints
its message and its hint and ends with its exit code; nothing else of ours reaches the terminal as
a traceback. Raise where the facts are known: what was expected, what was found, what to do.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from .paths import checkout


class JmpDeployError(Exception):
    """Base of all errors meant for the user.

    Args:
        message: what is wrong: expected and found, in one sentence.
        hint: what to do about it, best a command; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ModelError(JmpDeployError):
    """Unknown model name, or a model that JMP cannot patch."""


class WeightsError(JmpDeployError):
    """A checkpoint that cannot be read or does not fit the model."""


class ScheduleError(JmpDeployError):
    """A keep schedule that does not fit the model."""


class ImageError(JmpDeployError):
    """Missing, unreadable or unusable input images."""


class CalibrationError(JmpDeployError):
    """INT8 without usable ranges: no images, a cache of another model, values not finite."""


class GraphError(JmpDeployError):
    """An ONNX graph that is corrupt or holds something other than expected."""


class ToolchainError(JmpDeployError):
    """Missing or unusable compiler, CUDA toolkit or TensorRT headers."""


class EngineError(JmpDeployError):
    """An engine that cannot be built, loaded or run."""


class CheckError(JmpDeployError):
    """A check of what was measured failed."""

    exit_code = 1


class GpuMemoryError(EngineError):
    """The GPU has no room for what was asked for."""


class NonFiniteError(EngineError):
    """An engine answered NaN or infinity; `row` is the first image for which it did."""

    exit_code = 1
    row = 0


class ArtifactError(JmpDeployError):
    """An artifact directory that is incomplete, altered or cannot be written."""


class MissingPackageError(JmpDeployError):
    """An optional package that this command needs is not installed."""


def install_command(extra: str) -> str:
    """The pip command for an extra: from the checkout where this runs from one."""
    if root := checkout():
        target = f".[{extra}]" if root == Path.cwd() else f"{root}[{extra}]"
        return f"python -m pip install -e {shlex.quote(target)}"
    return f"python -m pip install 'jmp-deploy[{extra}]'"


def fail(message: str, hint: str | None, code: int) -> int:
    """Prints what is wrong, and what to do on a line of its own; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code
