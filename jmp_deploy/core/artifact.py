"""The sidecar of an artifact: what is in the folder, how it was made, whether it is intact."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import ArtifactError
from .files import sha256, write_json

FILE = "manifest.json"
FORMAT = 2

PORTABLE = "model.onnx"
DEPLOYABLE = "model.trt.onnx"
ENGINE = "model.engine"
REFERENCE = "reference.npz"
TIMING_CACHE = "timing.cache"
BUILD_LOG = "build.log"
TWIN_BUILD_LOG = "build.fp16.log"
CALIBRATION = "calibration.json"
TWIN_DEPLOYABLE = "model.fp16.trt.onnx"
TWIN_ENGINE = "model.fp16.engine"
"""The FP16 twin of an INT8 artifact. Where FP16 is as fast, it is `model.engine` instead, and the
INT8 engine has the name below."""
INT8_ENGINE = "model.int8.engine"

_REQUIRED = ("format", "model", "weights", "preprocess", "precision", "batch", "files", "rebuild")


def read(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of an artifact folder (not yet its files: see `verify`).

    Raises:
        ArtifactError: no folder, no manifest, or one that this version cannot read.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise ArtifactError(
            f"no such artifact folder: {folder}", "make one with `python -m jmp_deploy build MODEL`"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} has no {FILE}: it is not an artifact, or its build did not end",
            "make one with `python -m jmp_deploy build MODEL -o DIR`",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", "build the artifact again") from (
            error
        )
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise ArtifactError(
            f"{path} has format {found!r}, jmp_deploy {__version__} reads {FORMAT}",
            "build the artifact again with this version",
        )
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        raise ArtifactError(
            f"{path} is incomplete: no {', '.join(missing)}", "build the artifact again"
        )
    return data


def write(folder: Path, data: dict[str, Any], files: list[str]) -> None:
    """Writes the manifest with size and digest of `files`, all of them in `folder`."""
    entries = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in files
    }
    write_json(folder / FILE, {"format": FORMAT, **data, "files": entries})


def verify(folder: Path, data: dict[str, Any], *names: str) -> None:
    """Checks that files are there and are the ones that were built.

    Args:
        names: files to check; none means all that the manifest names.

    Raises:
        ArtifactError: a file is missing or altered; expected, found and the way to rebuild.
    """
    rebuild = f"build it again: {data['rebuild']}"
    for name in names or data["files"]:
        entry = data["files"].get(name)
        path = folder / name
        if entry is None:
            raise ArtifactError(f"{folder} was built without {name}", rebuild)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", rebuild)
        found = path.stat().st_size
        if found != entry["bytes"]:
            raise ArtifactError(
                f"{path} has {found} bytes, the manifest says {entry['bytes']}", rebuild
            )
        digest = sha256(path)
        if digest != entry["sha256"]:
            raise ArtifactError(
                f"{path} is not the file that was built: sha256 {digest[:12]}..., the manifest "
                f"says {entry['sha256'][:12]}...",
                rebuild,
            )


def is_random(data: dict[str, Any]) -> bool:
    """Whether the weights are random: good for timing, meaningless in what they answer."""
    return bool(data["weights"].get("kind") == "random")


def tool_versions() -> dict[str, str]:
    """Versions of what takes part in a build, as far as installed."""
    versions = {"jmp_deploy": __version__}
    for name in (
        "torch",
        "timm",
        "onnx",
        "onnxruntime",
        "onnx-graphsurgeon",
        "onnxconverter-common",
        "polygraphy",
        "numpy",
        "pillow",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
