"""The commands `tune` and `visualize`: flags, and what is printed."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from . import show
from .flags import add_command, positive


def add_commands(commands: Any) -> None:
    """Adds both to what `add_subparsers` returned."""
    _add_tune(commands)
    _add_visualize(commands)


def _add_tune(commands: Any) -> None:
    parser = add_command(
        commands,
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
    parser.add_argument("model", metavar="MODEL", help="deit_s, dinov2_s, ... or any timm name")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders, like those that the model will see; no labels are needed",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--gmacs", type=float, metavar="G", help="billion MACs per image")
    budget.add_argument(
        "--latency-ms", type=float, metavar="MS", help="per inference, by the table of --on"
    )
    budget.add_argument(
        "--speedup",
        type=float,
        metavar="X",
        help="over the dense model: in latency with --on, else in MACs",
    )
    parser.add_argument(
        "--on",
        type=Path,
        metavar="TABLE.json",
        help="latency table of a device (format: docstring of jmp_deploy/jmp/latency.py)",
    )
    parser.add_argument(
        "--on-batch", type=positive, metavar="N", help="batch size in that table (its smallest)"
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="schedule file (MODEL-tuned.json)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the trade-off (needs matplotlib)"
    )
    _add_weights(parser)
    parser.add_argument("--tau", type=float, help="fixed threshold (searched)")
    parser.add_argument(
        "--limit", type=positive, default=64, metavar="N", help="images to use at most (64)"
    )
    parser.add_argument(
        "--batch", type=positive, default=16, metavar="N", help="images per forward (16)"
    )
    parser.add_argument(
        "--passes",
        type=float,
        default=40.0,
        metavar="N",
        help="work to spend at most, in passes of the dense model over the images (40)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which images, where there are more than --limit (0)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of these flags ended"
    )


def _add_visualize(commands: Any) -> None:
    parser = add_command(
        commands,
        "visualize",
        "draw what becomes of each patch of a photo: kept, merged into which token, or pruned",
        (
            "visualize deit_s photo.jpg -o pictures/",
            "visualize artifacts/deit_s photos/ -o pictures/ --batch",
            "visualize dinov2_s photo.jpg -o photo.png --schedule tuned.json",
        ),
    )
    parser.add_argument("source", metavar="MODEL|DIR", help="model name, or artifact folder")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("pictures"),
        metavar="DIR|FILE",
        help="folder for a PNG per image and index.html, or one .png or .html file (pictures)",
    )
    parser.add_argument(
        "--batch", action="store_true", help="one contact sheet in place of a PNG per image"
    )
    parser.add_argument(
        "--schedule", metavar="NAME|LIST|FILE", help="as for build (spread; an artifact's own)"
    )
    parser.add_argument("--tau", type=float, help="(the schedule's)")
    parser.add_argument("--granularity", choices=("token", "sample"), help="(token)")
    _add_weights(parser, default=None)
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")


def _add_weights(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    parser.add_argument(
        "--weights",
        default=default,
        metavar="auto|pretrained|random|PATH",
        help="as for build (auto)" if default else "as for build (auto; an artifact's own)",
    )
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="(the model's own)")


def _tune(options: argparse.Namespace) -> int:
    from ..tune.tune import TuneOptions, tune
    from . import tune_view

    out = options.out or Path(f"{options.model.replace('/', '_')}-tuned.json")
    console = show.console(stderr=True)
    asked = TuneOptions(
        model=options.model,
        images=tuple(options.images),
        out=out,
        weights=options.weights,
        img_size=options.img_size,
        gmacs=options.gmacs,
        latency_ms=options.latency_ms,
        speedup=options.speedup,
        table=options.on,
        table_batch=options.on_batch,
        tau=options.tau,
        seed=options.seed,
        limit=options.limit,
        batch=options.batch,
        passes=options.passes,
        curve=options.plot is not None,
        resume=options.resume,
    )
    try:
        with tune_view.TuneProgress(console) as progress:
            result = tune(asked, on_progress=progress.update)
    except KeyboardInterrupt:
        print("what was measured is kept: go on with --resume", file=sys.stderr)
        raise
    trouble = tune_view.plot(result, options.plot) if options.plot else None
    build = ["python", "-m", "jmp_deploy", "build", options.model]
    build += ["--schedule", str(out)]  # tau is in the file
    build += ["--weights", options.weights] if options.weights != "auto" else []
    build += ["--img-size", str(options.img_size)] if options.img_size else []
    show.show(options, tune_view.summary(result, out, shlex.join(build)), result)
    if trouble:
        print(trouble, file=sys.stderr)
    return 0


def _visualize(options: argparse.Namespace) -> int:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..jmp.visualize import VisualizeOptions, visualize
    from .render import facts, weights

    result = visualize(
        VisualizeOptions(
            source=options.source,
            images=tuple(options.images),
            out=options.out,
            weights=options.weights,
            schedule=options.schedule,
            tau=options.tau,
            granularity=options.granularity,
            img_size=options.img_size,
            seed=options.seed,
            contact=options.batch,
        )
    )
    table = Table(expand=False)
    for name in ("image", "block", "tokens", "kept", "merged", "pruned"):
        table.add_column(name, justify="left" if name == "image" else "right")
    for record in result["images"][:8]:
        for index, stage in enumerate(record["stages"]):
            table.add_row(
                "" if index else record["image"],
                *(str(stage[name]) for name in ("block", "tokens", "kept", "merged", "pruned")),
            )
    rows = [
        ("model", f"{result['model']}, schedule {result['schedule']}, tau {result['tau']:g}"),
        ("weights", weights(result["weights"])),
        ("drawn", "\n".join(result["files"])),
    ]
    parts: list[Any] = [table, facts(rows)]
    if result["weights"]["kind"] == "random":
        parts.append(Text("RANDOM WEIGHTS: what is drawn means nothing", style="bold red"))
    show.show(options, Group(*parts), result)
    return 0


HANDLERS = {"tune": _tune, "visualize": _visualize}
