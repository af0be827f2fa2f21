"""The command `visualize`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType

PHOTOS = 8
"""Images that the table lists; the JSON has all."""


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _visualize,
        "visualize",
        "draw what becomes of each patch of a photo: kept, merged into which token, or pruned",
        (
            "visualize deit_s photo.jpg -o pictures/",
            "visualize artifacts/deit_s photos/ -o pictures/ --batch",
            "visualize dinov2_s photo.jpg -o photo.png --schedule tuned.json",
            "visualize dinov2_s photo.jpg --schedule spread:62 --features",
        ),
    )
    parser.add_argument("source", metavar="MODEL|DIR", help="model name, or artifact folder")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument(
        "-o",
        "--out",
        type=flags.new_pictures,
        metavar="DIR|FILE",
        help="folder for a PNG per image and index.html, or one .png or .html file (pictures)",
    )
    parser.add_argument(
        "--batch",
        dest="contact",
        action="store_true",
        help="one contact sheet in place of a PNG per image",
    )
    parser.add_argument(
        "--features",
        action="store_true",
        help="draw the features of the patches too, without JMP and with it (three principal "
        "components as red, green and blue)",
    )
    parser.add_argument(
        "--schedule", metavar="NAME|LIST|FILE", help="as for build (spread; an artifact's own)"
    )
    parser.add_argument("--tau", type=flags.tau, help="(the schedule's)")
    parser.add_argument("--granularity", choices=("token", "sample"), help="(token)")
    flags.add_weights(parser, more="; an artifact's own")
    parser.add_argument("--seed", type=flags.seed, help="of random weights (0)")
    flags.add_own_model(parser)


def _visualize(given: argparse.Namespace) -> int:
    from ..core.manifest import Weights
    from ..jmp.visualize import VisualizeOptions, visualize

    result = visualize(flags.fill(VisualizeOptions, given, own=flags.own_model(given)))
    numbers = ("block", "tokens", "kept", "merged", "pruned")
    table = show.table("", "image", *(f">{name}" for name in numbers))
    for record in result["images"][:PHOTOS]:
        for index, stage in enumerate(record["stages"]):
            cells = (str(stage[name]) for name in numbers)
            table.add_row("" if index else record["image"], *cells)
    weights = Weights(**result["weights"])
    rows = [
        ("model", f"{result['model']}, schedule {result['schedule']}, tau {result['tau']:g}"),
        ("weights", show.weights(weights)),
        ("drawn", "\n".join(result["files"])),
    ]
    parts: list[RenderableType] = [table, show.facts(rows)]
    if weights.kind == "random":
        parts.append(show.styled("RANDOM WEIGHTS: what is drawn means nothing", "bold red"))
    show.show(given, parts, result)
    return 0
