"""The engine: what users run, on a GPU, through our `Engine`."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import ort
from ..core.device import gpus
from ..core.errors import EngineError, engine_errors
from ..core.packages import importable
from .base import Backend, Infer, Opened, Outputs, Times, guarded, infer, noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.artifact import Artifact, Reference
    from ..core.manifest import Precision
    from ..engine.arrays import DeviceArray
    from ..engine.bound import BoundCall
    from ..engine.cuda import Cuda
    from ..engine.fit import EngineFile
    from ..jmp.trace import Trace

OPENING, RUNNING = "the engine cannot be opened", "the engine cannot be run"


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
        from ..engine.fit import HOST_CODE

        if artifact.engine is None:
            return "none was built"
        if not artifact.path(self.file).is_file():
            return f"{self.file} is missing"
        if artifact.engine.embeds_plugin:
            return HOST_CODE
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

        def run(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
            with engine_errors(RUNNING):
                return Outputs(engine.infer({INPUT: images}))

        with engine_errors(OPENING):
            engine = Engine(artifact.folder, cuda_graph=cuda_graph, max_batch=max_batch)
        with engine:
            yield run


def engine_runner(path: Path | EngineFile) -> Any:
    """A Polygraphy runner of an engine: `Engine` itself, so that what is compared and validated is
    what users run. (Polygraphy's own runner lets a plan run code of the host, and finds no CUDA
    runtime in the wheels of CUDA 13.)

    Args:
        path: as `Engine` takes it.

    Raises:
        JmpDeployError: on entering, as `Engine`.
    """
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    from ..engine.runtime import Engine

    class EngineRunner(BaseRunner):  # type: ignore[misc]
        def activate_impl(self) -> None:
            with engine_errors(OPENING):
                self.engine = Engine(path, check_finite=False, eager=True)

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


@dataclass(frozen=True)
class Bound:
    """A prepared inference; (pinned, device) memory of each input and output."""

    call: BoundCall
    inputs: list[tuple[Any, DeviceArray]]
    outputs: list[tuple[Any, DeviceArray]]


class TimedEngine:
    """An engine for timing, from pinned memory to pinned memory, with CUDA events between; opened
    once for each way to launch it that is asked for.

    The copies and the computation are enqueued on one stream; events around each tell what the GPU
    spent on it, and the host's clock what a caller waits. Between the events of the computation is
    one call that was prepared (`Engine.bind`): what Python does there the GPU would wait for, and
    it would count as computation. Copies start when the image is in pinned memory: filling it is
    the caller's work.

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
        """Whether its inferences can be replayed as CUDA graphs; found out by trying."""
        if self._has_graphs is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the answer says it
                self._has_graphs = self._bind(self._engine(True)[0].batch[0], True).call.is_graph
        return self._has_graphs

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """See `base.Timed`."""
        with engine_errors(OPENING):
            return guarded(RUNNING, self._prepare(batch, cuda_graph))

    def _prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        bound, cuda = self._bind(batch, cuda_graph), self._cuda
        call, inputs, outputs = bound.call, bound.inputs, bound.outputs
        stream = self._engine(cuda_graph)[1]
        if cuda_graph and not call.is_graph:
            raise EngineError(f"a batch of {batch} cannot be run as a CUDA graph here")
        with cuda.current():
            events = [cuda.timer_create() for _ in range(4)]
            for event in events:
                self._releases.callback(cuda.event_destroy, event)

        def infer() -> Times:
            with cuda.current():
                started = time.perf_counter()
                cuda.event_record(events[0], stream)
                for host, device in inputs:
                    cuda.copy(device.pointer, host.ctypes.data, device.nbytes, stream)
                cuda.event_record(events[1], stream)
                begun = time.perf_counter()
                call()
                launched = time.perf_counter()
                cuda.event_record(events[2], stream)
                for host, device in outputs:
                    cuda.copy(host.ctypes.data, device.pointer, device.nbytes, stream)
                cuda.event_record(events[3], stream)
                cuda.stream_synchronize(stream)
                ended = time.perf_counter()
                spent = [cuda.elapsed_ms(events[k], events[k + 1]) for k in range(3)]
            return Times.of_device(started, ended, launched - begun, spent)

        return infer

    def free_memory(self) -> int:
        """Bytes that the GPU has left."""
        with self._cuda.current():
            return self._cuda.free_memory()

    def close(self) -> None:
        """Gives back everything on the GPU."""
        streams = [stream for _, stream in self._engines.values()]
        self._engines.clear()
        with self._cuda.current():
            for stream in streams:  # after an error copies may still be on their way
                with suppress(EngineError):
                    self._cuda.stream_synchronize(stream)
            self._releases.close()

    def _bind(self, batch: int, cuda_graph: bool) -> Bound:
        """An inference of noise, with its memory."""
        engine, stream = self._engine(cuda_graph)
        with self._cuda.current():
            inputs = [self._pair(batch, tensor) for tensor in engine.inputs]
            outputs = [self._pair(batch, tensor) for tensor in engine.outputs]
            for tensor, (host, _) in zip(engine.inputs, inputs, strict=True):
                host[...] = noise(batch, tensor.shape)
            call = engine.bind(
                {t.name: device for t, (_, device) in zip(engine.inputs, inputs, strict=True)},
                {t.name: device for t, (_, device) in zip(engine.outputs, outputs, strict=True)},
                stream,
            )
        self._releases.callback(call.close)
        return Bound(call, inputs, outputs)

    def _engine(self, cuda_graph: bool) -> tuple[Any, int]:
        """An engine and its stream: with one for all batches it never waits for another."""
        if cuda_graph not in self._engines:
            engine = self._open(self.file, cuda_graph=cuda_graph, contexts=0, eager=True)
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
    twin = artifact.quantization is not None and facts.precision == "fp16"
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
