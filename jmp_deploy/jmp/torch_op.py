"""JMPTokenReduce as a PyTorch operator: the CUDA kernel without TensorRT.

`torch.ops.jmp_deploy.token_reduce` runs `plugins/token_reduce_kernel.cu` on CUDA tensors and the
reference (`reduction.py`) on CPU tensors. It has a fake kernel, so torch.compile takes it as one
opaque operator; its outputs and its scratch memory come from PyTorch's allocator and it runs on the
current stream, so it may be captured into a CUDA graph. The kernel is compiled for the GPU at hand
at the first call; make that call before a capture, as PyTorch asks for anyway.

`patch(..., backend=...)` chooses between `token_reduce` (the reference) and what is here:

    reference   plain PyTorch operators, wherever the model runs
    cuda        the kernel; an error where there is no GPU, no compiler, or a shape it refuses
    auto        the kernel for CUDA tensors where no gradient is wanted, else the reference; where
                the kernel cannot be had, or has only its slow plain version for a shape, one
                warning and the reference

The operator has no backward: train with the reference.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core.errors import JmpDeployError, ModelError, ScheduleError, ToolchainError
from .kernel import DTYPES, Kernel, kernel_library, make_params
from .node import ATTRIBUTES, GRANULARITIES, IMPORTANCES, SELECTIONS, TokenReduce
from .reduction import token_reduce

BACKENDS = ("auto", "cuda", "reference")
REFERENCE_HINT = 'use patch(..., backend="reference"), or "auto" to fall back by itself'


def check_backend(backend: str) -> None:
    """Raises where `backend` cannot work here; for "cuda" that compiles and loads the kernel.

    Raises:
        ModelError: not one of BACKENDS.
        ToolchainError: "cuda" without a GPU that PyTorch can use, or without a CUDA compiler.
        EngineError: "cuda", and the kernel does not load.
    """
    if backend not in BACKENDS:
        raise ModelError(f"backend={backend!r} is none of {', '.join(BACKENDS)}")
    if backend == "cuda":
        if not torch.cuda.is_available():
            raise ToolchainError(
                'backend="cuda" needs an NVIDIA GPU, and PyTorch finds none', REFERENCE_HINT
            )
        load_kernel(torch.cuda.get_device_capability())


def reduce_cuda(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
) -> tuple[Tensor, ...]:
    """`token_reduce` by the operator; arguments and results as there.

    Raises:
        ModelError: the kernel refuses the shapes, types or attributes.
        ToolchainError, EngineError: as `load_kernel`.
    """
    return _call(x, qkv, size, attributes, fallback=False)


def reduce_auto(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
) -> tuple[Tensor, ...]:
    """`token_reduce` by the kernel where that is possible; arguments and results as there."""
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or qkv.requires_grad)
    if not x.is_cuda or wants_gradient:
        return token_reduce(x, qkv, size, attributes)
    return _call(x, qkv, size, attributes, fallback=True)


def load_kernel(capability: tuple[int, int]) -> Kernel:
    """The kernel for GPUs of this compute capability, compiled if it was not before.

    Tried once per process, so that falling back does not search for a compiler at every call.

    Raises:
        ToolchainError: it cannot be compiled (no compiler, a compile error, no cache).
        EngineError: it cannot be loaded.
    """
    found = _find_kernel(capability)
    if isinstance(found, JmpDeployError):
        raise found
    return found


@cache
def _find_kernel(capability: tuple[int, int]) -> Kernel | JmpDeployError:
    try:
        return Kernel(kernel_library(f"{capability[0]}{capability[1]}"))
    except JmpDeployError as error:
        return error


def _call(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce, *, fallback: bool
) -> tuple[Tensor, ...]:
    if x.shape[1] - attributes.num_prefix < attributes.num_keep:
        raise ScheduleError(
            f"a reduction keeps {attributes.num_keep} patch tokens but only "
            f"{x.shape[1] - attributes.num_prefix} come in",
            "resolve the schedule for the image size that the model is run with",
        )
    outputs = torch.ops.jmp_deploy.token_reduce(
        x,
        qkv,
        size,
        attributes.num_prefix,
        attributes.num_keep,
        attributes.num_heads,
        attributes.head_dim,
        attributes.scale,
        attributes.tau,
        GRANULARITIES.index(attributes.granularity),
        IMPORTANCES.index(attributes.importance),
        attributes.proportional,
        SELECTIONS.index(attributes.selection),
        attributes.merge_weight,
        attributes.index,
        fallback,
    )
    return tuple(outputs)


# --- The operator --------------------------------------------------------------------------------


@torch.library.custom_op("jmp_deploy::token_reduce", mutates_args=(), device_types="cpu")
def _operator(
    x: Tensor,
    qkv: Tensor,
    size: Tensor,
    num_prefix: int,
    num_keep: int,
    num_heads: int,
    head_dim: int,
    scale: float,
    tau: float,
    granularity: int,
    importance: int,
    proportional: bool,
    selection: int,
    merge_weight: float,
    index: bool,
    fallback: bool,
) -> list[Tensor]:
    """On a CPU: the reference. Enumerations are the integers that the ONNX node carries.

    `fallback`: on a GPU, compute by the reference what the kernel does not take.
    """
    attributes = _attributes(
        num_prefix,
        num_keep,
        num_heads,
        head_dim,
        scale,
        tau,
        granularity,
        importance,
        proportional,
        selection,
        merge_weight,
        index,
    )
    return _dense(*token_reduce(x, qkv, size, attributes))


@cache
def _attributes(*values: Any) -> TokenReduce:
    """The operator's numbers, in the order of `TokenReduce`'s fields, as the ONNX node has them."""
    *numbers, index = values
    attributes = dict(zip(ATTRIBUTES, numbers, strict=True))
    attributes["proportional"] = int(attributes["proportional"])
    return TokenReduce.from_onnx(attributes, outputs=4 if index else 3)


@_operator.register_fake
def _(
    x: Tensor, qkv: Tensor, size: Tensor, num_prefix: int, num_keep: int, *rest: object
) -> list[Tensor]:
    return _empty(x, num_prefix, num_keep, index=bool(rest[-2]))


@_operator.register_kernel("cuda")
def _(x: Tensor, qkv: Tensor, size: Tensor, *values: Any) -> list[Tensor]:
    *numbers, fallback = values
    attributes = _attributes(*numbers)
    try:
        return list(launch(x, qkv, size, attributes, tuned_only=fallback))
    except JmpDeployError as error:
        if not fallback:
            raise
        _warn_once(str(error))
        return _dense(*token_reduce(x, qkv, size, attributes))


def launch(
    x: Tensor,
    qkv: Tensor,
    size: Tensor,
    attributes: TokenReduce,
    *,
    tuned_only: bool = False,
) -> tuple[Tensor, ...]:
    """One launch of the kernel on the current stream of x's device.

    Args:
        x, qkv, size, attributes: as for `reduction.token_reduce`; on a GPU, x of a type of
            kernel.DTYPES, the others no wider.
        tuned_only: refuse what only the plain kernels take. They are there to be read; PyTorch's
            own operators are the better way then.

    Returns:
        As `reduction.token_reduce`.

    Raises:
        ModelError: the kernel refuses the shapes, types or attributes.
        ToolchainError, EngineError: as `load_kernel`.
    """
    kind = str(x.dtype).removeprefix("torch.")
    # Under autocast the residual stream is float32 and QKV float16: widening loses nothing.
    widens = all(torch.promote_types(x.dtype, t.dtype) == x.dtype for t in (qkv, size))
    if kind not in DTYPES or not widens:
        raise ModelError(
            "the CUDA kernel takes float32, float16 or bfloat16, with qkv and size no wider than "
            f"x; found x {x.dtype}, qkv {qkv.dtype}, size {size.dtype}",
            REFERENCE_HINT,
        )
    kernel = load_kernel(torch.cuda.get_device_capability(x.device))
    params = make_params(attributes, kind, x.shape, qkv.shape, size.shape)
    if x.shape[0] > 0 and (refusal := kernel.refusal(params)) is not None:
        raise ModelError(f"the CUDA kernel refuses this reduction: {refusal}", REFERENCE_HINT)
    if tuned_only and (reason := kernel.why_plain(params)) is not None:
        raise ModelError(f"only the slow plain CUDA kernels take this: {reason}", REFERENCE_HINT)
    inputs = [_aligned(tensor.to(x.dtype)) for tensor in (x, qkv, size)]
    outputs = _empty(x, attributes.num_prefix, attributes.num_keep, index=attributes.index)
    if x.shape[0] == 0:
        return tuple(outputs)
    workspace = torch.empty(kernel.workspace_bytes(params), dtype=torch.uint8, device=x.device)
    addresses = [tensor.data_ptr() for tensor in (*inputs, *outputs)]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        kernel.launch(params, addresses, workspace.data_ptr(), stream)
    return tuple(outputs)


def _empty(x: Tensor, prefix: int, keep: int, *, index: bool) -> list[Tensor]:
    """Memory for the outputs."""
    batch, tokens, channels = x.shape
    shapes = ((batch, prefix + keep, channels), (batch, prefix + keep), (batch, prefix + keep))
    outputs = [x.new_empty(shape) for shape in shapes]
    return [*outputs, *([x.new_empty((batch, tokens - prefix), dtype=torch.int32)] * index)]


def _aligned(tensor: Tensor) -> Tensor:
    """Dense, and aligned for 16-byte loads: a view may start anywhere."""
    dense = tensor.contiguous()
    return dense if dense.data_ptr() % 16 == 0 else dense.clone()


def _dense(*outputs: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in outputs]


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"jmp_deploy computes a token reduction by plain PyTorch, not by its CUDA kernel: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
