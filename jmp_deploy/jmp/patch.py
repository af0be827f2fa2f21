"""JMP in a timm VisionTransformer: `patch` puts it in, `unpatch` takes it out.

What is replaced: `model.blocks`, an `nn.Sequential`, becomes a `JMPBlocks` that holds the same
block modules under the same names (parameters, state dict and hooks stay as they are) and hands
token sizes from block to block. Nothing else of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..core.errors import ModelError
from .node import TokenReduce
from .reduction import token_reduce
from .schedule import DEFAULT, ModelShape, Schedule, check_last_prefix_only, parse
from .torch_op import check_backend, reduce_auto, reduce_cuda

Reduce = Callable[[Tensor, Tensor, Tensor, TokenReduce], tuple[Tensor, Tensor, Tensor]]

REDUCES: dict[str, Reduce] = {
    "auto": reduce_auto,
    "cuda": reduce_cuda,
    "reference": token_reduce,
}
"""The implementation behind each word of `patch(backend=...)`."""


class JMPBlocks(nn.Module):
    """The blocks of a ViT with token reduction in some of them.

    Modifies, against the `nn.Sequential` of timm `Block`s in whose place it stands:
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

    Attributes:
        reductions: block index -> attributes of the reduction in it.
        reduce: the implementation (`patch(backend=...)`); export.py puts in one that becomes a
            single ONNX node, whatever it was.
        last_prefix_only: P if only the P prefix tokens leave the last block, else 0.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        reductions: dict[int, TokenReduce],
        last_prefix_only: int = 0,
        reduce: Reduce = token_reduce,
    ) -> None:
        super().__init__()
        for name, block in blocks.named_children():
            self.add_module(name, block)
        self.train(blocks.training)
        self.original = (blocks,)  # in a tuple, so that it is not registered a second time
        self.reductions = reductions
        self.reduce = reduce
        self.last_prefix_only = last_prefix_only

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, P + K_last, C], or [B, P, C] with `last_prefix_only`."""
        size = x.new_ones(1, x.shape[1])
        mask: Tensor | None = None
        # Not children(): those list a module that stands in two places once.
        for index, block in enumerate(self._modules.values()):
            attributes = self.reductions.get(index)
            if self.last_prefix_only and index == len(self) - 1:
                prefix = self.last_prefix_only
                attended, _ = _attend(block.attn, block.norm1(x), mask, prefix)
                x = x[:, :prefix] + block.drop_path1(block.ls1(attended))
                x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
                continue
            if attributes is None:
                x = block(x) if mask is None else block(x, attn_mask=mask)
                continue
            attended, queries_keys = _attend(block.attn, block.norm1(x), mask)
            x = x + block.drop_path1(block.ls1(attended))
            x, size, log_size = self.reduce(x, queries_keys, size, attributes)
            if attributes.proportional:
                mask = log_size[:, None, None, :]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x

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
            "or take JMP out first with jmp_deploy.jmp.patch.unpatch(model)",
        )


def patch(
    model: nn.Module,
    schedule: Schedule | str = DEFAULT,
    *,
    tau: float | None = None,
    granularity: str = "token",
    proportional: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """Puts JMP into a timm VisionTransformer, in place.

    Args:
        model: VisionTransformer of plain pre-norm blocks: DeiT (distilled too), ViT, DINOv2.
        schedule: as `schedule.parse` takes it ("spread", "paper", "3:138,6:97", a file), or
            resolved for this model already. Where it says `last_prefix_only`, `forward_features`
            returns the P prefix tokens alone: the last block computes no others (the head reads
            no others).
        tau, granularity: see `node.TokenReduce`; tau None takes the schedule's.
        proportional: later attention weighs each token by the patches that it stands for.
        backend: what computes the reductions (see `torch_op`): "cuda" the CUDA kernel, "reference"
            plain PyTorch, "auto" the kernel for CUDA tensors where it can be had. ONNX export is
            the same for all.

    Returns:
        The same model.

    Raises:
        ToolchainError: backend="cuda" without a GPU or a CUDA compiler.
        ModelError: the model cannot be patched, with the reason; or is patched already.
        ScheduleError: the schedule does not fit the model, or leaves out tokens that it needs.
    """
    check_backend(backend)
    shape = model_shape(model)
    if isinstance(schedule, str):
        schedule = parse(schedule, shape)
    check_last_prefix_only(schedule, shape)
    if isinstance(model.blocks, JMPBlocks):
        raise ModelError("the model is patched already", "call jmp_deploy.jmp.patch.unpatch(model)")
    reductions: dict[int, TokenReduce] = {}
    for block, keep in schedule.steps:
        attention = model.blocks[block].attn
        reductions[block] = TokenReduce(
            num_prefix=shape.num_prefix,
            num_keep=keep,
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            tau=schedule.tau if tau is None else tau,
            granularity=granularity,
            importance="class" if shape.has_class_token else "received",
            proportional=proportional,
            selection=schedule.selection,
            merge_weight=schedule.merge_weight,
        )
    prefix = shape.num_prefix if schedule.last_prefix_only else 0
    model.blocks = JMPBlocks(model.blocks, reductions, prefix, REDUCES[backend])
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Takes JMP out again: the very `nn.Sequential` that `patch` found is put back."""
    if isinstance(model.blocks, JMPBlocks):
        model.blocks = model.blocks.original[0]
    return model


