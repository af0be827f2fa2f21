"""The commands `validate` and `merge`: flags, and what is printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..backends import AUTO, AUTO_HELP, DEPLOYED
from . import show
from .flags import add_command, positive

MORE = """shards in parallel (... stands for `python -m jmp_deploy validate DIR --data DIR`):
  Slurm:     ... --shard $((SLURM_PROCID + 1))/$SLURM_NTASKS --json part$SLURM_PROCID.json
  torchrun:  torchrun --nproc-per-node 4 --no-python bash -c \\
    'CUDA_VISIBLE_DEVICES=$LOCAL_RANK ... --shard $((RANK + 1))/$WORLD_SIZE --json part$RANK.json'

exit code 1: more than one image in a hundred is unreadable, or an output is not finite."""


def add_commands(commands: Any) -> None:
    """Adds both to what `add_subparsers` returned."""
    _add_validate(commands)
    _add_merge(commands)


def _add_validate(commands: Any) -> None:
    parser = add_command(
        commands,
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
    parser.add_argument("dir", type=Path, metavar="DIR", help="artifact folder made by `build`")
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
    parser.add_argument(
        "--backend",
        choices=(AUTO, *DEPLOYED),
        default=AUTO,
        help=AUTO_HELP,
    )
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="images per inference (the engine's best)"
    )
    parser.add_argument(
        "--workers",
        type=_natural,
        metavar="N",
        help="processes that decode images, 0 for none (one per CPU, at most 8)",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="a fixed random subset of N images (all)"
    )
    parser.add_argument(
        "--train-limit", type=positive, metavar="N", help="the same for the train split (all)"
    )
    parser.add_argument(
        "--probe",
        choices=("auto", "logistic", "ridge"),
        default="auto",
        help="classifier on features: logistic regression needs scikit-learn, ridge regression "
        "numpy alone; auto takes the first where it can (auto)",
    )
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="every N-th batch from the I-th; see `merge`"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of these flags ended"
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="what --resume goes on from; written every 10 s and on Ctrl-C, removed at the end "
        "(beside --json FILE, else NAME-validate.state.npz here)",
    )
    parser.add_argument(
        "--allow-random", action="store_true", help="validate an artifact with random weights"
    )


def _add_merge(commands: Any) -> None:
    parser = add_command(
        commands,
        "merge",
        "put the results of all shards of `validate --shard` together",
        ("merge part*.json --json accuracy.json",),
    )
    parser.add_argument(
        "parts", nargs="+", type=Path, metavar="PART.json", help="one for each shard, in any order"
    )


def _validate(options: argparse.Namespace) -> int:
    from ..validate.validate import ValidateOptions, validate
    from . import validate_view

    asked = ValidateOptions(
        folder=options.dir,
        data=options.data,
        labels=options.labels,
        against=options.against,
        backend=options.backend,
        batch=options.batch,
        workers=options.workers,
        limit=options.limit,
        train_limit=options.train_limit,
        shard=options.shard,
        state=_state_file(options),
        resume=options.resume,
        probe=options.probe,
        allow_random=options.allow_random,
    )
    try:
        with validate_view.ValidateProgress(show.console(stderr=True)) as progress:
            result = validate(asked, on_progress=progress.update)
    except KeyboardInterrupt:
        if asked.state and asked.state.is_file():
            print(f"{asked.state} holds what was measured: go on with --resume", file=sys.stderr)
        raise
    show.show(options, validate_view.summary(result), result)
    return _verdict(result)


def _merge(options: argparse.Namespace) -> int:
    from ..validate.state import merge
    from . import validate_view

    result = merge(options.parts)
    show.show(options, validate_view.summary(result), result)
    return _verdict(result)


def _verdict(result: dict[str, Any]) -> int:
    if result["ok"]:
        return 0
    return show.fail(
        "more than 1 % of the images are unreadable: the accuracy is that of another data set",
        "the JSON lists them under `unreadable`",
        1,
    )


def _state_file(options: argparse.Namespace) -> Path:
    if options.state:
        return Path(options.state)
    if options.json and options.json != "-":
        return Path(options.json).with_suffix(".state.npz")
    shard = "-{}-of-{}".format(*options.shard) if options.shard else ""
    return Path(f"{options.dir.resolve().name}-validate{shard}.state.npz")


def _natural(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard such as 1/4") from error
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: shards of {count} are 1/{count} to "
                                         f"{count}/{count}")  # fmt: skip
    return index, count


HANDLERS = {"validate": _validate, "merge": _merge}
