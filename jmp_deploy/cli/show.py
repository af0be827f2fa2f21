"""What commands print: tables for people, JSON for programs, errors for both."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import write_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def show(options: argparse.Namespace, pretty: RenderableType, value: Any) -> None:
    """Prints for people, and writes JSON if asked; with `--json -` people get standard error."""
    to_stdout = options.json == "-"
    # crop: a command that mends something must be readable to its end on a narrow terminal too
    console(stderr=to_stdout).print(pretty, crop=False)
    if options.json is None:
        return
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"
    if to_stdout:
        sys.stdout.write(text)
    else:
        write_bytes(Path(options.json), text.encode())


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null instead."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def console(*, stderr: bool = False) -> Console:
    """A console for people; what we print is never taken for markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=False)


def fail(message: str, hint: str | None, code: int) -> int:
    """One line that says what is wrong, one that says what to do; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code
