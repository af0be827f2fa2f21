"""Artifacts for tests: a complete manifest, of which a test says only what it is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.images import Preprocess
from jmp_deploy.core.manifest import Check, EngineFacts, Jmp, Macs, Model, Weights

PREPROCESS = Preprocess(8, 8, 8, "bicubic", "center", (0.5,) * 3, (0.25,) * 3)
FILE_WEIGHTS = Weights("file", path="w.safetensors", sha256="0" * 64)
RANDOM_WEIGHTS = Weights("random", seed=0)
JMP = Jmp("list", ((1, 2),), tau=0.7)
PAIR = {"cosine": 1.0, "max_abs": 0.0, "top1_agreement": 1.0}
CALIBRATED = {"count": 8, "source": "photos", "demonstration": False, "warnings": []}
"""What an INT8 manifest has to say of its images."""
ENGINE = EngineFacts("rtx", "1.7.1", ("sm_86",), "fp16")


def make_artifact(folder: Path, *, side: int | None = None, **changes: Any) -> Artifact:
    """A dense FP16 classifier without an engine, not yet written.

    Args:
        side: pixels of the square input.
        changes: fields of `Artifact`; `name` and `output` of its model.
    """
    side = side or changes.get("preprocess", PREPROCESS).height
    model = Model(
        changes.pop("name", "deit_small_patch16_224"), side, changes.pop("output", "logits")
    )
    made = Artifact(
        folder=folder,
        model=model,
        weights=FILE_WEIGHTS,
        preprocess=replace(PREPROCESS, height=side, width=side, resize=side),
        precision="fp16",
        batch=(1, 4, 8),
        macs=Macs(4_000_000_000, 4_000_000_000),
        check=Check(True, ("r0",), (PAIR,), {"torch": 1.0}),
        rebuild=f"python -m jmp_deploy build {model.name}",
        no_engine="none was asked for",
    )
    return replace(made, **changes)


def write_artifact(folder: Path, **changes: Any) -> Artifact:
    """`make_artifact`, with its manifest written for the files that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    return make_artifact(folder, **changes).write()
