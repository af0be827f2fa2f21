"""The backends: what runs an artifact's model. Each is one file; this is their registry.

A new one is a subclass of `base.Backend` in a file beside these, and its place in `BACKENDS`: the
command line's choices, `run`, `compare`, `bench`, `validate` and `doctor` follow. A device needs
neither PyTorch nor ONNX tools for those that run what was built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.errors import EngineError
from .base import Backend
from .engine import EngineBackend
from .onnxruntime import OnnxRuntimeBackend
from .torch import TorchBackend

if TYPE_CHECKING:
    from ..core.artifact import Artifact

BACKENDS: tuple[Backend, ...] = (TorchBackend(), OnnxRuntimeBackend(), EngineBackend())
"""From the model as it was to what is deployed: `compare` holds each against the first, and what
is nearest to a deployment is taken by itself."""

NAMES = tuple(backend.name for backend in BACKENDS)
DEPLOYED = tuple(backend.name for backend in reversed(BACKENDS) if backend.is_deployed)
"""Those that run what was built, the best first."""
AUTO = "auto"
AUTO_HELP = "auto takes the engine where a GPU is, else ONNX Runtime (auto)"


def get(name: str) -> Backend:
    """A backend by its name."""
    return next(backend for backend in BACKENDS if backend.name == name)


def pick(artifacts: Sequence[Artifact], wanted: str = AUTO) -> tuple[Backend, str]:
    """Chooses what runs all of these artifacts here: the engine where possible.

    One backend for all of them, so that a difference is the models'.

    Args:
        wanted: AUTO or a name.

    Returns:
        (backend, why this one).

    Raises:
        EngineError: the one asked for, or every one that runs what was built, cannot run here.
    """
    refused: list[str] = []
    for name in DEPLOYED if wanted == AUTO else (wanted,):
        backend = get(name)
        why = _obstacle(backend, artifacts)
        if why is None and wanted != AUTO:
            return backend, "asked for"
        if why is None:
            return backend, f"no {refused[-1]}" if refused else f"{backend.device()} is here"
        refused.append(f"{name}: {why}")
    if wanted != AUTO:
        raise EngineError(refused[0])
    named = " and ".join(str(artifact.folder) for artifact in artifacts)
    raise EngineError(
        f"nothing here can run {named}: {'; '.join(refused)}",
        f"run it where a GPU is, or build it again: {artifacts[0].rebuild}",
    )


def _obstacle(backend: Backend, artifacts: Sequence[Artifact]) -> str | None:
    for artifact in artifacts:
        if why := backend.obstacle(artifact):
            return f"{artifact.folder}: {why}" if len(artifacts) > 1 else why
    return None
