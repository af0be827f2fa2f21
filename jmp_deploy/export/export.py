"""PyTorch -> portable ONNX: standard operators, and one JMPTokenReduce node per reduction.

The portable model carries the node's body as an ONNX local function, so ONNX Runtime runs it as it
is; `fuse.py` makes the form that TensorRT takes with our plugin, and one without local functions.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from .. import __version__
from ..core.errors import GraphError
from ..core.images import INPUT
from ..core.outputs import LOGITS, PROBABILITIES, output_of
from ..jmp import node
from ..jmp.dense import DenseFeatures
from ..jmp.families import family_of, written_out_attention
from ..jmp.families.rope import constant_rotations
from ..jmp.node import DOMAIN, OPSET, TokenReduce
from ..jmp.patch import JMPBlocks
from .body import add_bodies
from .graph import load_model, reductions, save_model

BATCH = torch.export.Dim("batch", min=1, max=4096)


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    image_size: tuple[int, int],
    outputs: Sequence[str] | None = None,
) -> Path:
    """Exports a timm ViT, patched or dense, to portable FP32 ONNX with a dynamic batch.

    Args:
        model: float32, on the CPU; exported in eval mode, whatever its own. Input `images`
            [B, C, H, W]; output `logits` [B, classes], or `features` [B, C] where the model has no
            classifier.
        path: file to write.
        image_size: (H, W) in pixels.
        outputs: names of other outputs than that one, as `dense.DenseFeatures` takes them; a
            patched model was patched with `restore` then.

    Returns:
        `path`.

    Raises:
        GraphError: the exporter failed, or what it made is not a valid model.
        ArtifactError: the file cannot be written.
    """
    # A batch of 2: torch.export takes sizes 0 and 1 for constants.
    example = torch.zeros(2, family_of(model).channels(model), *image_size)
    with _symbolic_reductions(model), _evaluating(model):
        names = outputs or (output_of(model).name,)
        given = DenseFeatures(model, outputs) if outputs else model
        proto = to_proto(given, example, {0: BATCH}, names)
    add_bodies(proto)
    _name_reductions(proto, model.blocks)
    _strip_debug_info(proto)
    proto.producer_name, proto.producer_version = "jmp_deploy", __version__
    save_model(proto, path)
    return path


def append_softmax(path: Path) -> None:
    """Puts a softmax over the classes behind a portable classifier's logits, in place; they are its
    first output.

    Behind what comes out, which is FP32 in a model of any precision: so is the softmax, and what
    lowers precision or quantizes sees logits.

    Raises:
        GraphError: not a model whose first output is logits.
        ArtifactError: the file cannot be written.
    """
    proto = load_model(path)
    names = [value.name for value in proto.graph.output]
    if names[:1] != [LOGITS.name]:
        raise GraphError(f"a softmax belongs behind {LOGITS.name}, {path} gives {names}")
    behind = PROBABILITIES.name
    softmax = onnx.helper.make_node("Softmax", names[:1], [behind], name="softmax", axis=-1)
    proto.graph.node.append(softmax)
    proto.graph.output[0].name = behind
    save_model(proto, path)


def to_proto(
    module: nn.Module,
    example: Tensor,
    dims: dict[int, torch.export.Dim],
    outputs: Sequence[str],
    what: str = "the model",
) -> onnx.ModelProto:
    """A module of one input through PyTorch's exporter, attention written out.

    Args:
        dims: dimensions of the input that may vary.
        outputs: what to call what comes out.
        what: is exported, for the message.

    Raises:
        GraphError: the exporter failed.
    """
    try:
        with (
            written_out_attention(module),
            constant_rotations(module),
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[*outputs],
                dynamic_shapes=(dims,),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise GraphError(f"PyTorch could not export {what}: {str(error).strip()}") from error
    return program.model_proto


def _name_reductions(proto: onnx.ModelProto, blocks: nn.Module) -> None:
    """Names each reduction after its block, so that logs and `inspect` can be read."""
    nodes = reductions(proto)
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and stochastic depth are off; each module's mode is as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _symbolic_reductions(model: nn.Module) -> Iterator[None]:
    """Each reduction as one symbolic node."""
    blocks = model.blocks
    before = blocks.reduce if isinstance(blocks, JMPBlocks) else None
    try:
        if before is not None:
            blocks.reduce = _reduce_node
        yield
    finally:
        if before is not None:
            blocks.reduce = before


def _reduce_node(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
) -> tuple[Tensor, ...]:
    """Stands for `token_reduce` while the model is traced: one ONNX node."""
    batch, before, width = x.shape
    tokens = attributes.num_prefix + attributes.num_keep
    shapes = [(batch, tokens, width), (batch, tokens), (batch, tokens)]
    dtypes = [x.dtype] * len(shapes)
    if attributes.index:
        shapes.append((batch, before - attributes.num_prefix))
        dtypes.append(torch.int32)
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{node.OP_TYPE}",
        (x, qkv, size),
        attributes.to_onnx(),
        dtypes=dtypes,
        shapes=shapes,
        version=attributes.version,
    )
    return tuple(outputs)
