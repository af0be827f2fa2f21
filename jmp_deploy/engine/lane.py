"""One lane of inference: a stream, buffers, scratch memory, and an execution context per batch.

Every batch size has an execution context of its own, whose shapes never change after the first
use: a CUDA graph refers to its context's state, so a context that served several sizes would
change under its graphs. The scratch memory, the large part of a context, is ours and shared by
all contexts of the lane, which runs one batch at a time.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import EngineError, GpuMemoryError
from . import api
from .api import Tensor
from .arrays import as_array
from .cuda import Cuda

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLANS = 8
"""Batch sizes, and graphs of foreign addresses per size, that a lane keeps; the least recently
used goes."""

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Setup:
    """What all lanes of an engine share.

    Attributes:
        cuda: the CUDA context.
        make_context: an execution context without scratch memory, or None.
        inputs, outputs: of the engine.
        least, most: images per inference.
        cuda_graph: capture graphs; false where the runtime does that itself.
        own_graphs: the runtime captures by itself and compiles first: whether it can is asked. Of
            one that compiles in the background the answer would be no, and wrong soon after.
        last_words: TensorRT's last error, for messages.
    """

    cuda: Cuda
    make_context: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    least: int
    most: int
    cuda_graph: bool
    own_graphs: bool
    last_words: Callable[[], str]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, then outputs."""
        return (*self.inputs, *self.outputs)


@dataclass
class Plan:
    """A context of one batch size; its graphs by the addresses that they hold."""

    context: Any
    scratch_bytes: int = 0
    has_run: bool = False
    bound: tuple[int, ...] = ()
    graphs: OrderedDict[tuple[int, ...], int] = field(default_factory=OrderedDict)
    seen: OrderedDict[tuple[int, ...], None] = field(default_factory=OrderedDict)


