"""From a plan file to an engine in memory: checks, plugin, runtime, TensorRT-RTX's kernels."""

from __future__ import annotations

import mmap
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..core.errors import ArtifactError, EngineError, JmpDeployError
from ..core.files import sha256, write_bytes
from ..core.paths import cache_dir
from . import api, fit
from .cuda import Cuda
from .fit import EngineFile, Mismatch
from .lane import failure


class LoadedEngine:
    """A deserialized engine. Its objects of TensorRT are held by attributes of this alone and let
    go in the right order: engine, runtime, logger.

    Args:
        cuda: the CUDA context to load into.
        file: which engine, and its manifest.
        plugin: our plugin's library; None finds or builds it where the engine needs it.
        cuda_graph, eager: for TensorRT-RTX (`api.context_factory`).

    Attributes:
        tensors: inputs and outputs.
        batch: (min, opt, max) images of profile 0.
        captures_itself: TensorRT-RTX does.

    Raises:
        EngineError: it does not fit this machine, or cannot be opened.
    """

    def __init__(
        self, cuda: Cuda, file: EngineFile, *, plugin: Path | None, cuda_graph: bool, eager: bool
    ) -> None:
        self._file = file
        self._cuda = cuda
        self._words: deque[str] = deque(maxlen=8)
        self._logger: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._factory: api.ContextFactory | None = None
        with cuda.current():
            try:
                self._load(plugin, cuda_graph, eager)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold what must go
                self._let_go()
                raise

    def make_context(self) -> Any:
        """An execution context without scratch memory, or None where TensorRT cannot make one."""
        assert self._factory is not None
        return self._factory.make()

    def last_words(self) -> str:
        """What TensorRT complained of last; it is forgotten then."""
        words = self._words[-1].strip().splitlines()[0] if self._words else ""
        self._words.clear()
        return words

    def close(self) -> None:
        """Keeps TensorRT-RTX's kernels for the next process and lets everything go."""
        with self._cuda.current(), ExitStack() as steps:
            steps.callback(self._let_go)
            self._keep_kernels()

    def _let_go(self) -> None:
        self._factory = None
        self._engine = None
        self._runtime = None
        self._logger = None

    def _load(self, plugin: Path | None, cuda_graph: bool, eager: bool) -> None:
        file = self._file
        fit.refuse_host_code(file)
        trt = self._trt = api.load(file.flavour)
        self.captures_itself = api.captures_itself(trt)
        library = _find_plugin(file, plugin)
        if file.facts is not None:
            fit.require_fit(file, self._mismatches(library))
        if library is not None:
            from ..plugin.library import load_plugin

            load_plugin(trt, library)
        self._deserialize()
        self.tensors = api.engine_tensors(trt, self._engine)
        first = next(tensor for tensor in self.tensors if tensor.is_input)
        self.batch = api.profile_batches(self._engine, first.name)
        kernels = self._kernels()
        self._factory = api.context_factory(
            trt,
            self._engine,
            cuda_graph=cuda_graph,
            eager=eager,
            cache=kernels.read_bytes() if kernels and kernels.is_file() else None,
        )

    def _mismatches(self, library: Path | None) -> list[Mismatch]:
        from ..plugin.library import plugin_info

        assert self._file.facts is not None
        return fit.mismatches(
            self._file.facts,
            version=self._trt.__version__,
            gpu=self._cuda.device_name(),
            capability=self._cuda.compute_capability(),
            plugin=None if library is None else plugin_info(library),
        )

    def _deserialize(self) -> None:
        path, hint = self._file.path, self._file.how_to_rebuild
        self._logger = api.make_logger(self._trt, self._words.append)
        self._runtime = api.make_runtime(self._trt, self._logger)
        with _mapped(path) as plan:
            if reason := api.invalidity(self._trt, self._runtime, plan):
                raise EngineError(f"{path} does not fit this machine: {reason}", hint)
            self._engine = api.deserialize(self._runtime, plan)
        if self._engine is None:
            error = failure(f"{path} cannot be opened", self.last_words())
            error.hint = error.hint or hint
            raise error

    def _kernels(self) -> Path | None:
        """Where TensorRT-RTX's compiled kernels of this engine are kept between processes."""
        if not self.captures_itself:
            return None
        name = f"{sha256(self._file.path)[:16]}-{self._trt.__version__}.bin"
        return cache_dir() / "kernels" / name

    def _keep_kernels(self) -> None:
        target = self._kernels()
        if target is None or self._factory is None:
            return
        kernels = api.cache_bytes(self._factory)
        if kernels and not (target.is_file() and target.read_bytes() == kernels):
            with suppress(ArtifactError):  # a full disk is no reason to fail: compiled again
                write_bytes(target, kernels)


@contextmanager
def _mapped(path: Path) -> Iterator[api.Buffer]:
    """A file's content without a copy of it: what is mapped is the system's cache of the file,
    which it takes back at will. A plan read into memory would be there twice while TensorRT
    loads it, which a Jetson's GPU and CPU pay from the same memory. (TensorRT's stream readers
    would do the same through calls of Python, and differ between versions: IStreamReader of 10.0
    is gone in 11.1, IStreamReaderV2 came with 10.7.)"""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            plan.madvise(mmap.MADV_SEQUENTIAL)
            yield plan
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise EngineError(f"{path} cannot be read: {error}") from error


def _find_plugin(file: EngineFile, given: Path | None) -> Path | None:
    """The library to load; without a manifest one that is at hand, since nobody knows."""
    if given is not None or file.has_plugin is False:
        return given
    from ..plugin.library import plugin_library

    try:
        return plugin_library(build=bool(file.has_plugin))
    except JmpDeployError:
        if file.has_plugin:
            raise
        return None
