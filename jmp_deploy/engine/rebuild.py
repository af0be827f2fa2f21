"""Make the engine of an artifact anew for the machine that is here, from its deployable ONNX.

Needs what built it minus PyTorch: a TensorRT, Polygraphy, and the plugin. The ONNX, the schedule
and the weights stay what they are, so the result of the check stays true.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..core import artifact
from ..core.device import gpus
from ..core.errors import ArtifactError, EngineError, JmpDeployError
from ..core.files import make_writable_dir, sha256
from . import api, fit
from . import builder as engines


def why_rebuild(folder: Path, data: dict[str, Any]) -> str | None:
    """Why the engine of an artifact cannot run here, as far as can be told without opening it;
    None where nothing speaks against it."""
    engine = data.get("engine")
    if not engine:
        return f"none was built: {data.get('no_engine')}"
    try:
        artifact.verify(folder, data, artifact.ENGINE)
    except ArtifactError as error:
        return error.message
    version = _version(engine["flavour"])
    if not gpus():
        # nothing is known of the GPU that it will run on
        found = fit.mismatches({**engine, "targets": []}, version=version, **_NO_GPU)
    else:
        here = gpus()[0]
        found = fit.mismatches(
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
    others = [name for name in data["files"] if name != artifact.ENGINE]
    if artifact.DEPLOYABLE not in others:
        raise ArtifactError(
            f"{folder} was built without {artifact.DEPLOYABLE}",
            f"build it again: {data['rebuild']}",
        )
    artifact.verify(folder, data, *others)
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
        (staging / artifact.ENGINE).replace(folder / artifact.ENGINE)
        artifact.write(folder, new, sorted({*others, artifact.ENGINE}))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return artifact.read(folder)


_NO_GPU: dict[str, Any] = {"gpu": "", "capability": (0, 0)}


def _version(flavour: str) -> str | None:
    """Of the flavour that is here."""
    if not api.installed(flavour):
        return None
    return str(api.load(flavour).__version__)


def _plugin_mismatch(engine: dict[str, Any]) -> list[fit.Mismatch]:
    if not engine["plugin"]:
        return []
    from ..plugin.library import plugin_info, plugin_library

    try:
        info = plugin_info(plugin_library(build=False))
    except JmpDeployError:
        return []  # not built here yet: what it will be is not known
    found = fit.mismatches(engine, version=engine["version"], plugin=info, **_NO_GPU)
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
        from ..plugin.library import plugin_library

        plugin = plugin_library()
    size = data["preprocess"]
    least, best, most = data["batch"]
    facts = engines.build_engine(
        folder / artifact.DEPLOYABLE,
        staging / artifact.ENGINE,
        flavour,
        engines.EngineSpec(
            batch=(least, best, most),
            image=(3, size["height"], size["width"]),
            precision=data["precision"],
        ),
        plugin=plugin,
        log=folder / artifact.BUILD_LOG,
        on_progress=on_progress,
    )
    before = (data.get("engine") or {}).get("plugin_layers", facts["plugin_layers"])
    if facts["plugin_layers"] != before:
        raise EngineError(
            f"the engine has {facts['plugin_layers']} plugin layers, the one before had {before}"
        )
    digest = None
    if plugin is not None:
        from ..plugin.library import plugin_info

        sources = plugin_info(plugin).get("sources")
        digest = {"file": plugin.name, "sha256": sha256(plugin), "sources": sources}
    return {**facts, "plugin": digest}
