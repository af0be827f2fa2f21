"""The command `inspect`: flags and tables. The facts are those of `inspection`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import build, flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


SHOWN_SETTINGS = ("img_size", "input_size", "mean", "std", "crop_pct", "num_classes", "gp")
"""Of what a trainer kept in a checkpoint; --json has all of it."""


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _inspect,
        "inspect",
        "show what is in an artifact, an ONNX model (as the TensorRT parser sees it), an engine or "
        "a checkpoint",
        (
            "inspect artifacts/deit_s",
            "inspect model_best.pth.tar",
            "inspect artifacts/deit_s/model.trt.onnx --json -",
        ),
    )
    parser.add_argument("path", type=Path, metavar="DIR|FILE")


def _inspect(given: argparse.Namespace) -> int:
    from ..core.artifact import Artifact
    from .inspection import inspect_artifact, inspect_file, serving

    parts: list[RenderableType] = []
    if given.path.is_dir():
        found = Artifact.read(given.path)
        result = inspect_artifact(found)
        result["serving"] = serving(found)
        parts += [*build.summary(found), show.styled("all files are as they were built", "green")]
        parts.append(show.facts([("serving stacks", result["serving"])]))
    else:
        result = inspect_file(given.path)
    show.show(given, [*parts, *_summary(result)], result)
    return 0


def _summary(result: dict[str, Any]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    if onnx := result.get("onnx"):
        stored = ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in onnx["weights_bytes"].items())
        rows = [
            ("ONNX", f"{onnx['form']}, opsets {onnx['opset']}"),
            ("operators", ", ".join(f"{n} {name}" for name, n in onnx["operators"].items())),
            ("weights", stored),
        ]
        parts.append(show.facts(rows))
        if onnx["reductions"]:
            parts.append(_reductions(onnx["reductions"]))
    if network := result.get("network"):
        parts += _network(network)
    if engine := result.get("engine"):
        rows = [
            ("engine", f"{engine['builder']} {engine['version']}"),
            ("device memory", f"{engine['device_memory'] / 1e6:.1f} MB"),
            ("layers", str(len(engine["layers"]))),
        ]
        parts.append(show.facts(rows))
    if found := result.get("checkpoint"):
        parts.append(show.facts(_checkpoint(found)))
    for part, reason in result["missing"].items():
        parts.append(show.styled(f"no {part}: {reason}", "yellow"))
    return parts


def _checkpoint(found: dict[str, Any]) -> list[tuple[str, str]]:
    types = ", ".join(f"{count} {name}" for name, count in found["types"].items())
    shown = ("head.weight", "pos_embed", "patch_embed.proj.weight", "cls_token", "fc_norm.weight")
    shapes = {name: shape for name, shape in found["shapes"].items() if name in shown}
    kept = {k: v for k, v in found["trainer"].items() if k in SHOWN_SETTINGS and v is not None}
    return [
        ("checkpoint", f"state {found['key'] or 'at its top'}"),
        ("other states", ", ".join(name or "its top" for name in found["others"]) or "none"),
        ("model", found["architecture"] or "not said"),
        ("tensors", f"{found['tensors']} ({types}), {found['parameters'] / 1e6:.2f} M parameters"),
        ("shapes", ", ".join(f"{name} {shape}" for name, shape in shapes.items())),
        ("settings", ", ".join(f"{name} {value}" for name, value in kept.items()) or "none"),
        ("notes", "; ".join(found["notes"]) or "none"),
    ]


def _network(network: dict[str, Any]) -> list[RenderableType]:
    counts = Counter(layer["type"] for layer in network["layers"])
    rows = [
        ("parser", f"{network['builder']} {network['version']}"),
        ("layers", ", ".join(f"{count} {name}" for name, count in counts.most_common())),
    ]
    for word in ("inputs", "outputs"):
        rows.append((word, "; ".join(_tensor(tensor) for tensor in network[word])))
    table = show.table("plugin layers in the network", ">position", "layer", "outputs")
    for index, layer in enumerate(network["layers"]):
        if layer["type"].startswith("PLUGIN"):
            shapes = "; ".join(_tensor(tensor) for tensor in layer["outputs"])
            table.add_row(str(index), layer["name"], shapes)
    return [show.facts(rows), table] if table.row_count else [show.facts(rows)]


def _reductions(reductions: Sequence[dict[str, Any]]) -> Table:
    first = reductions[0]
    words = ", ".join(
        f"{name} {first[name]}"
        for name in ("num_prefix", "num_heads", "head_dim", "granularity", "importance")
    )
    table = show.table(f"reductions ({words})", "node", ">position", ">keep", ">tau")
    table.columns[0].no_wrap = True
    for reduction in reductions:
        table.add_row(
            reduction["name"],
            str(reduction["position"]),
            str(reduction["num_keep"]),
            f"{reduction['tau']:.4g}",
        )
    return table


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} {tensor['shape']}"
