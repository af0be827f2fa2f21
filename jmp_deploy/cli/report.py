"""The command `report`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import JmpDeployError
from ..core.files import of_form, read_json, write_bytes
from . import build, compare, flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..core.artifact import Artifact


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _report,
        "report",
        "summarise an artifact: FLOPs, sizes, times, agreement, what this machine could not do",
        (
            "report artifacts/deit_s",
            "report artifacts/deit_s --compare compare.json",
            "report artifacts/deit_s --html deit_s.html --pictures pictures/*.png",
        ),
    )
    flags.add_artifact(parser)
    parser.add_argument(
        "--compare",
        type=Path,
        default=None,
        metavar="FILE",
        help="a result of `compare --json FILE` to include",
    )
    parser.add_argument(
        "--html", type=Path, default=None, metavar="FILE", help="write one self-contained page too"
    )
    parser.add_argument(
        "--bench",
        type=Path,
        default=None,
        metavar="FILE",
        help="a result of `bench --json FILE` for the page",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="pictures for the page, such as `visualize` draws",
    )


def _report(given: argparse.Namespace) -> int:
    from ..compare.result import read
    from ..core.artifact import Artifact

    found = Artifact.read(given.folder)
    found.verify()
    compared = read(given.compare) if given.compare else None
    if given.html:
        from .report_page import page

        text = page(
            found,
            build.rows_of(found),
            compared=compared,
            benched=_read_bench(given.bench) if given.bench else None,
            pictures=given.pictures,
        )
        write_bytes(given.html, text.encode())
    elif given.bench or given.pictures:
        raise JmpDeployError("--bench and --pictures are for the page", "add --html FILE")
    value = {"manifest": found.to_json(), "compare": compared}
    show.show(given, _summary(found, compared), value)
    return 0


@dataclass(frozen=True)
class _Latency:
    p50: float


@dataclass(frozen=True)
class _Row:
    backend: str
    batch: int
    latency_ms: _Latency


@dataclass(frozen=True)
class _Benched:
    device: str
    rows: list[_Row]


def _read_bench(path: Path) -> dict[str, Any]:
    """A result of `bench --json`, checked as far as the page shows it."""
    about: dict[str, Any] = {
        "what": "result of `bench`",
        "hint": "make one with `bench DIR --json FILE`",
        "error": JmpDeployError,
    }
    result = read_json(path, dict[str, Any], **about)
    of_form(result, _Benched, path, **about)
    return result


def _summary(found: Artifact, compared: dict[str, Any] | None) -> list[RenderableType]:
    """The closing table of the quickstart: what was made, by what, and what could not be."""
    stages = show.table("time", "stage", ">seconds")
    for stage in found.stages:
        stages.add_row(stage.name, f"{stage.seconds:.1f}")
    stages.add_row("all", f"{sum(stage.seconds for stage in found.stages):.1f}", style="bold")
    tools = ", ".join(f"{name} {version}" for name, version in found.tools.items())
    missing = []
    if compared:
        missing = [f"run {name}: {why}" for name, why in compared["skipped"].items()]
    if found.engine is None:
        missing.append(f"build an engine: {found.no_engine}")
    lines = missing or ["nothing: every backend ran"]
    return [
        *build.summary(found),
        show.facts([("made with", tools)]),
        stages,
        *(compare.summary(compared) if compared else ()),
        show.facts([("this machine could not", "\n".join(lines))]),
    ]
