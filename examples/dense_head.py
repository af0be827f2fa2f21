"""A frozen linear head on the features of patches, here for segments: no PyTorch where it runs.

    python -m jmp_deploy build dinov2_s --output dense
    python examples/dense_head.py artifacts/dinov2_s train/*.jpg --masks train/*.png --head head.npz
    python examples/dense_head.py artifacts/dinov2_s photo.jpg --head head.npz --out segments/

With masks (grey images of class numbers, one a photo, in the photos' order) it fits the head by
ridge regression; without, it applies it and writes such masks. The artifact runs on its engine
where a GPU is, else on ONNX Runtime.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jmp_deploy import Artifact
from jmp_deploy.backends import pick
from jmp_deploy.core.images import Preprocess, load_batch

RIDGE = 1e-3
"""Penalty on the weights, over the mean square of a feature."""


def main(arguments: list[str] | None = None) -> None:
    """Fits or applies the head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--masks", nargs="+", type=Path, default=[])
    parser.add_argument("--head", type=Path, default=Path("head.npz"))
    parser.add_argument("--out", type=Path, default=Path("segments"))
    given = parser.parse_args(arguments)
    artifact = Artifact.read(given.artifact)
    images = load_batch(given.photos, artifact.preprocess)
    with pick([artifact])[0].running(artifact) as infer:
        features = infer(images)["dense"].astype(np.float64)  # [B, M, C]
    rows = round((features.shape[1] * images.shape[2] / images.shape[3]) ** 0.5)
    grid = rows, features.shape[1] // rows
    if given.masks:
        classes = patch_classes(given.masks, artifact.preprocess, grid)
        head = fit(features, classes)
        np.savez(given.head, **head)
        right = (apply(head, features) == classes).mean()
        print(f"{given.head}: {head['weight'].shape[1]} classes, {right:.1%} of the patches right")
        return
    with np.load(given.head) as stored:
        found = apply(stored, features).astype(np.uint8)
    given.out.mkdir(parents=True, exist_ok=True)
    for photo, classes in zip(given.photos, found, strict=True):
        target = given.out / f"{photo.stem}.png"
        mask = Image.fromarray(classes.reshape(grid))
        mask.resize(images.shape[:1:-1], Image.Resampling.NEAREST).save(target)
        print(target)


def patch_classes(paths: list[Path], spec: Preprocess, grid: tuple[int, int]) -> Any:
    """[B, M] the most frequent class of each patch, of masks cut as the model's images are."""
    as_numbers = replace(spec, mean=(0.0,), std=(1 / 255,), interpolation="nearest", folded=None)
    masks = load_batch(paths, as_numbers).round().astype(np.int64)  # [B, 1, H, W]
    rows, columns = grid
    height, width = masks.shape[2] // rows, masks.shape[3] // columns
    patches = masks.reshape(len(masks), rows, height, columns, width).transpose(0, 1, 3, 2, 4)
    flat = patches.reshape(len(masks), rows * columns, height * width)
    return np.apply_along_axis(lambda values: np.bincount(values).argmax(), 2, flat)


def fit(features: Any, classes: Any) -> dict[str, Any]:
    """Ridge regression of one-hot classes [B, M] on features [B, M, C]."""
    x = features.reshape(-1, features.shape[2])
    mean = x.mean(axis=0)
    centred = x - mean
    wanted = np.eye(classes.max() + 1)[classes.ravel()]
    penalty = RIDGE * len(x) * np.square(centred).mean() * np.eye(x.shape[1])
    weight = np.linalg.solve(centred.T @ centred + penalty, centred.T @ wanted)
    return {"weight": weight, "bias": wanted.mean(axis=0) - mean @ weight}


def apply(head: Any, features: Any) -> Any:
    """[B, M] the class of each patch."""
    return (features @ head["weight"] + head["bias"]).argmax(axis=2)


if __name__ == "__main__":
    main()
