"""Which tokens a portable model keeps, and the tensors between its blocks.

As `jmp.trace.trace_torch` of PyTorch, through further outputs of its graph and of its reductions'
body. An engine shows only tensors between blocks, and only when it is built anew with them as
outputs (debug.py): which tokens it keeps stays inside the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.images import INPUT, join, split
from ..core.ort import session_runner
from ..jmp.trace import BATCH, Block, Trace, make_choice

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Backend:
    """What runs: its name, its Polygraphy runner, and for a live PyTorch its model."""

    name: str
    runner: Any
    model: Any = None


def trace_onnx(
    proto: onnx.ModelProto,
    images: NDArray[np.float32],
    profile: Sequence[int],
    *,
    blocks: bool = False,
    name: str = "onnxruntime",
) -> Trace:
    """Runs a portable model with its inner tensors marked as outputs by Polygraphy.

    Args:
        proto: the model; changed in place.
        images: [B, 3, H, W].
        profile: (min, opt, max) batch.
        blocks: keep the blocks' tensors too.

    Raises:
        GraphError: the model is not laid out as export.py does it.
    """
    from ..export.graph import (
        SHOWN,
        as_planned,
        block_of,
        block_tensors,
        mark,
        prefix_tokens,
        read_node,
        show_choices,
    )

    nodes = show_choices(proto)
    attributes = [read_node(n) for n in nodes]
    names = [f"{n.name}.{what}" for n in nodes for what in SHOWN]
    places = block_tensors(proto) if blocks else []
    marked = mark(proto, [*names, *_unique(places)])
    values = run_session(marked, images, profile, name)
    choices = [
        make_choice(block_of(n.name), n.name, a, as_planned(n.name, a.num_prefix, values))
        for n, a in zip(nodes, attributes, strict=True)
    ]
    return Trace(
        backend=name,
        choices=choices,
        blocks=[_values(place, values) for place in places],
        num_prefix=prefix_tokens(proto),
    )


def run_session(
    proto: onnx.ModelProto,
    images: NDArray[np.float32],
    profile: Sequence[int],
    name: str = "onnxruntime",
) -> dict[str, NDArray[Any]]:
    """Runs a model on images, through Polygraphy: output name -> [B, ...]."""
    least, _, most = profile
    pieces = split(images, max(least, min(most, BATCH)), least)
    with session_runner(proto, name) as runner:
        return join([_copied(runner.infer({INPUT: piece})) for piece in pieces], len(images))


def _unique(places: Sequence[Block]) -> list[str]:
    return list(dict.fromkeys(name for place in places for name in place))


def _values(place: Block, values: Mapping[str, NDArray[Any]]) -> Block:
    return Block(*(values[name].astype(np.float32) for name in place))


def _copied(outputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: np.array(value) for name, value in outputs.items()}
