"""Runs what was built behind Polygraphy's interface: the engine on a GPU, the portable model on
ONNX Runtime. Needs neither PyTorch nor timm nor ONNX tools."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import ort
from ..core.artifact import ENGINE, PORTABLE, Artifact
from ..core.device import gpus
from ..core.errors import EngineError, install_command
from ..core.images import INPUT, join, split
from .api import MODULES, installed
from .fit import EngineFile

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pick_backend(artifact: Artifact, wanted: str = "auto") -> tuple[str, str]:
    """Chooses what runs an artifact here: the engine where possible, else ONNX Runtime.

    Args:
        wanted: "auto", "engine" or "onnxruntime".

    Returns:
        (backend, reason).

    Raises:
        EngineError: the one asked for, or all of them, cannot run here.
    """
    obstacles = {"engine": _engine_obstacle(artifact), "onnxruntime": _onnx_obstacle(artifact)}
    if wanted != "auto":
        if obstacles[wanted]:
            raise EngineError(f"{wanted}: {obstacles[wanted]}")
        return wanted, "asked for"
    if not obstacles["engine"]:
        return "engine", f"{gpus()[0].name} is here"
    if not obstacles["onnxruntime"]:
        return "onnxruntime", f"no engine: {obstacles['engine']}"
    raise EngineError(
        f"nothing here can run {artifact.folder}: engine: {obstacles['engine']}; "
        f"onnxruntime: {obstacles['onnxruntime']}",
        f"run it where a GPU is, or build it again: {artifact.rebuild}",
    )


def open_runner(artifact: Artifact, backend: str) -> Any:
    """A Polygraphy runner (a context manager with `infer`), its file checked beforehand.

    Raises:
        ArtifactError: the file is missing or altered.
        MissingPackageError: Polygraphy or ONNX Runtime is not installed.
    """
    ort.quiet_polygraphy()
    if backend == "onnxruntime":
        return ort.session_runner(artifact.verified(PORTABLE))
    return engine_runner(artifact.path(ENGINE))


def infer(runner: Any, images: NDArray[np.float32], batch: tuple[int, int, int]) -> dict[str, Any]:
    """Runs any number of images in batches that the engine's profile allows.

    Args:
        runner: an active runner.
        images: [B, 3, H, W].
        batch: (min, opt, max) of the profile. Short batches are padded up to min.

    Returns:
        output name -> [B, ...].
    """
    least, _, most = batch
    parts = []
    for piece in split(images, most, least):
        outputs = runner.infer({INPUT: piece})
        # copied: a TensorRT runner writes the next batch into the same buffers
        parts.append({name: np.array(value) for name, value in outputs.items()})
    return join(parts, len(images))


def _engine_obstacle(artifact: Artifact) -> str | None:
    engine = artifact.engine
    if engine is None:
        return "none was built"
    if not artifact.path(ENGINE).is_file():
        return f"{ENGINE} is missing"
    if not gpus():
        return "no GPU is here"
    if not installed(engine.flavour) or not _has("cuda.bindings"):
        return f"it needs {MODULES[engine.flavour]} and cuda-bindings"
    return None


def _has(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _onnx_obstacle(artifact: Artifact) -> str | None:
    if not artifact.path(PORTABLE).is_file():
        return f"{PORTABLE} is missing"
    for package in ("onnxruntime", "polygraphy"):
        if find_spec(package) is None:
            return f"{package} is not installed ({install_command('runtime')})"
    return None


def engine_runner(path: Path | EngineFile) -> Any:
    """A Polygraphy runner of an engine: `Engine` itself, so that what is compared and validated is
    what users run. (Polygraphy's own runner lets a plan run code of the host, and finds no CUDA
    runtime in the wheels of CUDA 13.)

    Args:
        path: as `Engine` takes it.
    """
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    from .runtime import Engine

    class EngineRunner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            self.engine = Engine(path, check_finite=False)

        def deactivate_impl(self) -> None:
            self.engine.close()

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in self.engine.inputs:
                metadata.add(tensor.name, tensor.dtype, (-1, *tensor.shape))
            return metadata

        def infer_impl(self, feed_dict: dict[str, Any]) -> dict[str, Any]:
            started = time.perf_counter()
            outputs = self.engine.infer(feed_dict)
            self.inference_time = time.perf_counter() - started
            return outputs

    return EngineRunner(name="engine")
