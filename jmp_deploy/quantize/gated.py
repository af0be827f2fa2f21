"""One ONNX Runtime session for every choice of layers to quantize.

Sensitivity takes some hundred forward passes, each with other layers quantized. To write and load a
model for each would take longer than to run it, so every layer of this one is quantized or not by
an input, `gates`: the Q/DQ of what it reads stand in one branch of an If, what was there before in
the other. Both branches compute in FP32, with the scales and numbers of the model that
`qdq.quantize` writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import ort
from ..core.outputs import output_named
from ..export.graph import load_model, refill, temporary_file
from .formats import INT8, Format
from .qdq import insert

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from .layers import Layer

GATES = "gates"
BATCH = 8


class Gated:
    """A model whose layers are quantized or not, from run to run.

    Args:
        model: portable FP32 ONNX.
        scales, form: as for `qdq.quantize`.
        keep_float: words (`layers.select`) for layers that stay in floating point.

    Attributes:
        form: the number format.
        layers: those that have a gate, in graph order.
        classifies: its output is logits.
    """

    def __init__(
        self,
        model: Path,
        scales: Mapping[str, float],
        form: Format = INT8,
        *,
        keep_float: Collection[str] = (),
    ) -> None:
        import onnx

        proto = load_model(model)
        plain = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.form = form
        self._images = proto.graph.input[0].name
        self.classifies = output_named(proto.graph.output[0].name).classifies
        quantized = onnx.ModelProto()
        quantized.CopyFrom(proto)
        self.layers = insert(quantized, scales, form, keep_float=keep_float)
        _add_gates(quantized, self.layers, plain)
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
    """Puts the Q/DQ of each layer into branches, in place.

    Args:
        proto: of `qdq.insert`.
        layers: what it returned.
        weights: by name, unquantized.
    """
    from onnx import TensorProto, helper, numpy_helper

    if not layers:
        return
    graph = proto.graph
    makers = {name: n for n in graph.node for name in n.output}
    places: dict[str, list[tuple[int, str, int]]] = {}  # node -> (input, what it was, gate)
    nodes: list[onnx.NodeProto] = []
    for index, layer in enumerate(layers):
        gate, at = f"{layer.name}.gate", f"{layer.name}.at"
        graph.initializer.append(numpy_helper.from_array(np.array(index), at))
        nodes.append(helper.make_node("Gather", [GATES, at], [gate]))
        for read in layer.reads:
            places.setdefault(read.node, []).append((read.position, read.tensor, index))
        if layer.weight is not None:
            places[layer.node].append((1, layer.weight, index))
    for user in graph.node:
        if user.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue  # what they do is done in the branches
        for position, plain, index in places.get(user.name, ()):
            gate, name = f"{layers[index].name}.gate", f"{user.name}.{position}"
            last = makers[user.input[position]]
            steps = [makers[last.input[0]]] if last.input[0] in makers else []
            branches = {
                "then_branch": _branch(f"{name}.quantized", [*steps, last]),
                "else_branch": _branch(
                    f"{name}.plain", [helper.make_node("Identity", [plain], ["same"])]
                ),
            }
            nodes.append(helper.make_node("If", [gate], [name], name=name, **branches))
            user.input[position] = name
        nodes.append(user)
    present = {tensor.name for tensor in graph.initializer}
    plain_weights = {layer.weight for layer in layers if layer.weight is not None} - present
    graph.initializer.extend(weights[weight] for weight in sorted(plain_weights))
    refill(graph.node, nodes)
    graph.input.append(helper.make_tensor_value_info(GATES, TensorProto.BOOL, [len(layers)]))


def _branch(name: str, steps: Sequence[onnx.NodeProto]) -> onnx.GraphProto:
    """Copies of nodes as a branch that gives what the last one does; their own names are not taken
    again."""
    from onnx import TensorProto, helper

    inside = {output for step in steps for output in step.output}
    copies = []
    for step in steps:
        copy = type(step).FromString(step.SerializeToString())
        copy.name = f"{name}.{step.op_type}"
        for names in (copy.input, copy.output):
            for position, value in enumerate(names):
                if value in inside:
                    names[position] = f"{name}.{value}"
        copies.append(copy)
    end = helper.make_tensor_value_info(copies[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(copies, name, [], [end])
