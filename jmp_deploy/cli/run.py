"""The command `run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import AUTO
from ..core.errors import JmpDeployError, fail, say
from . import checked, flags, show

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
            "run artifacts/dinov2_s-dense-output photos/ --save features.npz",
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
        "--save",
        type=flags.new_file,
        metavar="FILE.npz",
        help="write all that came out: arrays `images` (names) and logits, features or dense",
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
    from ..core.images import UNREADABLE_HINT

    if "use_manifest" in given and "backend" in given and given.backend == "onnxruntime":
        raise JmpDeployError(
            "--no-manifest runs an engine, not ONNX Runtime", "leave one of the two flags out"
        )
    if given.rebuild:
        _rebuild(given.folder)
    if "use_manifest" not in given:
        verdict = checked.check_first([given.folder], [getattr(given, "backend", AUTO)])
        for words in verdict.notes:
            say(f"note: {words}")
        checked.refuse(verdict)
    options = flags.fill(Options, given)
    result = flags.fill(predict, given, path=given.folder, options=options)
    show.show(given, [_predictions(result)], [*result.records, *result.skipped])
    for entry in result.skipped:
        say(f"skipped: {entry['error']}")
    if not result.ok:
        total = len(result.records) + len(result.skipped)
        return fail(f"{len(result.skipped)} of {total} images cannot be read", UNREADABLE_HINT, 1)
    return 0


def _rebuild(folder: Path) -> None:
    """Makes the engine of an artifact anew where it does not fit."""
    from ..bench.twin import settle
    from ..compare.check import check_engine
    from ..core.artifact import Artifact
    from ..engine.stage import rebuild, why_rebuild
    from .build import known_faults

    found = Artifact.read(folder)
    reason = why_rebuild(found)
    if reason is None:
        return
    say(f"the engine is made anew: {reason}")
    with show.Progress() as progress:
        made = rebuild(
            found, check_engine, settle, on_stage=progress.stage, on_progress=progress.steps
        )
    for text in known_faults(made):
        say(f"warning: {text}")
    checked.refuse(checked.verdict_on(made))


def _predictions(result: Predictions) -> Table:
    title = f"run with {result.backend} ({result.reason})"
    first, *others = result.outputs
    table = show.table(title, "image", first.heading if not others else "outputs")
    for record in result.records:
        words = [first.words(record)]
        words += [f"{output.name}: {output.words(record[output.name])}" for output in others]
        table.add_row(record["image"], "\n".join(words))
    return table
