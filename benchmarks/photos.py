"""What a reduction changes of a model's features, on photos that chose nothing.

Takes the folder of `scripts/fetch_photos.py`: 50 photos (200 crops) and 500 digits of two kinds to
choose by (`--part validation`), and 33 photos of another source with as many other digits to judge
by, once (`--part test`). Unit: 1e4 x (1 - cosine) between reduced and dense features. Four crops of
one photo are no four photos: intervals are bootstrapped over photos. The mean is decided by a few
hard photos, so the median and the geometric mean stand beside it.

    python scripts/fetch_photos.py artifacts/unseen
    python scripts/demo_weights.py artifacts/weights/dinov2_s.safetensors
    python benchmarks/photos.py artifacts/unseen --weights artifacts/weights/dinov2_s.safetensors

A row of `--recovered FILE` is the reduced model with those weights against the dense one with
`--weights`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command
from jmp_deploy.core.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.lib.data import Samples

UNIT = 1e4
MANNER = ("selection", "tau", "merge_weight", "last_prefix_only")
"""What of a schedule is more than its steps."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks/photos.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("folder", type=Path, help="made by scripts/fetch_photos.py")
    add("--model", default="dinov2_s", help="short or timm name (dinov2_s)")
    add("--weights", default="auto", help="auto, pretrained, random, or a checkpoint's path (auto)")
    add("--part", choices=("validation", "test"), default="validation", help="which images judge")
    add("--budgets", default="75,62,50,40", help="percent of the dense FLOPs (75,62,50,40)")
    add("--methods", default="jmp,tome", help="comma list, as benchmarks/accuracy.py (jmp,tome)")
    add("--schedule", type=Path, action="append", help="also JMP with this file, as tune wrote it")
    add("--recovered", type=Path, action="append", help="also weights that `recover` wrote")
    add("--seed", type=int, default=0, help="of the crops, the digits and the bootstrap (0)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch (all)")
    add("-o", "--output", type=Path, help="without suffix: writes .json and .md")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    options = parser().parse_args(arguments)
    return command.exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything between the parsed options and the written files; returns the JSON's content."""
    import torch

    from benchmarks.lib import data, features
    from benchmarks.lib.measures import by_picture, interval, unit
    from benchmarks.lib.methods import METHODS
    from benchmarks.lib.report import machine
    from jmp_deploy.core.files import write_bytes, write_json
    from jmp_deploy.jmp.models import load_model
    from jmp_deploy.jmp.patch import model_shape
    from jmp_deploy.jmp.schedule import for_share, from_manifest, load, macs

    names, budgets = options.methods.split(","), command.budgets(options.budgets)
    if unknown := [name for name in names if name not in METHODS]:
        raise ModelError(f"unknown method {unknown[0]!r}", f"methods: {', '.join(METHODS)}")
    sets = data.fetched(options.folder, options.part, options.seed)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, options.weights, seed=options.seed)
    shape = model_shape(loaded.model)
    dense = macs(shape)
    source = features.Features(loaded, None)
    before = [unit(source.dense(samples)) for samples in sets]
    plans = [
        (budget, name, for_share(shape, budget), source) for budget in budgets for name in names
    ]
    others = [(f"jmp, {path.stem}", load(path, shape), source) for path in options.schedule or []]
    for path in options.recovered or []:
        taught = load_model(options.model, str(path), seed=options.seed)
        if taught.origin.recovered is None:
            raise ModelError(f"{path} is not of `recover`", "name a file that it wrote")
        schedule = from_manifest(taught.origin.recovered.jmp)
        others.append((f"jmp, {path.stem}", schedule, features.Features(taught, None)))
    for label, schedule, model in others:  # beside the budget nearest to its cost
        share = macs(shape, schedule) / dense
        nearest = min(budgets, key=lambda budget: abs(budget - share))
        plans.append((nearest, label, schedule, model))
    rows: list[dict[str, Any]] = []
    result = {
        "model": loaded.name,
        "weights": command.weights_facts(loaded.origin),
        "part": options.part,
        "seed": options.seed,
        "unit": "1e4 x (1 - cosine)",
        "sets": {name_of(s): {"images": len(s), "pictures": len(set(s.labels))} for s in sets},
        "patches": shape.num_patches,
        "dense_gmacs": dense / 1e9,
        "machine": machine(),
        "rows": rows,
    }
    plain: dict[tuple[float, str], NDArray[np.float64]] = {}
    for budget, label, schedule, model in sorted(plans, key=lambda plan: -plan[0]):
        method = METHODS[label.split(",")[0]]
        row: dict[str, Any] = {
            "method": label,
            "budget": budget,
            "schedule": [list(step) for step in schedule.steps],
            "manner": {key: getattr(schedule, key) for key in MANNER},
            "share": macs(shape, schedule) / dense,
        }
        for samples, features_before in zip(sets, before, strict=True):
            after = unit(model.reduced(samples, schedule, method))
            errors = by_picture(UNIT * (1 - (features_before * after).sum(1)), samples.labels)
            first = plain.setdefault((budget, samples.name), errors)
            row[name_of(samples)] = {
                **figures(errors, options.seed),
                "minus_first": interval(errors - first, options.seed),
            }
        rows.append(row)
        print(line(row, result["sets"]), flush=True)
        if options.output:  # after every row, so that a cut run leaves what it has
            write_json(options.output.with_suffix(".json"), result)
            write_bytes(options.output.with_suffix(".md"), table(result).encode())
    return result


def name_of(samples: Samples) -> str:
    """photos, digits or mnist."""
    return samples.name.split("-")[0]


def figures(errors: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Mean with interval, median and geometric mean of errors >= 0, by picture."""
    from benchmarks.lib.measures import interval

    geometric = float(np.exp(np.log(np.maximum(errors, 1e-6)).mean()))
    return {
        **interval(errors, seed),
        "median": float(np.median(errors)),
        "geometric": geometric,
        "worst": float(errors.max()),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    sets = result["sets"]
    counts = ", ".join(
        f"{name}: {count['pictures']} pictures ({count['images']} images)"
        for name, count in sets.items()
    )
    head = [
        f"Model `{result['model']}`, part `{result['part']}`, seed {result['seed']}; {counts}. "
        f"{result['unit']}, smaller is better; 95 % intervals, bootstrapped over pictures; in "
        "brackets the difference to the first row of the budget, paired.",
        "",
        "| method | FLOPs | "
        + " | ".join(f"{name}: mean | median, geometric | against first" for name in sets)
        + " |",
        "| --- | --- |" + " --- |" * 3 * len(sets),
    ]
    return "\n".join([*head, *(line(row, sets) for row in result["rows"])]) + "\n"


def line(row: dict[str, Any], sets: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [row["method"], f"{row['share']:.1%}"]
    for name in sets:
        found = row[name]
        minus = found["minus_first"]
        cells += [
            f"{found['mean']:.1f} ({found['low']:.1f} to {found['high']:.1f})",
            f"{found['median']:.1f}, {found['geometric']:.1f}",
            f"{minus['mean']:+.1f} ({minus['low']:+.1f} to {minus['high']:+.1f})",
        ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
