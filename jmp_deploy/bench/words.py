"""What a benchmark's figures are figures of, and what makes them less than they seem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.artifact import Artifact
from ..core.device import gpus
from .host import cpu_name

UNSTEADY = 0.1
"""A 95 % interval wider than this share of its ratio is called unsteady."""


def artifact(measured: Artifact, chosen: Sequence[str]) -> dict[str, Any]:
    """What is measured, for the result."""
    return {
        "path": str(measured.folder),
        "model": measured.model.name,
        "image_size": measured.model.image_size,
        "precision": measured.precision,
        "precision_of": {backend: measured.precision_of(backend) for backend in chosen},
        "jmp": measured.jmp.schedule_name if measured.jmp else None,
        "gmacs": measured.macs.model / 1e9,
        "random_weights": measured.is_random,
    }


def device(chosen: Sequence[str], threads: int, libraries: dict[str, str]) -> str:
    """What measures: the GPU, the CPU, and the library on it."""
    gpu = gpus()[0].name if gpus() else None
    cpu = f"{threads} thread{'s' if threads > 1 else ''}"
    parts = []
    for backend in chosen:
        library = libraries.get(backend, backend)
        if backend == "engine" or (backend == "torch" and gpu):
            parts.append(f"{gpu or 'GPU'}, {library}")
        else:
            parts.append(f"CPU {cpu_name()}, {library}, {cpu}")
    return "; ".join(parts)


def warnings(
    busy: Sequence[str],
    throttled: Sequence[str],
    rows: Sequence[dict[str, Any]],
    ratios: Sequence[dict[str, Any]],
    artifacts: Sequence[Artifact],
    chosen: Sequence[str],
) -> list[str]:
    """What makes these figures less than they seem."""
    found = []
    if busy:
        found.append(f"the machine was busy before we began: {', '.join(busy)}")
    if throttled:
        found.append(f"the device was throttled: {', '.join(throttled)}")
    for row in rows:
        if not row["stable"]:
            found.append(
                f"{row['artifact']} at batch {row['batch']} was not stable after "
                f"{row['warm_iterations']} warm-up inferences"
            )
    for entry in ratios:
        low, high = entry["ci95"]
        if high - low > UNSTEADY * entry["ratio"]:
            found.append(
                f"the ratio at batch {entry['batch']} is unsteady: {low:.2f} to {high:.2f}"
            )
    if len(artifacts) == 2:
        facts: list[tuple[str, list[Any]]] = [
            ("model", [item.model.name for item in artifacts]),
            ("image size", [item.model.image_size for item in artifacts]),
        ]
        for backend in chosen:
            facts.append(("precision", [item.precision_of(backend) for item in artifacts]))
        for name, values in facts:
            if values[0] != values[1]:
                found.append(f"the artifacts differ in {name}: {values[0]} and {values[1]}")
    return found


def notes(
    chosen: Sequence[str], uses_gpu: bool, has_power: bool, rows: Sequence[dict[str, Any]]
) -> list[str]:
    """What else has to be known of these figures."""
    found = []
    names = ", ".join({"onnxruntime": "ONNX Runtime", "torch": "PyTorch"}.get(b, b) for b in chosen)
    if not uses_gpu:
        found.append(f"measured on the CPU ({names}): it says nothing of an engine on a GPU")
    if not has_power:
        found.append("no energy per image: power cannot be read here")
    if "engine" in chosen and rows and not any(row["cuda_graph"] for row in rows):
        found.append("no row is of CUDA graphs: not asked for, or they cannot be captured here")
    if rows and min(row["iterations"] for row in rows) < 100:
        found.append("p99 of fewer than 100 inferences is close to the slowest one")
    return found
