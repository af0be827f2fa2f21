"""ONNX Runtime: the portable model on the CPU.

What is compared, traced and run is the model with the rounding that an engine of its precision has
(`export.precision.emulate`), where onnx is installed. What is timed is the model itself, as ONNX
Runtime runs it: it widens FP16 to FP32, and has no BF16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import ort
from ..core.errors import EngineError, one_line
from .base import Backend, Opened, Times, infer, noise

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from ..core.artifact import Artifact, Reference
    from ..jmp.trace import Block, Trace


TRACE_BATCH = 8
"""Images at a time where every block's tensors are kept."""


class OnnxRuntimeBackend(Backend):
    """See the module."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    packages = ("onnxruntime", "polygraphy")
    ability = "run portable models"
    shows_choices = True

    @property
    def file(self) -> str:
        """See `Backend`."""
        from ..core.artifact import PORTABLE

        return PORTABLE

    def open(
        self, artifact: Artifact, *, weights: str | None = None, reference: Reference | None = None
    ) -> Opened:
        """See `Backend`."""
        del weights, reference  # the portable model holds its own
        ort.quiet_polygraphy()

        def watch(images: NDArray[np.float32], *, blocks: bool = False) -> Trace:
            from ..export.graph import load_model

            proto = load_model(artifact.verified(self.file))
            return trace_onnx(proto, images, artifact.batch, blocks=blocks)

        model: Any = artifact.verified(self.file)
        try:
            from ..export.precision import emulated

            model = emulated(model)
        except ModuleNotFoundError:  # a device without onnx: as ONNX Runtime runs it by itself
            if artifact.precision == "bf16":
                raise
        return Opened(self, ort.session_runner(model, self.name), watch)

    def timed(self, artifact: Artifact, *, threads: int) -> TimedSession:
        """See `Backend`."""
        if artifact.precision == "bf16":
            raise EngineError(
                "ONNX Runtime has no BF16 on a CPU, so there is nothing to time",
                "time the engine where a GPU is, or build with --precision fp32 or fp16",
            )
        return TimedSession(artifact.verified(self.file), artifact.image_shape, threads)


class TimedSession:
    """A portable model for timing, called without Polygraphy: its checks and copies would be timed
    too, and would weigh more the faster the model is.

    Args:
        shape: of one image.
    """

    has_graphs = False

    def __init__(self, model: Path, shape: tuple[int, ...], threads: int) -> None:
        import onnxruntime

        self.session: Any = ort.session(model, ort.TAKES_TURNS, threads=threads)
        self.library = f"ONNX Runtime {onnxruntime.__version__}"
        self.model, self.shape = model, shape

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """See `base.Timed`."""
        from ..core.images import INPUT

        session, feed = self.session, {INPUT: noise(batch, self.shape)}

        def infer() -> Times:
            started = time.perf_counter()
            try:
                session.run(None, feed)
            except Exception as error:  # its exceptions share no public base class
                reason = one_line(error)
                raise EngineError(f"ONNX Runtime cannot run {self.model}: {reason}") from error
            return Times.of_host(started, time.perf_counter())

        return infer

    def view(self, shape: tuple[int, ...] | None = None) -> TimedSession:
        """The same session for images of another shape; closing one closes no other."""
        other = copy(self)
        other.shape = self.shape if shape is None else shape
        return other

    def close(self) -> None:
        """Lets the session go."""
        self.session = None


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
    from ..jmp.trace import Trace, make_choice

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
    """Runs a model on images with its precision's rounding, through Polygraphy: output name ->
    [B, ...]. The model is used up."""
    from ..export.precision import emulate

    least, best, most = profile
    with ort.session_runner(emulate(proto), name) as runner:
        return infer(runner, images, (least, best, max(least, min(most, TRACE_BATCH))))


def _unique(places: Sequence[Block]) -> list[str]:
    return list(dict.fromkeys(name for place in places for name in place))


def _values(place: Block, values: Mapping[str, NDArray[Any]]) -> Block:
    return type(place)(*(values[name].astype("float32") for name in place))
