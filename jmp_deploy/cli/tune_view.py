"""What `tune` shows: progress, the closing table, the plot of the trade-off."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import TaskProgressColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..core.files import atomic_path
from .progress import LINE_EVERY, Display
from .render import facts, weights


class TuneProgress(Display):
    """A context manager whose `update` is `tune`'s `on_progress`: a bar, or a line now and then."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, TaskProgressColumn(), TimeElapsedColumn())
        self.task = self.bar.add_task("loading", total=1.0)
        self.phase, self.printed = "", 0.0

    def finish(self) -> None:
        """Fills the bar."""
        self.bar.update(self.task, completed=1.0)

    def update(self, phase: str, share: float, best: float | None) -> None:
        """See `tune.OnProgress`."""
        words = phase if best is None else f"{phase}, best distance {best:.5f}"
        self.bar.update(self.task, description=words, completed=share)
        now = time.monotonic()
        due = phase != self.phase or now - self.printed > LINE_EVERY
        if due and not self.console.is_terminal:
            self.phase, self.printed = phase, now
            self.console.print(f"{now - self.started:5.0f} s  {share:4.0%}  {words}")


def summary(result: dict[str, Any], path: Path, build: str) -> RenderableType:
    """The table that ends `tune`."""
    unit = result["budget"]["unit"]
    dense = result["dense_cost"]
    columns = ["schedule", "distance", unit, "of dense"]
    if unit != "GMACs":
        columns.append("GMACs")
    table = Table(expand=False)
    for name in columns:
        table.add_column(name, justify="left" if name == "schedule" else "right")
    rows = [("tuned", result), *result["plain"].items()]
    for name, entry in rows:
        if entry is None:
            table.add_row(name, "cannot meet the budget")
            continue
        cost = entry["cost"]
        cells = [
            name,
            f"{entry['distance']:.5f}",
            f"{cost['value']:.3f}",
            f"{cost['value'] / dense['value']:.1%}",
            f"{cost['gmacs']:.3f}",
        ]
        table.add_row(*cells[: len(columns)], style="bold" if name == "tuned" else None)
    steps = ", ".join(f"{block}:{keep}" for block, keep in result["steps"])
    measured = result["measurements"]
    lines = [
        ("distance", result["objective"]),
        ("schedule", f"{path}: {steps}"),
        ("tau", _tau(result["tau"])),
        ("budget", f"{result['budget']['value']:.4g} {unit}{_device(result)}"),
        ("images", f"{result['images']['count']}, seed {result['seed']}"),
        ("weights", weights(result["weights"])),
        ("measured", f"{measured['run']} candidates, {measured['resumed']} taken from before"),
        ("build with", build),
    ]
    parts: list[RenderableType] = [table, facts(lines)]
    parts += [Text(f"warning: {words}", style="bold yellow") for words in result["warnings"]]
    return Group(*parts)


def plot(result: dict[str, Any], target: Path) -> str | None:
    """Draws the trade-off; returns why not, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return (
            "no plot: matplotlib is not installed (pip install matplotlib); "
            'its points are under "curve" in the schedule file'
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {
        "paper": ("plain: three blocks, one keep rate", "#8a8f98", "s"),
        "spread": ("plain: spread over the blocks", "#c2792d", "^"),
        "tuned": ("the schedule found, scaled to other budgets", "#1f6f9f", "o"),
    }
    for form, (label, colour, marker) in styles.items():
        points = sorted(
            (point["cost"], point["distance"]) for point in result["curve"] if point["form"] == form
        )
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    own = (result["cost"]["value"], result["distance"])
    axes.plot(*own, "o", ms=13, mfc="none", mec="#1f6f9f", mew=1.6)
    axes.annotate("tuned here", own, (-10, -16), textcoords="offset points", fontsize=9, ha="right")
    axes.set_yscale("log")
    unit = result["budget"]["unit"]
    axes.set_xlabel(f"{unit} per {'image' if unit == 'GMACs' else 'inference'}{_device(result)}")
    axes.set_ylabel("1 - cosine to the dense model")
    axes.set_title(f"{result['model']}, {result['images']['count']} images", fontsize=11)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".").lower() or "png")
    return None


def _device(result: dict[str, Any]) -> str:
    table = result["table"]
    return f" on {table['device']} at batch {table['batch']}" if table else ""


def _tau(tau: float) -> str:
    if tau <= -1:
        return f"{tau:g}: merges every token that goes"
    return f"{tau:g}: merges from this similarity, prunes below"
