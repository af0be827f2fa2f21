"""A result of `compare --json FILE`, read back: for `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..core.errors import JmpDeployError
from ..core.files import of_form, read_json
from ..core.manifest import Meta, Natural


def read(path: Path) -> dict[str, Any]:
    """What `compare.compare_artifact` returned, checked as far as tables show it.

    Raises:
        JmpDeployError: it is something else.
    """
    about: dict[str, Any] = {
        "what": "result of `compare`",
        "hint": "make one with `compare DIR --json FILE`",
        "error": JmpDeployError,
    }
    result = read_json(path, dict[str, Any], **about)
    of_form(result, _Compared, path, **about)
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
    alike: list[_Pair] = field(default_factory=list)


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
