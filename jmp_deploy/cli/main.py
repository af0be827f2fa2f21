"""The command line: a thin shell over the modules, and the one place that turns errors into text.

Exit codes: 0 success; 1 a check failed (the artifact is kept); 2 usage or environment.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..core import interrupt
from ..core.errors import JmpDeployError, fail, install_command
from . import (
    bench,
    build,
    compare,
    doctor,
    inspect,
    plugin,
    report,
    run,
    tune,
    validate,
    visualize,
)

COMMANDS = (
    *(build, run, compare, inspect, report, doctor, plugin),
    *(tune, visualize, bench, validate),
)
"""One module each: its flags (`add`), its handler, its tables. In the order of `--help`."""

EXTRAS = {
    "torch": "export",
    "torchvision": "export",
    "timm": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_graphsurgeon": "export",
    "onnxconverter_common": "export",
    "safetensors": "export",
    "huggingface_hub": "export",
    "polygraphy": "runtime",
    "onnxruntime": "runtime",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
}
"""Package that is missing -> extra of ours that installs it."""


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
        given.typed = shlex.join(["python", "-m", "jmp_deploy", *arguments])
        with interrupt.remembered():
            return int(given.handler(given))
    except SystemExit as exit_:  # argparse: --help, --version, wrong usage
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        return fail("interrupted; nothing half-written is left behind", None, 130)
    except JmpDeployError as error:
        return fail(error.message, error.hint, error.exit_code)
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        extra = EXTRAS.get(name)
        hint = install_command(extra) if extra else f"pip install {name}"
        return fail(f"this command needs {name}, which is not installed", hint, 2)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return fail("out of memory", "try a smaller model, image size or batch", 2)
    except Exception as error:  # a bug of ours, or a library's: one line for the user all the same
        if os.environ.get("JMP_DEPLOY_DEBUG"):
            traceback.print_exc()
        reason = str(error).strip().split("\n")[0]
        return fail(
            f"unexpected {type(error).__name__}: {reason}",
            "set JMP_DEPLOY_DEBUG=1 to see where it comes from",
            2,
        )
