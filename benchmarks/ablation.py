"""The choices behind JMP's defaults, one at a time, on validation images only.

    python benchmarks/ablation.py --weights artifacts/weights/dinov2_s.safetensors

Digits (197 images, probe on dense features) and crops of photos (120, cosine to dense features):
the data of `accuracy.py --part validation`. About a minute a row on two cores. `--only WORD` runs
the rows whose name contains WORD; the JSON file is written after every row.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command

SHIPPED: dict[str, Any] = {
    "select": "order_root",
    "merge_weight": 0.4,
    "fate": "absolute",
    "tau": 0.8,
}


def _but(**changes: Any) -> dict[str, Any]:
    """The shipped rule with something changed."""
    return {**SHIPPED, **changes}


# name -> (schedule: share and form, or share and (form, first, last)), rule, proportional
VARIANTS: dict[str, tuple[float, Any, dict[str, Any], bool]] = {
    "as shipped": (0.62, "even", SHIPPED, True),
    # which tokens stay
    "keep by importance alone": (0.62, "even", _but(select="importance"), True),
    "keep by distinctness alone": (0.62, "even", _but(select="order"), True),
    "by importance x distance, no root": (0.62, "even", _but(select="order_cost"), True),
    "bipartite, merged our way": (0.62, "even", _but(select="bipartite"), True),
    "importance x value norm": (0.62, "even", _but(importance="class_value"), True),
    "attention received": (0.62, "even", _but(importance="received"), True),
    "random importance": (0.62, "even", _but(importance="random"), True),
    "metric all keys": (0.62, "even", _but(metric="keys"), True),
    "metric x": (0.62, "even", _but(metric="x", tau=-1.0), True),
    "metric x less its mean": (0.62, "even", _but(metric="x_normed", tau=-1.0), True),
    # merge or prune
    "merge all (tau -1)": (0.62, "even", _but(fate="merge"), True),
    "prune all": (0.62, "even", _but(fate="prune"), True),
    "tau 0.7": (0.62, "even", _but(tau=0.7), True),
    "tau 0.9": (0.62, "even", _but(tau=0.9), True),
    "tau 0.8 of the sample's mean (granularity sample)": (0.62, "even", _but(fate="sample"), True),
    "prune below mean - 2 std of the sample": (0.62, "even", _but(fate="deviation", tau=2.0), True),
    # how much of a merged token counts
    "merge weight 0": (0.62, "even", _but(merge_weight=0.0), True),
    "merge weight 0.2": (0.62, "even", _but(merge_weight=0.2), True),
    "merge weight 0.6": (0.62, "even", _but(merge_weight=0.6), True),
    "merge weight 1": (0.62, "even", _but(merge_weight=1.0), True),
    "sizes weighted by similarity, weight 1": (
        0.62,
        "even",
        _but(weighting="similarity", merge_weight=1.0),
        True,
    ),
    "norm kept, weight 1": (0.62, "even", _but(keep_norm=True, merge_weight=1.0), True),
    "no proportional attention": (0.62, "even", SHIPPED, False),
    # at which blocks
    "even, blocks 0-10": (0.62, ("even", 0, 10), SHIPPED, True),
    "even, blocks 1-10": (0.62, ("even", 1, 10), SHIPPED, True),
    "even, blocks 3-10": (0.62, ("even", 3, 10), SHIPPED, True),
    "even, blocks 2-8": (0.62, ("even", 2, 8), SHIPPED, True),
    "rate, blocks 2-10": (0.62, "rate", SHIPPED, True),
    "50 %: rate, blocks 2-10": (0.5, "rate", SHIPPED, True),
    "50 %: rate, blocks 1-10": (0.5, ("rate", 1, 10), SHIPPED, True),
    "50 %: rate, blocks 2-8": (0.5, ("rate", 2, 8), SHIPPED, True),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the rows asked for; returns the exit code."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="dinov2_s")
    made.add_argument("--weights", default="auto")
    made.add_argument("--only", default="", help="part of a row's name")
    made.add_argument("--cache", type=Path, help="folder that keeps features")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument("-o", "--output", type=Path, default=Path("ablation.json"))
    options = made.parse_args(arguments)
    return command.exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant asked for."""
    import torch

    from benchmarks.lib import accuracy_report, data, features
    from benchmarks.lib.methods import Method
    from jmp_deploy.core.files import write_json
    from jmp_deploy.jmp.models import load_model
    from jmp_deploy.jmp.patch import model_shape
    from jmp_deploy.jmp.schedule import for_share, macs

    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, options.weights)
    shape = model_shape(loaded.model)
    source = features.Features(loaded, options.cache)
    judges = [
        accuracy_report.Judge(task, source, "validation", 0)
        for task in (data.digits(), data.photo_crops())
    ]
    rows = []
    for name, (share, form, rule, proportional) in VARIANTS.items():
        if options.only not in name:
            continue
        blocks = range(2, shape.depth - 1) if isinstance(form, str) else range(form[1], form[2] + 1)
        steps = for_share(shape, share, form if isinstance(form, str) else form[0], blocks)
        method = Method(name, name, rule=rule, proportional=proportional)
        row: dict[str, Any] = {
            "method": name,
            "schedule": [list(step) for step in steps.steps],
            "share": macs(shape, steps) / macs(shape),
        }
        for judge in judges:
            row[judge.task.name] = judge(steps, method)
        rows.append(row)
        accuracy_report.print_row(row, [judge.task.name for judge in judges], 0.0)
        write_json(options.output, rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
