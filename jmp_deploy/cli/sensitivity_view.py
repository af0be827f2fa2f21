"""What `--max-drop` found, for people: a table and a plot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.files import atomic_path

SHOWN_MORE = 5
"""Rows behind the last layer that stays in FP16."""
BARS = 20


def table(result: dict[str, Any]) -> RenderableType:
    """The ranking, and what it came to.

    Args:
        result: of `sensitivity.choose`, or "sensitivity" of a manifest's "int8".
    """
    rows = result["ranking"]
    last = max((i for i, row in enumerate(rows, 1) if row["kept"]), default=0)
    shown = rows[: last + SHOWN_MORE]
    whole = result["all_int8"]["noise"]
    made = Table()
    for name in ("", "layer", "points alone", "of the noise", "of the MACs", "stays"):
        made.add_column(name, justify="left" if name in ("layer", "stays") else "right")
    for rank, row in enumerate(shown, 1):
        least = "" if row["measured"] else "< "
        made.add_row(
            str(rank),
            row["name"],
            f"{least}{row['points']:.3f}",
            f"{least}{_share(row['noise'], whole)}",
            f"{row['macs_share']:.1%}",
            "FP16" if row["kept"] else "INT8",
            style="bold" if row["kept"] else None,
        )
    lines = [summary(result), f"points: {result['measure']}; on {result['images']} images"]
    if left := len(rows) - len(shown):
        lines.insert(0, f"... and {left} layers that cost less, in INT8")
    groups = ", ".join(
        f"{row['name']} {_share(row['noise'], whole)}"
        for row in sorted(result["groups"], key=lambda row: -row["noise"])[:6]
    )
    lines.insert(-1, f"noise of kinds and blocks, each alone: {groups}")
    return Group(made, *(Text(line) for line in lines))


def summary(result: dict[str, Any]) -> str:
    """One sentence."""
    kept = sum(row["kept"] for row in result["ranking"])
    flips = "" if result["flips"] is None else f", {result['flips']:.2g} % of answers change"
    return (
        f"estimated drop {result['drop']:.2g} points of {result['budget']:g} allowed{flips}: "
        f"{kept} of {len(result['ranking'])} layers stay in FP16 "
        f"({result['macs_share']:.0%} of their MACs in INT8); "
        f"all in INT8: {result['all_int8']['points']:.2g} points"
    )


def plot(result: dict[str, Any], target: Path) -> str | None:
    """Draws the ranking; returns why not, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    whole = max(result["all_int8"]["noise"], 1e-300)
    layers = sorted(result["ranking"], key=lambda row: -row["noise"])[:BARS]
    for axes, rows, title in (
        (left, layers, "layers, each alone in INT8"),
        (right, result["groups"], "kinds and blocks, each alone"),
    ):
        names = [row["name"] for row in rows]
        colours = ["#c2792d" if row.get("kept") else "#1f6f9f" for row in rows]
        axes.barh(names, [100 * row["noise"] / whole for row in rows], color=colours)
        axes.invert_yaxis()
        axes.set_xlabel("% of the noise of all in INT8")
        axes.set_title(title, fontsize=11)
        axes.tick_params(labelsize=8)
        axes.grid(True, axis="x", alpha=0.25)
    if any(row["kept"] for row in layers):
        left.bar([0], [0], color="#c2792d", label="stays in FP16")
        left.bar([0], [0], color="#1f6f9f", label="INT8")
        left.legend(frameon=False, loc="lower right")
    figure.suptitle(summary(result), fontsize=9)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".").lower() or "png")
    return None


def _share(noise: float, whole: float) -> str:
    return f"{noise / whole:.1%}" if whole > 0 else "-"
