"""Each block of a portable model by itself, fed with what PyTorch's block was fed.

What the blocks before did wrong is out of the way, and so is which tokens they kept: an error shows
in the block, and in the part of it, that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import interrupt
from ..core.errors import GraphError
from ..core.images import INPUT
from ..core.ort import session_runner
from ..export.graph import SHOWN, as_planned, block_tensors, reductions, show_choices
from ..jmp.node import reduction_name
from ..jmp.trace import Block, Trace, make_choice
from .measures import TOLERANCES, relative

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

PARTS = {"attention": "attention", "reduction": "token reduction", "mlp": "MLP"}
"""Parts of a block, by their keys in the result, in words."""


def by_itself(
    proto: onnx.ModelProto, a: Trace, precision: str, tolerance: float
) -> list[dict[str, Any]]:
    """Each block of a portable model alone, fed with what PyTorch's block was fed.

    Args:
        proto: the model; changed in place.
        a: PyTorch's trace with blocks.

    Returns:
        Per block {"stage", "precision", "attention", "reduction", "mlp", "same_set", "ok"}. The
        errors of attention and MLP are the norm of the difference over the norm of what the part
        adds to the residual stream; that of the reduction is over the norm of its output, for
        images in which it decides alike (None if there is none). Each is the largest of all
        images, infinite if not finite. same_set is the share of images in which the same tokens
        are kept.

    Raises:
        GraphError: the model has other reductions than PyTorch's, or no recognisable blocks.
    """
    found = [n.name for n in show_choices(proto)]
    if found != [c.name for c in a.choices or ()]:
        raise GraphError(f"the model has reductions {found}, others than {a.backend}'s")
    places = block_tensors(proto)
    producers = {name: n for n in proto.graph.node for name in n.output}
    rows = []
    for index, (place, ours) in enumerate(zip(places, a.blocks, strict=True)):
        interrupt.check()
        choice = next((c for c in a.choices or () if c.block == index), None)
        shown = [f"{choice.name}.{what}" for what in SHOWN] if choice else []
        feeds = _feeds(proto, a, place, index)
        attention = extract(proto, producers, feeds, [*dict.fromkeys(place[1:3]), *shown])
        feeds[place.reduced] = ours.reduced
        mlp = extract(proto, producers, feeds, [place.out])
        stored = _precision(attention, mlp)  # before running them uses them up
        values = _run_part(attention, feeds, f"blocks.{index}")
        values |= _run_part(mlp, feeds, f"blocks.{index}.mlp")
        kept = len(ours.attended[0])  # the last block may compute the prefix tokens alone
        row: dict[str, Any] = {
            "stage": f"blocks.{index}",
            "precision": stored or precision,
            "attention": _error(values[place.attended], ours.attended, ours.entry[:, :kept]),
            "reduction": None,
            "mlp": _error(values[place.out], ours.out, ours.reduced),
            "same_set": None,
        }
        if choice:
            other = make_choice(
                index,
                choice.name,
                choice,
                as_planned(choice.name, choice.num_prefix, values),
            )
            same = (choice.kept == other.kept).all(axis=1)
            alike = same & (choice.fate == other.fate).all(axis=1)
            row["same_set"] = float(same.mean())
            if alike.any():
                row["reduction"] = _error(values[place.reduced][alike], ours.reduced[alike], 0.0)
        limit = limit_of(TOLERANCES.get(row["precision"], tolerance))
        rows.append({**row, "ok": own_error(row) <= limit})
    return rows


def extract(
    proto: onnx.ModelProto,
    producers: Mapping[str, onnx.NodeProto],
    feeds: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """The part of a model between some tensors that are fed and some outputs.

    (Polygraphy's extract_subgraph goes through onnx_graphsurgeon, which drops the domain of our
    node from the imports.)

    Raises:
        GraphError: the outputs need an input that is not fed.
    """
    import onnx

    from ..export.precision import float_types

    needed: set[int] = set()
    inputs: set[str] = set()
    weights = {i.name: i for i in proto.graph.initializer}
    used: set[str] = set()
    todo = list(outputs)
    while todo:
        name = todo.pop()
        if not name or name in inputs or name in used:
            continue
        if name in feeds and name not in outputs:
            inputs.add(name)
        elif name in weights:
            used.add(name)
        elif name in producers:
            used.add(name)
            graph_node = producers[name]
            if id(graph_node) not in needed:
                needed.add(id(graph_node))
                todo.extend(graph_node.input)
        else:
            raise GraphError(f"a block reads {name!r}, which is not one of its inputs")
    nodes = [n for n in proto.graph.node if id(n) in needed]
    types = float_types(proto)
    values = [
        onnx.helper.make_tensor_value_info(name, types[name], [None] * feeds[name].ndim)
        for name in sorted(inputs)
    ]
    part = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "part",
            values,
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
            [weights[name] for name in sorted(used) if name in weights],
        ),
        functions=proto.functions,
        opset_imports=proto.opset_import,
    )
    part.ir_version = proto.ir_version
    return part


def own_error(row: Mapping[str, Any]) -> float:
    return max(row[part] or 0.0 for part in PARTS)


def limit_of(cosine: float) -> float:
    """A cosine between vectors of one length, as a relative error."""
    return float((2 - 2 * cosine) ** 0.5)


def _feeds(proto: onnx.ModelProto, a: Trace, place: Block, index: int) -> dict[str, NDArray[Any]]:
    """What a block may read: its entry, the token sizes so far, and the images for their number."""
    feeds = {
        place.entry: a.blocks[index].entry,
        INPUT: np.zeros((len(a.blocks[index].entry), 1, 1, 1), np.float32),
    }
    for graph_node in reductions(proto):
        if graph_node.name == reduction_name(index):
            continue
        for block, sizes in a.sizes.items():
            if reduction_name(block) == graph_node.name and block < index:
                feeds |= {
                    name: value.astype(np.float32)
                    for name, value in zip(graph_node.output[1:3], sizes, strict=True)
                }
    return feeds


def _precision(*parts: onnx.ModelProto) -> str:
    """What a block's weight matrices are stored in, as the model says it: "fp16", "fp16+int8"."""
    import onnx

    kinds = onnx.TensorProto
    names = {kinds.FLOAT16: "fp16", kinds.BFLOAT16: "bf16", kinds.FLOAT: "fp32"}
    names |= {kinds.INT8: "int8", kinds.FLOAT8E4M3FN: "fp8"}
    matrices = [w for part in parts for w in part.graph.initializer if len(w.dims) == 2]
    return "+".join(sorted({names[w.data_type] for w in matrices if w.data_type in names}))


def _run_part(
    part: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], name: str
) -> dict[str, NDArray[Any]]:
    from ..export.precision import emulate

    with session_runner(emulate(part), name) as runner:
        values = runner.infer({i.name: feeds[i.name] for i in part.graph.input})
        return {key: np.array(value) for key, value in values.items()}


def _error(theirs: NDArray[Any], ours: NDArray[Any], before: Any) -> float:
    """Largest relative error of what was added to `before`, over the images."""
    if not np.isfinite(theirs).all():
        return float("inf")
    wide = ours.astype(np.float64)
    return max(map(relative, theirs - wide, wide - before))
