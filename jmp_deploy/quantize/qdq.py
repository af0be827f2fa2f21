"""QuantizeLinear and DequantizeLinear in the ONNX, for INT8 and FP8.

Which tensors: the input (one scale per tensor) and the weight of linear and convolution layers, all
symmetric, so that TensorRT fuses them; in FP8, and in INT8 where it is asked for, what attention's
two products read too: queries (scaled already), keys (transposed already), values, and softmax.
That is how NVIDIA quantizes ViTs (Model Optimizer's FP8 recipe; for INT8 NVIDIA/TensorRT #3243),
and TensorRT makes one kernel of such an attention, whose output is rounded as the projection's
input. Nothing else: not the outputs (biases, residuals and LayerNorm read them in FP16), and
nothing at the JMPTokenReduce nodes, whose plugin reads and writes FP16. #3243 has Q/DQ before the
residual sums too: TensorRT-RTX 1.7.1 fuses attention without, and they cost accuracy
(calibration/README.md).

The rewriting is our own since it serves two formats: ONNX Runtime's static quantizer redirects all
readers of a tensor, which had to be undone, and knows no gates (gated.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import GraphError
from ..export.graph import load_model, reductions, refill, save_model
from .formats import INT8, Format
from .layers import Layer, find_layers, select

if TYPE_CHECKING:
    import onnx


def quantize(
    source: Path,
    target: Path,
    scales: Mapping[str, float],
    form: Format = INT8,
    *,
    keep_float: Collection[str] = (),
    half: bool = True,
    fp32: Collection[str] = (),
) -> list[Layer]:
    """Portable FP32 model -> portable quantized model.

    Args:
        source: portable FP32 ONNX, the JMP bodies in it.
        target: file to write.
        scales: name of what is read (`layers.Read`) -> its scale (`Format.scale`). Layers of which
            one is missing stay in floating point.
        form: the number format.
        keep_float: layers not to quantize, as `layers.select` takes them.
        half: FP16 for all that is not quantized; False leaves that in FP32: the same numbers and
            scales, four times as fast on a CPU, and right on ONNX Runtime before 1.30, whose FP16
            QuantizeLinear truncates.
        fp32: names of nodes that `half` leaves in FP32.

    Returns:
        The layers that were quantized.

    Raises:
        GraphError: not a portable FP32 ViT.
        CalibrationError: a word of keep_float that means nothing, or a weight that is not finite.
    """
    from ..export.precision import lower

    proto = load_model(source)
    done = insert(proto, scales, form, keep_float=keep_float)
    save_model(lower(proto, "fp16", fp32) if half else proto, target)
    return done


def insert(
    proto: onnx.ModelProto,
    scales: Mapping[str, float],
    form: Format = INT8,
    *,
    keep_float: Collection[str] = (),
) -> list[Layer]:
    """`quantize` on a model in memory, in place; the rest stays in FP32."""
    from onnx import numpy_helper

    found = find_layers(proto, form)
    kept = select(found, keep_float)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    made: dict[str, str] = {}  # what was quantized, once for all of its readers
    new: list[onnx.NodeProto] = []
    moved: dict[str, dict[int, str]] = {}  # node -> position -> what it reads from now on
    done = []
    for layer in found:
        if layer.name in kept or layer.lacks(scales):
            continue
        done.append(layer)
        for read in layer.reads:
            if read.tensor not in made:
                made[read.tensor] = f"{read.tensor}.dequantized"
                scale = scales[read.name] if read.most is None else form.scale(read.most)
                new += _pair(proto, read.tensor, np.float32(scale), form)
            moved.setdefault(read.node, {})[read.position] = made[read.tensor]
        if layer.weight is not None:
            if layer.weight not in made:
                made[layer.weight] = f"{layer.weight}.dequantized"
                values = numpy_helper.to_array(weights[layer.weight])
                new.append(_constant(proto, layer, values, form))
            moved[layer.node][1] = made[layer.weight]
    _rewire(proto, new, moved)
    _refuse_quantized_reductions(proto)
    return done


def _pair(
    proto: onnx.ModelProto, tensor: str, scale: Any, form: Format
) -> Iterator[onnx.NodeProto]:
    """Nodes that round a tensor to the format."""
    from onnx import helper, numpy_helper

    one, zero, narrow = (f"{tensor}.{what}" for what in ("scale", "zero", "quantized"))
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), one))
    proto.graph.initializer.append(form.tensor(zero, np.zeros((), np.float32)))
    for kind, source, target in (
        ("QuantizeLinear", tensor, narrow),
        ("DequantizeLinear", narrow, f"{tensor}.dequantized"),
    ):
        yield helper.make_node(kind, [source, one, zero], [target], f"{tensor}.{kind}")


def _constant(proto: onnx.ModelProto, layer: Layer, values: Any, form: Format) -> onnx.NodeProto:
    """Stores a layer's weight in the format; the node that gives it back."""
    from onnx import helper, numpy_helper

    name = layer.weight
    one, zero, narrow = (f"{name}.{what}" for what in ("scale", "zero", "quantized"))
    scales = form.weight_scales(values, layer.axis)
    shape = [-1 if axis == layer.axis else 1 for axis in range(values.ndim)]
    divided = values / (scales.reshape(shape) if scales.ndim else scales)
    proto.graph.initializer.extend(
        [
            form.tensor(narrow, divided),
            numpy_helper.from_array(scales, one),
            form.tensor(zero, np.zeros_like(scales)),
        ]
    )
    axis: dict[str, Any] = {"axis": layer.axis} if scales.ndim else {}
    inputs, outputs = [narrow, one, zero], [f"{name}.dequantized"]
    return helper.make_node("DequantizeLinear", inputs, outputs, f"{name}.DequantizeLinear", **axis)


def _rewire(
    proto: onnx.ModelProto,
    new: list[onnx.NodeProto],
    moved: Mapping[str, Mapping[int, str]],
) -> None:
    """Puts new nodes before the first of their readers, and lets those that were moved read them;
    weights that nobody reads any more go."""
    waiting = {output: node for node in new for output in node.output}
    nodes: list[onnx.NodeProto] = []

    def place(name: str) -> None:
        if (node := waiting.pop(name, None)) is not None:
            place(node.input[0])
            nodes.append(node)

    for node in proto.graph.node:
        for position, name in moved.get(node.name, {}).items():
            node.input[position] = name
        for name in node.input:
            place(name)
        nodes.append(node)
    refill(proto.graph.node, nodes)
    read = {name for node in proto.graph.node for name in node.input}
    weights = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    refill(proto.graph.initializer, weights)


def _refuse_quantized_reductions(proto: onnx.ModelProto) -> None:
    """The plugin reads and writes FP16: a Q/DQ beside it would cost copies and accuracy."""
    edges = {
        name
        for n in proto.graph.node
        if n.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in (n.input[0], n.output[0])
    }
    for graph_node in reductions(proto):
        beside = edges & {*graph_node.input, *graph_node.output}
        if beside:
            raise GraphError(f"{graph_node.name} has quantized tensors: {sorted(beside)}")
