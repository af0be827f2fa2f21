"""Small artifacts for the tests of `compare`, and faults to plant in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from jmp_deploy.core import artifact
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.manifest import Jmp
from jmp_deploy.export.export import export_onnx
from jmp_deploy.export.fuse import to_deployable
from jmp_deploy.export.precision import LOW, to_low
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from tests.fakes.artifacts import write_artifact
from tests.fakes.models import tiny_vit

IMAGES = np.random.default_rng(7).normal(size=(4, 3, 32, 32)).astype(np.float32)


def artifact_of(
    folder: Path,
    *,
    precision: str = "fp32",
    steps: str | None = "1:11,3:6",
    tau: float = 0.3,
    **options: Any,
) -> tuple[Path, Any]:
    """An artifact of `tiny_vit` as `build` leaves it, without an engine: (folder, model)."""
    folder.mkdir(parents=True)
    model = tiny_vit(**options)
    jmp = None
    if steps is not None:
        resolved = schedule.parse(steps, model_shape(model))
        patch(model, resolved, tau=tau)
        jmp = Jmp("list", resolved.steps, tau)
    portable = folder / artifact.PORTABLE
    full = portable if precision == "fp32" else folder / "fp32.onnx"
    export_onnx(model, full, image_size=(32, 32))
    if precision in LOW:
        to_low(full, portable, precision)
        full.unlink()
    to_deployable(portable, folder / artifact.DEPLOYABLE)
    output = "logits" if model.num_classes else "features"
    with torch.inference_mode():
        stored = model(torch.from_numpy(IMAGES)).numpy()
    names = np.array([f"r{index}" for index in range(len(IMAGES))])
    np.savez(folder / artifact.REFERENCE, images=IMAGES, output=stored, names=names)
    write_artifact(folder, side=32, name="tiny", output=output, precision=precision, jmp=jmp)
    return folder, model


def plant(
    folder: Path,
    block: int,
    layer: str,
    change: Callable[[np.ndarray], np.ndarray],
    file: str = artifact.PORTABLE,
) -> None:
    """Changes the weight matrix of a linear layer ("proj", "fc1" or "fc2") in an artifact's model.

    An untrained model's biases and norms are equal and share their names in the ONNX, so layers
    are found by what stands before them.
    """
    proto = onnx.load_model(folder / file)
    products = [
        n
        for n in proto.graph.node
        if n.op_type == "MatMul" and any(w.name in n.input for w in proto.graph.initializer)
    ]
    assert len(products) == 24  # qkv, proj, fc1, fc2; the head is a Gemm
    product = products[4 * block + ("qkv", "proj", "fc1", "fc2").index(layer)]
    weight = next(w for w in proto.graph.initializer if w.name in product.input)
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(change(values.copy()), weight.name))
    onnx.save_model(proto, folder / file)
    Artifact.read(folder).write()
