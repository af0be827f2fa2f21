"""The command `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        ("report artifacts/deit_s", "report artifacts/deit_s --compare compare.json"),
    )
    flags.add_artifact(parser)
    parser.add_argument(
        "--compare",
        type=Path,
        default=None,
        metavar="FILE",
        help="a result of `compare --json FILE` to include",
    )


def _report(given: argparse.Namespace) -> int:
    from ..compare.result import read
    from ..core.artifact import Artifact

    found = Artifact.read(given.folder)
    found.verify()
    compared = read(given.compare) if given.compare else None
    value = {"manifest": found.to_json(), "compare": compared}
    show.show(given, _summary(found, compared), value)
    return 0


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
