"""PyTorch as a benchmark runs it: in eager mode, on the GPU where PyTorch finds one, else the CPU.

What a model costs before it is deployed, and a figure for the GPU where no TensorRT is installed.
Weights are random: time does not depend on them, and no checkpoint has to be at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.artifact import Artifact, Weights
from ..core.errors import GpuMemoryError
from .backend import noise
from .measure import Times


class TorchModel:
    """An artifact's model, patched as its manifest says.

    Args:
        artifact: FP16 models run in half precision on a GPU, in FP32 on a CPU.
        threads: on a CPU.

    Raises:
        ModuleNotFoundError: PyTorch or timm is not installed.
    """

    has_graphs = False

    def __init__(self, artifact: Artifact, threads: int) -> None:
        import torch

        from ..jmp.models import restore_model

        self.model: Any = restore_model(replace(artifact, weights=Weights("random", seed=0)))
        self.shape = artifact.image_shape
        self.on_gpu = torch.cuda.is_available()
        words = "FP32"
        if self.on_gpu:
            half = artifact.precision == "fp16"
            self.model = self.model.to("cuda", torch.float16 if half else torch.float32)
            words = "FP16" if half else words
        else:
            torch.set_num_threads(threads)
        self.library = f"PyTorch {torch.__version__}, {words}, eager"

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """See `bench_backend.Backend`."""
        import torch

        images = torch.from_numpy(noise(batch, self.shape))
        return self._on_gpu(images) if self.on_gpu else self._on_cpu(images)

    def close(self) -> None:
        """Gives the model back."""
        self.model = None
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def _on_cpu(self, images: Any) -> Callable[[], Times]:
        import torch

        model = self.model

        def infer() -> Times:
            started = time.perf_counter()
            with torch.inference_mode():
                model(images).numpy()
            return Times(start=1000 * started, total=1000 * (time.perf_counter() - started))

        return infer

    def _on_gpu(self, images: Any) -> Callable[[], Times]:
        import torch

        model, dtype = self.model, next(self.model.parameters()).dtype
        pinned = images.pin_memory()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        try:
            with torch.inference_mode():
                answer = model(pinned.to("cuda", dtype)).float().cpu().pin_memory()
        except torch.cuda.OutOfMemoryError as error:
            raise GpuMemoryError(
                f"PyTorch has no GPU memory for a batch of {len(images)}", "choose a smaller one"
            ) from error

        def infer() -> Times:
            started = time.perf_counter()
            with torch.inference_mode():
                events[0].record()
                there = pinned.to("cuda", non_blocking=True)
                events[1].record()
                result = model(there.to(dtype)).float()
                events[2].record()
                answer.copy_(result, non_blocking=True)
                events[3].record()
            enqueued = time.perf_counter()
            events[3].synchronize()
            ended = time.perf_counter()
            spent = [events[k].elapsed_time(events[k + 1]) for k in range(3)]
            return Times.of_device(started, enqueued, ended, spent)

        return infer
