"""JMP in a timm vision transformer: `patch` puts it in, `unpatch` takes it out.

What is replaced: `model.blocks`, an `nn.Sequential`, becomes a `JMPBlocks` that holds the same
block modules under the same names (parameters, state dict and hooks stay as they are) and hands
token sizes from block to block. Nothing else of the model changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from .families import Family, family_of
from .node import TokenReduce
from .reduction import slots_of, token_reduce
from .schedule import DEFAULT, ModelShape, Schedule, check_last_prefix_only, parse
from .torch_op import check_backend, reduce_auto, reduce_cuda

Reduce = Callable[[Tensor, Tensor, Tensor, TokenReduce], tuple[Tensor, ...]]

REDUCES: dict[str, Reduce] = {
    "auto": reduce_auto,
    "cuda": reduce_cuda,
    "reference": token_reduce,
}
"""The implementation behind each word of `patch(backend=...)`."""


class Left:
    """What is to be known of the tokens that leave the blocks. Who wants it takes it away.

    Attributes:
        mask: [B, 1, 1, N] log sizes, for pooling by attention to add to its logits; None where
            nothing was reduced.
        wanted, layers: blocks, and block -> what left it (see `dense.py`): the tokens [B, N, C],
            and the slots [B, M] int64: the patch token, 0 to K-1, that each patch of the image is
            in or, of the pruned, resembled most.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.wanted: set[int] = set()
        self.layers: dict[int, tuple[Tensor, Tensor | None]] = {}

    def tell(self, pooling: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the pooling, so that its parameters keep their names."""
        mask, self.mask = self.mask, None
        if mask is not None:  # some heads leave the prefix tokens out
            mask = mask[..., -args[0].shape[1] :]
        return args, {**kwargs, "attn_mask": mask}


class JMPBlocks(nn.Module):
    """The blocks of a transformer with token reduction in some of them.

    Modifies, against the `nn.Sequential` of timm's blocks in whose place it stands:
    - a block with a reduction runs its own layers in timm's order, with `token_reduce` between
      the attention residual and the MLP;
    - blocks after the first reduction get log(token size) as attention mask (proportional
      attention), through timm's own `attn_mask` argument;
    - with `last_prefix_only`, the last block computes attention, projection and MLP for the prefix
      tokens alone: P tokens leave it. What the head reads is the same, to rounding. (All tokens
      keep their part in the packed QKV projection: the patches' queries are a twelfth of the
      block, and leaving them out would split one weight matrix, and one GEMM, in two.)

    Blocks before the first reduction run exactly as in timm. Running the blocks one by one from
    outside (`for block in model.blocks`, as `forward_intermediates` and gradient checkpointing do)
    would skip the reduction, so iteration and slices are refused; `children()` lists them. (Not an
    `nn.Sequential` itself: timm's checkpointing takes the children of those.)

    A block with a reduction, and a last one that computes prefix tokens alone, run layer by layer:
    forward hooks on the block and on its attention are not called then (`patch` warns of those that
    are there); hooks on the layers within are.

    What the model is may change after the patch, so it is looked at in each call: with another
    pooling the last block computes all tokens again, and an image of another size is refused.

    Attributes:
        model: the one patched, in a tuple, so that it is not registered as a part of its part.
        family: knows how the blocks are built.
        num_tokens: P + M that enter, which the schedule is for.
        reductions: block index -> attributes of the reduction in it.
        reduce: the implementation (`patch(backend=...)`); export.py puts in one that becomes a
            single ONNX node, whatever it was.
        last_prefix_only: P if only the P prefix tokens leave the last block, else 0.
        restores: `left.layers` say where each patch went.
        left: what the head, or who restores features, is told.
        hooks: to take out with JMP.
    """

    def __init__(
        self,
        blocks: nn.Sequential | nn.ModuleList,
        family: Family,
        reductions: dict[int, TokenReduce],
        last_prefix_only: int = 0,
        reduce: Reduce = token_reduce,
        *,
        model: nn.Module,
        num_tokens: int,
        restores: bool = False,
    ) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.train(blocks.training)
        self.original = (blocks,)  # in a tuple, so that it is not registered a second time
        self.model = (model,)
        self.num_tokens = num_tokens
        self.family = family
        self.reductions = reductions
        self.reduce = reduce
        self.last_prefix_only = last_prefix_only
        self.restores = restores
        self.left = Left()
        pooling = family.pooling(model)
        self.hooks = (
            ()
            if pooling is None
            else (pooling.register_forward_pre_hook(self.left.tell, with_kwargs=True),)
        )

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """[B, N, C] -> [B, P + K_last, C], or [B, P, C] with `last_prefix_only`.

        With `start`, x is what enters that block, and no block before it reduces.
        """
        if start == 0 and x.shape[1] != self.num_tokens:
            raise ModelError(
                f"the schedule is for {self.num_tokens} tokens of an image, {x.shape[1]} came in",
                "take JMP out with jmp_deploy.unpatch(model), give the model its image size "
                "(timm: model.set_input_size(img_size=...)), and patch it again",
            )
        if self.reduce in REDUCES.values() and _is_in_onnx_export():
            raise ModelError(
                "a patched model does not go to ONNX by torch.onnx.export alone",
                "jmp_deploy.build(model, DIR) with the model before it is patched, or "
                "jmp_deploy.export.export.export_onnx(model, FILE, image_size=(H, W))",
            )
        prefix_only = self.last_prefix_only if self._reads_prefix_only() else 0
        size = x.new_ones(1, x.shape[1])
        mask: Tensor | None = None
        rotary = self.family.rotary(self.model[0])
        slots: Tensor | None = None
        # Not children(): those list a module that stands in two places once.
        for index, block in list(enumerate(self._modules.values()))[start:]:
            attributes = self.reductions.get(index)
            rope = None if rotary is None else rotary.rows(index)
            if prefix_only and index == len(self) - 1:
                x, _ = self.family.attend(block, x, mask, rope, prefix_only)
                x = self.family.feed(block, x)
            elif attributes is None:
                x = self.family.run(block, x, mask, rope)
            else:
                x, qkv = self.family.attend(block, x, mask, rope)
                x, size, log_size, *became = self.reduce(x, qkv, size, attributes)
                if attributes.proportional:
                    mask = log_size[:, None, None, :]
                if rotary is not None:
                    rotary = rotary.follow(became[0], attributes.num_keep)
                if self.restores:
                    went = slots_of(became[0], attributes.num_keep)
                    slots = went if slots is None else went.gather(1, slots)
                x = self.family.feed(block, x)
            if index in self.left.wanted:
                self.left.layers[index] = x, slots
        if self.hooks:
            self.left.mask = mask
        return x

    def _reads_prefix_only(self) -> bool:
        return self.family.reads_prefix_only(self.model[0])

    def __iter__(self) -> Iterator[nn.Module]:
        raise self._refusal()

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            raise self._refusal()
        return list(self._modules.values())[index]

    def __len__(self) -> int:
        return len(self._modules)

    def _refusal(self) -> ModelError:
        return ModelError(
            "the blocks of a JMP-patched model cannot be run one by one: tokens are lost between",
            "call the model as a whole, without gradient checkpointing and intermediate features, "
            "or take JMP out first with jmp_deploy.unpatch(model)",
        )


def patch(
    model: nn.Module,
    schedule: Schedule | str = DEFAULT,
    *,
    tau: float | None = None,
    granularity: str = "token",
    proportional: bool = True,
    backend: str = "auto",
    restore: bool = False,
) -> nn.Module:
    """Puts JMP into a timm vision transformer, in place.

    Args:
        model: of a family in `families`: DeiT (distilled too), ViT, DINOv2, DINOv3, SigLIP, EVA-02.
        schedule: as `schedule.parse` takes it ("spread", "paper", "3:138,6:97", a file), or
            resolved for this model already. Where it says `last_prefix_only`, `forward_features`
            returns the P prefix tokens alone: the last block computes no others (the head reads
            no others).
        tau, granularity: see `node.TokenReduce`; tau None takes the schedule's.
        proportional: later attention weighs each token by the patches that it stands for.
        backend: what computes the reductions (see `torch_op`): "cuda" the CUDA kernel, "reference"
            plain PyTorch, "auto" the kernel for CUDA tensors where it can be had. ONNX export is
            the same for all.
        restore: keep what `dense.DenseFeatures` restores the features of every patch by; no token
            is left out in the last block then.

    Returns:
        The same model.

    Raises:
        ToolchainError: backend="cuda" without a GPU or a CUDA compiler.
        ModelError: the model cannot be patched, with the reason; or is patched already.
        ScheduleError: the schedule does not fit the model, or leaves out tokens that it needs.
    """
    check_backend(backend)
    family = family_of(model)
    shape = family.shape(model)
    if restore:
        shape = shape.for_patches()
    if isinstance(schedule, str):
        schedule = parse(schedule, shape)
    check_last_prefix_only(schedule, shape)
    if isinstance(model.blocks, JMPBlocks):
        raise ModelError("the model is patched already", "call jmp_deploy.unpatch(model)")
    reductions: dict[int, TokenReduce] = {}
    follows = restore or family.rotary(model) is not None
    for block, keep in schedule.steps:
        num_heads, head_dim, scale = family.heads(model.blocks[block])
        reductions[block] = TokenReduce(
            num_prefix=shape.num_prefix,
            num_keep=keep,
            num_heads=num_heads,
            head_dim=head_dim,
            scale=scale,
            tau=schedule.tau if tau is None else tau,
            granularity=granularity,
            importance="class" if shape.has_class_token else "received",
            proportional=proportional,
            selection=schedule.selection,
            merge_weight=schedule.merge_weight,
            index=follows,
        )
    prefix = shape.num_prefix if schedule.last_prefix_only else 0
    written_out = {*reductions, *([shape.depth - 1] if prefix else [])}
    _refuse_own_forward(model.blocks, written_out, family)
    blocks = JMPBlocks(
        model.blocks,
        family,
        reductions,
        prefix,
        REDUCES[backend],
        model=model,
        num_tokens=shape.num_prefix + shape.num_patches,
        restores=restore,
    )
    family.put(model, blocks)
    return model


def _is_in_onnx_export() -> bool:
    """Asked for real where torch.export traces with dynamo, which takes PyTorch's own for False.

    (`torch.compiler.assume_constant_result` sets this mark, and imports all of dynamo to do so.)
    """
    return torch.onnx.is_in_onnx_export()


_is_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_own_forward(blocks: nn.Sequential, indices: set[int], family: Family) -> None:
    """Looks for what would be passed over in blocks that run layer by layer.

    Raises:
        ModelError: a forward that was replaced. Hooks are warned of.
    """
    hooked = []
    for index in sorted(indices):
        for name, module in family.passed_over(blocks[index]):
            where = f"blocks.{index}{name}"
            if "forward" in vars(module):
                raise ModelError(
                    f"{where} has a forward of its own, which JMP would pass over",
                    "patch the model before it is replaced, or leave this block out of the "
                    "schedule",
                )
            if module._forward_hooks or module._forward_pre_hooks:
                hooked.append(where)
    if hooked:
        warnings.warn(
            f"forward hooks of {', '.join(hooked)} will not be called: JMP runs the layers within",
            RuntimeWarning,
            stacklevel=3,
        )


def unpatch(model: nn.Module) -> nn.Module:
    """Takes JMP out again: the very `nn.Sequential` that `patch` found is put back."""
    if isinstance(model.blocks, JMPBlocks):
        blocks = model.blocks
        for hook in blocks.hooks:
            hook.remove()
        blocks.family.put(model, blocks.original[0])
    return model


@contextmanager
def without_jmp(model: nn.Module) -> Iterator[None]:
    """While it lasts, a patched model runs as it did before."""
    blocks: Any = model.blocks
    blocks.family.put(model, blocks.original[0])
    try:
        yield
    finally:
        blocks.family.put(model, blocks)


def model_shape(model: nn.Module) -> ModelShape:
    """What a schedule needs to know of a model; the gate that unsupported models stop at.

    Raises:
        ModelError: JMP cannot be put into it, with the reason.
    """
    return family_of(model).shape(model)
