"""What a benchmark runs: ONNX Runtime on the CPU, an engine on the GPU, each down to its calls.

ONNX Runtime is called directly, without Polygraphy's runner: its checks and copies would be timed
too, and would weigh more the faster the model is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from ..core import ort
from ..core.artifact import PORTABLE, Artifact
from ..core.errors import EngineError
from ..core.images import INPUT
from ..engine.fit import locate
from .backend import Backend, noise
from .measure import Times


def open_backend(artifact: Artifact, backend: str, *, threads: int) -> Backend:
    """Opens an artifact with "onnxruntime", "engine" or "torch", its file checked beforehand.

    Raises:
        ArtifactError: the file is missing or altered.
        EngineError: it cannot be opened here.
    """
    if backend == "onnxruntime":
        return OnnxRuntime(artifact.verified(PORTABLE), artifact.image_shape, threads)
    if backend == "torch":
        from .torch_timed import TorchModel

        return TorchModel(artifact, threads)
    from .engine import TimedEngine

    return TimedEngine(locate(artifact.folder))


class OnnxRuntime:
    """A portable model on the CPU."""

    has_graphs = False

    def __init__(self, model: Path, shape: tuple[int, ...], threads: int, name: str = INPUT):
        import onnxruntime

        self.session: Any = ort.session(model, ort.TAKES_TURNS, threads=threads)
        self.library = f"ONNX Runtime {onnxruntime.__version__}"
        self.model, self.shape, self.name = model, shape, name

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        return self.prepare_feed({self.name: noise(batch, self.shape)})

    def prepare_feed(self, feed: dict[str, Any]) -> Callable[[], Times]:
        """The same for any inputs."""
        session = self.session

        def infer() -> Times:
            started = time.perf_counter()
            try:
                session.run(None, feed)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise EngineError(f"ONNX Runtime cannot run {self.model}: {reason}") from error
            return Times(start=1000 * started, total=1000 * (time.perf_counter() - started))

        return infer

    def view(self, shape: tuple[int, ...] | None = None) -> OnnxRuntime:
        """The same session for images of another shape; closing one closes no other."""
        other = copy(self)
        other.shape = self.shape if shape is None else shape
        return other

    def close(self) -> None:
        self.session = None
