"""What `validate` and `merge` show: progress and the closing table."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import (
    MofNCompleteColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .progress import LINE_EVERY, Display
from .render import facts

LISTED = 5
"""Unreadable images that the table lists; the JSON has all."""
WAITING = 0.2
"""Share of time spent waiting for images from which more workers are worth a hint."""
WORDS = {"train": "features for the probe", "val": "validating"}


class ValidateProgress(Display):
    """A context manager whose `update` is `validate`'s `on_progress`: a bar, or lines."""

    def __init__(self, console: Console) -> None:
        columns = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(console, *columns)
        self.tasks: dict[str, Any] = {}
        self.printed = self.started

    def update(self, split: str, done: int, total: int) -> None:
        """See `validate.OnProgress`."""
        words = WORDS.get(split, split)
        if split not in self.tasks:
            self.tasks[split] = self.bar.add_task(words, total=total)
        self.bar.update(self.tasks[split], completed=done, total=total)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed > LINE_EVERY or done == total):
            self.printed = now
            self.console.print(f"{now - self.started:5.0f} s  {words}: {done} of {total} images")


def summary(result: dict[str, Any]) -> RenderableType:
    """The tables that end `validate` and `merge`."""
    parts: list[RenderableType] = [_accuracy(result), facts(_facts(result))]
    parts += [Text(note, style="yellow") for note in result["notes"]]
    skipped = list(result["unreadable"]["files"])
    if result["probe"]:
        skipped += result["probe"]["unreadable"]["files"]
    parts += [Text(f"skipped: {entry['reason']}", style="yellow") for entry in skipped[:LISTED]]
    if len(skipped) > LISTED:
        parts.append(Text(f"and {len(skipped) - LISTED} more", style="yellow"))
    return Group(*parts)


def _accuracy(result: dict[str, Any]) -> Table:
    """A column per measure; rows: this artifact, the dense one, what was lost."""
    table = Table(title=f"{result['n']} images", title_justify="left", expand=False)
    table.add_column("")
    knn = result["knn"]
    for name in ("top-1 %", "top-5 %", *(("k-NN %",) if knn else ())):
        table.add_column(name, justify="right", no_wrap=True)
    model = [f"{result['top1']:.2f}", f"{result['top5']:.2f}"]
    table.add_row("this artifact", *model, *([f"{knn['top1']:.2f}"] if knn else []))
    if result["dense"]:
        dense = [f"{result['dense']['top1']:.2f}", f"{result['dense']['top5']:.2f}"]
        table.add_row("dense", *dense, *([f"{knn['dense']:.2f}"] if knn else []))
        lost = [f"{result['drop_points']:+.2f}", f"{result['top5_drop_points']:+.2f}"]
        lost += [f"{knn['drop_points']:+.2f}"] if knn else []
        table.add_row("drop in points", *lost, style="bold")
        intervals = [_interval(result["ci95"]), "", *([_interval(knn["ci95"])] if knn else [])]
        table.add_row("95 % interval", *intervals)
    return table


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("artifact", f"{result['artifact']} ({result['model']}, {result['precision'].upper()})")
    ]
    if result["dense"]:
        rows.append(("dense", str(result["against"])))
        rows.append(
            (
                "agreement",
                f"{result['agreement_with_dense']:.2f} % give the dense model's answer; only the "
                f"dense model is right on {result['only_dense_right']}, only this one on "
                f"{result['only_model_right']}",
            )
        )
    rows.append(("data", f"{result['data']}, {result['images']} images, {result['labels']}"))
    if shard := result["shard"]:
        rows.append(("shard", f"{shard['index']}/{shard['of']}: put all together with `merge`"))
    if probe := result["probe"]:
        fitted = {"logistic": "logistic regression", "ridge": "ridge regression"}[probe["kind"]]
        rows.append(
            (
                "probe",
                f"{fitted} and {probe['neighbours']} nearest neighbours on the dense features of "
                f"{probe['train_images']} train images",
            )
        )
    skipped = result["unreadable"]
    share = f"{skipped['count']} skipped ({skipped['share']:.1%} of the images)"
    rows.append(("unreadable", share if skipped["count"] else "none"))
    why = f" ({result['backend_reason']})" if result.get("backend_reason") else ""
    rows.append(("backend", f"{result['backend']}{why} on {result['device']}"))
    rows.append(("speed", _speed(result)))
    return rows


def _speed(result: dict[str, Any]) -> str:
    if result.get("shards"):
        return "; ".join(
            f"shard {shard['index']}: {_rate(shard['end_to_end'])} on {shard['device']}"
            for shard in result["shards"]
        )
    speed = result["throughput"]
    words = f"{_rate(speed['model'])} in this artifact alone"
    if speed["dense"] is not None:
        words += f", {_rate(speed['dense'])} in the dense one"
    words += f"; {_rate(speed['end_to_end'])} end to end"
    if result["dense"]:
        words += " with both"
    waiting = speed["waiting_share"]
    if waiting is not None:
        words += f", {waiting:.0%} of it waiting for images"
        words += " (more --workers may help)" if waiting > WAITING else ""
    return words


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} images/s"


def _interval(pair: list[float]) -> str:
    return f"{pair[0]:+.2f} to {pair[1]:+.2f}"
