"""The weighted layers of a ViT's ONNX graph: which there are, and what people call them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import CalibrationError, GraphError

if TYPE_CHECKING:
    import onnx

KINDS = ("patch_embed", "qkv", "gate", "proj", "fc1", "fc2", "head")
WEIGHTED = ("Conv", "MatMul", "Gemm")
"""Operators that layers are."""


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    Attributes:
        name: what people and caches call it: "blocks.3.qkv", "patch_embed", "head".
        block: 0-based, or None outside the blocks.
        kind: one of KINDS.
        node: name of its ONNX node.
        tensor: name of its input.
        weight: name of its weight.
        axis: of the weight's output channels.
        shape: of the weight.
        after_norm: its input comes straight from a LayerNormalization.
    """

    name: str
    block: int | None
    kind: str
    node: str
    tensor: str
    weight: str
    axis: int
    shape: tuple[int, ...]
    after_norm: bool = False

    @property
    def macs_per_row(self) -> int:
        """Multiply-adds for one token (one patch, for the patch embedding)."""
        return int(np.prod(self.shape))


def find_layers(proto: onnx.ModelProto) -> list[Layer]:
    """The quantizable layers of a portable or deployable ViT, in graph order.

    Names of weights say nothing (the exporter merges equal tensors, as all biases of a fresh model
    are), so layers are told apart by where they stand: each block has one Softmax; the projection
    is the first layer after it; then come fc1 (all layers that read fc1's input) and fc2.

    Raises:
        GraphError: the graph is not such a ViT.
    """
    from onnx.helper import get_attribute_value

    weights = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    norms = {n.output[0] for n in proto.graph.node if n.op_type == "LayerNormalization"}
    depth = sum(n.op_type == "Softmax" for n in proto.graph.node)
    found: list[Layer] = []
    block, attended = 0, False
    inputs: dict[str, str] = {}  # kind -> input tensor, in this block
    for graph_node in proto.graph.node:
        if graph_node.op_type == "Softmax" and graph_node.domain in ("", "ai.onnx"):
            attended = True
        if graph_node.op_type not in WEIGHTED or graph_node.input[1] not in weights:
            continue
        tensor, weight = graph_node.input[0], graph_node.input[1]
        shape = weights[weight]
        axis = len(shape) - 1
        if graph_node.op_type == "Conv":
            kind, axis = "patch_embed", 0
        elif block == depth:
            kind = "head"
        else:
            kind = _kind(tensor, attended, inputs)
        if graph_node.op_type == "Gemm":
            values = {a.name: get_attribute_value(a) for a in graph_node.attribute}
            axis = 0 if values.get("transB", 0) else 1
        inside = kind not in ("patch_embed", "head")
        name = f"blocks.{block}.{kind}" if inside else kind
        found.append(
            Layer(
                name=_unique(name, found),
                block=block if inside else None,
                kind=kind,
                node=graph_node.name,
                tensor=tensor,
                weight=weight,
                axis=axis,
                shape=shape,
                after_norm=tensor in norms,
            )
        )
        inputs.setdefault(kind, tensor)
        if kind == "fc2":
            block, attended, inputs = block + 1, False, {}
    _check_structure(found, depth)
    return found


def select(found: Sequence[Layer], words: Iterable[str]) -> set[str]:
    """Layers meant by words: a layer's name or node, a kind ("fc2"), a block ("blocks.3").

    Returns:
        Names of layers.

    Raises:
        CalibrationError: a word that means none of them.
    """
    chosen: set[str] = set()
    for word in words:
        block = re.fullmatch(r"blocks\.(\d+)", word)
        meant = {
            layer.name
            for layer in found
            if word in (layer.name, layer.node, layer.kind)
            or (block and layer.block == int(block.group(1)))
        }
        if not meant and word not in KINDS:
            raise CalibrationError(
                f"no layer {word!r} to keep in FP16",
                "name a kind (" + ", ".join(KINDS) + "), a block such as blocks.3, or a layer "
                "such as blocks.3.fc2",
            )
        chosen |= meant
    return chosen


def _kind(tensor: str, attended: bool, inputs: Mapping[str, str]) -> str:
    """The kind of a layer inside a block, from what came before it in the block."""
    if not attended:
        return "qkv"
    if "proj" not in inputs:
        # a gate reads what the QKV projection reads
        return "gate" if tensor == inputs.get("qkv") else "proj"
    if "fc1" not in inputs or tensor == inputs["fc1"]:
        return "fc1"
    return "fc2"


def _unique(name: str, found: Sequence[Layer]) -> str:
    taken = {layer.name for layer in found}
    names = [name, *(f"{name}_{number}" for number in range(2, 10))]
    return next(candidate for candidate in names if candidate not in taken)


def _check_structure(found: Sequence[Layer], depth: int) -> None:
    if depth == 0:
        raise GraphError("the model has no Softmax: is it a ViT, and in FP32?")
    for block in range(depth):
        kinds = {layer.kind for layer in found if layer.block == block}
        missing = {"qkv", "proj", "fc1", "fc2"} - kinds
        if missing:
            raise GraphError(
                f"block {block} has no {', '.join(sorted(missing))}: not a ViT of plain blocks, or "
                "quantized already"
            )