def model_shape(model: nn.Module) -> ModelShape:
    """What the schedule needs to know of a model; the gate that unsupported models stop at.

    Raises:
        ModelError: not a VisionTransformer of plain blocks, with what was found instead.
    """
    refuse_unsupported(model)
    stem = model.patch_embed.proj
    block = model.blocks[0]
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]
    patches = model.patch_embed.num_patches
    config = getattr(model, "pretrained_cfg", None) or {}
    return ModelShape(
        name=config.get("architecture") or type(model).__name__,
        depth=len(model.blocks),
        num_prefix=model.num_prefix_tokens,
        num_patches=patches,
        attn_dim=block.attn.num_heads * block.attn.head_dim,
        head_dim=block.attn.head_dim,
        attn_weights=_linear_weights(block.attn),
        mlp_weights=_linear_weights(block.mlp),
        stem_macs=patches * stem.weight.numel(),
        head_macs=sum(_linear_weights(head) for head in heads if head is not None),
        has_class_token=model.cls_token is not None,
        qkv_weights=block.attn.qkv.weight.numel(),
        head_reads_prefix_only=model.global_pool == "token" and model.cls_token is not None,
    )


def refuse_unsupported(model: nn.Module) -> None:
    """Raises ModelError with the reason if JMP cannot be put into this model."""
    kind = type(model).__name__
    hint = "supported: timm VisionTransformer models such as deit_*, vit_*_patch*, vit_*_dinov2"

    def refuse(reason: str) -> ModelError:
        return ModelError(f"{kind} cannot be patched: {reason}", hint)

    if not isinstance(model, VisionTransformer):
        raise refuse("JMP needs one sequence of tokens through all blocks (timm VisionTransformer)")
    if not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
        raise refuse(f"its patch embedding is {type(model.patch_embed).__name__}, not PatchEmbed")
    if getattr(model, "attn_pool", None) is not None:
        raise refuse("its head pools tokens by attention, which would have to know their sizes")
    for index, block in enumerate(model.blocks.children()):
        if type(block) is not Block:
            raise refuse(f"block {index} is a {type(block).__name__}, not a plain pre-norm Block")
        if type(block.attn) is not Attention:
            raise refuse(f"block {index} has {type(block.attn).__name__}, not plain Attention")


def _attend(
    attention: nn.Module, x: Tensor, mask: Tensor | None, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """timm's `Attention.forward`, keeping hold of the queries and keys.

    With `first`, only the first tokens ask: the output is theirs alone, [B, first, C].

    One thing differs, to the same effect: Q, K and V are split off along the last dimension. timm
    reshapes to five dimensions and unbinds, and where our plugin reads the same QKV tensor,
    TensorRT-RTX 1.7 then fails to build ("formats.cpp: CHECK(def_tactic_desc)").

    Returns:
        The attention's output [B, N, C], and the QKV projection as its GEMM left it [B, N, 3*D];
        with QK norm instead the normalised queries and keys side by side [B, N, 2*D].
    """
    batch, tokens, _ = x.shape
    packed = attention.qkv(x)
    shape = (batch, tokens, attention.num_heads, attention.head_dim)
    q, k, v = (part.reshape(shape).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    has_qk_norm = not isinstance(attention.q_norm, nn.Identity)
    q, k = attention.q_norm(q[:, :, :first]), attention.k_norm(k)
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=attention.scale
        )
    else:
        logits = (q * attention.scale) @ k.transpose(-2, -1)
        if mask is not None:
            logits = logits + mask
        out = attention.attn_drop(logits.softmax(dim=-1)) @ v
    out = attention.norm(out.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(x[:, :first]).sigmoid()
    out = attention.proj_drop(attention.proj(out))
    if has_qk_norm and first is None:
        packed = torch.cat(
            [part.transpose(1, 2).reshape(batch, tokens, -1) for part in (q, k)], dim=-1
        )
    return out, packed


def _linear_weights(module: nn.Module) -> int:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)
