"""What stays in FP32 in a model of 16 bits: what is too large for FP16, and what was asked for.

FP16 ends at 65504, and a GPU goes on with infinity beyond it, which a LayerNorm turns into NaN. So
the largest magnitude of every tensor is taken in FP32, on the photos of the check; what comes
near the end is stored in FP32, with the nodes that make and read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..core import interrupt, ort
from ..core.errors import GraphError
from ..core.images import INPUT
from ..core.manifest import Fp32, Large
from .graph import block_tensors, is_reduction, load_model, temporary_file
from .precision import FP16_MAX, VIEWS, emulate, float_types, large_weights, readers_of

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

LIMIT = FP16_MAX / 4
"""Largest magnitude on the check's photos that FP16 is trusted with: other photos may give more."""
BATCH = 2
KINDS = ("attention", "mlp")
ATTENTION, REDUCTION, MLP = "attention", "token reduction", "MLP"


class Seen(NamedTuple):
    """Of a tensor, over all images: its largest magnitude, and whether all of it is finite."""

    largest: float
    is_finite: bool


def keep_fp32(
    model: Path,
    images: NDArray[np.float32],
    asked: Sequence[str] = (),
    *,
    measure: bool = True,
) -> Fp32:
    """What stays in FP32 in an FP32 model that is to be lowered.

    Args:
        model: portable, in FP32.
        images: [B, 3, H, W]; all are run.
        asked: words of `--fp32` (see `asked_nodes`).
        measure: FP16 is meant, so that magnitudes matter; BF16 reaches as far as FP32.

    Raises:
        GraphError: a word that means nothing here.
    """
    proto = load_model(model)
    nodes = asked_nodes(proto, asked)
    seen = magnitudes(proto, images) if measure else {}
    where = places(proto)
    makers = {name: n.name for n in proto.graph.node for name in n.output}
    large = tuple(
        Large(name, where[makers[name]], value.largest)
        for name, value in seen.items()
        if value.is_finite and value.largest > LIMIT
    )
    weights = tuple(large_weights(proto)) if measure else ()
    nodes |= readers_of(proto, {*(one.tensor for one in large), *weights})
    finite = {name: value.largest for name, value in seen.items() if value.is_finite}
    top = max(finite, key=finite.__getitem__, default=None)
    return Fp32(
        asked=tuple(asked),
        largest=Large(top, where[makers[top]], finite[top]) if top else None,
        large=large,
        weights=weights,
        nodes=tuple(n.name for n in proto.graph.node if n.name in nodes),
    )


def magnitudes(proto: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, Seen]:
    """The largest magnitude of every floating-point tensor that a model computes, in graph order.

    Each is reduced to three numbers as soon as it is there, so it takes no more memory than an
    inference. Views are left out: they hold nothing else than what they show.

    Args:
        proto: portable, FP32 or `precision.emulate`d; stays as it is.
        images: [B, 3, H, W].
    """
    from onnx import TensorProto, helper

    types = float_types(proto)
    wide = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    names = [
        name
        for n in proto.graph.node
        if n.op_type not in {*VIEWS, "Cast", "Constant"}
        for name in n.output
        if name in wide
    ]
    marked = type(proto)()
    marked.CopyFrom(proto)
    outputs = []
    for index, name in enumerate(names):
        for what in ("ReduceMax", "ReduceMin", "ReduceSum"):
            outputs.append(f"{what}.{index}")
            node = helper.make_node(what, [name], outputs[-1:], name=outputs[-1], keepdims=0)
            marked.graph.node.append(node)
    del marked.graph.output[:]
    marked.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in outputs
    )
    with temporary_file(marked) as path:
        del marked
        session = ort.session(path, keep_memory=False)
    largest = np.zeros(len(names))
    finite = np.ones(len(names), dtype=bool)
    for start in range(0, len(images), BATCH):
        interrupt.check()
        values = session.run(outputs, {INPUT: images[start : start + BATCH]})
        high, low, total = np.array(values, dtype=np.float64).reshape(-1, 3).T
        # A maximum may pass over NaN; a sum passes over nothing.
        finite &= np.isfinite(total) & np.isfinite(high) & np.isfinite(low)
        largest = np.fmax(largest, np.fmax(np.abs(high), np.abs(low)))
    return {n: Seen(float(m), bool(f)) for n, m, f in zip(names, largest, finite, strict=True)}


def first_not_finite(proto: onnx.ModelProto, images: NDArray[np.float32]) -> str | None:
    """Where NaN or infinity first appears on these images, in words; None if nowhere.

    Args:
        proto: portable; run with its precision's rounding, and used up.
    """
    where = places(proto)
    makers = {name: n.name for n in proto.graph.node for name in n.output}
    for name, value in magnitudes(emulate(proto), images).items():
        if not value.is_finite:
            tensor = name.removesuffix(".exact")  # before it is rounded
            return f"{where[makers[tensor]]}: tensor {tensor!r}"
    return None


