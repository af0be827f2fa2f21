"""Run an engine on photos with numpy alone: no PyTorch, no ONNX Runtime.

    python examples/run_numpy.py artifacts/deit_s photo.jpg ...

Needs a GPU, the TensorRT that the engine was built with, and cuda-bindings.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jmp_deploy import Artifact, Engine
from jmp_deploy.core.images import find_images, load_batch
from jmp_deploy.core.outputs import output_named


def main(arguments: list[str]) -> None:
    """Prints the best class, or the first features, of each photo."""
    folder, *photos = map(Path, arguments)
    artifact = Artifact.read(folder)
    output = output_named(artifact.model.output)
    paths = find_images(photos)
    images = load_batch(paths, artifact.preprocess)  # [B, 3, H, W] float32
    with Engine(folder) as engine:
        rows = engine.infer(images)[output.name]  # any B: split and padded as the engine needs
    for path, row in zip(paths, rows, strict=True):
        print(path, output.words(output.answer(row, artifact.class_names, topk=1)))


if __name__ == "__main__":
    main(sys.argv[1:])
