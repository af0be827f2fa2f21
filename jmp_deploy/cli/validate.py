"""The commands `validate` and `merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import fail, say
from . import checked, flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LISTED = 5
"""Unreadable images that the table lists; the JSON has all."""
WAITING = 0.2
"""Share of time spent waiting for images from which more workers are worth a hint."""
WORDS = {"train": "features for the probe", "val": "validating"}

MORE = """shards in parallel (... stands for `python -m jmp_deploy validate DIR --data DIR`):
  Slurm:     ... --shard $((SLURM_PROCID + 1))/$SLURM_NTASKS --json part$SLURM_PROCID.json
  torchrun:  torchrun --nproc-per-node 4 --no-python bash -c \\
    'CUDA_VISIBLE_DEVICES=$LOCAL_RANK ... --shard $((RANK + 1))/$WORLD_SIZE --json part$RANK.json'

exit code 1: more than one image in a hundred is unreadable, or an output is not finite."""


def add(commands: Any) -> None:
    """Adds both to what `add_subparsers` returned."""
    _add_validate(commands)
    _add_merge(commands)


def _add_validate(commands: Any) -> None:
    parser = flags.add_command(
        commands,
        _validate,
        "validate",
        "measure accuracy on labelled images, and what is lost of it against the dense model",
        (
            "validate artifacts/deit_s --data imagenet/val",
            "validate artifacts/deit_s --data imagenet/val --against artifacts/deit_s-dense",
            "validate artifacts/deit_s --data photos/ --labels labels.csv --json accuracy.json",
            "validate artifacts/dinov2_s --data digits/ --against artifacts/dinov2_s-dense",
            "validate artifacts/deit_s --data imagenet/val --resume   # after Ctrl-C",
            "validate artifacts/deit_s --data imagenet/val --shard 1/4 --json part1.json",
            "merge part*.json                                         # the shards, together",
        ),
    )
    parser.epilog = f"{parser.epilog}\n\n{MORE}"
    flags.add_artifact(parser)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="DIR/CLASS/IMAGE, or DIR/val/CLASS/IMAGE; a class folder is a class number, an "
        "ImageNet synset or a class name. A model without a classifier head needs train/ too: a "
        "probe is fitted on it",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.csv",
        help="lines of file,class in place of class folders; paths start at --data",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DENSE_DIR",
        help="artifact made with `build MODEL --dense`: gives agreement, drop in points and its "
        "95 %% interval",
    )
    flags.add_backend(parser)
    parser.add_argument(
        "--batch", type=flags.positive, metavar="N", help="images per inference (the engine's best)"
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        metavar="N",
        help="processes that decode images, 0 for none (one per CPU, at most 8)",
    )
    parser.add_argument(
        "--limit", type=flags.positive, metavar="N", help="a fixed random subset of N images (all)"
    )
    parser.add_argument(
        "--train-limit", type=flags.positive, metavar="N", help="the same for the train split (all)"
    )
    parser.add_argument(
        "--probe",
        choices=("auto", "logistic", "ridge"),
        help="classifier on features: logistic regression needs scikit-learn, ridge regression "
        "numpy alone; auto takes the first where it can (auto)",
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="every N-th batch from the I-th; see `merge`"
    )
    flags.add_resume(parser)
    parser.add_argument(
        "--state",
        type=flags.new_file,
        default=None,
        metavar="FILE",
        help="what --resume goes on from; written every 10 s and on Ctrl-C, removed at the end "
        "(beside --json FILE, else NAME-validate.state.npz here)",
    )
    parser.add_argument(
        "--allow-random", action="store_true", help="validate an artifact with random weights"
    )


def _add_merge(commands: Any) -> None:
    parser = flags.add_command(
        commands,
        _merge,
        "merge",
        "put the results of all shards of `validate --shard` together",
        ("merge part*.json --json accuracy.json",),
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PART.json", help="one for each shard, in any order"
    )


def _natural(text: str) -> int:
    return 0 if text == "0" else flags.positive(text)


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as 1/4") from error
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: shards of {count} are 1/{count} to "
                                         f"{count}/{count}")  # fmt: skip
    return index, count


def _validate(given: argparse.Namespace) -> int:
    from ..validate.validate import ValidateOptions, validate

    state = _state_file(given)
    asked = flags.fill(ValidateOptions, given, state=state)
    folders = [asked.folder, *([asked.against] if asked.against else [])]
    verdict = checked.check_first(folders, [asked.backend])
    try:
        with show.Progress(remaining=True) as progress:

            def update(split: str, done: int, total: int) -> None:
                words = WORDS.get(split, split)
                if progress.label != words:
                    progress.stage(words)
                progress.update(words, done / total, f": {done} of {total} images")

            result = validate(asked, on_progress=update)
    except KeyboardInterrupt:
        if state.is_file():
            say(f"{state} holds what was measured: go on with --resume")
        raise
    result["notes"] += [*verdict.notes, *verdict.problems]
    code = _show(given, {**result, "ok": result["ok"] and not verdict.problems}, result["ok"])
    checked.refuse(verdict)
    return code


def _merge(given: argparse.Namespace) -> int:
    from ..validate.state import merge

    result = flags.fill(merge, given)
    return _show(given, result, result["ok"])


def _show(given: argparse.Namespace, result: dict[str, Any], readable: bool) -> int:
    show.show(given, _summary(result), result)
    if readable:
        return 0
    return fail(
        "more than 1 % of the images are unreadable: the accuracy is that of another data set",
        "the JSON lists them under `unreadable`",
        1,
    )


def _state_file(given: argparse.Namespace) -> Path:
    if given.state:
        return Path(given.state)
    if given.json and given.json != "-":
        return Path(given.json).with_suffix(".state.npz")
    shard = "-{}-of-{}".format(*given.shard) if "shard" in given else ""
    return Path(f"{given.folder.resolve().name}-validate{shard}.state.npz")


def _summary(result: dict[str, Any]) -> list[RenderableType]:
    """The tables that end `validate` and `merge`."""
    parts: list[RenderableType] = [_accuracy(result), show.facts(_facts(result))]
    parts += [show.styled(note, "yellow") for note in result["notes"]]
    skipped = list(result["unreadable"]["files"])
    if result["probe"]:
        skipped += result["probe"]["unreadable"]["files"]
    parts += [show.styled(f"skipped: {entry['reason']}", "yellow") for entry in skipped[:LISTED]]
    if len(skipped) > LISTED:
        parts.append(show.styled(f"and {len(skipped) - LISTED} more", "yellow"))
    return parts


def _accuracy(result: dict[str, Any]) -> Table:
    """A column per measure; rows: this artifact, the dense one, what was lost."""
    knn = result["knn"]
    columns = ("", ">top-1 %", ">top-5 %", *((">k-NN %",) if knn else ()))
    table = show.table(f"{result['n']} images", *columns, wrap=False)
    model = [f"{result['top1']:.2f}", f"{result['top5']:.2f}"]
    table.add_row("this artifact", *model, *([f"{knn['top1']:.2f}"] if knn else []))
    if result["dense"]:
        dense = [f"{result['dense']['top1']:.2f}", f"{result['dense']['top5']:.2f}"]
        table.add_row("dense", *dense, *([f"{knn['dense']:.2f}"] if knn else []))
        lost = [f"{result['drop_points']:+.2f}", f"{result['top5_drop_points']:+.2f}"]
        lost += [f"{knn['drop_points']:+.2f}"] if knn else []
        table.add_row("drop in points", *lost, style="bold")
        intervals = [_interval(result["ci95"]), "", *([_interval(knn["ci95"])] if knn else [])]
        table.add_row("95 % interval", *intervals)
    return table


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("artifact", f"{result['artifact']} ({result['model']}, {result['precision'].upper()})")
    ]
    if result["dense"]:
        rows.append(("dense", str(result["against"])))
        rows.append(
            (
                "agreement",
                f"{result['agreement_with_dense']:.2f} % give the dense model's answer; only the "
                f"dense model is right on {result['only_dense_right']}, only this one on "
                f"{result['only_model_right']}",
            )
        )
    rows.append(("data", f"{result['data']}, {result['images']} images, {result['labels']}"))
    if shard := result["shard"]:
        rows.append(("shard", f"{shard['index']}/{shard['of']}: put all together with `merge`"))
    if probe := result["probe"]:
        fitted = {"logistic": "logistic regression", "ridge": "ridge regression"}[probe["kind"]]
        rows.append(
            (
                "probe",
                f"{fitted} and {probe['neighbours']} nearest neighbours on the dense features of "
                f"{probe['train_images']} train images",
            )
        )
    skipped = result["unreadable"]
    share = f"{skipped['count']} skipped ({skipped['share']:.1%} of the images)"
    rows.append(("unreadable", share if skipped["count"] else "none"))
    why = f" ({result['backend_reason']})" if result.get("backend_reason") else ""
    rows.append(("backend", f"{result['backend']}{why} on {result['device']}"))
    rows.append(("speed", _speed(result)))
    return rows


def _speed(result: dict[str, Any]) -> str:
    if result.get("shards"):
        return "; ".join(
            f"shard {shard['index']}: {_rate(shard['end_to_end'])} on {shard['device']}"
            for shard in result["shards"]
        )
    speed = result["throughput"]
    words = f"{_rate(speed['model'])} in this artifact alone"
    if speed["dense"] is not None:
        words += f", {_rate(speed['dense'])} in the dense one"
    words += f"; {_rate(speed['end_to_end'])} end to end"
    if result["dense"]:
        words += " with both"
    waiting = speed["waiting_share"]
    if waiting is not None:
        words += f", {waiting:.0%} of it waiting for images"
        words += " (more --workers may help)" if waiting > WAITING else ""
    return words


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} images/s"


def _interval(pair: list[float]) -> str:
    return f"{pair[0]:+.2f} to {pair[1]:+.2f}"
