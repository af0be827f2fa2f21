"""The layers of a ViT's ONNX graph that can be quantized: which there are, and what people call
them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import CalibrationError, GraphError
from .formats import INT8, Format, Fused

if TYPE_CHECKING:
    import onnx

KINDS = ("patch_embed", "qkv", "gate", "attention", "proj", "fc1", "fc2", "head")
WEIGHTED = ("Conv", "MatMul", "Gemm")
"""Operators that layers are."""


@dataclass(frozen=True)
class Read:
    """A tensor that a layer reads, other than its weight.

    Attributes:
        name: what caches call it: the layer's name, or "blocks.3.q" and so on in attention.
        node, position: which node reads it, as which of its inputs.
        tensor: its name in the graph.
        most: its largest magnitude, where that is known without looking.
    """

    name: str
    node: str
    position: int
    tensor: str
    most: float | None = None


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized: one with a weight, or the two products of an attention.

    Attributes:
        name: what people and caches call it: "blocks.3.qkv", "patch_embed", "head".
        block: 0-based, or None outside the blocks.
        kind: one of KINDS.
        node: name of its ONNX node.
        tensor: name of its input.
        weight: name of its weight; None of an attention.
        axis: of the weight's output channels.
        shape: of the weight; of an attention (queries, keys, head size).
        after_norm: its input comes straight from a LayerNormalization.
        products: what an attention reads: queries, keys, softmax, values.
    """

    name: str
    block: int | None
    kind: str
    node: str
    tensor: str
    weight: str | None
    axis: int
    shape: tuple[int, ...]
    after_norm: bool = False
    products: tuple[Read, ...] = ()

    @property
    def reads(self) -> tuple[Read, ...]:
        """What is quantized besides the weight; the rows of the first are the layer's."""
        return self.products or (Read(self.name, self.node, 0, self.tensor),)

    def lacks(self, ranges: Collection[str]) -> bool:
        """Whether something that it reads is not among what is known the range of."""
        return any(read.most is None and read.name not in ranges for read in self.reads)

    @property
    def macs_per_row(self) -> int:
        """Multiply-adds for one token (one patch, for the patch embedding; one query of one head,
        for an attention)."""
        return 2 * self.shape[1] * self.shape[2] if self.products else int(np.prod(self.shape))

    @property
    def least_side(self) -> int:
        """The shortest side of its matrix products, the number of tokens of a weighted layer
        aside."""
        if self.products:
            return min(self.shape)
        outputs = self.shape[self.axis]
        return min(outputs, int(np.prod(self.shape)) // outputs)


def find_layers(proto: onnx.ModelProto, form: Format = INT8) -> list[Layer]:
    """The layers of a portable or deployable ViT that a format can do, in graph order.

    Names of weights say nothing (the exporter merges equal tensors, as all biases of a fresh model
    are), so layers are told apart by where they stand: each block has one Softmax; the projection
    is the first layer after it; then come fc1 (all layers that read fc1's input) and fc2.

    Raises:
        GraphError: the graph is not such a ViT.
    """
    from onnx.helper import get_attribute_value

    weights = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    attentions = _attentions(proto, form.attention) if form.attention else {}
    norms = {n.output[0] for n in proto.graph.node if n.op_type == "LayerNormalization"}
    depth = sum(n.op_type == "Softmax" for n in proto.graph.node)
    found: list[Layer] = []
    block, attended = 0, False
    inputs: dict[str, str] = {}  # kind -> input tensor, in this block
    for graph_node in proto.graph.node:
        if graph_node.op_type == "Softmax" and graph_node.domain in ("", "ai.onnx"):
            attended = True
        if graph_node.name in attentions:
            found.append(_attention(block, *attentions[graph_node.name], form))
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
    return [layer for layer in found if layer.least_side >= form.least_side]


def _attentions(
    proto: onnx.ModelProto, fused: Fused
) -> dict[str, tuple[onnx.NodeProto, onnx.NodeProto, list[int]]]:
    """Node of the scores -> it, the node of the values, and (queries, keys, head size).

    An attention of which the graph does not say the sizes is left out, as is one that would be
    several kernels.
    """
    sizes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info
    }
    makers = {name: n for n in proto.graph.node for name in n.output}
    users = {n.input[0]: n for n in proto.graph.node if n.op_type == "MatMul"}
    found = {}
    for softmax in proto.graph.node:
        if softmax.op_type != "Softmax" or softmax.output[0] not in users:
            continue
        scores = makers[softmax.input[0]]
        if scores.op_type == "Add":  # the mask
            sums = [makers[name] for name in scores.input if name in makers]
            scores = next((n for n in sums if n.op_type == "MatMul"), scores)
        values = users[softmax.output[0]]
        queries, keys = (sizes.get(name, []) for name in (scores.input[0], values.input[1]))
        if scores.op_type != "MatMul" or not len(queries) == len(keys) == 4:
            continue
        sizes_here = [queries[2], keys[2], keys[3]]
        if fused.takes(*sizes_here):
            found[scores.name] = scores, values, sizes_here
    return found


def _attention(
    block: int, scores: onnx.NodeProto, values: onnx.NodeProto, sizes: list[int], form: Format
) -> Layer:
    name = f"blocks.{block}"
    most = None if form.attention and form.attention.softmax else 1.0
    reads = (
        Read(f"{name}.q", scores.name, 0, scores.input[0]),
        Read(f"{name}.k", scores.name, 1, scores.input[1]),
        Read(f"{name}.softmax", values.name, 0, values.input[0], most=most),
        Read(f"{name}.v", values.name, 1, values.input[1]),
    )
    return Layer(
        name=f"{name}.attention",
        block=block,
        kind="attention",
        node=scores.name,
        tensor=scores.input[0],
        weight=None,
        axis=-1,
        shape=tuple(sizes),
        products=reads,
    )


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
