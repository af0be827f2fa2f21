"""Portable ONNX <-> deployable ONNX, and portable ONNX -> inlined ONNX.

The first two hold the same JMPTokenReduce nodes. The portable model defines them as an ONNX local
function; the deployable one drops the definition and names our TensorRT plugin instead, because
TensorRT 10.0 to 10.6 expands a local function rather than ask for a plugin of the same name, and no
parser before or after takes the body as it is meant.

The plugin's name, version and namespace stand in the node's attributes (all that importers before
10.10 read) and its domain is the namespace too (what later ones read).

The inlined model has the body's operators in the node's place, for engines and tools that know no
local functions (OpenVINO).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx.inliner import inline_local_functions

from ..core.errors import GraphError
from ..jmp.node import DOMAIN, OP_TYPE, OUTPUTS, TokenReduce
from .body import QKV_PARTS, add_bodies, body
from .graph import is_reduction, load_model, reductions, save_model


def to_deployable(
    source: Path, target: Path, *, expected: list[TokenReduce] | None = None
) -> list[TokenReduce]:
    """Portable model -> deployable model for TensorRT with our plugin.

    A dense model has no reductions and passes through unchanged.

    Args:
        source, target: ONNX files.
        expected: attributes of the reductions that must be there, in order; None takes any.

    Returns:
        The attributes found, in graph order.

    Raises:
        GraphError: the model holds anything other than expected; nothing is written.
    """
    proto = load_model(source)
    _refuse_foreign_functions(proto)
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR  # it warns of FP8, and keeps it
    graph = gs.import_onnx(proto)
    found = _check_reductions(graph)
    if found:
        if len(proto.functions) != 1:
            raise GraphError(f"{source} has {OP_TYPE} nodes without their body: is it deployable?")
        if proto.functions[0] not in [body(found[0], parts) for parts in QKV_PARTS]:
            raise GraphError(
                f"the body of {OP_TYPE} in {source} is not the one of this version of jmp_deploy",
                "build the model again; a changed body would not match the plugin",
            )
    if expected is not None and found != expected:
        raise GraphError(
            f"{source} has {len(found)} reductions {_keeps(found)}, "
            f"expected {len(expected)} {_keeps(expected)}"
        )
    for reduction in _reductions(graph):
        reduction.attrs.update(_plugin_attributes(reduction))
    graph.functions.clear()
    save_model(_to_proto(graph, proto), target)
    return found


def to_portable(source: Path, target: Path) -> list[TokenReduce]:
    """Deployable model -> portable model: the way back, so that the two can be proven equal.

    Raises:
        GraphError: the model holds anything other than `to_deployable` writes.
    """
    proto = load_model(source)
    if proto.functions:
        raise GraphError(f"{source} has local functions: it is portable already")
    graph = gs.import_onnx(proto)
    for reduction in _reductions(graph):
        for name, value in _plugin_attributes(reduction).items():
            if reduction.attrs.pop(name, None) != value:
                raise GraphError(f"{reduction.name} in {source} does not say {name}={value!r}")
    found = _check_reductions(graph)
    portable = _to_proto(graph, proto)
    add_bodies(portable)
    save_model(portable, target)
    return found


def to_inlined(source: Path, target: Path) -> None:
    """Portable model -> the same model of standard operators alone: no local functions.

    Its constants are whole tensors (`value`): folding by onnx-graphsurgeon, and by what is built on
    it, makes float64 of a `value_float`, which no operator beside it takes.

    Raises:
        GraphError: the model is not portable; nothing is written.
    """
    proto = load_model(source)
    _refuse_foreign_functions(proto)
    if reductions(proto) and not proto.functions:
        raise GraphError(f"{source} has {OP_TYPE} nodes without their body: is it deployable?")
    proto = inline_local_functions(proto)
    for graph_node in proto.graph.node:
        if graph_node.op_type == "Constant":
            _write_as_tensor(graph_node)
    standard = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(standard)
    save_model(proto, target)


def _write_as_tensor(constant: onnx.NodeProto) -> None:
    """A number or a list of numbers of a Constant as the tensor that it stands for."""
    (attribute,) = constant.attribute
    if attribute.name in ("value_float", "value_floats", "value_int", "value_ints"):
        number = onnx.helper.get_attribute_value(attribute)
        kind = np.dtype("int64" if attribute.name.startswith("value_int") else "float32")
        tensor = numpy_helper.from_array(np.array(number, kind))
        attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _plugin_attributes(reduction: gs.Node) -> dict[str, str]:
    """What names the plugin; its version says how many outputs it has."""
    return {
        "plugin_version": "2" if len(reduction.outputs) == len(OUTPUTS) else "1",
        "plugin_namespace": DOMAIN,
    }


def _reductions(graph: gs.Graph) -> list[gs.Node]:
    return [n for n in graph.nodes if is_reduction(n)]


def _refuse_foreign_functions(proto: onnx.ModelProto) -> None:
    foreign = [f"{f.domain}::{f.name}" for f in proto.functions if f.domain != DOMAIN]
    if foreign or len(proto.functions) > 1:
        names = foreign or [f.name for f in proto.functions]
        raise GraphError(f"unexpected local functions in the model: {', '.join(names)}")


def _check_reductions(graph: gs.Graph) -> list[TokenReduce]:
    """Attributes of all reductions, after a check that each stands where we would put it."""
    found: list[TokenReduce] = []
    for graph_node in graph.nodes:
        if graph_node.domain in (None, "", "ai.onnx"):
            continue
        label = f"{graph_node.domain}::{graph_node.op} ({graph_node.name})"
        if not is_reduction(graph_node) or graph_node.op != OP_TYPE:
            raise GraphError(f"unexpected operator in the model: {label}")
        attributes = TokenReduce.from_onnx(dict(graph_node.attrs), outputs=len(graph_node.outputs))
        _check_wiring(graph_node, attributes, found[-1] if found else None, label)
        found.append(attributes)
    return found


def _check_wiring(
    graph_node: gs.Node, attributes: TokenReduce, before: TokenReduce | None, label: str
) -> None:
    if len(graph_node.inputs) != 3 or len(graph_node.outputs) not in (3, len(OUTPUTS)):
        raise GraphError(
            f"{label} has {len(graph_node.inputs)} inputs and {len(graph_node.outputs)} outputs, "
            f"expected 3 and 3 or {len(OUTPUTS)}"
        )
    for position, tensor in enumerate(graph_node.inputs):
        if not isinstance(tensor, gs.Constant) and not tensor.inputs:
            raise GraphError(f"{label}: nothing computes its input {position} ({tensor.name!r})")
    size = graph_node.inputs[2]
    if before is None:
        if not isinstance(size, gs.Constant) or len(size.shape) != 2 or size.shape[0] != 1:
            raise GraphError(f"{label}: the first reduction needs constant sizes of shape [1, N]")
        patches = size.shape[1] - attributes.num_prefix
    else:
        maker = size.inputs[0] if size.inputs else None
        if maker is not None and maker.op == "Cast":  # where one of the two computes in FP32
            maker = maker.i()
        if maker is None or not is_reduction(maker):
            raise GraphError(f"{label}: its sizes do not come from the reduction before it")
        patches = before.num_keep
    if attributes.num_keep >= patches:
        raise GraphError(f"{label} keeps {attributes.num_keep} of {patches} patch tokens")


def _to_proto(graph: gs.Graph, source: onnx.ModelProto) -> onnx.ModelProto:
    proto = gs.export_onnx(graph, do_type_check=False)
    proto.ir_version = source.ir_version
    proto.producer_name, proto.producer_version = source.producer_name, source.producer_version
    # graphsurgeon writes only the domains that it knows; the node's own has to be imported.
    del proto.opset_import[:]
    proto.opset_import.extend(source.opset_import)
    return proto


def _keeps(attributes: list[TokenReduce]) -> str:
    return f"(keep {', '.join(str(a.num_keep) for a in attributes) or 'all'})"