class Lane:
    """Runs one batch at a time; not for two threads at once.

    Raises:
        GpuMemoryError: with the batch that fits.
        EngineError: any other failure. Nothing is left allocated.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._cuda = setup.cuda
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._cuda_graph = setup.cuda_graph
        self._scratch: tuple[int, int] | None = None
        self._is_busy = False
        self._in_use: Any = None
        self._releases = ExitStack()
        try:
            self._allocate()
        except GpuMemoryError as error:
            self._quietly_close()
            raise _out_of_memory(setup) from error
        except BaseException:
            self._quietly_close()
            raise

    def _allocate(self) -> None:
        cuda, most = self._cuda, self._setup.most
        self.stream = cuda.stream_create()
        self._releases.callback(cuda.stream_destroy, self.stream)
        self._done = cuda.event_create()
        self._releases.callback(cuda.event_destroy, self._done)
        self._ready = cuda.event_create()
        self._releases.callback(cuda.event_destroy, self._ready)
        self._device: dict[str, int] = {}
        self._pinned: dict[str, NDArray[Any]] = {}
        for tensor in self._setup.tensors:
            size = most * tensor.row_bytes
            address = cuda.malloc(size)
            self._releases.callback(cuda.free, address)
            self._device[tensor.name] = address
            host = cuda.malloc_host(size)
            self._releases.callback(cuda.free_host, host)
            self._pinned[tensor.name] = as_array(host, (most, *tensor.shape), tensor.dtype)
        self._plan(most)

    def close(self) -> None:
        """Waits for the GPU and frees everything, all of it even where one release fails."""
        with self._releases:
            self._releases.callback(self._free_scratch)
            self._releases.callback(self._drop_plans)
            self._settle()

    def _quietly_close(self) -> None:
        with suppress(EngineError):
            self.close()

    # --- Running ---

    def run_host(
        self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]], count: int
    ) -> None:
        """One batch from and to host memory; returns when it is done.

        Args:
            inputs: one array of `count` rows per input of the engine, in its order.
            outputs: likewise; written.
            count: at most `most`; below `least` the last image is repeated.
        """
        setup, cuda = self._setup, self._cuda
        batch = max(count, setup.least)
        self._begin(self.stream)
        try:
            for tensor, rows in zip(setup.inputs, inputs, strict=True):
                pinned = self._pinned[tensor.name]
                pinned[:count] = rows
                pinned[count:batch] = rows[-1]
                target = self._device[tensor.name]
                cuda.copy(target, pinned.ctypes.data, batch * tensor.row_bytes, self.stream)
            own = tuple(self._device[tensor.name] for tensor in setup.tensors)
            self._execute(batch, own, self.stream, is_own=True)
            for tensor in setup.outputs:
                target = self._pinned[tensor.name].ctypes.data
                size = count * tensor.row_bytes
                cuda.copy(target, self._device[tensor.name], size, self.stream)
            cuda.stream_synchronize(self.stream)
        except BaseException:
            self._settle_quietly()
            raise
        self._is_busy, self._in_use = False, None
        for tensor, rows in zip(setup.outputs, outputs, strict=True):
            rows[...] = self._pinned[tensor.name][:count]

    def run_device(
        self, inputs: Sequence[int], outputs: Sequence[int], count: int, stream: int, holds: Any
    ) -> None:
        """Enqueues one batch from and to device memory and returns at once.

        Args:
            inputs: address of the first row per input of the engine; read in place.
            outputs: likewise; written in place.
            count: as for `run_host`. A batch below `least` goes through buffers of the lane.
            stream: handle.
            holds: kept until the lane's next batch. The caller keeps its arrays until the stream
                has done its work, as everywhere in CUDA.
        """
        setup, cuda = self._setup, self._cuda
        batch = max(count, setup.least)
        self._begin(stream)
        try:
            if count == batch:
                self._execute(batch, (*inputs, *outputs), stream, is_own=False)
            else:
                for tensor, source in zip(setup.inputs, inputs, strict=True):
                    self._pad(tensor, source, count, batch, stream)
                own = tuple(self._device[tensor.name] for tensor in setup.tensors)
                self._execute(batch, own, stream, is_own=True)
                for tensor, target in zip(setup.outputs, outputs, strict=True):
                    size = count * tensor.row_bytes
                    cuda.copy(target, self._device[tensor.name], size, stream)
            cuda.event_record(self._done, stream)
        except BaseException:
            self._settle_quietly(stream)
            raise
        self._is_busy, self._in_use = True, holds

    def order_after(self, stream: int, other: int) -> None:
        """Lets `stream` wait for what is on `other` now."""
        if stream != other:
            self._cuda.event_record(self._ready, other)
            self._cuda.wait_event(stream, self._ready)

    def wait(self, stream: int) -> None:
        """Waits for the lane's work on a stream."""
        self._cuda.stream_synchronize(stream)
        self._is_busy, self._in_use = False, None

    def _begin(self, stream: int) -> None:
        """Buffers and scratch memory are used by one stream after the other. That it is the same
        stream as before cannot be told from its handle: another one may have got it since."""
        if self._is_busy:
            self._cuda.wait_event(stream, self._done)

    def _pad(self, tensor: Tensor, source: int, count: int, batch: int, stream: int) -> None:
        row, target = tensor.row_bytes, self._device[tensor.name]
        self._cuda.copy(target, source, count * row, stream)
        for index in range(count, batch):
            self._cuda.copy(target + index * row, source + (count - 1) * row, row, stream)

    def _execute(
        self, batch: int, addresses: tuple[int, ...], stream: int, *, is_own: bool
    ) -> None:
        plan = self._plan(batch)
        graph = plan.graphs.get(addresses)
        if graph is not None:
            plan.graphs.move_to_end(addresses)
            self._cuda.graph_launch(graph, stream)
            return
        self._bind(plan, addresses)
        if not api.enqueue(plan.context, stream):
            raise self._failure(f"TensorRT could not run a batch of {batch}")
        if self._setup.own_graphs and not plan.has_run:
            check_capturable(plan, stream)
        plan.has_run = True
        # A caller's arrays may be new at each call: worth a graph when they come again.
        if self._cuda_graph and (is_own or addresses in plan.seen):
            self._capture(plan, addresses, stream)
        elif not is_own:
            plan.seen[addresses] = None
            while len(plan.seen) > PLANS:
                plan.seen.popitem(last=False)

    def _bind(self, plan: Plan, addresses: tuple[int, ...]) -> None:
        if plan.bound != addresses:
            set_addresses(self._setup, plan, addresses)
            plan.bound = addresses

    def _capture(self, plan: Plan, addresses: tuple[int, ...], stream: int) -> None:
        """Records what was just enqueued once, as TensorRT asks for, on our own stream: the legacy
        default stream cannot be captured. Where that fails, work goes on without graphs."""
        cuda = self._cuda
        cuda.stream_synchronize(stream)
        while len(plan.graphs) >= PLANS:
            cuda.graph_destroy(plan.graphs.popitem(last=False)[1])
        try:
            plan.graphs[addresses] = record(self._setup, plan, self.stream)
        except EngineError as error:
            self._cuda_graph = False
            warn_of_no_graphs(error.message)

    # --- Plans and memory ---

    def _plan(self, batch: int) -> Plan:
        plan = self._plans.get(batch)
        if plan is not None:
            self._plans.move_to_end(batch)
            return plan
        if len(self._plans) >= PLANS:
            self._settle()
            self._drop(self._plans.popitem(last=False)[1])
        plan = make_plan(self._setup, batch)
        try:
            need = plan.scratch_bytes
            if self._scratch is None or need > self._scratch[1]:
                self._drop_plans()
                self._free_scratch()
                self._scratch = (self._cuda.malloc(need), need)
            api.set_scratch(plan.context, *self._scratch)
        except BaseException:
            plan.context = None
            raise
        self._plans[batch] = plan
        return plan

    def _drop_plans(self) -> None:
        if self._plans:
            self._settle()
        with ExitStack() as drops:
            for plan in self._plans.values():
                drops.callback(self._drop, plan)
            self._plans.clear()

    def _drop(self, plan: Plan) -> None:
        with ExitStack() as drops:
            drops.callback(setattr, plan, "context", None)
            for graph in plan.graphs.values():
                drops.callback(self._cuda.graph_destroy, graph)
            plan.graphs.clear()

    def _free_scratch(self) -> None:
        if self._scratch is not None:
            address, self._scratch = self._scratch[0], None
            self._cuda.free(address)

    def _settle(self) -> None:
        """Waits for what the lane has on the GPU."""
        if self._is_busy:
            self._is_busy = False
            self._cuda.event_synchronize(self._done)
        self._in_use = None

    def _settle_quietly(self, stream: int | None = None) -> None:
        """After an error: what was enqueued may still use our buffers, and arrays of the caller."""
        with suppress(EngineError):
            self._cuda.stream_synchronize(self.stream if stream is None else stream)
        self._is_busy, self._in_use = False, None

    def _failure(self, what: str) -> EngineError:
        return failure(what, self._setup.last_words())


