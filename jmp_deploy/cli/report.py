"""The command `report`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..core.artifact import Meta, Natural
from ..core.errors import JmpDeployError
from ..core.files import read_json
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
    from ..core.artifact import Artifact

    found = Artifact.read(given.folder)
    found.verify()
    compared = _compared(given.compare) if given.compare else None
    value = {"manifest": found.to_json(), "compare": compared}
    show.show(given, _summary(found, compared), value)
    return 0


def _compared(path: Path) -> dict[str, Any]:
    read = partial(
        read_json,
        what="result of `compare`",
        hint="make one with `compare DIR --json FILE`",
        error=JmpDeployError,
    )
    read(path, _Compared)
    result: dict[str, Any] = read(path, dict[str, Any])
    return result


@dataclass(frozen=True)
class _Pair:
    a: str
    b: str
    output: str
    ok: bool
    top1_agreement: float | None
    cosine: float | None = None
    cosine_median: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    top5_agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Tolerance:
    cosine: float
    worst: float = 0.0
    max_abs: float | None = None


@dataclass(frozen=True)
class _Node:
    block: Natural
    keep: Natural
    of: Natural
    same_set: float
    shared: float
    first_here: Natural
    near_ties: Natural
    flagged: Natural
    margin: float | None


@dataclass(frozen=True)
class _Reductions:
    a: str
    b: str
    images: Natural
    selection: str
    first: str | None
    tolerance: float
    verdict: str
    nodes: list[_Node]


@dataclass(frozen=True)
class _Row:
    stage: str
    ok: bool
    not_finite: list[str]
    prefix_cosine: float | None
    patch_cosine: float | None
    relative_error: float | None
    matched: float | None


@dataclass(frozen=True)
class _Alone:
    stage: str
    precision: str = ""
    attention: float | None = None
    reduction: float | None = None
    mlp: float | None = None


@dataclass(frozen=True)
class _Debug:
    a: str
    b: str
    verdict: str
    stages: list[_Row]
    cause: str | None
    alone: list[_Alone] | None


@dataclass(frozen=True)
class _File:
    reason: str


@dataclass(frozen=True)
class _Compared:
    """What the tables of `compare` read of a result."""

    pairs: Annotated[list[_Pair], Meta(min_length=1)]
    tolerance: _Tolerance
    images: Natural
    precision: str
    backends: list[str]
    skipped: dict[str, str]
    runtime_ms: dict[str, float]
    random_weights: bool
    notes: list[str] = field(default_factory=list)
    unreadable: list[_File] = field(default_factory=list)
    reductions: _Reductions | None = None
    reductions_skipped: str | None = None
    debug: list[_Debug] | None = None
    debug_skipped: str | None = None


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