def places(proto: onnx.ModelProto) -> dict[str, str]:
    """Node name -> where it stands: "embedding", "blocks.3 MLP", "head".

    The exporter writes the nodes in the order in which they ran, and passes keep it.
    """
    makers = {name: n.name for n in proto.graph.node for name in n.output}
    ends: dict[str, str] = {}
    blocks = block_tensors(proto)
    ends[makers[blocks[0].entry]] = "blocks.0 " + ATTENTION
    for index, block in enumerate(blocks):
        ends[makers[block.attended]] = f"blocks.{index} {MLP}"
        if block.reduced != block.attended:
            ends[makers[block.attended]] = f"blocks.{index} {REDUCTION}"
            ends[makers[block.reduced]] = f"blocks.{index} {MLP}"
        last = index + 1 == len(blocks)
        ends[makers[block.out]] = "head" if last else f"blocks.{index + 1} {ATTENTION}"
    found, now = {}, "embedding"
    for node in proto.graph.node:
        found[node.name] = now
        now = ends.get(node.name, now)
    return found


def parse_asked(word: str) -> tuple[str, frozenset[int] | None]:
    """ "attention" -> (kind, None for all blocks); "mlp:0-3,11" -> (kind, blocks).

    Raises:
        GraphError: it is neither.
    """
    found = re.fullmatch(rf"({'|'.join(KINDS)})(?::(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*))?", word)
    if found is None:
        raise GraphError(
            f"--fp32 {word}: expected {' or '.join(KINDS)}, with blocks or without",
            "write --fp32 attention, --fp32 attention:0-3,11 or --fp32 mlp:5",
        )
    if found[2] is None:
        return found[1], None
    blocks: set[int] = set()
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        blocks.update(range(int(first), min(int(last or first), 1 << 16) + 1))
    return found[1], frozenset(blocks)


def asked_nodes(proto: onnx.ModelProto, words: Iterable[str]) -> set[str]:
    """Names of the nodes that words of `--fp32` mean.

    "attention": the scores, from the scaling of the queries to the softmax, so that attention is
    not one fused 16-bit kernel; their product with the values stays in 16 bits. "mlp": all between
    the second norm and the residual sum.

    Raises:
        GraphError: a word cannot be read, or names blocks that the model lacks.
    """
    asked = [parse_asked(word) for word in words]
    if not asked:
        return set()
    blocks = block_tensors(proto)
    names: set[str] = set()
    for kind, chosen in asked:
        if chosen and max(chosen) >= len(blocks):
            raise GraphError(
                f"--fp32 {kind} names block {max(chosen)}, the model has blocks 0 to "
                f"{len(blocks) - 1}",
            )
        for index, block in enumerate(blocks):
            if chosen is None or index in chosen:
                if kind == "attention":
                    names |= _scores(proto, block.entry, block.attended)
                else:
                    names |= _between(proto, block.reduced, block.out)
    return names


def _scores(proto: onnx.ModelProto, entry: str, attended: str) -> set[str]:
    """Softmax of one block, and what computes its input from queries and keys."""
    inside = _between(proto, entry, attended)
    makers = {name: n for n in proto.graph.node for name in n.output}
    softmax = [n for n in proto.graph.node if n.op_type == "Softmax" and n.name in inside]
    names: set[str] = set()
    todo: list[onnx.NodeProto] = softmax
    while todo:
        node = todo.pop()
        names.add(node.name)
        behind = [makers[name] for name in node.input if name in makers]
        if node.op_type in ("Mul", "Div"):  # the scaling: what it scales is a projection's
            continue
        for other in behind:
            while other.op_type in VIEWS and other.input[0] in makers:
                other = makers[other.input[0]]
            # The softmax reads a sum with the mask; any other sum is a projection with its bias.
            sums = {"Add"} if node.op_type == "Softmax" else set()
            if other.name in inside and other.op_type in {"MatMul", "Mul", "Div"} | sums:
                todo.append(other)
    return names


def _between(proto: onnx.ModelProto, start: str, end: str) -> set[str]:
    """Names of the nodes from a tensor to another, without the sum or reduction that ends them."""
    makers = {name: n for n in proto.graph.node for name in n.output}
    names: set[str] = set()
    todo = [name for name in makers[end].input if name != start and name in makers]
    while todo:
        name = todo.pop()
        node = makers[name]
        if name == start or node.name in names or is_reduction(node):
            continue
        names.add(node.name)
        todo.extend(n for n in node.input if n in makers and n != start)
    return names
