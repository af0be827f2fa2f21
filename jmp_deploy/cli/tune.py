"""The command `tune`."""

from __future__ import annotations

import argparse
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import say
from . import flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _tune,
        "tune",
        "search the schedule and tau that change a model least within a budget (unlabelled images)",
        (
            "tune deit_s --images photos/ --gmacs 3.0",
            "tune dinov2_s --weights dinov2_s.safetensors --images photos/ --speedup 1.5 "
            "--plot trade-off.png",
            "tune deit_s --images photos/ --latency-ms 4.5 --on orin.json --on-batch 8",
            "build deit_s --schedule deit_s-tuned.json",
        ),
    )
    flags.add_model(parser)
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders, like those that the model will see, 50 photos and above; no labels "
        "are needed. A third of the files is held back and judges the answer: no two of one photo",
    )
    budget_type = flags.number(0, 1e9, above=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--gmacs", type=budget_type, metavar="G", help="billion MACs per image")
    budget.add_argument(
        "--latency-ms", type=budget_type, metavar="MS", help="per inference, by the table of --on"
    )
    budget.add_argument(
        "--speedup",
        type=budget_type,
        metavar="X",
        help="over the dense model: in latency with --on, else in MACs",
    )
    parser.add_argument(
        "--on",
        dest="table",
        type=Path,
        metavar="TABLE.json",
        help="latency table of a device (format: docstring of jmp_deploy/jmp/latency.py)",
    )
    parser.add_argument(
        "--on-batch",
        dest="table_batch",
        type=flags.positive,
        metavar="N",
        help="batch size in that table (its smallest)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=flags.new_file,
        default=None,
        metavar="FILE",
        help="schedule file (MODEL-tuned.json)",
    )
    parser.add_argument(
        "--plot",
        type=flags.new_plot,
        default=None,
        metavar="FILE.png",
        help="draw the trade-off (needs matplotlib)",
    )
    flags.add_weights(parser)
    parser.add_argument("--tau", type=flags.tau, help="fixed threshold (searched)")
    parser.add_argument(
        "--output",
        choices=("pooled", "dense"),
        help="what is to change least: what the model gives, or the features of every patch, for "
        "`build --output dense` (pooled)",
    )
    parser.add_argument(
        "--limit", type=flags.positive, metavar="N", help="images to use at most (64)"
    )
    parser.add_argument("--batch", type=flags.positive, metavar="N", help="images per forward (16)")
    parser.add_argument(
        "--passes",
        type=flags.number(0, 1e6, above=True),
        metavar="N",
        help="work to spend at most, in passes of the dense model over the images that choose (24)",
    )
    parser.add_argument(
        "--seed", type=flags.seed, help="which images, where there are more than --limit (0)"
    )
    flags.add_resume(parser)
    flags.add_own_model(parser)


def _tune(given: argparse.Namespace) -> int:
    from ..tune.tune import TuneOptions, tune

    out = given.out or Path(f"{given.model.replace('/', '_')}-tuned.json")
    curve, own = given.plot is not None, flags.own_model(given)
    asked = flags.fill(TuneOptions, given, out=out, curve=curve, own=own)
    with show.nearing("what was measured is kept") as update:
        result = tune(asked, on_progress=update)
    trouble = plot(result, given.plot) if given.plot else None
    build = ["python", "-m", "jmp_deploy", "build", asked.model]
    build += ["--schedule", str(out)]  # tau is in the file
    build += ["--weights", asked.weights] if asked.weights != "auto" else []
    build += ["--output", asked.output] if asked.output != "pooled" else []
    build += flags.own_words(given)
    show.show(given, _summary(result, out, shlex.join(build)), result)
    if trouble:
        say(trouble)
    return 0


def _summary(result: dict[str, Any], path: Path, build: str) -> list[RenderableType]:
    from ..core.manifest import Weights

    unit = result["budget"]["unit"]
    dense = result["dense_cost"]["value"]
    chosen, held = result["chosen"], result["images"]["held_back"]
    parts = {"choosing": result["images"]["count"] - held, "held_back": held}
    columns = ["1e4 x", f">{parts['choosing']} that chose", f">{held} held back"]
    columns += [">their mean", f">{unit}"]
    if unit != "GMACs":
        columns.append(">GMACs")
    table = show.table("", *columns)
    for name, entry in result["candidates"].items():
        if entry is None:
            table.add_row(name, "cannot meet the budget")
            continue
        cells = [
            name,
            *(_distance(entry[part]["geometric"]) for part in parts),
            _distance(entry["held_back"]["mean"]),
            f"{entry['cost']['value']:.3f}",
            f"{entry['cost']['gmacs']:.3f}",
        ]
        table.add_row(*cells[: len(columns)], style="bold" if name == chosen else None)
    gain = {part: _gain(result["gain"][part]["geometric"]) for part in parts}
    steps = ", ".join(f"{block}:{keep}" for block, keep in result["steps"])
    measured = result["measurements"]
    lines = [
        ("distance", f"{result['objective']}; geometric mean over files (95 % interval)"),
        ("tuned gains", f"{gain['choosing']} over spread on the images that chose"),
        ("held back", f"{gain['held_back']}: {_verdict(result)}"),
        ("schedule", f"{path}: {steps}"),
        ("tau", _tau(result["tau"])),
        ("budget", f"{result['budget']['value']:.4g} {unit}{_device(result)}, of {dense:.4g}"),
        ("images", f"{result['images']['count']}, seed {result['seed']}"),
        ("weights", show.weights(Weights(**result["weights"]))),
        ("measured", f"{measured['run']} times, {measured['resumed']} taken from before"),
        ("build with", build),
    ]
    return [table, show.facts(lines), *show.warnings(result)]


def _verdict(result: dict[str, Any]) -> str:
    if result["chosen"] == "tuned":
        return "beyond chance, so tuned is written"
    held = result["gain"]["held_back"]
    why = "not beyond chance"
    if held["geometric"]["low"] > 0:
        why = f"but the mean is {-held['mean']['value']:.1%} worse"
    return f"{why}, so the plain schedule, spread, is written"


def _distance(figure: dict[str, float]) -> str:
    value, low, high = (f"{1e4 * figure[key]:.3g}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def _gain(figure: dict[str, float]) -> str:
    value, low, high = (f"{100 * figure[key]:+.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def plot(result: dict[str, Any], target: Path) -> str | None:
    """Draws the trade-off; returns why not, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return (
            "no plot: matplotlib is not installed (pip install matplotlib); "
            'its points are under "curve" in the schedule file'
        )
    styles = {
        "paper": ("plain: three blocks, one keep rate", "#8a8f98", "s"),
        "spread": ("plain: spread over the blocks", "#c2792d", "^"),
        "tuned": ("the form found, at other budgets", "#1f6f9f", "o"),
    }
    unit = result["budget"]["unit"]
    tuned = result["candidates"]["tuned"]
    own = (tuned["cost"]["value"], tuned["held_back"]["geometric"]["value"])
    with show.plot(target) as axes:
        for form, (label, colour, marker) in styles.items():
            points = sorted(
                (point["cost"], point["distance"])
                for point in result["curve"]
                if point["form"] == form
            )
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
        axes.plot(*own, "o", ms=13, mfc="none", mec="#1f6f9f", mew=1.6)
        offset = {"xytext": (-10, -16), "textcoords": "offset points"}
        axes.annotate("tuned here", own, fontsize=9, ha="right", **offset)
        axes.set_yscale("log")
        per = "image" if unit == "GMACs" else "inference"
        axes.set_xlabel(f"{unit} per {per}{_device(result)}")
        axes.set_ylabel("1 - cosine to the dense model, geometric mean")
        held = result["images"]["held_back"]
        axes.set_title(f"{result['model']}, {held} images held back", fontsize=11)
        axes.legend(frameon=False)
    return None


def _device(result: dict[str, Any]) -> str:
    table = result["table"]
    return f" on {table['device']} at batch {table['batch']}" if table else ""


def _tau(tau: float) -> str:
    if tau <= -1:
        return f"{tau:g}: merges every token that goes"
    return f"{tau:g}: merges from this similarity, prunes below"
