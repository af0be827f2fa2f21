"""The engine: what users run, on a GPU, through our `Engine`."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import ort
from ..core.device import gpus
from ..core.errors import EngineError
from ..core.packages import importable
from .base import Backend, Infer, Opened, Times, infer, noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.artifact import Artifact, Precision, Reference
    from ..engine.arrays import DeviceArray
    from ..engine.cuda import Cuda
    from ..engine.fit import EngineFile
    from ..jmp.trace import Trace

CAPTURED_AFTER = 3
"""Inferences after which `Engine` has captured: it does when the same arrays come again."""


class EngineBackend(Backend):
    """See the module."""

    name = "engine"
    title = "the engine"
    launches = True

    @property
    def file(self) -> str:
        """See `Backend`."""
        from ..core.artifact import ENGINE

        return ENGINE

    def obstacle(self, artifact: Artifact) -> str | None:
        """See `Backend`."""
        from ..engine.api import MODULES, installed

        if artifact.engine is None:
            return "none was built"
        if not artifact.path(self.file).is_file():
            return f"{self.file} is missing"
        if not gpus():
            return "no GPU is here"
        flavour = artifact.engine.flavour
        if not installed(flavour) or not importable("cuda.bindings"):
            return f"it needs {MODULES[flavour]} and cuda-bindings"
        return None

    def gpu(self) -> str | None:
        """See `Backend`."""
        return gpus()[0].name if gpus() else "GPU"

    def precision(self, artifact: Artifact) -> Precision:
        """Of the engine that is there."""
        return artifact.engine.precision if artifact.engine else artifact.precision

    def open(
        self, artifact: Artifact, *, weights: str | None = None, reference: Reference | None = None
    ) -> Opened:
        """See `Backend`."""
        del weights, reference  # an engine holds its own
        ort.quiet_polygraphy()

        def watch(images: NDArray[np.float32], *, blocks: bool = False) -> Trace:
            del blocks  # nothing else can be seen
            return trace_engine(artifact, images)

        return Opened(self, engine_runner(artifact.path(self.file)), watch)

    def timed(self, artifact: Artifact, *, threads: int) -> TimedEngine:
        """See `Backend`."""
        from ..engine.fit import locate

        return TimedEngine(locate(artifact.folder))

    @contextmanager
    def running(
        self, artifact: Artifact, *, max_batch: int | None = None, cuda_graph: bool = True
    ) -> Iterator[Infer]:
        """See `Backend`; without Polygraphy."""
        from ..core.images import INPUT
        from ..engine.runtime import Engine

        with Engine(artifact.folder, cuda_graph=cuda_graph, max_batch=max_batch) as engine:
            yield lambda images: engine.infer({INPUT: images})


def engine_runner(path: Path | EngineFile) -> Any:
    """A Polygraphy runner of an engine: `Engine` itself, so that what is compared and validated is
    what users run. (Polygraphy's own runner lets a plan run code of the host, and finds no CUDA
    runtime in the wheels of CUDA 13.)

    Args:
        path: as `Engine` takes it.
    """
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    from ..engine.runtime import Engine

    class EngineRunner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            self.engine = Engine(path, check_finite=False)

        def deactivate_impl(self) -> None:
            self.engine.close()

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in self.engine.inputs:
                metadata.add(tensor.name, tensor.dtype, (-1, *tensor.shape))
            return metadata

        def infer_impl(self, feed_dict: dict[str, Any]) -> dict[str, Any]:
            started = time.perf_counter()
            outputs = self.engine.infer(feed_dict)
            self.inference_time = time.perf_counter() - started
            return outputs

    return EngineRunner(name=EngineBackend.name)


class TimedEngine:
    """An engine for timing, from pinned memory to pinned memory, with CUDA events between; opened
    once for each way to launch it that is asked for.

    The copies and the computation are enqueued on one stream; events around each tell what the GPU
    spent on it, and the host's clock what a caller waits. Copies start when the image is in pinned
    memory: filling it is the caller's work.

    Args:
        file: the engine, and what is known of it.
        open_engine, cuda: in place of the real ones (tests).
    """

    def __init__(
        self,
        file: EngineFile,
        *,
        open_engine: Callable[..., Any] | None = None,
        cuda: Cuda | None = None,
    ) -> None:
        from ..engine.cuda import open_cuda
        from ..engine.runtime import Engine

        assert file.facts is not None
        self.library = f"{file.facts.builder} {file.facts.version}"
        self.file = file
        self._open, self._cuda = open_engine or Engine, cuda or open_cuda()
        self._engines: dict[bool, tuple[Any, int]] = {}
        self._releases = ExitStack()
        self._has_graphs: bool | None = None

    @property
    def has_graphs(self) -> bool:
        """Whether its inferences can be replayed as CUDA graphs; found out by trying.

        `Engine` goes on without graphs where TensorRT cannot be captured, and warns.
        """
        if self._has_graphs is None:
            infer = self.prepare(self._engine(True)[0].batch[0], True)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(CAPTURED_AFTER):
                    infer()
            words = [str(item.message) for item in caught]
            self._has_graphs = not any("CUDA graphs" in text for text in words)
        return self._has_graphs

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """See `base.Timed`."""
        (engine, stream), cuda = self._engine(cuda_graph), self._cuda
        with cuda.current():
            events = [cuda.timer_create() for _ in range(4)]
            for event in events:
                self._releases.callback(cuda.event_destroy, event)
            inputs = {t.name: self._pair(batch, t) for t in engine.inputs}
            outputs = {t.name: self._pair(batch, t) for t in engine.outputs}
        for tensor in engine.inputs:
            host = inputs[tensor.name][0]
            host[...] = noise(batch, tensor.shape)
        sources = {name: device for name, (_, device) in inputs.items()}
        targets = {name: device for name, (_, device) in outputs.items()}

        def infer() -> Times:
            started = time.perf_counter()
            cuda.event_record(events[0], stream)
            for host, device in inputs.values():
                cuda.copy(device.pointer, host.ctypes.data, device.nbytes, stream)
            cuda.event_record(events[1], stream)
            engine.infer(sources, stream=stream, out=targets)
            cuda.event_record(events[2], stream)
            for host, device in outputs.values():
                cuda.copy(host.ctypes.data, device.pointer, device.nbytes, stream)
            cuda.event_record(events[3], stream)
            enqueued = time.perf_counter()
            cuda.stream_synchronize(stream)
            ended = time.perf_counter()
            spent = [cuda.elapsed_ms(events[k], events[k + 1]) for k in range(3)]
            return Times.of_device(started, enqueued, ended, spent)

        return infer

    def close(self) -> None:
        """Gives back everything on the GPU."""
        self._engines.clear()
        with self._cuda.current():
            self._releases.close()

    def _engine(self, cuda_graph: bool) -> tuple[Any, int]:
        """An engine and its stream: with one for all batches it never waits for another."""
        if cuda_graph not in self._engines:
            engine = self._open(self.file, cuda_graph=cuda_graph, check_finite=False)
            self._releases.callback(engine.close)
            with self._cuda.current():
                stream = self._cuda.stream_create()
            self._releases.callback(self._cuda.stream_destroy, stream)
            self._engines[cuda_graph] = engine, stream
        return self._engines[cuda_graph]

    def _pair(self, batch: int, tensor: Any) -> tuple[Any, DeviceArray]:
        """Pinned and device memory for a tensor of `batch` images."""
        from ..engine.arrays import DeviceArray, as_array

        cuda, shape, size = self._cuda, (batch, *tensor.shape), batch * tensor.row_bytes
        address = cuda.malloc(size)
        self._releases.callback(cuda.free, address)
        pinned = cuda.malloc_host(size)
        self._releases.callback(cuda.free_host, pinned)
        return as_array(pinned, shape, tensor.dtype), DeviceArray(address, shape, tensor.dtype)


def trace_engine(artifact: Artifact, images: NDArray[np.float32]) -> Trace:
    """Builds the engine anew with every block's output marked, and runs it.

    Marked tensors keep TensorRT from fusing across them, so this engine may round otherwise than
    the artifact's; which tokens it keeps stays inside the plugin.

    Raises:
        EngineError: it cannot be built or run here.
        ArtifactError: the artifact has no deployable model.
    """
    from ..core.artifact import DEPLOYABLE, ENGINE, TWIN_DEPLOYABLE
    from ..engine import builder
    from ..engine.fit import EngineFile
    from ..engine.stage import find_plugin
    from ..export.graph import block_tensors, load_model, mark, prefix_tokens, save_model
    from ..export.precision import widen
    from ..jmp.trace import Block, Trace

    facts = artifact.engine
    if facts is None:
        raise EngineError("the artifact has no engine")
    twin = artifact.precision == "int8" and facts.precision == "fp16"
    proto = load_model(artifact.verified(TWIN_DEPLOYABLE if twin else DEPLOYABLE))
    places = block_tensors(proto)
    names = [places[0].entry]
    for place in places:
        names += [place.attended, place.out]
    targets = facts.targets if facts.flavour == "rtx" else ()
    options = replace(artifact.engine_options, targets=targets)
    spec = builder.EngineSpec(artifact.batch, artifact.image_shape, options, facts.precision)
    with tempfile.TemporaryDirectory(prefix="jmp-debug-") as name:
        model, plan = Path(name) / DEPLOYABLE, Path(name) / ENGINE
        widen(proto, {*names})
        save_model(mark(proto, dict.fromkeys(names)), model)
        plugin = find_plugin() if artifact.jmp else (None, None)
        built = builder.build_engine(model, plan, facts.flavour, spec, plugin=plugin[0])
        built = replace(built, plugin=plugin[1])
        with engine_runner(EngineFile(plan, facts.flavour, built)) as runner:
            values = infer(runner, images, artifact.batch)
    wide = {name: values[name].astype("float32") for name in names}
    blocks = zip(names[0:-1:2], names[1::2], names[2::2], strict=True)
    return Trace(
        backend=EngineBackend.name,
        choices=None,
        blocks=[Block(wide[entry], wide[mid], None, wide[out]) for entry, mid, out in blocks],
        num_prefix=prefix_tokens(proto),
    )