# --- Plans: what they need, and what to say when memory runs out ---
# Their contexts are reached through them alone: a local variable would live on in the traceback of
# an error, and GPU memory with it.


def make_plan(setup: Setup, batch: int) -> Plan:
    """A context fixed to a batch; scratch memory is still to be given.

    Raises:
        GpuMemoryError, EngineError: TensorRT cannot make it.
    """
    plan = Plan(None)
    with _one_at_a_time:
        plan.context = setup.make_context()
        if plan.context is None:
            raise failure("TensorRT cannot make an execution context", setup.last_words())
        need = api.set_batch(plan.context, setup.inputs, batch)
    if need is None:
        plan.context = None
        raise failure(f"TensorRT refuses a batch of {batch}", setup.last_words())
    plan.scratch_bytes = need
    return plan


def set_addresses(setup: Setup, plan: Plan, addresses: Sequence[int]) -> None:
    """Says where inputs and outputs lie.

    Raises:
        EngineError: TensorRT refuses an address.
    """
    for tensor, address in zip(setup.tensors, addresses, strict=True):
        if not api.bind(plan.context, tensor.name, address):
            what = f"TensorRT refuses the address of {tensor.name!r}"
            raise failure(what, setup.last_words())


def record(setup: Setup, plan: Plan, stream: int) -> int:
    """The graph of one inference, of a context that was enqueued before, as TensorRT asks for.

    Args:
        stream: of ours, for recording: the legacy default stream cannot be captured.

    Raises:
        EngineError: it cannot be captured. The stream is as it was.
    """
    cuda = setup.cuda
    cuda.begin_capture(stream)
    try:
        captured = api.enqueue(plan.context, stream)
    except BaseException:
        cuda.abandon_capture(stream)
        raise
    if not captured:
        cuda.abandon_capture(stream)
        raise failure("TensorRT cannot be captured", setup.last_words())
    return cuda.end_capture(stream)


def check_capturable(plan: Plan, stream: int) -> bool:
    """Whether a runtime that captures by itself can; a warning where it cannot."""
    if api.can_be_captured(plan.context, stream):
        return True
    warn_of_no_graphs("TensorRT-RTX says that it cannot be captured")
    return False


def warn_of_no_graphs(reason: str) -> None:
    """Work goes on without them."""
    words = f"no CUDA graphs, each inference is enqueued instead: {reason}"
    warnings.warn(words, RuntimeWarning, stacklevel=2)


def failure(what: str, words: str) -> EngineError:
    """An error with TensorRT's own words; its own class where memory ran out."""
    message = f"{what}: {words}" if words else what
    lower = words.lower()
    if "out of memory" in lower or "outofmemory" in lower or "cudamalloc" in lower:
        return GpuMemoryError(message, "free GPU memory, or take a smaller batch")
    return EngineError(message)


def _out_of_memory(setup: Setup) -> GpuMemoryError:
    """Names the largest batch that fits into what is free now."""
    hint = "free GPU memory, or build the engine for smaller batches (--batch)"
    try:
        free = setup.cuda.free_memory()
        needs = {batch: _memory_need(setup, batch) for batch in (setup.least, setup.most)}
        message = (
            f"out of GPU memory: batch {setup.most} needs {mib(needs[setup.most])} per context, "
            f"{mib(free)} are free"
        )
        if needs[setup.least] > free:
            return GpuMemoryError(f"{message}; not even batch {setup.least} fits", hint)
        low, high = setup.least, setup.most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _memory_need(setup, middle) <= free else (low, middle)
    except EngineError as error:  # so little is left that even asking fails
        return GpuMemoryError(f"out of GPU memory: {error.message}", hint)
    return GpuMemoryError(
        f"{message}; batch {low} fits", f"Engine(..., max_batch={low}), or `run --batch {low}`"
    )


def _memory_need(setup: Setup, batch: int) -> int:
    """Device memory of a lane, in bytes: scratch, inputs, outputs."""
    scratch = make_plan(setup, batch).scratch_bytes
    return scratch + batch * sum(tensor.row_bytes for tensor in setup.tensors)


def mib(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size} bytes"
