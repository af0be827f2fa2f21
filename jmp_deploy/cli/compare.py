"""The command `compare`."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from ..backends import NAMES
from ..backends.engine import EngineBackend
from ..core.errors import say
from . import checked, flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

LISTED = 5


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _compare,
        "compare",
        "compare PyTorch, ONNX Runtime and the engine on the same images; exit 1 outside tolerance",
        (
            "compare artifacts/deit_s",
            "compare artifacts/deit_s --backends torch,engine --images photos/ --json -",
            "compare artifacts/deit_s --min-cosine 0.9995 --max-abs 0.2",
            "compare artifacts/deit_s --debug           # which block loses the accuracy",
        ),
    )
    flags.add_artifact(parser)
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar="A,B,..",
        help=f"of {', '.join(NAMES)}; the first is the reference (all that run here)",
    )
    flags.add_images(parser, "files or folders (the artifact's reference images)")
    parser.add_argument(
        "--limit",
        type=flags.positive,
        metavar="N",
        help="images to use at most, spread evenly (64)",
    )
    parser.add_argument(
        "--weights", metavar="PATH", help="if they are not where the build had them"
    )
    parser.add_argument(
        "--min-cosine",
        type=_cosine,
        metavar="C",
        help="smallest cosine of an output, for every image (by precision, for the median image: "
        "fp32 0.99999, fp16 0.999, int8 0.99, fp8 0.98)",
    )
    parser.add_argument(
        "--max-abs",
        type=_not_negative,
        metavar="X",
        help="largest difference of an output (any that the cosine allows)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="look at every block of what is outside tolerance (of the first pair if nothing is), "
        "and name the first block outside and the one at fault; an engine is built anew for it, "
        "with its blocks marked",
    )


def _cosine(text: str) -> float:
    number = flags.decimal(text)
    if not -1 <= number <= 1:
        raise argparse.ArgumentTypeError("a cosine lies between -1 and 1")
    return number


def _not_negative(text: str) -> float:
    number = flags.decimal(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be a number of at least 0")
    return number


def _backends(text: str) -> tuple[str, ...]:
    names = flags.words_of(*NAMES)(text)
    if len(set(names)) < 2:
        raise argparse.ArgumentTypeError("two different backends at least")
    return names


def _compare(given: argparse.Namespace) -> int:
    from ..compare.compare import compare_artifact
    from ..core.images import find_images

    images = find_images(given.images) if "images" in given else []
    if EngineBackend.name in getattr(given, "backends", NAMES):
        # on record anew: whoever mended something asks here
        verdict = checked.check_first([given.folder], [EngineBackend.name], again=True)
        for words in verdict.notes:
            say(f"note: {words}")
    with show.Progress("comparing", transient=True):
        result = flags.fill(compare_artifact, given, images=images)
    show.show(given, summary(result), result)
    return 0 if result["ok"] else 1


def summary(result: dict[str, Any]) -> list[RenderableType]:
    """What `compare_artifact` found; results of earlier versions, with fewer keys, too."""
    lines: list[RenderableType] = [_pairs(result), *_classes(result)]
    for pair in result["pairs"]:
        lines += [
            show.styled(f"{_between(pair, result)}: {problem}", "bold red")
            for problem in pair.get("problems", ())
        ]
    lines.append(_tolerance(result["tolerance"]))
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result["runtime_ms"].items())
    lines.append(f"time per image, cold start included (no benchmark): {times}")
    lines += [show.styled(f"note: {words}", "yellow") for words in result.get("notes", ())]
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
        lines.append(show.styled(report["verdict"], "bold"))
        lines += [
            f"{pair['a']} with the choices of {pair['b']}: {pair['output']} at cosine >= "
            f"{_figure(pair['cosine'], '.7f')}, largest difference {_figure(pair['max_abs'])}"
            for pair in report.get("alike", ())
        ]
        if "engine" in result["backends"]:
            lines.append("the engine's kept tokens stay inside its plugin: only outputs compared")
    elif result.get("reductions_skipped"):
        lines.append(f"kept tokens not compared: {result['reductions_skipped']}")
    for found in result.get("debug") or []:
        lines += ["", *_debug(found)]
    why_not = str(result.get("debug_skipped", "not asked for"))
    if result.get("debug") is None and not why_not.startswith("not asked for"):
        lines.append(f"no look at the blocks: {why_not}")
    if result["random_weights"]:
        lines.append(show.styled(show.RANDOM_WARNING, "bold red"))
    return lines


def _pairs(result: dict[str, Any]) -> Table:
    outputs = ", ".join(dict.fromkeys(pair["output"] for pair in result["pairs"]))
    table = show.table(
        f"{outputs} of {result['images']} images, {result['precision'].upper()}",
        *("backends", ">cosine min", ">median", ">max abs", ">mean", ">max rel", ""),
        frame=False,
        wrap=False,
    )
    for pair in result["pairs"]:
        cells = [_figure(pair.get(key), ".6f") for key in ("cosine", "cosine_median")]
        # JSON has no infinity: a null that is there was one
        for key in ("max_abs", "mean_abs", "max_rel"):
            cells.append(show.number(pair[key]) if key in pair else "-")
        verdict = _ok() if pair["ok"] else show.styled("outside", "bold red")
        table.add_row(_between(pair, result), *cells, verdict)
    return table


def _between(pair: dict[str, Any], result: dict[str, Any]) -> str:
    """Which backends, and of several outputs which."""
    several = len({each["output"] for each in result["pairs"]}) > 1
    return f"{pair['a']} - {pair['b']}" + f", {pair['output']}" * several


def _classes(result: dict[str, Any]) -> list[RenderableType]:
    """What the differences mean for the classes; nothing for features."""
    pairs = [pair for pair in result["pairs"] if pair["top1_agreement"] is not None]
    table = show.table(
        "classes: images with the same top-1, share of the top-5 that both name",
        *("backends", ">top-1", ">top-5", ">KL mean", ">KL max (nats)"),
        frame=False,
        wrap=False,
    )
    for pair in pairs:
        cells = [_figure(pair.get(key), ".1%") for key in ("top1_agreement", "top5_agreement")]
        cells += [_figure(pair.get(key)) for key in ("kl_mean", "kl_max")]
        table.add_row(f"{pair['a']} - {pair['b']}", *cells)
    return [table] if pairs else []


def _tolerance(tolerance: dict[str, Any]) -> str:
    words = f"tolerance: cosine >= {tolerance['cosine']:g}"
    worst = tolerance.get("worst", tolerance["cosine"])
    if worst == tolerance["cosine"]:
        words += " for every image"
    else:
        words += f" for the median image, >= {worst:g} for every image"
    if tolerance.get("max_abs") is not None:
        words += f", largest difference <= {tolerance['max_abs']:g}"
    return words


def _unreadable(files: list[dict[str, str]]) -> list[RenderableType]:
    if not files:
        return []
    lines: list[RenderableType] = [
        show.styled(f"{len(files)} images could not be read:", "yellow"),
        *(f"  {entry['reason']}" for entry in files[:LISTED]),
    ]
    return lines + ([f"  and {len(files) - LISTED} more"] if len(files) > LISTED else [])


def _reductions(report: dict[str, Any]) -> Table:
    numbers = ("keeps", "same set", "shared", "first differ", "near ties", "margin", "flagged")
    table = show.table(
        f"kept tokens of {report['images']} images, {report['a']} - {report['b']}, chosen by "
        f"{report['selection']}",
        *("in", *(f">{name}" for name in numbers)),
        frame=False,
    )
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for node in report["nodes"]:
        table.add_row(
            f"blocks.{node['block']}",
            f"{node['keep']} of {node['of']}",
            f"{node['same_set']:.1%}",
            f"{node['shared']:.1%}",
            str(node["first_here"] or "-"),
            str(node["near_ties"] or "-"),
            _figure(node["margin"]),
            show.styled(str(node["flagged"]), "bold red") if node["flagged"] else "-",
        )
    return table


def _debug(found: dict[str, Any]) -> list[RenderableType]:
    alone = {row["stage"]: row for row in found["alone"] or ()}
    numbers = ["class token", "patches"]
    numbers += ["type", "attention", "reduction", "MLP"] if alone else ["error", "matched"]
    table = show.table(
        f"blocks, {found['a']} - {found['b']}",
        *("output of", *(f">{name}" for name in numbers), ""),
        frame=False,
    )
    table.columns[0].no_wrap = True
    for row in found["stages"]:
        cells = [_figure(row[key], ".6f") for key in ("prefix_cosine", "patch_cosine")]
        own = alone.get(row["stage"], {})
        if alone:
            cells.append(own.get("precision", ""))
            cells += [_figure(own.get(part), ".2%") for part in ("attention", "reduction", "mlp")]
        else:
            cells += [_figure(row[key], ".2%") for key in ("relative_error", "matched")]
        words = [] if row["ok"] else [_trouble(row)]
        words += ["cause"] if row["stage"] == found["cause"] else []
        verdict = show.styled(", ".join(words), "bold red") if words else _ok()
        table.add_row(row["stage"], *cells, verdict)
    notes = "class token, patches: cosine along the way, patches where made of the same patches"
    if alone:
        notes += (
            "; attention, reduction, MLP: error of each block by itself, fed with what PyTorch's "
            "was fed, over what the part adds"
        )
    return [table, notes, show.styled(found["verdict"], "bold")]


def _ok() -> Text:
    return show.styled("ok", "green")


def _trouble(row: dict[str, Any]) -> str:
    return f"NaN or inf in {' and '.join(row['not_finite'])}" if row["not_finite"] else "outside"


def _figure(value: float | None, spec: str = ".3g") -> str:
    return "-" if value is None else show.number(value, spec)
