"""Make the engine of an artifact anew for the machine that is here, from its deployable ONNX.

Needs what built it minus PyTorch: a TensorRT, Polygraphy, and the plugin. The ONNX, the schedule
and the weights stay what they are, so the result of the check stays true.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from . import engine as engines
from . import engine_check, manifest, trt_api
from .device import gpus
from .errors import ArtifactError, EngineError, JmpDeployError
from .files import make_writable_dir, sha256


def why_rebuild(folder: Path, data: dict[str, Any]) -> str | None:
    """Why the engine of an artifact cannot run here, as far as can be told without opening it;
    None where nothing speaks against it."""
    engine = data.get("engine")
    if not engine:
        return f"none was built: {data.get('no_engine')}"
    try:
        manifest.verify(folder, data, manifest.ENGINE)
    except ArtifactError as error:
        return error.message
    version = _version(engine["flavour"])
    if not gpus():
        # nothing is known of the GPU that it will run on
        found = engine_check.mismatches({**engine, "targets": []}, version=version, **_NO_GPU)
    else:
        here = gpus()[0]
        found = engine_check.mismatches(
            engine, version=version, gpu=here.name, capability=here.compute_capability
        )
    found += _plugin_mismatch(engine)
    return "; ".join(map(str, found)) or None


def rebuild_engine(
    folder: Path, data: dict[str, Any], *, on_progress: engines.Progress | None = None
) -> dict[str, Any]:
    """Builds the engine again and puts it and the new manifest in place of the old ones.

    Returns:
        The new manifest.

    Raises:
        ArtifactError: another file of the artifact is missing or altered.
        EngineError: no builder can work here, or the build failed. The artifact is as before.
    """
    others = [name for name in data["files"] if name != manifest.ENGINE]
    if manifest.DEPLOYABLE not in others:
        raise ArtifactError(
            f"{folder} was built without {manifest.DEPLOYABLE}",
            f"build it again: {data['rebuild']}",
        )
    manifest.verify(folder, data, *others)
    choice = engines.choose("auto")
    if choice.flavour is None:
        raise EngineError(f"no builder can work here: {choice.reason}")
    make_writable_dir(folder)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        facts = _build(folder, staging, data, choice.flavour, on_progress)
        new = {
            **data,
            "engine": {"flavour": choice.flavour, "why": choice.reason, **facts},
            "no_engine": None,
        }
        # The engine is there for a moment without its manifest's blessing: that is noticed, and
        # mended by another run of this.
        (staging / manifest.ENGINE).replace(folder / manifest.ENGINE)
        manifest.write(folder, new, sorted({*others, manifest.ENGINE}))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest.read(folder)


_NO_GPU: dict[str, Any] = {"gpu": "", "capability": (0, 0)}


def _version(flavour: str) -> str | None:
    """Of the flavour that is here."""
    if not trt_api.installed(flavour):
        return None
    return str(trt_api.load(flavour).__version__)


def _plugin_mismatch(engine: dict[str, Any]) -> list[engine_check.Mismatch]:
    if not engine["plugin"]:
        return []
    from .plugin import plugin_info, plugin_library

    try:
        info = plugin_info(plugin_library(build=False))
    except JmpDeployError:
        return []  # not built here yet: what it will be is not known
    found = engine_check.mismatches(engine, version=engine["version"], plugin=info, **_NO_GPU)
    return [mismatch for mismatch in found if mismatch.what == "plugin"]


def _build(
    folder: Path,
    staging: Path,
    data: dict[str, Any],
    flavour: str,
    on_progress: engines.Progress | None,
) -> dict[str, Any]:
    plugin = None
    if data["jmp"]:
        from .plugin import plugin_library

        plugin = plugin_library()
    size = data["preprocess"]
    least, best, most = data["batch"]
    facts = engines.build_engine(
        folder / manifest.DEPLOYABLE,
        staging / manifest.ENGINE,
        flavour,
        engines.EngineSpec(
            batch=(least, best, most),
            image=(3, size["height"], size["width"]),
            precision=data["precision"],
        ),
        plugin=plugin,
        log=folder / manifest.BUILD_LOG,
        on_progress=on_progress,
    )
    before = (data.get("engine") or {}).get("plugin_layers", facts["plugin_layers"])
    if facts["plugin_layers"] != before:
        raise EngineError(
            f"the engine has {facts['plugin_layers']} plugin layers, the one before had {before}"
        )
    digest = None
    if plugin is not None:
        from .plugin import plugin_info

        sources = plugin_info(plugin).get("sources")
        digest = {"file": plugin.name, "sha256": sha256(plugin), "sources": sources}
    return {**facts, "plugin": digest}
