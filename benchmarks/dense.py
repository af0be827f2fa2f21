"""Features of every patch after token reduction, against the dense model's.

    # the table of benchmarks/results/dense-validation.md; some minutes on two cores
    python scripts/demo_weights.py artifacts/weights/dinov2_s.safetensors
    python benchmarks/dense.py --weights artifacts/weights/dinov2_s.safetensors --limit 48 \
        -o benchmarks/results/dense-validation

    # does everything run? (random weights: the figures mean nothing)
    python benchmarks/dense.py --model deit_t --weights random --limit 2 --budgets 62

Every patch is restored as `build --output dense` does it, for ToMe as its authors do ("unmerge"):
it has the features of the token that it went to. All methods run the schedule of their budget.
Judged is the cosine of each patch to its features in the dense model, meaned over an image's
patches, and the share of patches below 0.9; intervals are of the mean over images, 95 %, bootstrap.
The same behind `--layers`, each through the model's last norm and restored by the reductions so far
(`build --output dense:2,5,8`).

A task beside it: collages of four photos, one in each quarter, and a linear head (ridge regression,
fitted to the dense model's features of collages of the reference crops) that tells for every patch
which of the photos it is of. Points are what the head loses on features with JMP; the interval is
paired over collages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command
from jmp_deploy.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.lib.data import Samples
    from jmp_deploy.jmp.models import LoadedModel
    from jmp_deploy.validate.probe import Probe

METHODS = ("jmp", "jmp-merge", "jmp-prune", "tome", "merge")
BATCH = 10
FAR = 0.9


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks/dense.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", default="dinov2_s", help="short or timm name (dinov2_s)")
    add("--weights", default="auto", help="auto, pretrained, random, or a checkpoint's path (auto)")
    add("--budgets", default="75,62,50", help="percent of the dense FLOPs (75,62,50)")
    add("--methods", default=",".join(METHODS), help=f"({','.join(METHODS)})")
    add("--layers", default="2,5,8", help="blocks behind which features are judged too (2,5,8)")
    add("--part", choices=("validation", "test"), default="validation", help="which crops judge")
    add("--limit", type=int, help="images at most")
    add("--seed", type=int, default=0, help="of the crops and the bootstrap (0)")
    add("-o", "--output", type=Path, help="base of the files to write (benchmarks/results/dense-*)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs from the command line."""
    return command.exit_code(lambda: run(parser().parse_args(arguments)))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints and writes."""
    from benchmarks.lib import data, report
    from benchmarks.lib.features import reduced
    from benchmarks.lib.measures import interval
    from benchmarks.lib.methods import METHODS as KNOWN
    from jmp_deploy.core.outputs import asked
    from jmp_deploy.jmp import schedule
    from jmp_deploy.jmp.families import family_of
    from jmp_deploy.jmp.models import load_model
    from jmp_deploy.jmp.patch import model_shape

    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        raise ModelError(
            f"unknown methods {', '.join(sorted(unknown))}", f"choose of {', '.join(METHODS)}"
        )
    loaded = load_model(options.model, options.weights, seed=options.seed)
    task = data.photo_crops(options.seed)
    samples = getattr(task, options.part)
    samples = samples.first(options.limit) if options.limit else samples
    images = _inputs(loaded, samples)
    shape = model_shape(loaded.model).for_patches()
    outputs = asked(f"dense,dense:{options.layers}" if options.layers else "dense")
    dense = _features(loaded, images, outputs)
    grid = family_of(loaded.model).patch_embed(loaded.model).grid_size
    references = task.train.first(options.limit) if options.limit else task.train
    head = _head(loaded, _collages(_inputs(loaded, references), references.labels, grid, 0))
    collages = _collages(images, samples.labels, grid, options.seed + 1)
    right = _right(loaded, head, collages)
    rows = []
    for budget in map(float, options.budgets.split(",")):
        steps = schedule.parse(f"spread:{budget:g}", shape)
        for name in methods:
            with reduced(loaded, steps, KNOWN[name], restore=True):
                found = _features(loaded, images, outputs)
                still = _right(loaded, head, collages)
            row, *layers = (_judged(dense[name], found[name], options.seed) for name in outputs)
            row["layers"] = dict(zip(outputs[1:], layers, strict=True))
            points = interval(still - right, options.seed)
            row["collages"] = {"right": float(still.mean()), "points": points}
            share = schedule.macs(shape, steps) / schedule.macs(shape)
            rows.append({"budget": budget, "method": name, "flops": share, **row})
            print(f"{budget:g} % {name}: {row['cosine']['mean']:.5f}", flush=True)
    facts = report.machine()
    result = {
        "machine": facts,
        "model": loaded.name,
        "weights": command.weights_facts(loaded.origin),
        "images": len(images),
        "seed": options.seed,
        "part": options.part,
        "collages": {
            "right": float(right.mean()),
            "count": len(right),
            "photos": len(set(references.labels.tolist())),
        },
        "rows": rows,
    }
    base = options.output or report.default_output("dense", facts)
    for path in report.write(base, result, _table(result)):
        print(path)
    return result


def _inputs(loaded: LoadedModel, samples: Samples) -> NDArray[Any]:
    from benchmarks.lib import data

    return data.batch(samples.images, loaded.preprocess)


def _collages(
    images: NDArray[Any], labels: NDArray[Any], grid: tuple[int, int], seed: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """As many collages [n, 3, H, W] as images, and the label of each patch [n, M]. Each quarter is
    that of another image, cut at a border of patches."""
    import numpy as np

    random = np.random.default_rng((seed, 7))
    made, classes = np.empty_like(images), np.empty((len(images), *grid), np.int64)
    rows, columns = grid
    height, width = images.shape[2] // rows, images.shape[3] // columns
    for top, bottom in ((0, rows // 2), (rows // 2, rows)):
        for left, right in ((0, columns // 2), (columns // 2, columns)):
            chosen = random.permutation(len(images))
            y, x = slice(top * height, bottom * height), slice(left * width, right * width)
            made[:, :, y, x] = images[chosen][:, :, y, x]
            classes[:, top:bottom, left:right] = labels[chosen][:, None, None]
    return made, classes.reshape(len(images), -1)


def _head(loaded: LoadedModel, collages: tuple[NDArray[Any], NDArray[Any]]) -> Probe:
    from jmp_deploy.validate.probe import fit_ridge

    (features,) = _features(loaded, collages[0], ("dense",)).values()
    return fit_ridge(features.reshape(-1, features.shape[2]), collages[1].ravel())


def _right(
    loaded: LoadedModel, head: Probe, collages: tuple[NDArray[Any], NDArray[Any]]
) -> NDArray[Any]:
    """Percent of each collage's patches that the head places right: [n] float64."""
    (features,) = _features(loaded, collages[0], ("dense",)).values()
    return 100.0 * (head.scores(features).argmax(axis=2) == collages[1]).mean(axis=1)


