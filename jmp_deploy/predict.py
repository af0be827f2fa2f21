"""Images in, classes or features out, on whatever this machine can run an artifact with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import manifest, runners
from .errors import ArtifactError, EngineError
from .images import Preprocess, find_images, load_batch

CHUNK = 256
"""Images decoded at a time: a folder of any size fits into memory."""


def predict(
    folder: Path,
    images: Sequence[Path],
    *,
    backend: str = "auto",
    topk: int = 5,
    allow_random: bool = False,
) -> tuple[list[dict[str, Any]], str, str]:
    """Runs an artifact on images.

    Args:
        folder: the artifact.
        images: files or folders.
        backend: "auto", "engine" or "onnxruntime".
        topk: classes per image.
        allow_random: run random weights too.

    Returns:
        (records, backend, why that backend). A record is {"image", "top": [{"index", "label",
        "score"}]}, score a softmax probability, or {"image", "features": [...]}.

    Raises:
        ArtifactError: random weights, or a broken artifact.
        ImageError: no images, or one that cannot be read.
        EngineError: nothing can run it here, or its outputs are not finite.
    """
    data = manifest.read(folder)
    if manifest.is_random(data) and not allow_random:
        raise ArtifactError(
            f"{folder} has random weights: its answers mean nothing",
            "build it with real weights (--weights FILE), or pass --allow-random",
        )
    chosen, reason = runners.pick_backend(folder, data, backend)
    paths = find_images(images)
    spec = Preprocess.from_dict(data["preprocess"])
    output = data["model"]["output"]
    records: list[dict[str, Any]] = []
    with runners.open_runner(folder, data, chosen) as runner:
        for start in range(0, len(paths), CHUNK):
            piece = paths[start : start + CHUNK]
            values = runners.infer(runner, load_batch(piece, spec), tuple(data["batch"]))[output]
            for path, row in zip(piece, values, strict=True):
                if not np.isfinite(row).all():
                    raise EngineError(
                        f"the output for {path} is not finite",
                        f"run `python -m jmp_deploy compare {folder}` to see which backend fails",
                    )
                records.append({"image": str(path), **_answer(row, output, data, topk)})
    return records, chosen, reason


def _answer(row: Any, output: str, data: dict[str, Any], topk: int) -> dict[str, Any]:
    if output == "features":
        return {"features": [float(value) for value in row]}
    wide = np.asarray(row, dtype=np.float64)
    scores = np.exp(wide - wide.max())
    scores /= scores.sum()
    names = data.get("class_names")
    best = np.argsort(-scores, kind="stable")[:topk]
    return {
        "top": [
            {
                "index": int(index),
                "label": names[index] if names else str(index),
                "score": float(scores[index]),
            }
            for index in best
        ]
    }
