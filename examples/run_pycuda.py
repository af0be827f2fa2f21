"""Run an engine inside of pycuda's own context, on its GPUArrays and its Stream, without a copy.

    pip install "jmp-deploy[pycuda]"
    python examples/run_pycuda.py artifacts/deit_s

The engine is loaded into the context that is current where `Engine` is made, here pycuda's.
"""

from __future__ import annotations

import sys

import numpy as np
import pycuda.driver as cuda
from pycuda import gpuarray

from jmp_deploy import Engine


def main(folder: str) -> np.ndarray:
    """Runs one batch of noise and returns what the engine says of it, [B, ...]."""
    cuda.init()
    context = cuda.Device(0).make_context()
    try:
        with Engine(folder) as engine:
            (image,), (answer,) = engine.inputs, engine.outputs
            batch = engine.batch[1]
            noise = np.random.default_rng(0).normal(size=(batch, *image.shape))
            images = gpuarray.to_gpu(noise.astype(image.dtype))
            result = gpuarray.empty((batch, *answer.shape), answer.dtype)
            context.synchronize()  # what made the arrays ran on another stream
            stream = cuda.Stream()
            engine.infer(images, stream=stream, out={answer.name: result})
            stream.synchronize()
            found = result.get()
            # GPU memory is given back while its context still is there
            del images, result, stream
    finally:
        context.pop()
    print(found[:, :4])
    return found


if __name__ == "__main__":
    main(sys.argv[1])
