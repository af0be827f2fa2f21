"""The PyTorch model that an artifact was built from, made again from its manifest."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..core.artifact import Artifact, Weights
from ..core.errors import WeightsError
from .models import load_model
from .patch import patch
from .schedule import from_manifest


def restore_model(artifact: Artifact, weights: str | None = None) -> nn.Module:
    """Loads the weights named in a manifest and puts JMP in as the build did.

    Args:
        artifact: what was built.
        weights: file or word as for `build --weights`, if the recorded place will not do.

    Raises:
        WeightsError: the weights are not to be had here, or are others than those of the build.
    """
    origin, jmp = artifact.weights, artifact.jmp
    source = weights or _source(origin)
    loaded = load_model(
        artifact.model.name, source, img_size=artifact.model.image_size, seed=origin.seed or 0
    )
    if origin.kind == "file" and loaded.origin.sha256 != origin.sha256:
        raise WeightsError(
            f"{source} is not the file that the artifact was built from "
            f"(sha256 {str(loaded.origin.sha256)[:12]}..., expected {str(origin.sha256)[:12]}...)",
            "name the right one with --weights",
        )
    if jmp:
        patch(
            loaded.model,
            from_manifest(jmp),
            tau=jmp.tau,
            granularity=jmp.granularity,
            proportional=jmp.proportional,
        )
    return loaded.model


def _source(origin: Weights) -> str:
    if origin.kind != "file":
        return origin.kind
    if not Path(str(origin.path)).is_file():
        raise WeightsError(
            f"the weights {origin.path} are not here", "name them with --weights FILE"
        )
    return str(origin.path)
