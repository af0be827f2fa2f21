"""What a benchmark's figures are figures of, and what makes them less than they seem."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import artifact as manifest
from ..core.device import gpus
from .host import cpu_name

UNSTEADY = 0.1
"""A 95 % interval wider than this share of its ratio is called unsteady."""


def artifact(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What is measured, for the result."""
    return {
        "path": str(folder),
        "model": data["model"]["name"],
        "image_size": data["model"]["image_size"],
        "precision": data["precision"],
        "jmp": data["jmp"]["schedule_name"] if data["jmp"] else None,
        "gmacs": data["macs"]["model"] / 1e9,
        "random_weights": manifest.is_random(data),
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
    datas: Sequence[dict[str, Any]],
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
    if len(datas) == 2:
        for name, values in (
            ("model", [data["model"]["name"] for data in datas]),
            ("image size", [data["model"]["image_size"] for data in datas]),
            ("precision", [data["precision"] for data in datas]),
        ):
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
