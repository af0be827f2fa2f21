"""PyTorch: the model as it was before its export, what all others are held against.

In FP32 on the CPU where answers count; for timing on the GPU where PyTorch finds one: what a model
costs before it is deployed, and a figure for the GPU where no TensorRT is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..core import ort
from ..core.errors import ArtifactError, GpuMemoryError, JmpDeployError, engine_errors
from ..core.packages import importable
from .base import Backend, Infer, Opened, Times, function_runner, guarded, noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.artifact import Artifact, Reference
    from ..core.manifest import Precision
    from ..jmp.trace import Choice


class TorchBackend(Backend):
    """See the module."""

    name = "torch"
    title = "PyTorch"
    is_deployed = False
    extra = "export"
    packages = ("torch", "timm")
    shows_choices = True

    def gpu(self) -> str | None:
        """The one that `timed` uses."""
        if not importable("torch"):
            return None
        import torch

        return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None

    def precision(self, artifact: Artifact) -> Precision:
        """FP32, whatever the artifact's is."""
        del artifact
        return "fp32"

    def timed_precision(self, artifact: Artifact) -> Precision:
        """FP16 for an FP16 artifact on a GPU: what one would deploy without TensorRT."""
        low = artifact.precision in ("fp16", "bf16") and self.gpu()
        return artifact.precision if low else "fp32"

    def open(
        self, artifact: Artifact, *, weights: str | None = None, reference: Reference | None = None
    ) -> Opened:
        """See `Backend`. Its outputs travel with the artifact, for devices without PyTorch."""
        ort.quiet_polygraphy()
        outputs = artifact.model.outputs
        try:
            from ..jmp.models import restore_model
            from ..jmp.trace import trace_torch

            model = restore_model(artifact, weights)
        except (ImportError, JmpDeployError) as error:
            if reference is not None and weights is None:
                why = f"its outputs of the build stand in for PyTorch: {error}"
                return Opened(self, _stored_runner(reference), note=why)
            if isinstance(error, JmpDeployError):
                raise
            raise ArtifactError(str(error)) from error
        return Opened(
            self,
            torch_runner(model, outputs, self.name),
            partial(trace_torch, model),
            partial(_replayed, model, outputs),
        )

    def timed(self, artifact: Artifact, *, threads: int) -> TimedModel:
        """See `Backend`."""
        return TimedModel(artifact, threads)


def with_outputs(model: Any, outputs: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A timm model as a function that gives an artifact's outputs: what the model gives itself, or
    probabilities, or features of patches too."""
    from ..core.outputs import output_of  # numpy is not for --help
    from ..jmp.dense import DenseFeatures

    given = [*outputs] == [output_of(model).name]
    module = model if given else DenseFeatures(model, outputs)

    def run(images: Any) -> tuple[Any, ...]:
        values = module(images)
        return values if isinstance(values, tuple) else (values,)

    return run


def torch_runner(model: Any, outputs: Sequence[str], name: str = TorchBackend.name) -> Any:
    """A Polygraphy runner of a PyTorch model in FP32 on the CPU."""
    return function_runner(_forward(model, outputs), name)


def _forward(model: Any, outputs: Sequence[str]) -> Infer:
    import torch

    run = with_outputs(model, outputs)

    def forward(images: NDArray[np.float32]) -> dict[str, Any]:
        with torch.inference_mode():
            values = run(torch.from_numpy(images))
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

    return forward


def _replayed(
    model: Any, outputs: Sequence[str], images: NDArray[np.float32], choices: Sequence[Choice]
) -> dict[str, Any]:
    """See `base.Replay`."""
    from ..core.images import join
    from ..jmp.trace import BATCH, deciding

    forward, parts = _forward(model, outputs), []
    for start in range(0, len(images), BATCH):
        some = slice(start, start + BATCH)
        with deciding(model, [choice.of(some) for choice in choices]):
            parts.append(forward(images[some]))
    return join(parts, len(images))


def _stored_runner(reference: Reference) -> Any:
    """Plays back PyTorch's stored outputs for the reference images, in their order."""
    last, position = len(reference.images) - 1, 0

    def replay(images: NDArray[np.float32]) -> dict[str, Any]:
        nonlocal position
        index = [min(position + k, last) for k in range(len(images))]
        position += len(images)
        return {name: stored[index] for name, stored in reference.outputs.items()}

    return function_runner(replay, f"{TorchBackend.name} (stored)")


class TimedModel:
    """An artifact's model for timing, in eager mode, patched as its manifest says.

    Weights are random: time does not depend on them, and no checkpoint has to be at hand.

    Args:
        artifact: runs at `TorchBackend.timed_precision`.
        threads: on a CPU.

    Raises:
        ModuleNotFoundError: PyTorch or timm is not installed.
    """

    has_graphs = False

    def __init__(self, artifact: Artifact, threads: int) -> None:
        import torch

        from ..core.manifest import Weights
        from ..jmp.models import restore_model

        untrained = restore_model(replace(artifact, weights=Weights("random", seed=0)))
        self.shape = artifact.image_shape
        self.on_gpu = torch.cuda.is_available()
        precision = TorchBackend().timed_precision(artifact)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        if self.on_gpu:
            untrained = untrained.to("cuda", self.dtype)
        else:
            torch.set_num_threads(threads)
        self.run: Any = with_outputs(untrained, artifact.model.outputs)
        self.library = f"PyTorch {torch.__version__}, {precision.upper()}, eager"

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """See `base.Timed`."""
        import torch

        images = torch.from_numpy(noise(batch, self.shape))
        what = "PyTorch cannot run the model"
        with engine_errors(what):
            return guarded(what, self._on_gpu(images) if self.on_gpu else self._on_cpu(images))

    def close(self) -> None:
        """Gives the model back."""
        self.run = None
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def _on_cpu(self, images: Any) -> Callable[[], Times]:
        import torch

        run = self.run

        def infer() -> Times:
            started = time.perf_counter()
            with torch.inference_mode():
                for value in run(images):
                    value.numpy()
            return Times.of_host(started, time.perf_counter())

        return infer

    def _on_gpu(self, images: Any) -> Callable[[], Times]:
        import torch

        run, dtype = self.run, self.dtype
        pinned = images.pin_memory()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        try:
            with torch.inference_mode():
                values = run(pinned.to("cuda", dtype))
                answers = [value.float().cpu().pin_memory() for value in values]
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
                begun = time.perf_counter()
                results = [value.float() for value in run(there.to(dtype))]
                launched = time.perf_counter()
                events[2].record()
                for answer, result in zip(answers, results, strict=True):
                    answer.copy_(result, non_blocking=True)
                events[3].record()
            events[3].synchronize()
            ended = time.perf_counter()
            spent = [events[k].elapsed_time(events[k + 1]) for k in range(3)]
            return Times.of_device(started, ended, launched - begun, spent)

        return infer
