"""Execution contexts: one per batch size, what they need, and what to say when memory runs out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import EngineError, GpuMemoryError
from . import api
from .api import Tensor
from .cuda import Cuda

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
        last_words: TensorRT's last error, for messages.
    """

    cuda: Cuda
    make_context: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    least: int
    most: int
    cuda_graph: bool
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
    bound: tuple[int, ...] = ()
    graphs: OrderedDict[tuple[int, ...], int] = field(default_factory=OrderedDict)
    seen: OrderedDict[tuple[int, ...], None] = field(default_factory=OrderedDict)


def make_plan(setup: Setup, batch: int) -> Plan:
    """A context fixed to a batch; scratch memory is still to be given.

    The context is held by the plan alone: a local variable would live on in the traceback of an
    error, and with it GPU memory.

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


def failure(what: str, words: str) -> EngineError:
    """An error with TensorRT's own words; its own class where memory ran out."""
    message = f"{what}: {words}" if words else what
    lower = words.lower()
    if "out of memory" in lower or "outofmemory" in lower or "cudamalloc" in lower:
        return GpuMemoryError(message, "free GPU memory, or take a smaller batch")
    return EngineError(message)


def out_of_memory(setup: Setup) -> GpuMemoryError:
    """Names the largest batch that fits into what is free now."""
    hint = "free GPU memory, or build the engine for smaller batches (--batch)"
    try:
        free = setup.cuda.free_memory()
        needs = {batch: memory_need(setup, batch) for batch in (setup.least, setup.most)}
        message = (
            f"out of GPU memory: batch {setup.most} needs {_mib(needs[setup.most])} per context, "
            f"{_mib(free)} are free"
        )
        if needs[setup.least] > free:
            return GpuMemoryError(f"{message}; not even batch {setup.least} fits", hint)
        low, high = setup.least, setup.most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if memory_need(setup, middle) <= free else (low, middle)
    except EngineError as error:  # so little is left that even asking fails
        return GpuMemoryError(f"out of GPU memory: {error.message}", hint)
    return GpuMemoryError(
        f"{message}; batch {low} fits", f"Engine(..., max_batch={low}), or `run --batch {low}`"
    )


def memory_need(setup: Setup, batch: int) -> int:
    """Device memory of a lane, in bytes: scratch, inputs, outputs."""
    scratch = make_plan(setup, batch).scratch_bytes
    return scratch + batch * sum(tensor.row_bytes for tensor in setup.tensors)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size} bytes"
