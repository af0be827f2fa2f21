"""Precision written into the ONNX: FP16 or BF16, with FP32 where that is needed (the Q/DQ of INT8
and FP8 are qdq.py's).

TensorRT builds strongly typed networks from what the model says, so one model serves TensorRT 10,
11 and TensorRT-RTX: `lower` decides what an engine computes with. LayerNormalization stands in
FP32 between casts, because nothing promises what a kernel squares an FP16 deviation in: above 256
that overflows. Engines fuse the casts away (tests/engine/test_numerics.py looks).

No CPU runs such a model as an engine does: ONNX Runtime removes the FP16 casts between its
operators, so that a value of 128000 passes where a GPU has infinity. `emulate` is the same model in
FP32 that rounds every tensor as the engine stores it, and what is checked on a CPU is that.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .graph import is_reduction, load_model, refill, save_model

FP16_MAX = float(np.finfo(np.float16).max)
LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
"""Precisions of 16 bits, as ONNX calls them."""
FLOATS = (TensorProto.FLOAT, *LOW.values())

VIEWS = frozenset(
    [
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    ]
)
"""Operators that move numbers and change none: they take the type of what they are given."""
NO_FLOAT = frozenset(
    ["Shape", "Size", "ArgMax", "ArgMin", "IsNaN", "IsInf", "NonZero", "QuantizeLinear"]
)
"""Operators whose outputs are no floating-point numbers."""
ALWAYS_FP32 = frozenset({"LayerNormalization"})


def to_low(source: Path, target: Path, precision: str, fp32: Collection[str] = ()) -> Path:
    """Portable FP32 model -> portable FP16 or BF16 model with FP32 inputs and outputs: see `lower`.

    Raises:
        GraphError: not a readable model.
    """
    save_model(lower(load_model(source), precision, fp32), target)
    return target


def lower(
    proto: onnx.ModelProto, precision: str = "fp16", fp32: Collection[str] = ()
) -> onnx.ModelProto:
    """An FP32 model with everything in 16 bits but its inputs, its outputs, LayerNormalization and
    what is to stay in FP32. In place.

    JMPTokenReduce takes and gives one type; its body works in FP32. Q/DQ pairs (qdq.py) take the
    type of what reads them: their scales are numbers that FP16 holds exactly. A weight that FP16
    cannot hold stays in FP32 with the nodes that read it: it is not clamped.

    Args:
        precision: of `LOW`.
        fp32: names of nodes that compute in FP32.

    Returns:
        The model.
    """
    low = LOW[precision]
    if low == TensorProto.FLOAT16:
        fp32 = {*fp32, *readers_of(proto, large_weights(proto))}
    _constants_as_initializers(proto)
    types = float_types(proto)
    kept = _in_fp32(proto, fp32)
    weights = {w.name: w for w in proto.graph.initializer}
    infos = {v.name: v for v in proto.graph.value_info}
    outputs = {v.name for v in proto.graph.output}
    made: dict[tuple[str, int], str] = {}
    stored: dict[tuple[str, int], TensorProto] = {}
    nodes: list[onnx.NodeProto] = []

    def as_type(name: str, kind: int) -> str:
        """The name under which a floating-point tensor can be read as a type."""
        if name in weights:
            return constant(name, kind)
        if types[name] == kind:
            return name
        if (name, kind) not in made:
            made[name, kind] = f"{name}.{'fp32' if kind == TensorProto.FLOAT else precision}"
            nodes.append(_cast(name, made[name, kind], kind))
            if name in infos:
                info = proto.graph.value_info.add()
                info.CopyFrom(infos[name])
                info.name, info.type.tensor_type.elem_type = made[name, kind], kind
        return made[name, kind]

    def constant(name: str, kind: int) -> str:
        other = {k for n, k in stored if n == name} - {kind}
        alias = f"{name}.{kind}" if other else name
        if (name, kind) not in stored:
            stored[name, kind] = _converted(weights[name], kind, alias)
        return stored[name, kind].name

    for node in list(proto.graph.node):
        if node.op_type == "Cast" or not any(name in types for name in node.input):
            nodes.append(node)
            continue
        if node.op_type in VIEWS or node.op_type == "QuantizeLinear":
            # Numbers of a constant have no type of their own: they take the others'.
            given = [n for n in node.input if n in types and n not in weights]
            wide = node.name in kept or any(types[n] == TensorProto.FLOAT for n in given)
        else:
            wide = node.name in kept or node.op_type in NO_FLOAT
        kind: int = TensorProto.FLOAT if wide else low
        if node.op_type == "Shape":
            kind = types[node.input[0]]
        for position, name in enumerate(node.input):
            if name in types:
                node.input[position] = as_type(name, kind)
        nodes.append(node)
        for name in node.output:
            if name not in types:
                continue
            types[name] = kind
            if name in infos:
                infos[name].type.tensor_type.elem_type = kind
            if name in outputs and kind != TensorProto.FLOAT:
                _rename(nodes, name, f"{name}.{precision}")
                types[f"{name}.{precision}"] = kind
                made[name, kind] = f"{name}.{precision}"  # for those that read it too
                nodes.append(_cast(f"{name}.{precision}", name, TensorProto.FLOAT))
                types[name] = TensorProto.FLOAT
    others = [w for w in proto.graph.initializer if w.name not in types]
    refill(proto.graph.initializer, [*others, *stored.values()])
    refill(proto.graph.node, nodes)
    return proto


def emulate(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model in FP32 that rounds every tensor to the 16 bits in which the given one stores it.

    Products are summed in FP32, as engines do, and what exceeds the type becomes infinite. Of
    INT8 and FP8, the numbers and scales are the model's; what a DequantizeLinear gives is not
    rounded, as engines multiply what it was given. A model without 16 bits anywhere comes out as it
    was.

    Args:
        proto: portable; used up.
    """
    _constants_as_initializers(proto)
    types = float_types(proto)
    narrow = {name: kind for name, kind in types.items() if kind != TensorProto.FLOAT}
    if not narrow:
        return proto
    for position, weight in enumerate(proto.graph.initializer):
        if weight.name in narrow:
            wide = _converted(weight, TensorProto.FLOAT, weight.name)
            proto.graph.initializer[position].CopyFrom(wide)
    nodes: list[onnx.NodeProto] = []

    def rounded(exact: str, name: str, kind: int) -> None:
        nodes.append(_cast(exact, f"{name}.rounded", kind, "round"))
        nodes.append(_cast(f"{name}.rounded", name, TensorProto.FLOAT, "round"))

    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        if value.type.tensor_type.elem_type in LOW.values():
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    given = {v.name: f"{v.name}.as_given" for v in proto.graph.input if v.name in narrow}
    for name, as_given in given.items():
        rounded(name, as_given, narrow[name])
    for node in proto.graph.node:
        nodes.append(node)
        for position, name in enumerate(node.input):
            node.input[position] = given.get(name, name)
        if node.op_type == "Cast" and node.output[0] in types:
            # What comes in has the other type's numbers, in FP32: a cast up changes nothing.
            node.op_type = "Identity"
            del node.attribute[:]
        if node.op_type in VIEWS - {"Identity"} or node.op_type == "DequantizeLinear":
            continue
        for position, name in enumerate(node.output):
            if name in narrow:
                node.output[position] = f"{name}.exact"
                rounded(node.output[position], name, narrow[name])
    refill(proto.graph.node, nodes)
    return proto


