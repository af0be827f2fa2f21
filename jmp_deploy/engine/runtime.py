"""Run an engine: numpy, a TensorRT flavour and cuda-bindings are all that it takes.

    from jmp_deploy import Engine

    with Engine("artifacts/deit_s") as engine:
        logits = engine.infer(images)["logits"]            # numpy in, numpy out, any batch
        logits = engine.infer(tensor, stream=stream)["logits"]  # GPU in, GPU out, no copy
        call = engine.bind(tensor, {"logits": logits}, stream)  # the same arrays again and again:
        call()                                                  # one launch of a CUDA graph

Threads: an `Engine` may be used by any number of threads at once. Each call takes one of its
`contexts` lanes (stream, buffers, execution contexts) for itself and waits for one where all are
busy. `close` waits for calls that are running; later ones are refused.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import EngineError, JmpDeployError, NonFiniteError
from . import arrays as gpu_arrays
from . import fit
from .api import Tensor
from .arrays import DeviceArray
from .bound import BoundCall
from .cuda import DEFAULT_STREAM, Cuda, open_cuda
from .lane import Lane, Setup
from .loading import LoadedEngine
from .pool import Pool

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Engine:
    """A built engine, ready to run.

    Args:
        path: an artifact's folder, a plan with its manifest beside it, or a plan of which the
            facts are known.
        use_manifest: False runs any plan, unchecked, with a warning.
        cuda_graph: replay each batch size as one CUDA graph, captured when it is first used.
        contexts: lanes, for as many calls of `infer` at once; 0 where `bind` alone is used.
        max_batch: images per inference at most, below the engine's own limit: less memory.
        device: number of the GPU; None takes that of the CUDA context that is current (pycuda's,
            say), else 0. Which context is current in the caller's thread stays as it is.
        eager: TensorRT-RTX compiles the kernels of each batch size before it first runs, so that
            all of its inferences take the same time; by default it does so in the background.
            Without effect on TensorRT.
        check_finite: look for NaN and infinity in results in host memory.
        flavour: "tensorrt" or "rtx"; only for a plan without a manifest.
        plugin: library of our plugin; None finds or builds it where the engine needs it.

    Attributes:
        inputs, outputs: `Tensor`s, with name, dtype and shape of one image.
        batch: (min, opt, max) images of the engine's profile 0.
        max_batch: images per inference; larger batches are split.

    Raises:
        ArtifactError: no engine, no manifest, or a file that is not the one that was built.
        GpuMemoryError: it does not fit; the message names the batch that does.
        EngineError: it does not fit this machine, or cannot be opened. Nothing is left allocated.
    """

    def __init__(
        self,
        path: Path | str | fit.EngineFile,
        *,
        use_manifest: bool = True,
        cuda_graph: bool = True,
        contexts: int = 1,
        max_batch: int | None = None,
        device: int | None = None,
        eager: bool = False,
        check_finite: bool = True,
        flavour: str | None = None,
        plugin: Path | None = None,
    ) -> None:
        self._check_finite = check_finite
        self._lanes: list[Lane] = []
        self._bound: list[BoundCall] = []
        self._idle: list[Lane] = []
        self._free = threading.Condition()
        self._is_closed = False
        self._releases = ExitStack()
        if isinstance(path, fit.EngineFile):
            file = path
        else:
            file = fit.locate(Path(path), use_manifest=use_manifest, flavour=flavour)
        if file.facts is None:
            warnings.warn(
                f"{file.path} is run without a manifest: nothing says whether it fits this machine",
                RuntimeWarning,
                stacklevel=2,
            )
        self.path = file.path
        try:
            self._cuda = open_cuda(device)
            self._loaded = LoadedEngine(
                self._cuda, file, plugin=plugin, cuda_graph=cuda_graph, eager=eager
            )
            self._releases.callback(self._loaded.close)
            self._start(cuda_graph, eager, contexts, max_batch)
        except BaseException as error:
            # Frames of the traceback would keep objects of TensorRT, and GPU memory with them.
            traceback.clear_frames(error.__traceback__)
            with suppress(JmpDeployError):
                self.close()
            raise

    # --- Use ---

    def infer(
        self, inputs: Any, *, stream: Any = None, out: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Runs any number of images.

        Args:
            inputs: name -> array, or the array alone where the engine has one input. An array is
                [B, ...] of the input's own type, B >= 1: numpy's or any other in host memory, or
                on the GPU (PyTorch, CuPy, pycuda, ...). All on one side.
            stream: for arrays on the GPU: the CUDA stream to work on, of any library or as an
                integer handle. The work is then only enqueued: results are there, and arrays are
                no longer needed, when the stream has done it. (For 0, the legacy default stream,
                the work is done on a stream of ours, in the order of 0: TensorRT synchronises more
                there.) Without one, the call waits for the legacy default stream before, and for
                its own work at its end. A stream that is being captured is refused: see `bind`.
            out: for arrays on the GPU: output name -> array to write to. Others are taken from a
                pool.

        Returns:
            output name -> [B, ...]: numpy arrays for arrays in host memory, else what `out`
            names, or a `DeviceArray`. When you let go of one that came from the pool, a later call
            on the same stream may write to its memory: what you enqueued on it must be on that
            stream (without a `stream`: on the legacy default stream), or be done.

        Raises:
            NonFiniteError: NaN or infinity in a result in host memory.
            EngineError: inputs that do not fit, arrays of another GPU, a stream that is being
                captured, or a failure of TensorRT or CUDA.
        """
        if not self._lanes and not self._is_closed:
            raise EngineError("this engine was opened with contexts=0: for `bind` alone")
        named = self._named(inputs)
        sides = {gpu_arrays.on_device(array) for array in named.values()}
        if len(sides) > 1:
            raise EngineError("some inputs are in host memory and some on the GPU", "use one side")
        if True in sides:
            return self._infer_device(named, stream, dict(out or {}))
        if stream is not None or out is not None:
            raise EngineError("`stream` and `out` are for arrays on the GPU")
        return self._infer_host(named)

    def bind(self, inputs: Any, outputs: Mapping[str, Any], stream: Any) -> BoundCall:
        """Prepares one inference on fixed arrays; each call of the result is one launch.

        For the same arrays again and again, a benchmark or a camera's buffers. It costs an
        execution context and scratch memory of its own until it, or the engine, is closed; the
        inference runs twice now, to warm up and to be recorded.

        Args:
            inputs: as for `infer`, on the GPU: [B, ...], B at most `max_batch` and at least
                `batch[0]`. Read at every call, where they are; kept alive.
            outputs: output name -> array on the GPU for every output; written at every call.
            stream: the CUDA stream of every call, not the default stream; it lives as long as the
                call. It is waited for now.

        Raises:
            GpuMemoryError: no room for its scratch memory.
            EngineError: arrays or stream that do not fit, or a failure of TensorRT or CUDA.
        """
        named = self._named(inputs)
        expected = {tensor.name for tensor in self.outputs}
        if outputs.keys() != expected:
            raise EngineError(f"name an array for every output: {self._outputs()}")
        handle = gpu_arrays.stream_handle(stream)
        if handle == DEFAULT_STREAM:
            raise EngineError("bind takes a stream of its own, not the default stream")
        with self._free:
            self._require_open()
        with self._cuda.current():
            self._require_no_capture(handle)
            sources = self._views(self.inputs, named, handle)
            targets = self._views(self.outputs, outputs, handle)
            batch = self._check_batch(sources, targets)
            if not self.batch[0] <= batch <= self.max_batch:
                least = self.batch[0]
                raise EngineError(f"{batch} images: bind takes {least} to {self.max_batch}")
            call = BoundCall(
                self._setup,
                [array.pointer for array in (*sources, *targets)],
                batch,
                handle,
                outputs=dict(outputs),
                holds=(sources, targets),
                siblings=self._bound,
            )
        with self._free:
            self._bound.append(call)
            if not self._is_closed:
                return call
        call.close()
        raise EngineError(f"{self.path} was closed")

    def close(self) -> None:
        """Waits for running calls and frees everything, bound calls too. Twice is no harm."""
        with self._free:
            self._is_closed = True
            self._free.notify_all()
            self._free.wait_for(lambda: len(self._idle) == len(self._lanes))
        releases, self._releases = self._releases, ExitStack()
        self._lanes, self._idle = [], []
        with releases:
            for call in list(self._bound):
                releases.callback(call.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except EngineError:
            if error is None:  # what went wrong first is what the caller must hear of
                raise

    def __del__(self) -> None:
        if hasattr(self, "_pool") and not self._is_closed:  # it was opened
            warnings.warn(f"{self.path} was not closed", ResourceWarning, stacklevel=2)
            with suppress(Exception):
                self.close()

    # --- Opening ---

    def _start(self, cuda_graph: bool, eager: bool, contexts: int, max_batch: int | None) -> None:
        loaded = self._loaded
        self.inputs = tuple(tensor for tensor in loaded.tensors if tensor.is_input)
        self.outputs = tuple(tensor for tensor in loaded.tensors if not tensor.is_input)
        self.batch = loaded.batch
        self.max_batch = self._pick_max_batch(max_batch)
        if contexts < 0:
            raise EngineError(f"{contexts} contexts: none or more")
        setup = self._setup = Setup(
            cuda=self._cuda,
            make_context=loaded.make_context,
            inputs=self.inputs,
            outputs=self.outputs,
            least=self.batch[0],
            most=self.max_batch,
            cuda_graph=cuda_graph and not loaded.captures_itself,
            own_graphs=cuda_graph and loaded.captures_itself and eager,
            last_words=loaded.last_words,
        )
        self._pool = Pool(self._cuda)
        # functions, not methods of ours: an engine that holds itself would be freed late
        self._releases.callback(_close, self._cuda, self._pool)
        with self._cuda.current():
            for _ in range(contexts):
                lane = Lane(setup)
                self._releases.callback(_close, self._cuda, lane)
                self._lanes.append(lane)
                self._idle.append(lane)

    def _pick_max_batch(self, wanted: int | None) -> int:
        least, _, most = self.batch
        if wanted is None:
            return most
        if not least <= wanted <= most:
            raise EngineError(
                f"max_batch {wanted} is outside of the engine's {least} to {most} images"
            )
        return wanted

    # --- Running ---

    def _infer_host(self, named: dict[str, Any]) -> dict[str, NDArray[Any]]:
        arrays = [gpu_arrays.as_host(named[t.name], _what(t)) for t in self.inputs]
        total = self._check(self.inputs, arrays)
        results = {t.name: np.empty((total, *t.shape), t.dtype) for t in self.outputs}
        with self._lane() as lane:
            for start in range(0, total, self.max_batch):
                piece = slice(start, min(start + self.max_batch, total))
                outputs = [results[tensor.name][piece] for tensor in self.outputs]
                lane.run_host([array[piece] for array in arrays], outputs, piece.stop - piece.start)
        if self._check_finite:
            require_finite(results)
        return results

    def _infer_device(
        self, named: dict[str, Any], stream: Any, out: dict[str, Any]
    ) -> dict[str, Any]:
        if unknown := out.keys() - {tensor.name for tensor in self.outputs}:
            raise EngineError(f"no output {sorted(unknown)[0]!r}; the engine has {self._outputs()}")
        with self._lane() as lane:
            given = DEFAULT_STREAM if stream is None else gpu_arrays.stream_handle(stream)
            self._require_no_capture(given)
            work = lane.stream if given == DEFAULT_STREAM else given
            sources = self._views(self.inputs, named, work)
            total = self._check(self.inputs, sources)
            # what ran on lanes for the default stream is ordered by it
            order = DEFAULT_STREAM if given == DEFAULT_STREAM else self._cuda.stream_id(given)
            results = dict(out)
            for tensor in self.outputs:
                if tensor.name not in results:
                    results[tensor.name] = self._new_array(tensor, total, order)
            targets = self._views(self.outputs, results, work)
            self._check_batch(sources, targets)
            producers = {view.stream for view in (*sources, *targets)} | {given}
            for producer in producers:
                if producer is not None:
                    lane.order_after(work, producer)
            for start in range(0, total, self.max_batch):
                lane.run_device(
                    _addresses(self.inputs, sources, start),
                    _addresses(self.outputs, targets, start),
                    min(self.max_batch, total - start),
                    work,
                    (sources, targets),
                )
            if stream is None:
                lane.wait(work)
            elif work != given:
                lane.order_after(given, work)
        return results

    def _views(
        self, tensors: Sequence[Tensor], arrays: Mapping[str, Any], stream: int
    ) -> list[DeviceArray]:
        """The arrays of `tensors`, in their order, in this GPU's memory."""
        found = []
        for tensor in tensors:
            array, writable = arrays[tensor.name], not tensor.is_input
            view = gpu_arrays.as_device(
                array, _what(tensor), self._cuda, stream=stream, writable=writable
            )
            found.append(view)
        return found

    def _new_array(self, tensor: Tensor, rows: int, order: int) -> DeviceArray:
        size = rows * tensor.row_bytes
        address = self._pool.take(size, order)
        release = partial(self._pool.give, address, size, order)
        return DeviceArray(address, (rows, *tensor.shape), tensor.dtype, release=release)

    @contextmanager
    def _lane(self) -> Iterator[Lane]:
        with self._free:
            self._free.wait_for(lambda: self._idle or self._is_closed)
            self._require_open()
            lane = self._idle.pop()
        try:
            with self._cuda.current():
                yield lane
        finally:
            with self._free:
                self._idle.append(lane)
                self._free.notify_all()

    # --- Checks ---

    def _require_open(self) -> None:
        if self._is_closed:
            raise EngineError(f"{self.path} is closed")

    def _require_no_capture(self, stream: int) -> None:
        """Lanes share their memory between calls and wait for one another: a graph that was
        recorded of that would be wrong later, and the attempt would break the caller's capture."""
        if self._cuda.is_capturing(stream):
            raise EngineError(
                "the stream is being captured: nothing was enqueued",
                "make the call with Engine.bind before, and capture that",
            )

    def _check_batch(self, sources: list[DeviceArray], targets: list[DeviceArray]) -> int:
        """The batch of inputs and outputs together."""
        total = self._check(self.inputs, sources)
        if self._check(self.outputs, targets) != total:
            raise EngineError(f"`out` has {len(targets[0])} rows, the inputs have {total}")
        return total

    def _named(self, inputs: Any) -> dict[str, Any]:
        if not isinstance(inputs, Mapping):
            if len(self.inputs) != 1:
                names = ", ".join(tensor.name for tensor in self.inputs)
                raise EngineError(f"name the inputs: {names}")
            return {self.inputs[0].name: inputs}
        expected = {tensor.name for tensor in self.inputs}
        if inputs.keys() != expected:
            raise EngineError(
                f"inputs are {', '.join(sorted(map(str, inputs))) or 'none'}, expected "
                + ", ".join(sorted(expected))
            )
        return dict(inputs)

    def _outputs(self) -> str:
        return ", ".join(tensor.name for tensor in self.outputs)

    @staticmethod
    def _check(tensors: tuple[Tensor, ...], arrays: list[Any]) -> int:
        """Types and shapes; returns the batch, which all share."""
        for tensor, array in zip(tensors, arrays, strict=True):
            what = _what(tensor)
            if np.dtype(array.dtype) != tensor.dtype:
                raise EngineError(f"{what} is {array.dtype}, expected {tensor.dtype}")
            shape = tuple(array.shape)
            if shape[1:] != tensor.shape or not shape or shape[0] < 1:
                raise EngineError(f"{what} has shape {shape}, expected (B >= 1, *{tensor.shape})")
            if shape[0] != arrays[0].shape[0]:
                raise EngineError(f"{what} has {shape[0]} rows, others {arrays[0].shape[0]}")
        return int(arrays[0].shape[0])


def _close(cuda: Cuda, part: Lane | Pool) -> None:
    with cuda.current():
        part.close()


def _what(tensor: Tensor) -> str:
    return f"{'input' if tensor.is_input else 'output'} {tensor.name!r}"


def _addresses(tensors: tuple[Tensor, ...], arrays: list[DeviceArray], start: int) -> list[int]:
    """Where row `start` of each array lies."""
    pairs = zip(tensors, arrays, strict=True)
    return [array.pointer + start * tensor.row_bytes for tensor, array in pairs]


def require_finite(outputs: Mapping[str, NDArray[Any]]) -> None:
    """Raises NonFiniteError, with output and rows, if any of [B, ...] is NaN or infinite.

    The error's `row` is the first that is.
    """
    for name, values in outputs.items():
        if values.dtype.kind != "f":
            continue
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            kind = "NaN" if np.isnan(values[row]).any() else "infinite"
            error = NonFiniteError(
                f"output {name!r} is {kind} for {int(bad.sum())} of {len(values)} images (the "
                f"first: number {row})",
                "compare backends with `python -m jmp_deploy compare DIR`; FP16 may overflow where "
                "`build --precision fp32` does not",
            )
            error.row = row
            raise error
