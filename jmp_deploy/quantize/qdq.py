"""INT8 in the ONNX: QuantizeLinear and DequantizeLinear around the weighted layers.

Which tensors: the input (one scale per tensor) and the weight (one scale per output channel) of
linear and convolution layers; both symmetric, so that TensorRT fuses them. Nothing else: not the
outputs (biases, residuals and LayerNorm read them in FP16), not attention's own products (on a
DeiT-S 36.9 dB of signal-to-noise in place of 48.4), and nothing at the JMPTokenReduce nodes, whose
plugin reads and writes FP16.

Every scale is a number that FP16 holds exactly, chosen before the weights are rounded with it. So
the FP32 form of a quantized model and its FP16 form have the same scales and the same integers,
and accuracy that is measured on one is that of the other.

The rewriting itself is ONNX Runtime's static quantizer (`QDQQuantizer`); ours is the choice of
nodes and scales.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import CalibrationError, GraphError
from ..export.graph import load_model, reductions, save_model
from .layers import WEIGHTED, Layer, find_layers, select

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

QMAX = 127
FP16_LEAST, FP16_MOST = 2.0**-24, 65504.0


def activation_scale(threshold: float) -> float:
    """The scale that maps [-threshold, threshold] to [-127, 127], as FP16 holds it.

    Raises:
        CalibrationError: the threshold is not a positive finite number.
    """
    if not (threshold > 0 and np.isfinite(threshold)):
        raise CalibrationError(f"a range of {threshold} cannot be quantized")
    return float(_as_half(np.array([threshold / QMAX]))[0])


def weight_scales(weight: NDArray[Any], axis: int) -> NDArray[Any]:
    """One scale per output channel, [channels] float32, each exact in FP16.

    A channel of zeros gets the scale 1: any would do, and 0 would divide by zero.

    Raises:
        CalibrationError: a weight is not finite.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    most = np.abs(weight.astype(np.float64)).max(axis=others)
    if not np.isfinite(most).all():
        raise CalibrationError("a weight is not finite", "are the weights sound?")
    return np.where(most > 0, _as_half(most / QMAX), 1.0).astype(np.float32)


def quantize(
    source: Path,
    target: Path,
    scales: Mapping[str, float],
    *,
    keep_float: Collection[str] = (),
    half: bool = True,
    fp32: Collection[str] = (),
) -> list[Layer]:
    """Portable FP32 model -> portable INT8 model.

    Args:
        source: portable FP32 ONNX, the JMP bodies in it.
        target: file to write.
        scales: layer name -> scale of its input (`activation_scale`). Layers that are not in it
            stay in floating point.
        keep_float: layers not to quantize, as `layers.select` takes them.
        half: FP16 for all that is not INT8; False leaves that in FP32: the same integers and
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
    done = insert(proto, scales, keep_float=keep_float)
    save_model(lower(proto, "fp16", fp32) if half else proto, target)
    return done


def insert(
    proto: onnx.ModelProto, scales: Mapping[str, float], *, keep_float: Collection[str] = ()
) -> list[Layer]:
    """`quantize` on a model in memory, in place; the rest stays in FP32."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    found = find_layers(proto)
    kept = select(found, keep_float)
    chosen = [layer for layer in found if layer.name in scales and layer.name not in kept]
    if not chosen:
        return []
    chosen = _own_weights(proto, chosen)
    _run_quantizer(proto, chosen, scales)
    _undo_foreign_readers(proto, chosen)
    _refuse_quantized_reductions(proto)
    # The quantizer appends its nodes; who reads types off the operators needs them in order.
    ONNXModel(proto).topological_sort()
    return chosen


def _own_weights(proto: onnx.ModelProto, chosen: Sequence[Layer]) -> list[Layer]:
    """Copies of weights that other nodes read too: those must not get the quantized ones.

    The exporter merges equal tensors, so two layers of one model may have one weight.
    """
    nodes = {n.name: n for n in proto.graph.node}
    weights = {t.name: t for t in proto.graph.initializer}
    owned = []
    for layer in chosen:
        readers = sum(name == layer.weight for n in proto.graph.node for name in n.input)
        if readers > 1:
            copy = proto.graph.initializer.add()
            copy.CopyFrom(weights[layer.weight])
            copy.name = f"{layer.name}.weight.own"
            nodes[layer.node].input[1] = copy.name
            layer = replace(layer, weight=copy.name)
        owned.append(layer)
    return owned


def _run_quantizer(
    proto: onnx.ModelProto, chosen: Sequence[Layer], scales: Mapping[str, float]
) -> None:
    from onnx import numpy_helper
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorData  # 1.23 exports it nowhere else

    weights = {t.name: t for t in proto.graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    ranges: dict[str, Any] = {}
    for layer in chosen:
        scale = np.float32(scales[layer.name])
        limit = np.array(scale * QMAX, dtype=np.float32)
        ranges[layer.tensor] = TensorData(lowest=-limit, highest=limit)
        zero = np.array(0, dtype=np.int8)
        overrides[layer.tensor] = [{"scale": np.array(scale), "zero_point": zero}]
        values = numpy_helper.to_array(weights[layer.weight])
        overrides[layer.weight] = [
            {"scale": np.array(value), "zero_point": zero, "axis": layer.axis}
            for value in weight_scales(values, layer.axis)
        ]
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a preprocessing that was done
    try:
        quantizer = QDQQuantizer(
            proto,
            True,  # per channel
            False,  # no reduced range
            QuantType.QInt8,
            QuantType.QInt8,
            ranges,
            [layer.node for layer in chosen],
            [],
            list(WEIGHTED),
            {
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "AddQDQPairToWeight": False,
                "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
                "QDQDisableWeightAdjustForInt32Bias": True,
                "TensorQuantOverrides": overrides,
            },
        )
        quantizer.quantize_model()
    finally:
        logging.root.setLevel(level)
    made = quantizer.model.model
    producer = proto.producer_name, proto.producer_version
    proto.CopyFrom(made)
    proto.producer_name, proto.producer_version = producer
    del proto.metadata_props[:]


def _undo_foreign_readers(proto: onnx.ModelProto, chosen: Sequence[Layer]) -> None:
    """Gives every node but the chosen ones the unquantized tensor back.

    The quantizer redirects all readers of a tensor: the Shape that reads the images' batch size,
    and a layer that was to stay in FP16 beside one that was not.
    """
    nodes = {layer.node for layer in chosen}
    original = {
        n.output[0]: quantize_.input[0]
        for n in proto.graph.node
        if n.op_type == "DequantizeLinear"
        for quantize_ in proto.graph.node
        if quantize_.op_type == "QuantizeLinear" and quantize_.output[0] == n.input[0]
    }
    for graph_node in proto.graph.node:
        if graph_node.name in nodes or graph_node.op_type == "DequantizeLinear":
            continue
        for position, name in enumerate(graph_node.input):
            if name in original:
                graph_node.input[position] = original[name]


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


def _as_half(values: NDArray[Any]) -> NDArray[Any]:
    """Nearby numbers that FP16 holds exactly; upwards where the nearest would clip.

    The nearest one is within 2**-11, which clips the largest value by less than half a step.
    Below FP16's normal numbers that is no longer so, and the next one up is taken.
    """
    wide = np.asarray(values, dtype=np.float64)
    half = np.clip(wide, FP16_LEAST, FP16_MOST).astype(np.float16)
    clips = half.astype(np.float64) * (QMAX + 0.5) < wide * QMAX
    up = np.nextafter(half, np.float16(np.inf))
    return np.where(clips, up, half).astype(np.float64)
