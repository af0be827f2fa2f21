"""Does an engine fit this machine? Asked of the manifest, before anything is deserialized.

An engine fits one flavour and version of TensorRT, the GPUs that it was built for, and the plugin
that it was built with. TensorRT itself tells so late, and in words of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import artifact
from ..core.artifact import Artifact
from ..core.errors import ArtifactError, EngineError
from ..core.manifest import EngineFacts, PluginFile
from .api import FLAVOURS, MODULES, TITLES, installed

HOST_CODE = (
    "it carries its plugin (--embed-plugin), host code that jmp_deploy never lets an engine run"
)
"""Why such an engine is for other runtimes."""


@dataclass(frozen=True)
class EngineFile:
    """An engine and what is known of it.

    Attributes:
        path: the plan.
        flavour: "tensorrt" or "rtx".
        facts: what its builder said of it, or None where nobody is asked.
        rebuild: the command that makes its artifact anew, if it belongs to one.
    """

    path: Path
    flavour: str
    facts: EngineFacts | None = None
    rebuild: str | None = None

    @property
    def has_plugin(self) -> bool | None:
        """Whether it holds our plugin; None where that is not known."""
        return None if self.facts is None else self.facts.plugin is not None

    @property
    def how_to_rebuild(self) -> str:
        """For the hint of an error."""
        if self.rebuild is None:
            return "an engine fits one TensorRT version and GPU architecture: build it again here"
        folder = shlex.quote(str(self.path.parent))
        return (
            f"make the engine anew with `python -m jmp_deploy run {folder} IMAGE --rebuild`, or "
            f"everything with `{self.rebuild}`"
        )


@dataclass(frozen=True)
class Mismatch:
    """One thing that does not fit: what was expected (by the engine), what was found (here)."""

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, found {self.found}"


def locate(path: Path, *, use_manifest: bool = True, flavour: str | None = None) -> EngineFile:
    """Finds an engine and its manifest, and checks the file against it.

    Args:
        path: the plan, or the folder of an artifact.
        use_manifest: False takes any plan as it is.
        flavour: needed without a manifest where both flavours are installed; else TensorRT.

    Raises:
        ArtifactError: no such file, no manifest beside it, or the file is not the one that was
            built.
        EngineError: the flavour is not installed.
    """
    plan = path / artifact.ENGINE if path.is_dir() else path
    if not use_manifest:
        if not plan.is_file():
            raise ArtifactError(f"no such engine: {plan}")
        chosen = flavour or next((name for name in FLAVOURS if installed(name)), FLAVOURS[0])
        return EngineFile(plan, chosen)
    if not plan.is_file() and not plan.parent.is_dir():
        raise ArtifactError(f"no such engine: {plan}")
    if not (plan.parent / artifact.FILE).is_file():
        raise ArtifactError(
            f"{plan} has no {artifact.FILE} beside it: nothing is known of the TensorRT version, "
            "GPU and plugin that it needs",
            "run it from the artifact's folder, or without the check: --no-manifest",
        )
    found = Artifact.read(plan.parent)
    if found.engine is None:
        raise ArtifactError(
            f"{plan.parent} has no engine: {found.no_engine}", f"build it again: {found.rebuild}"
        )
    found.verify(plan.name)
    return EngineFile(plan, found.engine.flavour, found.engine, found.rebuild)


def mismatches(
    engine: EngineFacts,
    *,
    version: str | None,
    gpu: str,
    capability: tuple[int, int],
    plugin: dict[str, Any] | None = None,
) -> list[Mismatch]:
    """What of an engine does not fit.

    Args:
        version: of the flavour that is here; None where it is not installed.
        gpu, capability: name of the GPU and its compute capability.
        plugin: `plugin.plugin_info` of the library that would be loaded; not looked at where the
            engine has none.
    """
    found = []
    title = TITLES[engine.flavour]
    if version is None:
        missing = f"no {MODULES[engine.flavour]}"
        found.append(Mismatch(f"{title} version", engine.version, missing))
    elif version != engine.version:
        found.append(Mismatch(f"{title} version", engine.version, version))
    here = "sm_{}{}".format(*capability)
    if engine.targets and here not in engine.targets:
        targets = " or ".join(engine.targets)
        found.append(Mismatch("compute capability", targets, f"{here} ({gpu})"))
    if engine.plugin and plugin is not None and not _same_plugin(engine.plugin, plugin):
        expected, ours = engine.plugin.sha256[:12], plugin["sha256"][:12]
        found.append(Mismatch("plugin", f"sha256 {expected}...", f"{ours}... ({plugin['path']})"))
    return found


def refuse_host_code(file: EngineFile) -> None:
    """Raises EngineError for an engine that is known to carry its plugin."""
    if file.facts is not None and file.facts.embeds_plugin:
        raise EngineError(
            f"{file.path} is for a runtime that allows host code: {HOST_CODE}",
            "build without --embed-plugin to run it here, or use --backend onnxruntime",
        )


def require_fit(file: EngineFile, found: Sequence[Mismatch]) -> None:
    """Raises EngineError if anything does not fit."""
    if found:
        raise EngineError(
            f"{file.path} does not fit this machine: " + "; ".join(map(str, found)),
            file.how_to_rebuild,
        )


def _same_plugin(expected: PluginFile, found: dict[str, Any]) -> bool:
    """The same library, or one that another compiler made of the same sources: an engine that
    was built ahead of time meets a plugin that was compiled on the device."""
    if expected.sha256 == found["sha256"]:
        return True
    return expected.sources is not None and expected.sources == found.get("sources")