def emulated(path: Path) -> onnx.ModelProto:
    """The `emulate`d form of a portable model in a file."""
    return emulate(load_model(path))


def float_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Type of every floating-point tensor of a portable or deployable model, by name.

    Read off the operators, as a quantizer leaves tensors without a stated type.
    """
    types = {w.name: w.data_type for w in proto.graph.initializer if w.data_type in FLOATS}
    for value in proto.graph.input:
        if value.type.tensor_type.elem_type in FLOATS:
            types[value.name] = value.type.tensor_type.elem_type
    for node in proto.graph.node:
        kind = next((types[name] for name in node.input if name in types), None)
        names = list(node.output)
        if node.op_type == "Cast":
            to = helper.get_attribute_value(node.attribute[0])
            kind = to if to in FLOATS else None
        elif node.op_type == "Constant":
            kind = next((a.t.data_type for a in node.attribute if a.t.data_type in FLOATS), None)
        elif node.op_type == "DequantizeLinear":
            kind = types.get(node.input[1])
        elif node.op_type in NO_FLOAT:
            kind = None
        elif is_reduction(node):
            names = names[:3]  # what `show_choices` adds has types of its own
        if kind is not None:
            types |= dict.fromkeys((name for name in names if name), kind)
    return types


def widen(proto: onnx.ModelProto, names: Collection[str]) -> None:
    """Gives those of some tensors that are in BF16, which numpy lacks, their names in FP32; who
    read them reads the original. In place, so that they can be outputs."""
    types = float_types(proto)
    for name in names:
        if types.get(name) != TensorProto.BFLOAT16:
            continue
        _rename(proto.graph.node, name, f"{name}.narrow")
        proto.graph.node.append(_cast(f"{name}.narrow", name, TensorProto.FLOAT, "widen"))
        for value in proto.graph.value_info:
            if value.name == name:
                value.type.tensor_type.elem_type = TensorProto.FLOAT


def large_weights(proto: onnx.ModelProto) -> list[str]:
    """Names of the weights that FP16 cannot hold."""
    return [
        w.name
        for w in proto.graph.initializer
        if w.data_type == TensorProto.FLOAT
        and (values := np.abs(numpy_helper.to_array(w))).size
        and FP16_MAX < values.max() < np.inf
    ]


def readers_of(proto: onnx.ModelProto, tensors: Collection[str]) -> set[str]:
    """Names of the nodes that make or read some tensors, or views of them."""
    reached = set(tensors)
    names = set()
    for node in proto.graph.node:
        if not reached.isdisjoint([*node.input, *node.output]):
            names.add(node.name)
            if node.op_type in VIEWS and not reached.isdisjoint(node.input):
                reached.update(node.output)
    return names


def _in_fp32(proto: onnx.ModelProto, names: Collection[str]) -> set[str]:
    """Names of the nodes that compute in FP32, with the DequantizeLinear nodes that they read."""
    kept = {n.name for n in proto.graph.node if n.name in names or n.op_type in ALWAYS_FP32}
    read = {name for n in proto.graph.node if n.name in kept for name in n.input}
    return kept | {
        n.name for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.output[0] in read
    }


def _constants_as_initializers(proto: onnx.ModelProto) -> None:
    """Constant nodes of tensors as weights, which have one way to be converted."""
    rest = []
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            weight = proto.graph.initializer.add()
            weight.CopyFrom(node.attribute[0].t)
            weight.name = node.output[0]
        else:
            rest.append(node)
    refill(proto.graph.node, rest)


def _converted(weight: TensorProto, kind: int, name: str) -> TensorProto:
    """A weight as another type, to the nearest."""
    if weight.data_type == kind:
        same = TensorProto()
        same.CopyFrom(weight)
        same.name = name
        return same
    if kind == TensorProto.BFLOAT16:
        wide = numpy_helper.to_array(weight).astype(np.float32).view(np.uint32)
        # the upper half of the bits, rounded to even
        half = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")
        return helper.make_tensor(name, kind, weight.dims, half.tobytes(), raw=True)
    values = numpy_helper.to_array(weight).astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(values, name)


def _cast(source: str, target: str, kind: int, why: str = "cast") -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{why}.{target}", to=kind)


def _rename(nodes: Collection[onnx.NodeProto], before: str, after: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == before:
                    names[position] = after
