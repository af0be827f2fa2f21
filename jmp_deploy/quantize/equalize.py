"""Outlier channels, moved from activations into weights before both are quantized.

A layer after a LayerNormalization computes the same if the normalisation's output channel j is
divided by s_j and the layer's weights for it are multiplied by s_j; the division goes into the
normalisation's own weight and bias, so the model gets no new operation. With

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

(G. Xiao et al., "SmoothQuant", ICML 2023, eq. 4) channels become more alike, and one scale for all
of them wastes less. It applies where the layer is the only reader of its LayerNormalization: QKV
projection and fc1 of a pre-norm ViT.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import GraphError
from .layers import Layer
from .ranges import Observed

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

LEAST = 1e-5


def factors(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    observed: Mapping[str, Observed],
    alpha: float,
    *,
    keep_float: Collection[str] = (),
) -> dict[str, list[float]]:
    """s per layer, for the layers that can be equalised.

    Args:
        proto: portable FP32 model.
        layers: of it.
        observed: of `ranges.observe`; a few dozen images are enough.
        alpha: 0 would put all of the trouble into the activations, 1 into the weights.
        keep_float: names of layers that are not quantized, so need none of this.

    Returns:
        Layer name -> [C] factors, powers of two. (So a scaled weight has the bits of the old one,
        and the FP32 model computes the same but for underflow.)
    """
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = {}
    for layer in layers:
        if not _foldable(proto, layer) or layer.name in keep_float:
            continue
        weight = numpy_helper.to_array(initializers[layer.weight]).astype(np.float64)
        most_x = np.maximum(observed[layer.name].channel_amax, LEAST)
        most_w = np.maximum(np.abs(weight).max(axis=layer.axis), LEAST)
        raw = most_x**alpha / most_w ** (1 - alpha)
        raw /= np.exp(np.log(raw).mean())
        found[layer.name] = [float(value) for value in 2.0 ** np.round(np.log2(raw))]
    return found


def apply(
    proto: onnx.ModelProto, layers: Sequence[Layer], wanted: Mapping[str, Sequence[float]]
) -> None:
    """Rewrites normalisations and weights, in place.

    Raises:
        GraphError: factors for a layer that the model does not have or that cannot be equalised.
    """
    by_name = {layer.name: layer for layer in layers}
    producers = {name: n for n in proto.graph.node for name in n.output}
    for name, values in wanted.items():
        layer = by_name.get(name)
        if layer is None or not _foldable(proto, layer):
            raise GraphError(f"{name} cannot be equalised in this model")
        scale = np.asarray(values, dtype=np.float32)
        norm = producers[layer.tensor]
        _replace(proto, norm, 1, lambda array, s=scale: array / s)
        if len(norm.input) > 2 and norm.input[2]:
            _replace(proto, norm, 2, lambda array, s=scale: array / s)
        user = next(n for n in proto.graph.node if n.name == layer.node)
        column = scale[:, None] if layer.axis == 1 else scale[None, :]
        _replace(proto, user, 1, lambda array, s=column: array * s)


def _foldable(proto: onnx.ModelProto, layer: Layer) -> bool:
    """Whether the layer alone reads its LayerNormalization."""
    if not layer.after_norm or layer.kind not in ("qkv", "fc1"):
        return False
    readers = sum(name == layer.tensor for n in proto.graph.node for name in n.input)
    return readers == 1


def _replace(proto: onnx.ModelProto, node: onnx.NodeProto, position: int, change: Any) -> None:
    """A changed copy of one of a node's weights; others may share the old one."""
    from onnx import numpy_helper

    name = node.input[position]
    old = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    values: NDArray[Any] = change(numpy_helper.to_array(old)).astype(np.float32)
    shared = sum(name == other for n in proto.graph.node for other in n.input) > 1
    if not shared:
        old.CopyFrom(numpy_helper.from_array(values, name))
        return
    node.input[position] = f"{name}.{node.name}"
    proto.graph.initializer.append(numpy_helper.from_array(values, node.input[position]))
