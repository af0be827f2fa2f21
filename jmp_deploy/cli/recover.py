"""The command `recover`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..recover.recover import RecoverOptions


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _recover,
        "recover",
        "train the reduced model to answer as the dense one does, on unlabelled images; for "
        "reductions to half of the work and less",
        (
            "recover dinov2_s --weights dinov2_s.safetensors --images photos/",
            "recover dinov2_s --weights dinov2_s.safetensors --images photos/ --schedule spread:40",
            "build dinov2_s --schedule spread:40 --weights dinov2_s-recovered.safetensors",
        ),
    )
    flags.add_model(parser)
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders, like those that the model will see, 200 photos and above; no "
        "labels are needed. A fifth of the files judges the end and a tenth says when to stop: no "
        "two of one photo",
    )
    parser.add_argument(
        "--schedule", metavar="NAME|LIST|FILE", help="as for build: what to learn for (spread:50)"
    )
    parser.add_argument("--tau", type=flags.tau, help="as for build (the schedule's)")
    parser.add_argument(
        "-o",
        "--out",
        type=flags.new_file,
        default=None,
        metavar="FILE",
        help="weights for `build --weights` (MODEL-recovered.safetensors)",
    )
    flags.add_weights(parser)
    parser.add_argument(
        "--train",
        choices=("small", "all"),
        help="what learns: norms, biases and layer scales, or the matrices too (all)",
    )
    parser.add_argument(
        "--crops", type=flags.positive, metavar="N", help="crops to learn from in all (8000)"
    )
    parser.add_argument("--batch", type=flags.positive, metavar="N", help="crops in a step (16)")
    parser.add_argument(
        "--learning-rate",
        type=flags.number(0, 1, above=True),
        metavar="R",
        help="the largest (3e-6; with --train small 3e-4)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="where it learns; auto takes a GPU, if there is one (auto)",
    )
    parser.add_argument(
        "--limit", type=flags.positive, metavar="N", help="images to use at most (500)"
    )
    parser.add_argument(
        "--seed", type=flags.seed, help="of the crops, and which images judge and which stop (0)"
    )
    flags.add_resume(parser)
    flags.add_own_model(parser)


def _recover(given: argparse.Namespace) -> int:
    from ..recover.recover import RecoverOptions, recover

    out = given.out or Path(f"{given.model.replace('/', '_')}-recovered.safetensors")
    asked = flags.fill(RecoverOptions, given, out=out, own=flags.own_model(given))
    with show.nearing("what was learnt up to the last look at the result is kept") as update:
        result = recover(asked, on_progress=update)
    show.show(given, _summary(result, out, _build(given, asked, out)), result)
    return 0


def _build(given: argparse.Namespace, asked: RecoverOptions, out: Path) -> str:
    """What makes an artifact with the weights."""
    if asked.own.function:  # which makes its model itself: `build` reads no weights beside it
        return f"{out} loaded by {asked.own.function} itself (safetensors.torch.load_file)"
    words = ["python", "-m", "jmp_deploy", "build", asked.model, "--weights", str(out)]
    words += ["--schedule", asked.schedule]
    words += ["--tau", f"{asked.tau:g}"] if asked.tau is not None else []
    return shlex.join([*words, *flags.own_words(given)])


def _summary(result: dict[str, Any], path: Path, build: str) -> list[RenderableType]:
    from ..core.manifest import Weights

    jmp, gain = result["jmp"], result["gain"]
    judged = result["judged"]
    table = show.table("", "1e4 x", f">{judged} images that it never saw")
    for name in ("before", "after", "gain"):
        table.add_row(name, _figure(result[name]))
    steps = ", ".join(f"{block}:{keep}" for block, keep in jmp["schedule"])
    share = gain["value"] / result["before"]["value"]
    lines = [
        ("distance", f"{result['objective']}; mean over files (95 % interval)"),
        ("gains", f"{share:.0%} of it"),
        ("weights", f"{path}, from {show.weights(Weights(**result['weights']))}"),
        ("for", f"{jmp['schedule_name']} ({steps}), tau {jmp['tau']:g}"),
        ("learnt", f"{result['train']}, best after {result['best_step']} of {result['steps']} "
         f"steps of {result['batch']} crops"),
        ("images", f"{result['images']}, seed {result['seed']}"),
        ("build with", build),
    ]  # fmt: skip
    return [table, show.facts(lines), *show.warnings(result)]


def _figure(figure: dict[str, float]) -> str:
    value, low, high = (f"{1e4 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
