"""The command line: a thin shell over the modules, and the one place that turns errors into text.

Exit codes: 0 success; 1 a check failed (the artifact is kept); 2 usage or environment.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import __version__
from ..core import interrupt
from ..core.errors import BrokenPackageError, JmpDeployError, fail, one_line, say
from . import (
    bench,
    build,
    compare,
    doctor,
    inspect,
    package,
    plugin,
    recover,
    report,
    run,
    tune,
    validate,
    visualize,
)

COMMANDS = (
    *(build, run, compare, inspect, report, doctor, plugin, package),
    *(tune, recover, visualize, bench, validate),
)
"""One module each: its flags (`add`), its handler, its tables. In the order of `--help`."""


def make_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(
        prog="jmp_deploy",
        description="TensorRT engines of timm vision transformers that do a third less work "
        "(JMP: joint merging and pruning of tokens).",
        epilog="Start with `python -m jmp_deploy doctor`, then with "
        "`python -m jmp_deploy build deit_s`.",
    )
    parser.add_argument("--version", action="version", version=f"jmp_deploy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Never raises, never shows a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        given = make_parser().parse_args(arguments)
        given.typed = ["python", "-m", "jmp_deploy", *arguments]
        with interrupt.remembered(), _warnings_as_lines():
            return int(given.handler(given))
    except KeyboardInterrupt:
        words, code = interrupt.farewell()
        return fail(words, None, code)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _out_of_memory()
    except (Exception, SystemExit) as error:
        return _explain(error)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What the library warns of, without the line of our source where it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, RuntimeWarning):
                say(f"warning: {message}")
            else:
                usual(message, category, *rest, **more)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _out_of_memory() -> int:
    return fail("out of memory", "try a smaller model, image size or batch", 2)


def _explain(error: BaseException) -> int:
    """Ends the command with what went wrong; a failed import is behind many an error."""
    from ..core.packages import import_failure

    failure: JmpDeployError | None = import_failure(error)
    if isinstance(error, JmpDeployError) and not isinstance(failure, BrokenPackageError):
        failure = error  # who misses a package has said what for
    elif isinstance(error, SystemExit) and not failure:  # argparse: --help, wrong usage
        return error.code if isinstance(error.code, int) else 2
    elif os.environ.get("JMP_DEPLOY_DEBUG"):
        traceback.print_exception(error)
    if not failure and re.search("allocate.*memory|out of memory", str(error), re.IGNORECASE):
        return _out_of_memory()  # PyTorch and ONNX Runtime have no class of their own for it
    if failure:
        return fail(failure.message, failure.hint, failure.exit_code)
    # a bug of ours, or a library's: one line for the user all the same
    return fail(
        f"unexpected {type(error).__name__}: {one_line(error)}",
        "set JMP_DEPLOY_DEBUG=1 to see where it comes from",
        2,
    )
