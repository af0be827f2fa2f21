"""The command `report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import JmpDeployError
from ..core.files import write_bytes
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
    from ..core.artifact import Artifact

    found = Artifact.read(given.folder)
    found.verify()
    compared = _result(given.compare, "compare", _COMPARED) if given.compare else None
    if given.html:
        from .report_page import page

        benched = _result(given.bench, "bench", _BENCHED) if given.bench else None
        text = page(
            found,
            build.rows_of(found),
            compared=compared,
            benched=benched,
            pictures=given.pictures,
        )
        write_bytes(given.html, text.encode())
    elif given.bench or given.pictures:
        raise JmpDeployError("--bench and --pictures are for the page", "add --html FILE")
    value = {"manifest": found.to_json(), "compare": compared}
    show.show(given, _summary(found, compared), value)
    return 0


_COMPARED: dict[str, type] = {"pairs": list, "skipped": dict, "tolerance": object}
_BENCHED: dict[str, type] = {"device": str, "rows": list}
"""Keys of the results of other commands that are read here, and their types."""


def _result(path: Path, command: str, keys: dict[str, type]) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in keys.items():
            if not isinstance(result[key], kind):
                raise ValueError(f"{key!r} is not what it writes there")
        for row in result["rows"] if command == "bench" else ():
            float(row["latency_ms"]["p50"]), row["backend"], row["batch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JmpDeployError(f"{path} is not a result of `{command} --json`: {error}") from error
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
