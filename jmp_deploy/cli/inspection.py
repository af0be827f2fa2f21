"""What is inside an artifact, an ONNX model or an engine: the facts behind `inspect`."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core import artifact, manifest
from ..core.artifact import Artifact
from ..core.device import gpus
from ..core.errors import ArtifactError, JmpDeployError, MissingPackageError, install_command
from ..engine import builder
from ..export import graph
from ..jmp import checkpoint
from ..plugin.library import plugin_library, serving_words


def inspect_artifact(found: artifact.Artifact) -> dict[str, Any]:
    """Looks into an artifact.

    Returns:
        {"path", "kind": "artifact", "manifest", "onnx", "network", "engine", "missing"}; what
        could not be had is None, and in "missing": {part: reason}.

    Raises:
        ArtifactError: a file is missing or altered.
    """
    found.verify()
    result: dict[str, Any] = {
        "path": str(found.folder),
        "kind": "artifact",
        "missing": {},
        "manifest": {**found.to_json(), "class_names": len(found.class_names or ())},
    }
    model = found.path(artifact.DEPLOYABLE)
    result["onnx"] = _try(result, "onnx", lambda: onnx_facts(model))
    result["network"] = _try(result, "network", lambda: _network(model, result["onnx"]))
    if found.engine:
        plan = found.path(artifact.ENGINE)
        result["engine"] = _try(result, "engine", lambda: _engine(plan, found.engine))
    else:
        result["engine"] = None
        result["missing"]["engine"] = found.no_engine
    return result


def serving(found: Artifact) -> str:
    """In one line, what a serving stack has to be told to open an artifact's engine."""
    if found.jmp is None:
        return "no plugin is needed: a dense model"
    if found.engine is not None and found.engine.embeds_plugin:
        return (
            "the engine carries its plugin: allow host code (engine_host_code_allowed; Triton: "
            "--backend-config=tensorrt,version-compatible=true)"
        )
    try:
        return serving_words(plugin_library(build=False))
    except JmpDeployError:
        return serving_words(None)


def inspect_file(path: Path) -> dict[str, Any]:
    """Looks into a .onnx, .engine or .plan file, or a checkpoint.

    Returns:
        {"path", "kind", "missing", ...}: "onnx" with "onnx" and "network", "engine" with
        "engine", or "checkpoint" with "checkpoint"; see `inspect_artifact`.

    Raises:
        JmpDeployError: nothing there, corrupt, or an engine without a GPU to open it.
    """
    if not path.exists():
        raise ArtifactError(f"no such file or folder: {path}")
    if path.suffix == ".onnx":
        result: dict[str, Any] = {"path": str(path), "kind": "onnx", "missing": {}}
        result["onnx"] = onnx_facts(path)
        result["network"] = _try(result, "network", lambda: _network(path, result["onnx"]))
        return result
    if path.suffix in (".engine", ".plan"):
        beside = path.parent / artifact.FILE
        found = Artifact.read(path.parent) if beside.is_file() else None
        if found and path.name in found.files:
            found.verify(path.name)
        facts = found.engine if found else None
        return {"path": str(path), "kind": "engine", "engine": _engine(path, facts), "missing": {}}
    if path.suffix in checkpoint.SUFFIXES:
        return {"path": str(path), "kind": "checkpoint", "missing": {}, **_checkpoint(path)}
    raise ArtifactError(
        f"{path} is neither an artifact folder, a .onnx, .engine or .plan file, nor a checkpoint"
    )


def _checkpoint(path: Path) -> dict[str, Any]:
    """What `build --weights` would find in a file."""
    try:
        from ..jmp.families import roots
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{error.name} is not installed", install_command("export")
        ) from error
    found = checkpoint.read(path, roots)
    types = Counter(str(value.dtype).removeprefix("torch.") for value in found.state.values())
    return {
        "checkpoint": {
            "key": found.key,
            "others": list(found.others),
            "architecture": found.architecture,
            "tensors": len(found.state),
            "parameters": sum(value.numel() for value in found.state.values()),
            "types": dict(types),
            "shapes": {name: list(value.shape) for name, value in found.state.items()},
            "left_out": list(found.left_out),
            "trainer": found.trainer,
            "notes": list(found.notes),
        }
    }


def onnx_facts(path: Path) -> dict[str, Any]:
    """Operators, weights and reductions of an ONNX file, as the file has them.

    Raises:
        JmpDeployError: the file is not ONNX, or the onnx package is not installed.
    """
    try:
        proto = graph.load_model(path)
    except ModuleNotFoundError as error:  # on a device the small extra is enough
        raise MissingPackageError(
            f"{error.name} is not installed", install_command("runtime")
        ) from error
    reductions = [
        {"name": node.name, "position": index, **vars(graph.read_node(node))}
        for index, node in enumerate(proto.graph.node)
        if graph.is_reduction(node)
    ]
    return {
        "form": "portable" if proto.functions or not reductions else "deployable",
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "operators": dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        "weights_bytes": graph.weight_types(proto),
        "reductions": reductions,
    }


def _network(model: Path, facts: dict[str, Any] | None) -> dict[str, Any]:
    """The model as a TensorRT parser sees it."""
    flavour = next((f for f in builder.FLAVOURS if builder.installed(f)), None)
    if flavour is None or find_spec("polygraphy") is None:
        raise ArtifactError("neither TensorRT nor TensorRT-RTX with Polygraphy is installed")
    plugin = None
    if facts is None or facts["reductions"]:
        if facts and facts["form"] == "portable":
            raise ArtifactError("TensorRT takes the deployable form (model.trt.onnx)")
        from ..plugin.library import plugin_library

        plugin = plugin_library()
    return builder.parse_network(model, flavour, plugin=plugin)


def _engine(path: Path, facts: manifest.EngineFacts | None) -> dict[str, Any]:
    if facts is None:
        flavour = next((f for f in builder.FLAVOURS if builder.installed(f)), "tensorrt")
    else:
        flavour = facts.flavour
    plugin = None
    if gpus() and (facts is None or facts.plugin):
        from ..plugin.library import plugin_library

        plugin = plugin_library()
    return builder.inspect_engine(path, flavour, plugin=plugin)


def _try(result: dict[str, Any], part: str, work: Any) -> Any:
    """A part that may not be had here: its reason goes to "missing" instead of ending it all."""
    try:
        return work()
    except ModuleNotFoundError as error:
        result["missing"][part] = f"{error.name} is not installed"
    except JmpDeployError as error:
        result["missing"][part] = error.message
    return None
