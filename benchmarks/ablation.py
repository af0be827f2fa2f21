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

from jmp_deploy import output
from jmp_deploy.errors import JmpDeployError

DISTINCT: dict[str, Any] = {"select": "order"}
# name -> (schedule: share and form, or share and (form, first, last)), rule, proportional
VARIANTS: dict[str, tuple[float, Any, dict[str, Any], bool]] = {
    # which tokens stay
    "importance (first form)": (0.62, "even", {}, True),
    "most similar of the less important half": (0.62, "even", {"select": "pool"}, True),
    "the same, by importance x distance": (0.62, "even", {"select": "pool_cost"}, True),
    "bipartite (ToMe)": (0.62, "even", {"select": "bipartite"}, True),
    "distinct": (0.62, "even", DISTINCT, True),
    "distinct, by importance x distance": (0.62, "even", {"select": "order_cost"}, True),
    "distinct, metric x, 62 %": (0.62, "even", {**DISTINCT, "metric": "x"}, True),
    "distinct, by importance x distance, metric x": (
        0.62,
        "even",
        {"select": "order_cost", "metric": "x"},
        True,
    ),
    "importance, metric x": (0.62, "even", {"metric": "x"}, True),
    "importance, metric all keys": (0.62, "even", {"metric": "keys"}, True),
    # at which blocks
    "distinct, even, blocks 2-10, 50 %": (0.5, ("even", 2, 9), DISTINCT, True),
    "distinct, rate, blocks 2-10, 62 %": (0.62, "rate", DISTINCT, True),
    "distinct, rate, blocks 2-10, 50 %": (0.5, "rate", DISTINCT, True),
    "distinct, rate, blocks 1-10, 50 %": (0.5, ("rate", 1, 10), DISTINCT, True),
    "distinct, rate, blocks 2-8, 50 %": (0.5, ("rate", 2, 8), DISTINCT, True),
    "distinct, even, blocks 1-10, 50 %": (0.5, ("even", 1, 10), DISTINCT, True),
    # merge or prune
    "distinct, tau 0.9": (0.62, "even", {**DISTINCT, "fate": "absolute", "tau": 0.9}, True),
    "distinct, tau 0.95": (0.62, "even", {**DISTINCT, "fate": "absolute", "tau": 0.95}, True),
    "distinct, prune below mean - 2 std": (
        0.54,
        "even",
        {**DISTINCT, "fate": "deviation", "tau": 2.0},
        True,
    ),
    # the rest
    "distinct, random order": (0.54, "even", {**DISTINCT, "importance": "random"}, True),
    "distinct, metric x": (0.5, "rate", {**DISTINCT, "metric": "x"}, True),
    "distinct, metric all keys": (0.5, "rate", {**DISTINCT, "metric": "keys"}, True),
    "distinct, importance x value norm": (
        0.5,
        "rate",
        {**DISTINCT, "importance": "class_value"},
        True,
    ),
    "distinct, attention received": (0.5, "rate", {**DISTINCT, "importance": "received"}, True),
    "distinct, no proportional attention": (0.5, "rate", DISTINCT, False),
    "distinct, sizes weighted by similarity": (
        0.5,
        "rate",
        {**DISTINCT, "weighting": "similarity"},
        True,
    ),
    "distinct, norm kept": (0.5, "rate", {**DISTINCT, "keep_norm": True}, True),
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
    try:
        run(options)
    except JmpDeployError as error:
        return output.fail(error.message, error.hint, error.exit_code)
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each variant asked for."""
    import torch

    from benchmarks.accuracy_lib import data, features, report
    from benchmarks.accuracy_lib.methods import Method
    from jmp_deploy.files import write_json
    from jmp_deploy.models import load_model
    from jmp_deploy.patch import model_shape
    from jmp_deploy.schedule import for_share, macs

    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, options.weights)
    shape = model_shape(loaded.model)
    source = features.Features(loaded, options.cache)
    judges = [
        report.Judge(task, source, "validation", 0) for task in (data.digits(), data.photo_crops())
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
        report.print_row(row, [judge.task.name for judge in judges], 0.0)
        write_json(options.output, rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
