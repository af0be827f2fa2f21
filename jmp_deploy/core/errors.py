"""Exceptions that carry a hint.

Every error that a user can cause or mend derives from `JmpDeployError`. The command line prints
its message and its hint and ends with its exit code; nothing else of ours reaches the terminal as
a traceback. Raise where the facts are known: what was expected, what was found, what to do.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from . import device
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
    """INT8 or FP8 without usable ranges: no images, a cache of another model, values not finite."""


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


class BrokenPackageError(MissingPackageError):
    """A package that this command needs is installed, but cannot be imported."""


FOR_CUDA_12 = ("tensorrt", "rtx", "runtime")
"""Extras of CUDA 13 that have a twin, "-cu12", for drivers before it."""

FROM_JETPACK = {
    "tensorrt": "sudo apt-get install python3-libnvinfer",
    "nvcc": "sudo apt-get install cuda-toolkit",
}
"""Extras that a Jetson has from its system instead."""


FOREIGN = ("polygraphy", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda")
"""Packages whose exceptions are errors of running a model."""


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Within, what Polygraphy, ONNX Runtime, TensorRT, CUDA or the system raise is an EngineError.

    TensorRT's and cuda-bindings' own are RuntimeErrors, the system's OSErrors.

    Args:
        what: cannot be done, in words.
    """
    try:
        yield
    except JmpDeployError:
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, (OSError, RuntimeError)) or package in FOREIGN:
            raise EngineError(f"{what}: {in_words(error)}") from error
        raise


def in_words(error: BaseException) -> str:
    """What an error says, in one line that can be printed and stand in a manifest; with its class
    where it is none of ours."""
    if isinstance(error, JmpDeployError):
        return one_line(error.message)
    if isinstance(error, OSError) and error.strerror:
        named = f" ({error.filename})" if error.filename else ""
        return one_line(f"{error.strerror}{named}")
    words, kind = one_line(error), type(error).__name__
    return f"{kind}: {words}" if words else kind


def install_command(extra: str) -> str:
    """The command that installs an extra here: from the checkout where this runs from one.

    It goes by the machine: a driver before CUDA 13 gets the twin for CUDA 12, a PyTorch that is
    there is kept, and a Jetson takes from JetPack what JetPack has.
    """
    jetson = device.jetson_linux() is not None
    if jetson and extra in FROM_JETPACK:
        return FROM_JETPACK[extra]
    if extra == "export" and (jetson or _has_torch()):
        extra = "export-no-torch"
    if device.needs_cuda_12():
        if extra == "nvcc":
            return "python -m pip install 'cuda-toolkit[nvcc,cudart,cccl]>=12.6,<13'"
        extra += "-cu12" if extra in FOR_CUDA_12 else ""
    root = checkout()
    if root is None:
        return f"python -m pip install 'jmp-deploy[{extra}]'"
    target = f".[{extra}]" if root == Path.cwd() else f"{root}[{extra}]"
    # What is there may be of other versions than the tested ones: then pip would replace it.
    held = "" if _has_torch() or extra.endswith(("-cu12", "-no-torch")) else constraints()
    return f"python -m pip install -e {shlex.quote(target)}{held}"


def constraints() -> str:
    """The option that holds pip to the tested set of versions, where that is at hand."""
    root = checkout()
    if root is None or device.needs_cuda_12() or not (root / "constraints.txt").is_file():
        return ""
    file = root / "constraints.txt"
    return f" -c {shlex.quote(file.name if root == Path.cwd() else str(file))}"


def one_line(value: object) -> str:
    """The first line of a text or an error, without control characters; empty if there is none.

    What others wrote (versions, names, messages) passes through here on its way to a terminal.
    """
    return printable(next(iter(str(value).strip().splitlines()), "")).strip()


def printable(text: str) -> str:
    """A text without control characters, other than the ends of its lines.

    Bytes of a file name that are no UTF-8, which Python keeps as lone surrogates, become "\\xff".
    """
    if text.isprintable():
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def _has_torch() -> bool:
    try:
        return find_spec("torch") is not None and find_spec("torchvision") is not None
    except (ImportError, ValueError):
        return False


def say(text: str) -> None:
    """Prints to standard error, for people.

    Names out of files of others (tensors, nodes, paths) are in it: no control character of theirs
    reaches the terminal.
    """
    print(printable(text), file=sys.stderr)


def fail(message: str, hint: str | None, code: int) -> int:
    """Prints what is wrong, and what to do on a line of its own; returns the exit code."""
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")
    return code
