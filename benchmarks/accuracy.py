"""Accuracy of token reduction without training, against the dense model and other methods.

A linear probe and nearest neighbours are fitted to DENSE features of training images; then they
judge what a reduced model makes of images that neither has seen. No method is tuned here: budgets
and methods are named on the command line, choices belong to `--part validation`, and `--part test`
is for the figures that are reported.

    # 3 minutes: does everything run? (random weights: the figures mean nothing)
    python benchmarks/accuracy.py --quick

    # the tables of docs/method.md
    python scripts/demo_weights.py artifacts/weights/dinov2_s.safetensors
    python benchmarks/accuracy.py --weights artifacts/weights/dinov2_s.safetensors
    python benchmarks/accuracy.py --weights artifacts/weights/dinov2_s.safetensors --part test

    # your own model on ImageNet's validation images (DIR/CLASS/IMAGE)
    python benchmarks/accuracy.py --model deit_s --weights FILE.pth --data-dir val --limit 4000

Budgets are shares of the dense model's multiply-accumulates as timm runs it. A method's cost is
counted by PyTorch's flop counter, its own arithmetic included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command
from jmp_deploy.core.errors import ModelError

if TYPE_CHECKING:
    from benchmarks.lib.data import Task

QUICK_IMAGES = 12


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks/accuracy.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", default="dinov2_s", help="short or timm name (dinov2_s)")
    add("--weights", default="auto", help="auto, pretrained, random, or a checkpoint's path (auto)")
    add("--img-size", type=int, help="pixels, if not the model's own")
    add("--part", choices=("validation", "test"), default="validation", help="which images judge")
    add("--budgets", default="75,62,50,40", help="percent of the dense FLOPs (75,62,50,40)")
    add("--methods", help="comma list out of: %(metavar)s (all)", metavar="jmp,tome,...")
    add("--own-schedules", action="store_true", help="also ToMe and EViT in their own blocks")
    add("--schedule", type=Path, action="append", help="also JMP with this file, as tune wrote it")
    add("--data-dir", type=Path, help="DIR/CLASS/IMAGE instead of digits and photo crops")
    add("--limit", type=int, help="images taken of --data-dir")
    add("--seed", type=int, default=0, help="of the split, the crops and the bootstrap (0)")
    add("--quick", action="store_true", help=f"smoke run: {QUICK_IMAGES} images, two methods")
    add("--cache", type=Path, help="folder that keeps features; a run that was cut goes on")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch (all)")
    add("-o", "--output", type=Path, help="without suffix: writes .json, .md and .png")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    options = parser().parse_args(arguments)
    return command.exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything between the parsed options and the written files; returns the JSON's content."""
    import torch

    from benchmarks.lib import accuracy_report, data, features
    from benchmarks.lib.methods import METHODS
    from jmp_deploy.jmp.models import load_model
    from jmp_deploy.jmp.patch import model_shape
    from jmp_deploy.jmp.schedule import for_share, load, macs

    budgets = command.budgets(options.budgets)
    names = list(METHODS) if options.methods is None else options.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ModelError(f"unknown method {unknown[0]!r}", f"methods: {', '.join(METHODS)}")
    weights = options.weights
    if options.quick:
        names, budgets = [*names[:1], "tome"], budgets[:1]
        weights = "random" if weights == "auto" else weights
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, weights, img_size=options.img_size, seed=options.seed)
    if loaded.origin.kind == "random":
        print("warning: random weights: the figures below mean nothing", file=sys.stderr)
    shape = model_shape(loaded.model)

    tasks: list[Task]
    if options.data_dir is not None:
        tasks = [data.image_folder(options.data_dir, options.seed, options.limit)]
    else:
        tasks = [data.digits(options.seed), data.photo_crops(options.seed)]
    if options.quick:
        tasks = [task.first(QUICK_IMAGES) for task in tasks]
    source = features.Features(loaded, options.cache)
    judges = [accuracy_report.Judge(task, source, options.part, options.seed) for task in tasks]

    dense = macs(shape)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "model": loaded.name,
        "weights": command.weights_facts(loaded.origin),
        "part": options.part,
        "seed": options.seed,
        "dense_gmacs": dense / 1e9,
        "data": {
            task.name: {
                "train": len(task.train),
                "judged": len(getattr(task, options.part)),
            }
            for task in tasks
        },
        "torch": str(torch.__version__),
        "rows": rows,
    }
    tuned = [load(path, shape) for path in options.schedule or []]
    for budget in budgets:
        plain = for_share(shape, budget)
        for name in names:
            method = METHODS[name]
            plans = [(name, plain)]
            if options.own_schedules:
                own = features.own_schedule(shape, method, budget)
                plans += [(f"{name}, own blocks", own)] if own is not None else []
            if name == "jmp":  # a tuned schedule stands at the budget nearest to its cost
                plans += [
                    (f"jmp, {schedule.name}", schedule)
                    for schedule in tuned
                    if budget == min(budgets, key=lambda b: abs(b - macs(shape, schedule) / dense))
                ]
            for label, schedule in plans:
                started = time.perf_counter()
                with features.reduced(loaded, schedule, method):
                    cost = features.counted_macs(loaded.model)
                row: dict[str, Any] = {
                    "method": label,
                    "note": method.note,
                    "budget": budget,
                    "schedule": [list(step) for step in schedule.steps],
                    "gmacs": cost / 1e9,
                    "share": cost / dense,
                }
                for judge in judges:
                    row[judge.task.name] = judge(schedule, method)
                rows.append(row)
                accuracy_report.print_row(
                    row, [task.name for task in tasks], time.perf_counter() - started
                )
                if options.output:  # after every row, so that a cut run leaves what it has
                    accuracy_report.write(options.output, result)
    if "jmp" in names:
        photos = next((t for t in tasks if t.name == "photos"), tasks[0])
        result["shares"] = {
            f"{budget:.0%}": features.shares(
                loaded,
                getattr(photos, options.part),
                for_share(shape, budget),
                METHODS["jmp"],
            )
            for budget in budgets
        }
    result["comparisons"] = accuracy_report.comparisons(judges, rows)
    if options.output:
        for path in accuracy_report.write(options.output, result, plot=True):
            print(f"written    {path}")
    else:
        print(accuracy_report.table(result))
    return result


if __name__ == "__main__":
    sys.exit(main())
