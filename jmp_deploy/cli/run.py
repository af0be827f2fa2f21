"""The command `run`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import fail
from . import flags, show

if TYPE_CHECKING:
    from rich.table import Table

    from ..backends.predict import Predictions


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _run,
        "run",
        "run an artifact on images: top classes, or features of a model without a classifier",
        (
            "run artifacts/deit_s photo.jpg",
            "run artifacts/dinov2_s photos/ --json features.json",
            "run artifacts/deit_s photos/ --rebuild        # on another GPU or TensorRT",
            "run artifacts/deit_s photos/ --batch 4        # less GPU memory",
            "run some.engine photo.jpg --no-manifest",
        ),
    )
    flags.add_artifact(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    flags.add_backend(parser)
    parser.add_argument("--topk", type=flags.positive, metavar="K", help="classes (5)")
    parser.add_argument(
        "--batch",
        type=flags.positive,
        metavar="N",
        help="images per inference at most (the engine's own limit)",
    )
    parser.add_argument(
        "--allow-random", action="store_true", help="run an artifact with random weights"
    )
    parser.add_argument(
        "--no-cuda-graph",
        dest="cuda_graph",
        action="store_false",
        help="enqueue each inference layer by layer",
    )
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument(
        "--rebuild",
        action="store_true",
        default=False,
        help="make the engine anew from model.trt.onnx if it does not fit this machine",
    )
    checks.add_argument(
        "--no-manifest",
        dest="use_manifest",
        action="store_false",
        help="run an engine of which nothing is known: DIR may be a plan file",
    )


def _run(given: argparse.Namespace) -> int:
    from ..backends.predict import Options, predict

    if given.rebuild:
        _rebuild(given.folder)
    with _warnings_as_lines():
        options = flags.fill(Options, given)
        result = flags.fill(predict, given, path=given.folder, options=options)
    show.show(given, [_predictions(result)], [*result.records, *result.skipped])
    for entry in result.skipped:
        print(f"skipped: {entry['error']}", file=sys.stderr)
    if not result.ok:
        total = len(result.records) + len(result.skipped)
        return fail(f"{len(result.skipped)} of {total} images cannot be read", None, 1)
    return 0


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What the library warns of, without the line of our source where it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def _rebuild(folder: Path) -> None:
    """Makes the engine of an artifact anew where it does not fit."""
    from ..bench.int8 import settle
    from ..core.artifact import Artifact
    from ..engine.stage import rebuild, why_rebuild
    from .build import known_faults

    found = Artifact.read(folder)
    reason = why_rebuild(found)
    if reason is None:
        return
    print(f"the engine is made anew: {reason}", file=sys.stderr)
    with show.Progress() as progress:
        made = rebuild(found, settle, on_stage=progress.stage, on_progress=progress.steps)
    for text in known_faults(made):
        print(f"warning: {text}", file=sys.stderr)


def _predictions(result: Predictions) -> Table:
    title = f"run with {result.backend} ({result.reason})"
    table = show.table(title, "image", result.output.heading)
    for record in result.records:
        table.add_row(record["image"], result.output.words(record))
    return table
