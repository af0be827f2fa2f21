"""PyTorch, ONNX Runtime and the engine side by side, run and paired by Polygraphy's Comparator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import manifest, runtime
from .errors import ArtifactError, JmpDeployError
from .images import Preprocess, load_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

BACKENDS = ("torch", "onnxruntime", "engine")

TOLERANCES = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.99}
"""Smallest cosine, over all images, at which two backends agree. FP32: rounding of another order of
summation. FP16: 10 bits of mantissa through 12 blocks give 0.9999 and better; the rest is for a
near tie in importance that falls the other way, so that one token more or less is merged. INT8: 127
levels for each tensor cannot give what FP16 does, with any scales; a cosine of 0.99 is a
signal-to-noise ratio of 17 dB, which the recipes keep (0.997 on DINOv2 ViT-S with JMP) and wrong
scales do not (clipping that model's outliers by method entropy: 0.64)."""


@dataclass(frozen=True)
class Pair:
    """How far output `output` of backend b is from that of a, over all images.

    cosine is the smallest over the images; max_rel is max_abs over a's largest magnitude;
    top1_agreement is the share of images with the same top class, None for features.
    """

    a: str
    b: str
    output: str
    cosine: float
    cosine_mean: float
    max_abs: float
    max_rel: float
    top1_agreement: float | None
    ok: bool


def compare_artifact(
    folder: Path,
    *,
    backends: Sequence[str] | None = None,
    images: Sequence[Path] = (),
    weights: str | None = None,
) -> dict[str, Any]:
    """Runs an artifact's backends on the same images and compares each with the first.

    Args:
        folder: the artifact.
        backends: of "torch", "onnxruntime", "engine"; None takes all that can run here.
        images: files; none means the artifact's reference images.
        weights: where PyTorch takes the weights from, if not from where the build did.

    Returns:
        {"ok", "precision", "images", "backends", "skipped": {backend: reason}, "pairs",
        "runtime_ms": {backend: per image}}

    Raises:
        JmpDeployError: fewer than two backends can run, or one that was asked for cannot.
    """
    data = manifest.read(folder)
    runtime.quiet_polygraphy()
    manifest.verify(folder, data, manifest.REFERENCE)
    reference = load_reference(folder / manifest.REFERENCE)
    spec = Preprocess.from_dict(data["preprocess"])
    batch = load_batch(images, spec) if images else reference["images"]

    runners, skipped = [], {}
    for name in backends or BACKENDS:
        try:
            runners.append(_runner(name, folder, data, weights, None if images else reference))
        except JmpDeployError as error:
            if backends:
                raise
            skipped[name] = error.message.removeprefix(f"{name}: ")
    if len(runners) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise ArtifactError(
            f"nothing to compare: {len(runners)} backend can run here ({reasons})",
            "run `python -m jmp_deploy doctor` to see what is missing",
        )
    pairs, times, _ = run_and_pair(runners, batch, tuple(data["batch"]), data["precision"])
    return {
        "ok": all(pair.ok for pair in pairs),
        "precision": data["precision"],
        "tolerance": {"cosine": TOLERANCES[data["precision"]]},
        "images": len(batch),
        "random_weights": manifest.is_random(data),
        "backends": [runner.name for runner in runners],
        "skipped": skipped,
        "pairs": [vars(pair) for pair in pairs],
        "runtime_ms": times,
    }


def run_and_pair(
    runners: Sequence[Any],
    images: NDArray[np.float32],
    profile: tuple[int, ...],
    precision: str,
) -> tuple[list[Pair], dict[str, float], dict[str, NDArray[Any]]]:
    """Runs every runner on every image and pairs each runner with the first.

    Returns:
        The pairs; per runner the time of one image in ms (whole batches, first one included: an
        orientation, not a benchmark); and the first runner's outputs by name, [B, ...].
    """
    from polygraphy.comparator import Comparator

    least, _, most = profile
    size = max(least, min(most, 8))
    feed = [{runtime.INPUT: piece} for piece in runtime.split(images, size, least)]
    by_name = dict(Comparator.run(list(runners), data_loader=feed).items())
    outputs = {name: runtime.join(iterations, len(images)) for name, iterations in by_name.items()}
    first = runners[0].name
    pairs = [
        measure(first, runner.name, output, ours, outputs[runner.name][output], precision)
        for runner in runners[1:]
        for output, ours in outputs[first].items()
    ]
    times = {
        name: 1000 * sum(iteration.runtime for iteration in iterations) / len(images)
        for name, iterations in by_name.items()
    }
    return pairs, times, outputs[first]


def measure(
    a: str,
    b: str,
    output: str,
    ours: NDArray[Any],
    theirs: NDArray[Any],
    precision: str,
) -> Pair:
    """Compares two outputs of shape [B, D]. Anything not finite fails."""
    x, y = (np.asarray(value, dtype=np.float64).reshape(len(value), -1) for value in (ours, theirs))
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return Pair(a, b, output, 0.0, 0.0, math.inf, math.inf, None, False)
    tiny = float(np.finfo(np.float64).tiny)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = (x * y).sum(axis=1) / np.maximum(norms, tiny)
    max_abs = float(np.abs(x - y).max())
    top1 = float((x.argmax(axis=1) == y.argmax(axis=1)).mean()) if output == "logits" else None
    return Pair(
        a=a,
        b=b,
        output=output,
        cosine=float(np.min(cosine)),
        cosine_mean=float(cosine.mean()),
        max_abs=max_abs,
        max_rel=max_abs / max(float(np.abs(x).max()), tiny),
        top1_agreement=top1,
        ok=bool(np.min(cosine) >= TOLERANCES[precision]),
    )


def load_reference(path: Path) -> dict[str, Any]:
    """Reads reference.npz: {"images": [B, 3, H, W], "output": [B, D], "names": [...]}."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in ("images", "output", "names")}
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", "build the artifact again") from (
            error
        )


def torch_runner(model: Any, output: str, name: str = "torch") -> Any:
    """A Polygraphy runner of a PyTorch model in FP32 on the CPU."""
    import torch

    def forward(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return _function_runner(forward, output, name)


def _runner(
    name: str,
    folder: Path,
    data: dict[str, Any],
    weights: str | None,
    reference: dict[str, Any] | None,
) -> Any:
    if name != "torch":
        runtime.pick_backend(folder, data, name)
        return runtime.open_runner(folder, data, name)
    output = data["model"]["output"]
    try:
        from .restore import restore_model

        return torch_runner(restore_model(data, weights), output)
    except (ImportError, JmpDeployError) as error:
        if reference is None or weights is not None:
            raise error if isinstance(error, JmpDeployError) else ArtifactError(str(error)) from (
                error
            )
        # PyTorch's outputs travel with the artifact, for devices without PyTorch.
        return _stored_runner(reference, output)


def _stored_runner(reference: dict[str, Any], output: str) -> Any:
    """Plays back PyTorch's stored outputs for the reference images, in their order."""
    stored, position = reference["output"], 0

    def replay(images: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal position
        index = [min(position + k, len(stored) - 1) for k in range(len(images))]
        position += len(images)
        return stored[index]

    return _function_runner(replay, output, "torch (stored)")


def _function_runner(function: Any, output: str, name: str) -> Any:
    import time

    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class FunctionRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata().add(runtime.INPUT, np.float32, (-1, 3, -1, -1))

        def infer_impl(self, feed_dict: dict[str, Any]) -> dict[str, Any]:
            started = time.perf_counter()
            value = function(np.asarray(feed_dict[runtime.INPUT]))
            self.inference_time = time.perf_counter() - started
            return {output: value}

    return FunctionRunner(name=name)
