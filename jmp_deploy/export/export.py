"""PyTorch -> portable ONNX: standard operators, and one JMPTokenReduce node per reduction.

The portable model carries the node's body as an ONNX local function, so ONNX Runtime and other
engines run it as it is; `fuse.py` makes the form that TensorRT takes with our plugin.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from .. import __version__
from ..core.errors import GraphError
from ..core.files import atomic_path
from ..core.outputs import output_of
from ..jmp import node
from ..jmp.families import written_out_attention
from ..jmp.node import DOMAIN, OPSET, TokenReduce
from ..jmp.patch import JMPBlocks

INPUT = "images"


def export_onnx(model: nn.Module, path: Path, *, image_size: tuple[int, int]) -> Path:
    """Exports a timm ViT, patched or dense, to portable FP32 ONNX with a dynamic batch.

    Args:
        model: in eval mode, float32, on the CPU. Input `images` [B, 3, H, W]; output `logits`
            [B, classes], or `features` [B, C] where the model has no classifier.
        path: file to write.
        image_size: (H, W) in pixels.

    Returns:
        `path`.

    Raises:
        GraphError: the exporter failed, or what it made is not a valid model.
        ArtifactError: the file cannot be written.
    """
    # A batch of 2: torch.export takes sizes 0 and 1 for constants.
    example = torch.zeros(2, 3, *image_size)
    try:
        with _export_form(model), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[output_of(model).name],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise GraphError(f"PyTorch could not export the model: {str(error).strip()}") from error
    proto = program.model_proto
    add_bodies(proto)
    _name_reductions(proto, model.blocks)
    _strip_debug_info(proto)
    proto.producer_name, proto.producer_version = "jmp_deploy", __version__
    save_model(proto, path)
    return path


def add_bodies(proto: onnx.ModelProto) -> None:
    """Gives a model's JMPTokenReduce nodes their portable body, in place.

    Raises:
        GraphError: its nodes disagree in what one body can express.
    """
    nodes = [n for n in proto.graph.node if n.domain == DOMAIN]
    attributes = [read_node(n) for n in nodes]
    del proto.functions[:]
    if not attributes:
        return
    shared = {(a.granularity, a.importance, a.proportional, a.selection) for a in attributes}
    if len(shared) > 1:
        raise GraphError(
            "reductions of one model must agree in granularity, importance, proportional "
            "and selection"
        )
    widths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in [*proto.graph.value_info, *proto.graph.input]
        if value.type.tensor_type.shape.dim
    }
    parts = {
        widths.get(n.input[1], 0) / (a.num_heads * a.head_dim)
        for n, a in zip(nodes, attributes, strict=True)
    }
    if len(parts) > 1 or not parts <= set(node.QKV_PARTS):
        raise GraphError("reductions need a QKV tensor of two or three parts, and its width known")
    proto.functions.append(node.body(attributes[0], int(parts.pop())))
    if DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, node.VERSION))


def read_node(graph_node: onnx.NodeProto) -> TokenReduce:
    """Attributes of a JMPTokenReduce node; raises GraphError if they are not as expected."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in graph_node.attribute}
    return TokenReduce.from_onnx(values)


def save_model(proto: onnx.ModelProto, path: Path) -> None:
    """Checks and writes a model, whole or not at all. Above 2 GB weights go beside it."""
    with atomic_path(path) as temporary:
        try:
            onnx.save_model(proto, str(temporary))
        except ValueError as error:  # protobuf's limit of 2 GB
            raise GraphError(
                f"the model is too large for one ONNX file ({error})",
                "models above 2 GB in FP32 (ViT-g and larger) are not supported yet",
            ) from error


def load_model(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file.

    Raises:
        GraphError: missing, truncated or not ONNX.
    """
    try:
        proto = onnx.load_model(path)
        if not proto.graph.node or not proto.graph.output:
            raise ValueError("it holds no graph")
    except FileNotFoundError as error:
        raise GraphError(f"no such file: {path}") from error
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, OSError, ...
        raise GraphError(
            f"{path} is truncated or not an ONNX model: {str(error).splitlines()[0]}",
            "build it again",
        ) from error
    return proto


def _name_reductions(proto: onnx.ModelProto, blocks: nn.Module) -> None:
    """Names each reduction after its block, so that logs and `inspect` can be read."""
    nodes = [n for n in proto.graph.node if n.domain == DOMAIN]
    indices = sorted(blocks.reductions) if isinstance(blocks, JMPBlocks) else []
    if len(nodes) != len(indices):
        raise GraphError(f"{len(indices)} reductions went in, {len(nodes)} came out of the export")
    for graph_node, index in zip(nodes, indices, strict=True):
        graph_node.name = node.reduction_name(index)


def _strip_debug_info(proto: onnx.ModelProto) -> None:
    """Removes the exporter's stack traces: paths of the machine that exported."""
    del proto.metadata_props[:]
    for graph_node in proto.graph.node:
        del graph_node.metadata_props[:]
        graph_node.doc_string = ""
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]


@contextmanager
def _export_form(model: nn.Module) -> Iterator[None]:
    """Reductions as one symbolic node, attention written out."""
    blocks = model.blocks
    before = blocks.reduce if isinstance(blocks, JMPBlocks) else None
    try:
        if before is not None:
            blocks.reduce = _reduce_node
        with written_out_attention(model):
            yield
    finally:
        if before is not None:
            blocks.reduce = before


def _reduce_node(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands for `token_reduce` while the model is traced: one ONNX node."""
    batch, _, width = x.shape
    tokens = attributes.num_prefix + attributes.num_keep
    y, out_size, log_size = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{node.OP_TYPE}",
        (x, qkv, size),
        attributes.to_onnx(),
        dtypes=(x.dtype,) * 3,
        shapes=((batch, tokens, width), (batch, tokens), (batch, tokens)),
        version=node.VERSION,
    )
    return y, out_size, log_size
