"""Runs what was built, through Polygraphy's runners: the engine on a GPU, the portable model on
ONNX Runtime. Needs neither PyTorch nor timm nor ONNX tools."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import artifact, ort
from ..core.device import gpus
from ..core.errors import EngineError, install_command
from ..core.images import INPUT
from . import api, fit
from .api import MODULES, installed

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pick_backend(
    folder: Path, data: dict[str, Any], wanted: str = "auto", *, through: str = "polygraphy"
) -> tuple[str, str]:
    """Chooses what runs an artifact here: the engine where possible, else ONNX Runtime.

    Args:
        wanted: "auto", "engine" or "onnxruntime".
        through: the package that runs the engine: "polygraphy" for `open_runner`, "cuda.bindings"
            for `runtime.Engine`.

    Returns:
        (backend, reason).

    Raises:
        EngineError: the one asked for, or all of them, cannot run here.
    """
    obstacles = {
        "engine": _engine_obstacle(folder, data, through),
        "onnxruntime": _onnx_obstacle(folder),
    }
    if wanted != "auto":
        if obstacles[wanted]:
            raise EngineError(f"{wanted}: {obstacles[wanted]}")
        return wanted, "asked for"
    if not obstacles["engine"]:
        return "engine", f"{gpus()[0].name} is here"
    if not obstacles["onnxruntime"]:
        return "onnxruntime", f"no engine: {obstacles['engine']}"
    raise EngineError(
        f"nothing here can run {folder}: engine: {obstacles['engine']}; "
        f"onnxruntime: {obstacles['onnxruntime']}",
        f"run it where a GPU is, or build it again: {data['rebuild']}",
    )


def open_runner(folder: Path, data: dict[str, Any], backend: str) -> Any:
    """A Polygraphy runner (a context manager with `infer`), its file checked beforehand.

    Raises:
        ArtifactError: the file is missing or altered.
        MissingPackageError: Polygraphy or ONNX Runtime is not installed.
    """
    ort.quiet_polygraphy()
    if backend == "onnxruntime":
        artifact.verify(folder, data, artifact.PORTABLE)
        return ort.session_runner(folder / artifact.PORTABLE)
    artifact.verify(folder, data, artifact.ENGINE)
    return _engine_runner(folder / artifact.ENGINE, data)


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


def split(images: NDArray[np.float32], size: int, least: int) -> list[NDArray[np.float32]]:
    """Batches of at most `size` images; a last one below `least` is padded with its last image."""
    pieces = [images[start : start + size] for start in range(0, len(images), size)]
    missing = least - len(pieces[-1])
    if missing > 0:
        pieces[-1] = np.concatenate([pieces[-1], np.repeat(pieces[-1][-1:], missing, axis=0)])
    return pieces


def join(parts: Sequence[Mapping[str, Any]], count: int) -> dict[str, NDArray[Any]]:
    """The outputs of `split` batches as one, without the padding: name -> [count, ...]."""
    return {
        name: np.concatenate([np.asarray(part[name]) for part in parts])[:count]
        for name in parts[0]
    }


def _engine_obstacle(folder: Path, data: dict[str, Any], through: str) -> str | None:
    engine = data.get("engine")
    if not engine:
        return "none was built"
    if not (folder / artifact.ENGINE).is_file():
        return f"{artifact.ENGINE} is missing"
    if not gpus():
        return "no GPU is here"
    module = MODULES[engine["flavour"]]
    if not installed(engine["flavour"]) or not _has(through):
        return f"it needs {module} and {through}"
    return None


def _has(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _onnx_obstacle(folder: Path) -> str | None:
    if not (folder / artifact.PORTABLE).is_file():
        return f"{artifact.PORTABLE} is missing"
    for package in ("onnxruntime", "polygraphy"):
        if find_spec(package) is None:
            return f"{package} is not installed ({install_command('runtime')})"
    return None


def _engine_runner(path: Path, data: dict[str, Any]) -> Any:
    """A runner of an engine; whether it fits is asked before it is opened."""
    engine = data["engine"]
    flavour = engine["flavour"]
    if flavour == "rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        from polygraphy import config

        config.USE_TENSORRT_RTX = True  # in case polygraphy was imported before
    trt = api.load(flavour)
    library = None
    if engine["plugin"]:
        from ..plugin.library import load_plugin, plugin_info, plugin_library

        library = plugin_library()
    found = fit.mismatches(
        engine,
        version=trt.__version__,
        gpu=gpus()[0].name,
        capability=gpus()[0].compute_capability,
        plugin=plugin_info(library) if library else None,
    )
    fit.require_fit(fit.EngineFile(path, data, flavour), found)
    from polygraphy.backend.common import bytes_from_path
    from polygraphy.backend.trt import TrtRunner, engine_from_bytes
    from polygraphy.exception import PolygraphyException

    if library:
        load_plugin(trt, library)

    def deserialize() -> Any:
        try:
            return engine_from_bytes(bytes_from_path(str(path)))
        except PolygraphyException as error:
            raise EngineError(f"{MODULES[flavour]} cannot open {path}: {error}") from error

    return TrtRunner(deserialize, name="engine")
