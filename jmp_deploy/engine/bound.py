"""A prepared call: everything that `Engine.infer` does at each call done once, beforehand."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from ..core.errors import EngineError, GpuMemoryError
from . import api
from .lane import (
    Plan,
    Setup,
    check_capturable,
    failure,
    make_plan,
    mib,
    record,
    set_addresses,
    warn_of_no_graphs,
)


class BoundCall:
    """One inference on fixed arrays and a fixed stream; calling it launches one CUDA graph (or
    enqueues the kernels, where there is none) and returns at once.

    It has an execution context and scratch memory of its own and shares nothing with
    `Engine.infer`. On a stream that is being captured it enqueues TensorRT's kernels into that
    capture; that graph of yours uses this call's memory, so it runs neither beside it nor after it
    was closed. For one thread at a time, like a stream. Made by `Engine.bind`.

    Attributes:
        outputs: output name -> array that the results are written to.
        is_graph: calls launch a graph, ours or TensorRT-RTX's own (there it is known where the
            engine was opened with `eager` alone).
    """

    def __init__(
        self,
        setup: Setup,
        addresses: Sequence[int],
        batch: int,
        stream: int,
        *,
        outputs: dict[str, Any],
        holds: Any,
        siblings: list[BoundCall],
    ) -> None:
        self.outputs = outputs
        self._setup, self._cuda, self._stream = setup, setup.cuda, stream
        self._holds, self._siblings = holds, siblings
        self._releases = ExitStack()
        self._plan: Plan | None = None
        self._launch: Callable[[], None] = self._enqueue
        try:
            self._prepare(addresses, batch)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold GPU memory
            with suppress(EngineError):
                self._releases.close()
            self._let_go()
            raise

    def __call__(self) -> None:
        """Enqueues the inference.

        Raises:
            EngineError: TensorRT or CUDA failed, or the call was closed.
        """
        cuda = self._cuda
        if cuda.is_current():
            if cuda.is_capturing(self._stream):
                self._record()
            else:
                self._launch()
        else:
            with cuda.current():
                self()

    def close(self) -> None:
        """Waits for the stream and frees everything. Twice is no harm."""
        self._launch = self._enqueue
        releases, self._releases = self._releases, ExitStack()
        with self._cuda.current():
            releases.close()
        self._holds = None
        if self in self._siblings:
            self._siblings.remove(self)

    def __enter__(self) -> BoundCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, addresses: Sequence[int], batch: int) -> None:
        setup, cuda, releases = self._setup, self._cuda, self._releases
        plan = self._plan = make_plan(setup, batch)
        need = plan.scratch_bytes
        try:
            scratch = cuda.malloc(need)
        except GpuMemoryError as error:
            raise GpuMemoryError(
                f"out of GPU memory: a bound call of batch {batch} needs {mib(need)} of scratch "
                f"memory, {mib(cuda.free_memory())} are free",
                "close bound calls that are no longer used, or bind a smaller batch",
            ) from error
        releases.callback(cuda.free, scratch)
        releases.callback(self._let_go)
        api.set_scratch(plan.context, scratch, need)
        set_addresses(setup, plan, addresses)
        self._enqueue()  # a capture needs one before; and TensorRT-RTX compiles now, not later
        releases.callback(cuda.stream_synchronize, self._stream)
        cuda.stream_synchronize(self._stream)
        self.is_graph = setup.own_graphs and check_capturable(plan, self._stream)
        if setup.cuda_graph:
            self._capture(plan)

    def _capture(self, plan: Plan) -> None:
        cuda = self._cuda
        stream = cuda.stream_create()
        self._releases.callback(cuda.stream_destroy, stream)
        try:
            graph = record(self._setup, plan, stream)
        except EngineError as error:
            warn_of_no_graphs(error.message)
            return
        self._releases.callback(cuda.graph_destroy, graph)
        self._releases.callback(cuda.stream_synchronize, self._stream)
        self._launch = cuda.graph_launcher(graph, self._stream)
        self.is_graph = True

    def _record(self) -> None:
        if self._plan is not None and not api.can_be_captured(self._plan.context, self._stream):
            raise EngineError("TensorRT-RTX says that it cannot be captured")
        self._enqueue()

    def _enqueue(self) -> None:
        if self._plan is None:
            raise EngineError("this bound call is closed")
        if not api.enqueue(self._plan.context, self._stream):
            raise failure("TensorRT could not run a bound call", self._setup.last_words())

    def _let_go(self) -> None:
        plan, self._plan = self._plan, None
        if plan is not None:
            plan.context = None
