"""What the schedules that come with the package were measured to keep of a model's accuracy.

`schedules/*.json` are schedule files as `schedule.load` reads them, with the figures beside the
steps; `scripts/publish_schedules.py` makes them from benchmarks/results/.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ScheduleError
from ..core.files import read_json
from .schedule import PUBLISHED, ModelShape, Schedule, load, published


@dataclass(frozen=True)
class Figure:
    """What was measured on images that chose nothing, with its 95 % interval.

    Attributes:
        on: which images.
    """

    on: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """The expected accuracy.

    Attributes:
        weights: of the model that was measured.
        commit: the code that measured `cosine`.
        gmacs, dense_gmacs: per image, in billions.
        cosine: between reduced and dense features.
        probe: of a linear probe on dense features: reduced minus dense, in points.
    """

    weights: str
    commit: str
    gmacs: float
    dense_gmacs: float
    cosine: Figure
    probe: Figure


@dataclass(frozen=True)
class _Published:
    model: str
    measured: Measured


def measured(name: str) -> Measured:
    """The figures of a published schedule.

    Raises:
        ScheduleError: its file cannot be read.
    """
    return _read(name).measured


def expected(schedule: Schedule, shape: ModelShape) -> str:
    """The figures in words where this schedule, however it was asked for, is published; else ""."""
    for name in published():
        if _read(name).model != shape.name:
            continue
        try:
            known = load(PUBLISHED / f"{name}.json", shape)
        except ScheduleError:  # for another image size
            continue
        if known.steps == schedule.steps and _manner(known) == _manner(schedule):
            return in_words(measured(name))
    return ""


def in_words(found: Measured) -> str:
    """One sentence."""
    cosine, probe = found.cosine, found.probe
    return (
        f"cosine {cosine.value:.4f} ({cosine.low:.4f} to {cosine.high:.4f}) on {cosine.on}; "
        f"{probe.value:+.2f} points ({probe.low:+.2f} to {probe.high:+.2f}) on {probe.on}; "
        f"with {found.weights}, in FP32"
    )


def _manner(schedule: Schedule) -> tuple[object, ...]:
    return (
        schedule.selection,
        schedule.tau,
        schedule.merge_weight,
        schedule.last_prefix_only,
    )


def _read(name: str) -> _Published:
    return read_json(
        PUBLISHED / f"{name}.json",
        _Published,
        what="published schedule",
        hint="install the package anew",
        error=ScheduleError,
    )
