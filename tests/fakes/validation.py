"""Artifacts of a few numbers and folders of tiny images, for the tests of `validate`.

The model is one matrix product, so that a test computes what it answers on its own, in float64.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from jmp_deploy.core import artifact
from tests.fakes import artifacts
from tests.fakes.artifacts import JMP

SIDE = 8
PIXELS = 3 * SIDE * SIDE
VOLATILE = ("throughput", "resumed_batches", "shard", "shards")
"""Keys of a result that differ between two runs that measured the same."""


def weights(outputs: int, seed: int = 0) -> np.ndarray:
    """[PIXELS, outputs] float32."""
    return np.random.default_rng(seed).normal(size=(PIXELS, outputs)).astype(np.float32)


def write_artifact(folder: Path, matrix: np.ndarray, **changes: Any) -> Path:
    """An artifact that answers `images.reshape(B, -1) @ matrix`.

    Args:
        changes: of the manifest; `root=True` takes the square root of the answers, so that
            negative ones become NaN; `output="features"` makes it a model without a head.
    """
    root = changes.pop("root", False)
    output = changes.pop("output", "logits")
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["product" if root else output]),
    ]
    if root:
        nodes.append(helper.make_node("Sqrt", ["product"], [output]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["B", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B", matrix.shape[1]])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / artifact.PORTABLE)
    images = np.zeros((2, 3, SIDE, SIDE), np.float32)
    np.savez(
        folder / artifact.REFERENCE,
        images=images,
        output=np.zeros((2, matrix.shape[1]), np.float32),
        names=np.array(["a", "b"]),
    )
    base = {"name": "linear", "jmp": JMP, "precision": "fp32", "batch": (1, 4, 16)}
    artifacts.write_artifact(folder, side=SIDE, output=output, **{**base, **changes})
    return folder


def write_images(root: Path, labels: list[int] | np.ndarray, seed: int = 0) -> np.ndarray:
    """DIR/LABEL/IMAGE.png of noise; returns what a model gets, [n, PIXELS] float64.

    Sorted paths are in the order of `labels` if those are sorted.
    """
    random = np.random.default_rng(seed)
    rows = []
    for place, label in enumerate(labels):
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{place:05d}.png")
        rows.append(model_input(pixels))
    return np.array(rows)


def model_input(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 to what the artifact's matrix multiplies, by definition."""
    return ((pixels / 255.0 - 0.5) / 0.25).transpose(2, 0, 1).reshape(-1)


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what depends on the clock or on how the run was cut up."""
    return {key: value for key, value in result.items() if key not in VOLATILE}


def die(group: Any, spec: Any, place: Any) -> None:
    """What a worker does when the kernel takes its memory."""
    os._exit(9)