def _features(
    loaded: LoadedModel, images: NDArray[Any], outputs: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Output -> [n, M, C] float32, of every patch."""
    import numpy as np
    import torch

    from jmp_deploy.backends.torch import with_outputs

    run = with_outputs(loaded.model, outputs)
    with torch.inference_mode():
        pieces = [
            [value.numpy() for value in run(torch.from_numpy(images[start : start + BATCH]))]
            for start in range(0, len(images), BATCH)
        ]
    joined = map(np.concatenate, zip(*pieces, strict=True))
    return dict(zip(outputs, joined, strict=True))


def _judged(dense: NDArray[Any], found: NDArray[Any], seed: int) -> dict[str, Any]:
    import numpy as np

    from benchmarks.lib.measures import interval

    lengths = np.linalg.norm(dense, axis=2) * np.linalg.norm(found, axis=2)
    cosine = (dense * found).sum(axis=2) / np.maximum(lengths, 1e-12)
    by_image = {"cosine": cosine.mean(axis=1), "far": 100 * (cosine < FAR).mean(axis=1)}
    return {name: interval(values.astype(np.float64), seed) for name, values in by_image.items()}


def _table(result: dict[str, Any]) -> str:
    from benchmarks.lib import report

    def words(value: dict[str, float], digits: int) -> str:
        mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})"

    head = ["method", "budget", "FLOPs", "cosine of a patch", f"patches below {FAR}, %"]
    head.append("collages, points")
    rows = [
        [
            row["method"],
            f"{row['budget']:g} %",
            f"{row['flops']:.1%}",
            words(row["cosine"], 4),
            words(row["far"], 1),
            words(row["collages"]["points"], 2),
        ]
        for row in result["rows"]
    ]
    layers = [*result["rows"][0]["layers"]]
    by_layer = [
        [row["method"], f"{row['budget']:g} %"]
        + [words(row["layers"][name]["cosine"], 4) for name in layers]
        for row in result["rows"]
    ]
    weights = "random weights: the figures mean nothing" * (result["weights"]["kind"] == "random")
    told = result["collages"]
    about = (
        f"{result['model']}, {result['images']} photo crops ({result['part']}); {told['count']} "
        f"collages, of whose patches the dense model places {told['right']:.2f} % in the right one "
        f"of {told['photos']} photos. {weights}"
    )
    title = report.heading(
        "Features of every patch, restored, against the dense model", result["machine"]
    )
    parts = [title, about.strip(), "", report.markdown(head, rows)]
    if layers:
        parts += ["", "Cosine of a patch behind earlier blocks:", ""]
        parts.append(report.markdown(["method", "budget", *layers], by_layer))
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
