"""The tables of `compare`."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .render import RANDOM_WARNING

OK = Text("ok", "green")
LISTED = 5


def comparison(result: dict[str, Any]) -> RenderableType:
    """What `compare_artifact` found; results of earlier versions, with fewer keys, too."""
    lines: list[RenderableType] = [_pairs(result), *_classes(result)]
    for pair in result["pairs"]:
        lines += [
            Text(f"{pair['a']} - {pair['b']}: {problem}", "bold red")
            for problem in pair.get("problems", ())
        ]
    lines.append(_tolerance(result["tolerance"]))
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result["runtime_ms"].items())
    lines.append(f"time per image, cold start included (no benchmark): {times}")
    for name, reason in result["skipped"].items():
        lines.append(f"not compared: {name}: {reason}")
    lines += _unreadable(result.get("unreadable", []))
    if result.get("reductions"):
        report = result["reductions"]
        lines += ["", _reductions(report)]
        if report["first"] is not None:
            lines.append(
                "margin: largest gap in rating between tokens that changed places, over the "
                f"interquartile range; moves up to {report['tolerance']:g} are near ties"
            )
        lines.append(Text(report["verdict"], "bold"))
        if "engine" in result["backends"]:
            lines.append("the engine's kept tokens stay inside its plugin: only outputs compared")
    elif result.get("reductions_skipped"):
        lines.append(f"kept tokens not compared: {result['reductions_skipped']}")
    for found in result.get("debug") or []:
        lines += ["", *_debug(found)]
    if result.get("debug") is None and not _unasked(result):
        lines.append(f"no look at the blocks: {result['debug_skipped']}")
    if result["random_weights"]:
        lines.append(Text(RANDOM_WARNING, style="bold red"))
    return Group(*lines)


def _unasked(result: dict[str, Any]) -> bool:
    return str(result.get("debug_skipped", "not asked for")).startswith("not asked for")


def _pairs(result: dict[str, Any]) -> Table:
    outputs = ", ".join(dict.fromkeys(pair["output"] for pair in result["pairs"]))
    table = _table(f"{outputs} of {result['images']} images, {result['precision'].upper()}")
    table.add_column("backends", overflow="fold")
    for name in ("cosine min", "median", "max abs", "mean", "max rel"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for pair in result["pairs"]:
        cells = [_cosine(pair["cosine"]), _cosine(pair.get("cosine_median"))]
        # JSON has no infinity: a null that is there was one
        keys = ("max_abs", "mean_abs", "max_rel")
        cells += [_number(pair.get(key, "-"), "not finite") for key in keys]
        verdict = OK if pair["ok"] else Text("outside", "bold red")
        table.add_row(f"{pair['a']} - {pair['b']}", *cells, verdict)
    return table


def _classes(result: dict[str, Any]) -> list[RenderableType]:
    """What the differences mean for the classes; nothing for features."""
    pairs = [pair for pair in result["pairs"] if pair["top1_agreement"] is not None]
    table = _table("classes: images with the same top-1, share of the top-5 that both name")
    table.add_column("backends", overflow="fold")
    for name in ("top-1", "top-5", "KL mean", "KL max (nats)"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        shares = (pair["top1_agreement"], pair.get("top5_agreement"))
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        cells += [_number(pair.get("kl_mean")), _number(pair.get("kl_max"))]
        table.add_row(f"{pair['a']} - {pair['b']}", *cells)
    return [table] if pairs else []


def _table(title: str) -> Table:
    """Without a frame: eight columns fit into 80 characters."""
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )


def _tolerance(tolerance: dict[str, Any]) -> str:
    words = f"tolerance: cosine >= {tolerance['cosine']:g}"
    worst = tolerance.get("worst", tolerance["cosine"])
    if worst == tolerance["cosine"]:
        words += " for every image"
    else:
        words += f" for the median image, >= {worst:g} for every image (near ties)"
    if tolerance.get("max_abs") is not None:
        words += f", largest difference <= {tolerance['max_abs']:g}"
    return words


def _unreadable(files: list[dict[str, str]]) -> list[RenderableType]:
    if not files:
        return []
    lines: list[RenderableType] = [Text(f"{len(files)} images could not be read:", "yellow")]
    lines += [f"  {entry['reason']}" for entry in files[:LISTED]]
    return lines + ([f"  and {len(files) - LISTED} more"] if len(files) > LISTED else [])


def _reductions(report: dict[str, Any]) -> Table:
    table = _table(
        f"kept tokens of {report['images']} images, {report['a']} - {report['b']}, chosen by "
        f"{report['selection']}"
    )
    table.add_column("in", no_wrap=True)
    names = ("keeps", "same set", "shared", "first differ", "near ties", "margin", "flagged")
    for name in names:
        table.add_column(name, justify="right", no_wrap=name == "keeps")
    for node in report["nodes"]:
        table.add_row(
            f"blocks.{node['block']}",
            f"{node['keep']} of {node['of']}",
            f"{node['same_set']:.1%}",
            f"{node['shared']:.1%}",
            str(node["first_here"] or "-"),
            str(node["near_ties"] or "-"),
            _number(node["margin"]),
            Text(str(node["flagged"]), "bold red") if node["flagged"] else "-",
        )
    return table


def _debug(found: dict[str, Any]) -> list[RenderableType]:
    table = _table(f"blocks, {found['a']} - {found['b']}")
    table.add_column("output of", no_wrap=True)
    alone = {row["stage"]: row for row in found["alone"] or ()}
    names = ["class token", "patches"]
    names += ["type", "attention", "reduction", "MLP"] if alone else ["error", "matched"]
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("")
    for row in found["stages"]:
        cells = [_cosine(row["prefix_cosine"]), _cosine(row["patch_cosine"])]
        own = alone.get(row["stage"], {})
        if alone:
            cells.append(own.get("precision", ""))
            cells += [_share(own.get(part)) for part in ("attention", "reduction", "mlp")]
        else:
            cells += [_share(row["relative_error"]), _share(row["matched"])]
        words = [] if row["ok"] else [_trouble(row)]
        words += ["cause"] if row["stage"] == found["cause"] else []
        table.add_row(row["stage"], *cells, Text(", ".join(words), "bold red") if words else OK)
    notes = "class token, patches: cosine along the way, patches where made of the same patches"
    if alone:
        notes += (
            "; attention, reduction, MLP: error of each block by itself, fed with what PyTorch's "
            "was fed, over what the part adds"
        )
    return [table, notes, Text(found["verdict"], "bold")]


def _trouble(row: dict[str, Any]) -> str:
    return f"NaN or inf in {' and '.join(row['not_finite'])}" if row["not_finite"] else "outside"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if math.isfinite(value) else "not finite"


def _number(value: float | str | None, none: str = "-") -> str:
    if value is None or isinstance(value, str):
        return value or none
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
