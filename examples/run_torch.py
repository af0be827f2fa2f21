"""Run an engine between two steps of PyTorch or CuPy on the GPU, without a copy.

    python examples/run_torch.py artifacts/deit_s

Tensors are read and written in place and the work is enqueued on PyTorch's own stream, so that
nothing waits until a value is asked for.
"""

from __future__ import annotations

import sys

import torch

from jmp_deploy import Engine


def main(folder: str) -> None:
    """Normalises on the GPU, runs the engine, takes the softmax on the GPU."""
    torch.cuda.init()
    with Engine(folder, device=torch.cuda.current_device()) as engine:
        (image,), (answer,) = engine.inputs, engine.outputs
        batch = engine.batch[1]
        photos = torch.randint(0, 256, (batch, *image.shape), dtype=torch.uint8, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            images = (photos.float() / 255 - 0.5) / 0.5
            result = torch.empty((batch, *answer.shape), device="cuda")
            # The same arrays at each call: from the second on it is one CUDA graph.
            for _ in range(3):
                engine.infer(images, stream=stream, out={answer.name: result})
            scores = result.softmax(dim=-1)
        stream.synchronize()
        print(scores.max(dim=-1))

        # Without `out` a new array is made; PyTorch and CuPy take it as it is.
        found = engine.infer(images, stream=stream)[answer.name]
        stream.synchronize()
        print(torch.as_tensor(found, device="cuda").shape)  # or cupy.asarray(found)
        del found


if __name__ == "__main__":
    main(sys.argv[1])
