"""What a backend computes on the way: the tensors between blocks, and which tokens it keeps.

PyTorch shows both through hooks; the portable model through further outputs of its graph and of
its reductions' body; an engine only tensors between blocks, and only when it is built anew with
them as outputs: which tokens it keeps stays inside the plugin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.errors import GraphError
from ..core.images import join, split
from ..jmp.node import DOMAIN, TokenReduce

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from torch import nn

BATCH = 8
DECIDED = ("kept", "rating", "importance", "target", "merged")
"""What `Choice` is made of, as `reduction.Plan` has it."""
SHOWN = (*DECIDED, "rest")
"""Tensors of the portable body (node_body.py) that tell it."""


class Block(NamedTuple):
    """The tensors of a block's residual stream: their values [B, tokens, C], or their names.

    entry: what comes in; attended: after the attention residual; reduced: what the MLP reads, the
    same as attended where the block reduces nothing; out: what leaves.
    """

    entry: Any
    attended: Any
    reduced: Any
    out: Any


@dataclass(frozen=True)
class Choice:
    """Which tokens one reduction kept, for a batch of images.

    Attributes:
        block: its block.
        name: its node's name, "blocks.3.token_reduce".
        num_prefix: P.
        selection: as in `node.TokenReduce`.
        kept: [B, K] which of the M incoming patch tokens stay, ascending.
        rating: [B, M] by which they were chosen.
        importance: [B, M].
        fate: [B, M-K] what becomes of the others, ascending: the position in `kept` of the token
            that each is merged into, -1 if it is pruned.
    """

    block: int
    name: str
    num_prefix: int
    selection: str
    kept: NDArray[Any]
    rating: NDArray[Any]
    importance: NDArray[Any]
    fate: NDArray[Any]


@dataclass(frozen=True)
class Trace:
    """What was seen of a backend.

    Attributes:
        backend: its name.
        choices: of every reduction in order; None where they cannot be seen.
        blocks: the tensors of every block, in float32; empty if they were not asked for.
        sizes: block -> (size, log_size) [B, P+K] after its reduction; PyTorch only.
        num_prefix: P.
    """

    backend: str
    choices: list[Choice] | None
    blocks: list[Block] = field(default_factory=list)
    sizes: dict[int, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    num_prefix: int = 1


def trace_torch(
    model: nn.Module, images: NDArray[np.float32], *, blocks: bool = False, name: str = "torch"
) -> Trace:
    """Runs a timm ViT, patched or dense, and keeps what its blocks did. The model stays as it is.

    Args:
        images: [B, 3, H, W].
        blocks: keep the blocks' tensors too.
    """
    import torch

    from ..jmp.patch import JMPBlocks

    pieces = []
    for piece in split(images, BATCH, 1):
        seen: dict[str, NDArray[Any]] = {}
        with ExitStack() as stack:
            if blocks:
                _watch_blocks(stack, model, seen)
            if isinstance(model.blocks, JMPBlocks):
                _watch_reductions(stack, model.blocks, seen, blocks)
            with torch.inference_mode():
                model(torch.from_numpy(piece))
        pieces.append(seen)
    seen = join(pieces, len(images))
    reductions = model.blocks.reductions if isinstance(model.blocks, JMPBlocks) else {}
    choices = [
        make_choice(block, reduction_name(block), reductions[block], seen)
        for block in sorted(reductions)
    ]
    depth = len(model.blocks) if blocks else 0
    sized = reductions if blocks else ()
    return Trace(
        backend=name,
        choices=choices,
        blocks=[_torch_block(seen, index, depth) for index in range(depth)],
        sizes={block: (seen[f"{block}.size"], seen[f"{block}.log_size"]) for block in sized},
        num_prefix=model.num_prefix_tokens,
    )


def mark(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
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
    nodes = [n for n in proto.graph.node if n.domain == DOMAIN]
    if nodes and len(proto.functions) != 1:
        raise GraphError("the model's reductions have no body: is it the deployable one?")
    for function in proto.functions:
        function.output.extend(SHOWN)
    for graph_node in nodes:
        graph_node.output.extend(f"{graph_node.name}.{what}" for what in SHOWN)
    return nodes


def prefix_tokens(proto: onnx.ModelProto) -> int:
    """P of a model: tokens that its class, distillation and register parameters stand for."""
    for graph_node in proto.graph.node:
        if graph_node.domain == DOMAIN:
            return node_attributes(graph_node).num_prefix
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
    readers = Counter(name for n in proto.graph.node for name in set(n.input))
    inputs = [n.input[0] for n in proto.graph.node if n.op_type == "LayerNormalization"]
    norms = [name for name in inputs if readers[name] > 1]
    entries, reduced = norms[0::2], norms[1::2]
    # The last block's output is the residual sum over what its MLP reads.
    sums = [
        n.output[0] for n in proto.graph.node if n.op_type == "Add" and norms[-1:] == [*n.input][:1]
    ]
    reductions = {n.name: n for n in proto.graph.node if n.domain == DOMAIN}
    places = []
    for index, (entry, after) in enumerate(zip(entries, reduced, strict=False)):
        node = reductions.pop(reduction_name(index), None)
        if node is not None and node.output[0] != after:
            break
        attended = node.input[0] if node is not None else after
        out = [*entries, *sums][index + 1 :][:1]
        places += [Block(entry, attended, after, *out)] if out else []
    if not places or len(entries) != len(reduced) or len(places) != len(entries) or reductions:
        raise GraphError(
            "the model's blocks cannot be told apart: each needs two LayerNormalization nodes on "
            "the residual stream",
            "build it again with this version of jmp_deploy",
        )
    return places


def make_choice(
    block: int, name: str, attributes: TokenReduce | Choice, values: Mapping[str, NDArray[Any]]
) -> Choice:
    """What a reduction decided, out of values that are named NODE.kept and so on."""
    kept, rating, importance, target, merged = (values[f"{name}.{what}"] for what in DECIDED)
    return Choice(
        block=block,
        name=name,
        num_prefix=attributes.num_prefix,
        selection=attributes.selection,
        kept=kept,
        rating=rating,
        importance=importance,
        fate=np.where(merged, target, -1),
    )


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


def reduction_name(block: int) -> str:
    """What export.py calls the reduction of a block."""
    return f"blocks.{block}.token_reduce"


def node_attributes(graph_node: onnx.NodeProto) -> TokenReduce:
    from onnx.helper import get_attribute_value

    values = {a.name: get_attribute_value(a) for a in graph_node.attribute}
    # the deployable model's nodes name their plugin too
    own = {name: value for name, value in values.items() if not name.startswith("plugin_")}
    return TokenReduce.from_onnx(own)


def block_of(name: str) -> int:
    try:
        return int(name.split(".")[1])
    except (IndexError, ValueError) as error:
        raise GraphError(f"the reduction {name!r} does not say its block", "build again") from error


def _watch_blocks(stack: ExitStack, model: nn.Module, seen: dict[str, NDArray[Any]]) -> None:
    """Keeps what enters both norms of every block, and what leaves the last one."""

    def keep(key: str, value: Any) -> None:
        seen[key] = value.detach().float().cpu().numpy().copy()

    def before(key: str) -> Any:
        return lambda module, inputs: keep(key, inputs[0])

    children = list(model.blocks.children())
    for index, block in enumerate(children):
        for norm, what in ((block.norm1, "entry"), (block.norm2, "reduced")):
            stack.callback(norm.register_forward_pre_hook(before(f"{index}.{what}")).remove)
    hook = model.blocks.register_forward_hook(
        lambda module, inputs, output: keep(f"{len(children)}.entry", output)
    )
    stack.callback(hook.remove)


def _watch_reductions(
    stack: ExitStack, blocks: Any, seen: dict[str, NDArray[Any]], tensors: bool
) -> None:
    """Puts a reduction in place that decides with `make_plan` and notes what it decided."""
    from ..jmp import reduction

    order = iter(sorted(blocks.reductions))

    def reduce(x: Any, qkv: Any, size: Any, attributes: Any) -> Any:
        block = next(order)
        plan = reduction.make_plan(qkv, size, attributes)
        reduced = reduction.apply_plan(
            x, size, plan, attributes.num_prefix, attributes.merge_weight
        )
        name = reduction_name(block)
        notes = {f"{name}.{what}": getattr(plan, what) for what in DECIDED}
        if tensors:
            notes[f"{block}.attended"] = x
            notes[f"{block}.size"], notes[f"{block}.log_size"] = reduced[1:]
        seen.update({key: value.numpy().copy() for key, value in notes.items()})
        return reduced

    stack.callback(setattr, blocks, "reduce", blocks.reduce)
    blocks.reduce = reduce


def _torch_block(seen: Mapping[str, NDArray[Any]], index: int, depth: int) -> Block:
    reduced = seen[f"{index}.reduced"]
    return Block(
        entry=seen[f"{index}.entry"],
        attended=seen.get(f"{index}.attended", reduced),
        reduced=reduced,
        out=seen[f"{index + 1}.entry"],
    )
