"""ONNX models as files and as graphs: reading and writing them, finding our reductions and the
blocks in them, and making inner tensors outputs.

Light to import: onnx is needed only once a model is at hand, so a device without it imports what
imports this.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import GraphError, one_line
from ..core.files import atomic_path, size_of
from ..jmp.node import DOMAIN, TokenReduce, reduction_name
from ..jmp.trace import DECIDED, Block

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

SHOWN = (*DECIDED, "rest")
"""Tensors of the portable body (body.py) that tell what a reduction decided."""
PLUGIN_PREFIX = "plugin_"
"""Of the attributes by which a deployable model's nodes name their TensorRT plugin."""


def load_model(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file.

    Raises:
        GraphError: missing, truncated or not ONNX.
        ModuleNotFoundError: onnx is not installed.
    """
    import onnx

    try:
        size_of(path)
        proto = onnx.load_model(path)
        if not proto.graph.node or not proto.graph.output:
            raise ValueError("it holds no graph")
    except FileNotFoundError as error:
        raise GraphError(f"no such file: {path}") from error
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, OSError, ...
        raise GraphError(
            f"{path} is truncated or not an ONNX model: {one_line(error)}",
            "build it again",
        ) from error
    return proto


def save_model(proto: onnx.ModelProto, path: Path) -> None:
    """Writes a model, whole or not at all.

    Raises:
        GraphError: it is above 2 GB.
        ArtifactError: the file cannot be written.
    """
    import onnx

    with atomic_path(path) as temporary:
        try:
            onnx.save_model(proto, str(temporary))
        except ValueError as error:  # protobuf's limit of 2 GB
            raise GraphError(
                f"the model is too large for one ONNX file ({error})",
                "models above 2 GB in FP32 (ViT-g and larger) are not supported yet",
            ) from error


@contextmanager
def temporary_file(proto: onnx.ModelProto) -> Iterator[Path]:
    """A model in a file for as long as it takes to open it.

    Serialized in memory, ViT-B would be there three times over: whoever asks lets go of `proto`.
    """
    with tempfile.TemporaryDirectory(prefix="jmp-model-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(proto, path)
        del proto
        yield path


def refill(field: Any, values: Iterable[Any]) -> None:
    """Replaces what a repeated field of a model holds, by copies: values may be from it."""
    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(kept)


def is_reduction(graph_node: onnx.NodeProto) -> bool:
    """Whether a node (of onnx, or of onnx_graphsurgeon) is one of ours."""
    return graph_node.domain == DOMAIN


def reductions(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The JMPTokenReduce nodes of a model, portable or deployable, in graph order."""
    return [n for n in proto.graph.node if is_reduction(n)]


def read_node(graph_node: onnx.NodeProto) -> TokenReduce:
    """Attributes of a JMPTokenReduce node, of a portable or a deployable model.

    Raises:
        GraphError: they are not as expected.
    """
    from onnx.helper import get_attribute_value

    return TokenReduce.from_onnx(
        {
            a.name: get_attribute_value(a)
            for a in graph_node.attribute
            if not a.name.startswith(PLUGIN_PREFIX)
        },
        outputs=len(graph_node.output),
    )


def weight_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of weights per data type, e.g. {"FLOAT16": 44000000, "INT64": 120}."""
    import onnx

    sizes: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        sizes[name] = sizes.get(name, 0) + int(np.prod(tensor.dims, dtype=np.int64)) * width
    return sizes


# --- Inner tensors ---


def mark(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model with these tensors, and no others, as outputs."""
    from polygraphy.backend.onnx import modify_outputs

    return modify_outputs(proto, outputs=list(names))


def show_choices(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Gives every reduction of a portable model further outputs NODE.kept, .rating, .importance.

    The body is a local function, so its inner tensors become outputs of the function; the
    alternative, the inliner of onnx, would rename them all.

    Returns:
        The reductions' nodes, in graph order; the model is changed in place.
    """
    nodes = reductions(proto)
    if nodes and len(proto.functions) != 1:
        raise GraphError("the model's reductions have no body: is it the deployable one?")
    for function in proto.functions:
        function.output.extend(SHOWN)
    for graph_node in nodes:
        graph_node.output.extend(f"{graph_node.name}.{what}" for what in SHOWN)
    return nodes


def prefix_tokens(proto: onnx.ModelProto) -> int:
    """P of a model: tokens that its class, distillation and register parameters stand for."""
    if nodes := reductions(proto):
        return read_node(nodes[0]).num_prefix
    names = ("cls_token", "dist_token", "reg_token")
    return sum(int(w.dims[1]) for w in proto.graph.initializer if w.name in names)


def block_tensors(proto: onnx.ModelProto) -> list[Block]:
    """Names of every block's tensors, portable or deployable.

    They are found by the blocks' two LayerNorms: the ones whose input something else reads too,
    the residual sum. (Not by their weights' names: the exporter gives equal weights one name, and
    in an untrained model all are equal.)

    Raises:
        GraphError: the blocks are not to be found.
    """
    uncast = {n.output[0]: n.input[0] for n in proto.graph.node if n.op_type == "Cast"}

    def stream(name: str) -> str:
        """The tensor itself, where what is read is a cast of it."""
        return uncast.get(name, name)

    readers = Counter(
        name for n in proto.graph.node if n.op_type != "Cast" for name in {*map(stream, n.input)}
    )
    inputs = [stream(n.input[0]) for n in proto.graph.node if n.op_type == "LayerNormalization"]
    # Each once: features of a block may be an output, by the last norm.
    norms = list(dict.fromkeys(name for name in inputs if readers[name] > 1))
    # Pooling by attention has one more, behind the blocks.
    norms = norms[: len(norms) // 2 * 2]
    entries, reduced = norms[0::2], norms[1::2]
    # The last block's output is the residual sum over what its MLP reads.
    sums = [
        n.output[0]
        for n in proto.graph.node
        if n.op_type == "Add" and norms[-1:] == [*map(stream, n.input)][:1]
    ]
    left = {n.name: n for n in reductions(proto)}
    places = []
    for index, (entry, after) in enumerate(zip(entries, reduced, strict=False)):
        node = left.pop(reduction_name(index), None)
        if node is not None and node.output[0] != after:
            break
        attended = stream(node.input[0]) if node is not None else after
        out = [*entries, *sums][index + 1 :][:1]
        places += [Block(entry, attended, after, *out)] if out else []
    if not places or len(entries) != len(reduced) or len(places) != len(entries) or left:
        raise GraphError(
            "the model's blocks cannot be told apart: each needs two LayerNormalization nodes on "
            "the residual stream",
            "build it again with this version of jmp_deploy",
        )
    return places


def as_planned(
    name: str, prefix: int, values: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The body's tensors in the form of `reduction.Plan`.

    In the body a token is [B, L, 1] and counted with the prefix, and those that leave come in the
    order of their rating.
    """
    flat = {what: values[f"{name}.{what}"][..., 0] for what in SHOWN}
    order = np.argsort(flat["rest"], axis=1)
    planned = {
        "kept": flat["kept"] - prefix,
        "rating": flat["rating"][:, prefix:],
        "importance": flat["importance"][:, prefix:],
        "target": np.take_along_axis(flat["target"] - prefix, order, axis=1),
        "merged": np.take_along_axis(flat["merged"], order, axis=1),
    }
    return {f"{name}.{what}": value for what, value in planned.items()}


def block_of(name: str) -> int:
    """The block whose reduction has this name; raises GraphError if it does not say one."""
    try:
        return int(name.split(".")[1])
    except (IndexError, ValueError) as error:
        raise GraphError(f"the reduction {name!r} does not say its block", "build again") from error
