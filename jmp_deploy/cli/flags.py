"""The command line's words: commands, flags, their help and their types. No work is done here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends import AUTO, AUTO_HELP, DEPLOYED, NAMES


def make_parser(*others: Callable[[Any], None]) -> argparse.ArgumentParser:
    """All commands and their flags; `others` add theirs to the subparsers."""
    parser = argparse.ArgumentParser(
        prog="jmp_deploy",
        description="TensorRT engines of timm vision transformers that do a third less work "
        "(JMP: joint merging and pruning of tokens).",
        epilog="Start with `python -m jmp_deploy doctor`, then with "
        "`python -m jmp_deploy build deit_s`.",
    )
    parser.add_argument("--version", action="version", version=f"jmp_deploy {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_build, _add_run, _add_compare, _add_inspect, _add_report):
        add(commands)
    _add_doctor(commands)
    _add_plugin(commands)
    for add_other in others:
        add_other(commands)
    return parser


def add_command(
    commands: Any, name: str, summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A subcommand with what all of them have: --json, examples, its own name in `command`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  python -m jmp_deploy {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --force would be --force-int8
    )
    parser.set_defaults(command=name)
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON too; - for standard output"
    )
    return parser


def _add_build(commands: Any) -> None:
    parser = add_command(
        commands,
        "build",
        "make an engine: weights -> JMP -> ONNX -> precision -> check -> plugin -> engine",
        (
            "build deit_s",
            "build deit_s --dense                          # the baseline",
            "build deit_s --schedule paper --strategy merge",
            "build dinov2_s --weights dinov2_s.safetensors --batch 1,8,64",
            "build vit_base_patch16_224 --keep-rate 0.7 --blocks 3,6,9 --precision fp32",
            "build deit_s --precision int8 --calib photos/ --max-drop 0.3",
            "build deit_s --precision int8 --calib-cache artifacts/deit_s/calibration.json",
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="deit_s, dinov2_s, ... or any timm name")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="artifact folder (artifacts/MODEL)"
    )
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="auto|pretrained|random|PATH",
        help="auto takes pretrained ones, or random ones (for timing only) where the hub cannot be "
        "reached; PATH is .safetensors or a .pth of plain tensors (auto)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp16", "int8", "fp32"),
        default="fp16",
        help="int8 quantizes the linear layers, keeps the rest in FP16 and needs --calib (fp16)",
    )
    parser.add_argument(
        "--schedule",
        metavar="NAME|LIST|FILE",
        help="which blocks reduce, and to how many patch tokens: spread, spread:50 (percent of the "
        "FLOPs), paper, 3:138,6:97,9:68, r18@2-10 or a .json file, as `tune` writes it (spread)",
    )
    parser.add_argument(
        "--keep-rate", type=float, metavar="R", help="with --blocks: keep ceil(R*M) in each"
    )
    parser.add_argument("--blocks", type=_integers, metavar="I,J,..", help="0-based")
    parser.add_argument(
        "--tau",
        type=float,
        help="similarity from which a token is merged rather than pruned (the schedule's: 0.8 for "
        "spread, 0.7 for what is written out, or what its file says)",
    )
    parser.add_argument(
        "--granularity",
        choices=("token", "sample"),
        default="token",
        help="decide per token or for all tokens of an image at once (token)",
    )
    parser.add_argument(
        "--strategy",
        choices=("jmp", "merge", "prune"),
        default="jmp",
        help="jmp uses tau; merge and prune do only that (jmp)",
    )
    parser.add_argument(
        "--no-proportional",
        action="store_true",
        help="do not weigh tokens in attention by the patches that they stand for",
    )
    parser.add_argument("--dense", action="store_true", help="no JMP: the baseline")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="(the model's own)")
    parser.add_argument(
        "--batch",
        type=_batch,
        default=(1, 8, 32),
        metavar="N|MIN,OPT,MAX",
        help="images per inference: one size, or a range and what to tune for (1,8,32)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "tensorrt", "rtx", "none"),
        default="auto",
        help="builder; auto takes TensorRT where a GPU is, else TensorRT-RTX ahead of time (auto)",
    )
    parser.add_argument(
        "--targets",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="sm_86,..",
        help="GPUs of a TensorRT-RTX engine (the one that is here, else all that it knows)",
    )
    parser.add_argument(
        "--workspace", type=positive, metavar="MIB", help="limit of the builder's scratch memory"
    )
    _add_images(parser, "photos for the check (those that scikit-image and scikit-learn ship)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of random weights and of the calibration sample (0)"
    )
    _add_int8(parser)


def _add_int8(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "INT8",
        "The FP16 twin is built too; where a GPU is, both are timed and the faster one is "
        "model.engine.",
    )
    group.add_argument(
        "--calib",
        metavar="DIR|sample",
        help="images like those that the model will see; sample takes crops of the photos that "
        "scikit-image and scikit-learn ship (a demonstration)",
    )
    group.add_argument(
        "--calib-images", type=positive, default=256, metavar="N", help="images to draw (256)"
    )
    group.add_argument(
        "--calib-method",
        metavar="max|entropy|percentile[:P]",
        help="how ranges are chosen; percentile is 99.999 (the model family's recipe)",
    )
    group.add_argument(
        "--calib-cache",
        type=Path,
        metavar="FILE",
        help="calibration.json of an earlier build of this model and schedule: no images needed, "
        "the same model again",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="measure what each layer costs and keep the worst in FP16 until the estimated drop "
        "holds, e.g. 0.3 (keep what the model family's recipe says)",
    )
    group.add_argument(
        "--force-int8",
        action="store_true",
        help="use the INT8 engine even if it is less than 5 %% faster than FP16",
    )


def _add_run(commands: Any) -> None:
    parser = add_command(
        commands,
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
    _add_artifact(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files or folders")
    parser.add_argument(
        "--backend",
        choices=(AUTO, *DEPLOYED),
        default=AUTO,
        help=AUTO_HELP,
    )
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes (5)")
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="images per inference at most (the engine's own limit)",
    )
    parser.add_argument(
        "--allow-random", action="store_true", help="run an artifact with random weights"
    )
    parser.add_argument(
        "--no-cuda-graph", action="store_true", help="enqueue each inference layer by layer"
    )
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument(
        "--rebuild",
        dest="rebuild_engine",  # `rebuild` is the whole command, for the manifest
        action="store_true",
        help="make the engine anew from model.trt.onnx if it does not fit this machine",
    )
    checks.add_argument(
        "--no-manifest",
        action="store_true",
        help="run an engine of which nothing is known: DIR may be a plan file",
    )


def _add_compare(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        "compare PyTorch, ONNX Runtime and the engine on the same images; exit 1 outside tolerance",
        (
            "compare artifacts/deit_s",
            "compare artifacts/deit_s --backends torch,engine --images photos/ --json -",
            "compare artifacts/deit_s --min-cosine 0.9995 --max-abs 0.2",
            "compare artifacts/deit_s --debug           # which block loses the accuracy",
        ),
    )
    _add_artifact(parser)
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar="A,B,..",
        help=f"of {', '.join(NAMES)}; the first is the reference (all that run here)",
    )
    _add_images(parser, "files or folders (the artifact's reference images)")
    parser.add_argument(
        "--limit",
        type=positive,
        default=64,
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
        "fp32 0.99999, fp16 0.999, int8 0.99)",
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


def _add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "show what is in an artifact, an ONNX model (as the TensorRT parser sees it) or an engine",
        ("inspect artifacts/deit_s", "inspect artifacts/deit_s/model.trt.onnx --json -"),
    )
    parser.add_argument("path", type=Path, metavar="DIR|FILE")


def _add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        "summarise an artifact: FLOPs, sizes, times, agreement, what this machine could not do",
        ("report artifacts/deit_s", "report artifacts/deit_s --compare compare.json"),
    )
    _add_artifact(parser)
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="a result of `compare --json FILE` to include"
    )


def _add_doctor(commands: Any) -> None:
    add_command(
        commands,
        "doctor",
        "tell what is installed, found and usable here, and the command that mends each gap",
        ("doctor", "doctor --json doctor.json"),
    )


def _add_plugin(commands: Any) -> None:
    parser = add_command(
        commands,
        "plugin",
        "build the TensorRT plugin (`build` does it by itself), or say where it is",
        ("plugin build", "plugin build --arch sm_87,sm_110 --force", "plugin path"),
    )
    parser.add_argument("action", choices=("build", "path"))
    parser.add_argument(
        "--arch",
        type=lambda text: text.split(","),
        metavar="sm_87,..",
        help="GPU architectures (all that the compiler knows of 75, 80, 86, 87, 89, 90, 110, 120)",
    )
    parser.add_argument("--force", action="store_true", help="build even if it is there")


def _add_images(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--images", type=Path, nargs="+", default=(), metavar="PATH", help=what)


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="artifact folder made by `build`")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 3,6,9") from error


def _batch(text: str) -> tuple[int, int, int]:
    numbers = _integers(text)
    if len(numbers) == 1:
        numbers = numbers * 3
    if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor MIN,OPT,MAX in rising order")
    return numbers[0], numbers[1], numbers[2]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _cosine(text: str) -> float:
    number = _number(text)
    if not -1 <= number <= 1:
        raise argparse.ArgumentTypeError("a cosine lies between -1 and 1")
    return number


def _not_negative(text: str) -> float:
    number = _number(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("must be a number of at least 0")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def _backends(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(NAMES)}")
    if len(set(names)) < 2:
        raise argparse.ArgumentTypeError("two different backends at least")
    return names
