"""One ONNX Runtime session for every choice of layers to quantize.

Sensitivity takes some hundred forward passes, each with other layers in INT8. To write and load a
model for each would take longer than to run it, so every layer of this one is quantized or not by
an input, `gates`: its Q/DQ stand in one branch of an If, what was there before in the other. Both
branches compute in FP32, with the scales and integers of the model that `qdq.quantize` writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import ort
from ..core.outputs import output_named
from ..export.graph import load_model, temporary_file
from .qdq import insert

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from .layers import Layer

GATES = "gates"
BATCH = 8


class Gated:
    """A model whose layers are in INT8 or not, from run to run.

    Args:
        model: portable FP32 ONNX.
        scales: layer name -> scale of its input; layers without one stay in floating point.
        keep_float: words (`layers.select`) for layers that stay in floating point.

    Attributes:
        layers: those that have a gate, in graph order.
        classifies: its output is logits.
    """

    def __init__(
        self, model: Path, scales: Mapping[str, float], *, keep_float: Collection[str] = ()
    ) -> None:
        import onnx

        proto = load_model(model)
        plain = {tensor.name: tensor for tensor in proto.graph.initializer}
        weights = {n.name: n.input[1] for n in proto.graph.node if len(n.input) > 1}
        self._images = proto.graph.input[0].name
        self.classifies = output_named(proto.graph.output[0].name).classifies
        quantized = onnx.ModelProto()
        quantized.CopyFrom(proto)
        self.layers = insert(quantized, scales, keep_float=keep_float)
        _add_gates(quantized, self.layers, {k: plain[v] for k, v in weights.items() if v in plain})
        del proto, plain
        with temporary_file(quantized) as path:
            del quantized
            self._session = ort.session(path, keep_memory=False)

    def run(self, names: Collection[str], images: NDArray[np.float32]) -> NDArray[Any]:
        """The model's outputs [n, C] for images [n, 3, H, W], these layers quantized."""
        gates = np.array([layer.name in names for layer in self.layers], dtype=np.bool_)
        rows = []
        for start in range(0, len(images), BATCH):
            feed: dict[str, Any] = {self._images: images[start : start + BATCH]}
            if self.layers:
                feed[GATES] = gates
            rows.append(self._session.run(None, feed)[0])
        return np.concatenate(rows)


def _add_gates(
    proto: onnx.ModelProto, layers: Sequence[Layer], weights: Mapping[str, onnx.TensorProto]
) -> None:
    """Puts the Q/DQ of each layer into a branch, in place.

    Args:
        proto: of `qdq.insert`.
        layers: what it returned.
        weights: node name -> the layer's unquantized weight.
    """
    from onnx import TensorProto, helper

    if not layers:
        return
    graph = proto.graph
    producers = {name: n for n in graph.node for name in n.output}
    gated = {layer.node: (index, layer) for index, layer in enumerate(layers)}
    present = {tensor.name for tensor in graph.initializer}
    moved: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    for user in graph.node:
        if user.name not in gated:
            nodes.append(user)
            continue
        index, layer = gated[user.name]
        values, kernel = producers[user.input[0]], producers[user.input[1]]
        steps = [producers[values.input[0]], values, kernel]
        moved.update(name for step in steps for name in step.output)
        weight = weights[layer.node]
        if weight.name not in present:
            graph.initializer.append(weight)
            present.add(weight.name)
        prefix = f"{layer.name}.gated"
        ends = [user.input[0], user.input[1]]
        chosen = _branch(f"{prefix}.int8", steps, ends)
        plain = [steps[0].input[0], weight.name]
        kept = helper.make_graph(
            [
                helper.make_node("Identity", [name], [f"{prefix}.plain.{at}"])
                for at, name in enumerate(plain)
            ],
            f"{prefix}.plain",
            [],
            [_float(f"{prefix}.plain.{at}") for at in range(2)],
        )
        graph.initializer.append(helper.make_tensor(f"{prefix}.at", TensorProto.INT64, [], [index]))
        nodes.append(helper.make_node("Gather", [GATES, f"{prefix}.at"], [f"{prefix}.gate"]))
        nodes.append(
            helper.make_node(
                "If",
                [f"{prefix}.gate"],
                [f"{prefix}.0", f"{prefix}.1"],
                name=prefix,
                then_branch=chosen,
                else_branch=kept,
            )
        )
        user.input[0], user.input[1] = f"{prefix}.0", f"{prefix}.1"
        nodes.append(user)
    left = [n for n in nodes if not moved & set(n.output)]
    copies = []
    for graph_node in left:  # what `del` frees must not be what is put back
        copies.append(type(graph_node).FromString(graph_node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(copies)
    graph.input.append(helper.make_tensor_value_info(GATES, TensorProto.BOOL, [len(layers)]))


def _branch(name: str, steps: Sequence[onnx.NodeProto], ends: Sequence[str]) -> onnx.GraphProto:
    """Copies of nodes as a branch that gives `ends`; their own names are not taken again."""
    from onnx import helper

    inside = {output for step in steps for output in step.output}
    copies = []
    for step in steps:
        copy = type(step).FromString(step.SerializeToString())
        copy.name = f"{name}.{step.name}"
        for names in (copy.input, copy.output):
            for position, value in enumerate(names):
                if value in inside:
                    names[position] = f"{name}.{value}"
        copies.append(copy)
    return helper.make_graph(copies, name, [], [_float(f"{name}.{end}") for end in ends])


def _float(name: str) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
