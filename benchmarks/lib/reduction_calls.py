"""One reduction as a list of calls on the GPU, by each of its implementations.

Every implementation gets several sets of tensors, taken in turns, so that together they exceed the
second level cache wherever memory allows: a reduction in a model finds x and QKV as the layers
before left them, not in cache from its own last run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jmp_deploy.jmp.kernel import make_params
from jmp_deploy.jmp.node import TokenReduce
from jmp_deploy.jmp.reduction import token_reduce
from jmp_deploy.jmp.torch_op import load_kernel

DEVICE = "cuda"
Call = Callable[[], Any]
MOST_SETS = 20
SET_BYTES = 4 << 30  # of all sets together: the workspace and eager PyTorch need room beside them


@dataclass(frozen=True)
class Case:
    """The first reduction of a model: what it is called, its sizes, its attributes."""

    model: str
    tokens: int
    channels: int
    attributes: TokenReduce

    def bytes_moved(self, batch: int, element: int) -> int:
        """Least traffic: x, the keys, the rows of queries and the sizes read, the outputs written.

        Args:
            batch: B.
            element: bytes of one number.
        """
        a = self.attributes
        inner = a.num_heads * a.head_dim
        rows = 1 if a.importance == "class" else self.tokens
        read = batch * (self.tokens * (self.channels + inner) + rows * inner) + self.tokens
        written = batch * (a.num_prefix + a.num_keep) * (self.channels + 2)
        return (read + written) * element

    def tensors(self, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Random x [B, N, C], qkv [B, N, 3*H*d] and size [1, N] of ones, on the GPU."""
        width = 3 * self.attributes.num_heads * self.attributes.head_dim
        options = {"device": DEVICE, "dtype": dtype}
        x = torch.randn(batch, self.tokens, self.channels, **options)
        qkv = torch.randn(batch, self.tokens, width, **options)
        return x, qkv, torch.ones(1, self.tokens, **options)


def sets_of(case: Case, batch: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Enough sets of inputs to exceed the second level cache twice, within SET_BYTES."""
    first = case.tensors(batch, dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(1, min(MOST_SETS, 2 * cache // size + 1, SET_BYTES // size))
    return [first, *(case.tensors(batch, dtype) for _ in range(count - 1))]


def kernel_calls(case: Case, sets: list[tuple[torch.Tensor, ...]], *, plain: bool) -> list[Call]:
    """Launches of the tuned or the plain kernels, all buffers allocated beforehand."""
    kernel = load_kernel(torch.cuda.get_device_capability())
    x, qkv, size = sets[0]
    kind = str(x.dtype).removeprefix("torch.")
    params = make_params(case.attributes, kind, x.shape, qkv.shape, size.shape)
    scratch = torch.empty(
        kernel.workspace_bytes(params, plain=plain), dtype=torch.uint8, device=DEVICE
    )
    places = case.attributes.num_prefix + case.attributes.num_keep
    calls = []
    for tensors in sets:
        outputs = (
            x.new_empty(len(x), places, case.channels),
            x.new_empty(len(x), places),
            x.new_empty(len(x), places),
        )
        calls.append(_launch(kernel, params, (*tensors, *outputs), scratch, plain))
    return calls


def _launch(
    kernel: Any, params: Any, tensors: tuple[torch.Tensor, ...], scratch: torch.Tensor, plain: bool
) -> Call:
    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        addresses = [tensor.data_ptr() for tensor in tensors]
        kernel.launch(params, addresses, scratch.data_ptr(), stream, plain=plain)

    return call


def pytorch_calls(
    case: Case, sets: list[tuple[torch.Tensor, ...]], *, compiled: bool
) -> list[Call]:
    """`reduction.token_reduce`, eager or through torch.compile for exactly these shapes."""
    function: Callable[..., Any] = token_reduce
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(token_reduce, dynamic=False, fullgraph=True)
    return [_apply(function, tensors, case.attributes) for tensors in sets]


def _apply(
    function: Callable[..., Any], tensors: tuple[torch.Tensor, ...], attributes: TokenReduce
) -> Call:
    def call() -> None:
        with torch.no_grad():
            function(*tensors, attributes)

    return call


def copy_calls(moved: int, count: int) -> list[Call]:
    """`count` copies that move `moved` bytes each: half read, half written."""
    half = max(moved // 2, 1)
    pairs = [
        [torch.empty(half, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        for _ in range(count)
    ]
    return [_copy(*pair) for pair in pairs]


def _copy(target: torch.Tensor, source: torch.Tensor) -> Call:
    return lambda: target.copy_(source)
