"""timm's `VisionTransformer` of plain pre-norm blocks: DeiT (distilled too), ViT, DINOv2."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..schedule import ModelShape

STEM = "patch_embed.proj.weight"

SHORT_NAMES: dict[str, tuple[str, int | None]] = {
    "deit_t": ("deit_tiny_patch16_224", None),
    "deit_s": ("deit_small_patch16_224", None),
    "deit_b": ("deit_base_patch16_224", None),
    "deit_t_distilled": ("deit_tiny_distilled_patch16_224", None),
    "deit_s_distilled": ("deit_small_distilled_patch16_224", None),
    "deit_b_distilled": ("deit_base_distilled_patch16_224", None),
    "deit3_s": ("deit3_small_patch16_224", None),
    "deit3_b": ("deit3_base_patch16_224", None),
    "vit_t": ("vit_tiny_patch16_224", None),
    "vit_s": ("vit_small_patch16_224", None),
    "vit_b": ("vit_base_patch16_224", None),
    "vit_l": ("vit_large_patch16_224", None),
    # Trained at 518 pixels; used at 224 (256 patch tokens) unless --img-size says otherwise.
    "dinov2_s": ("vit_small_patch14_dinov2", 224),
    "dinov2_b": ("vit_base_patch14_dinov2", 224),
    "dinov2_l": ("vit_large_patch14_dinov2", 224),
    "dinov2_g": ("vit_giant_patch14_dinov2", 224),
    "dinov2_s_reg": ("vit_small_patch14_reg4_dinov2", 224),
    "dinov2_b_reg": ("vit_base_patch14_reg4_dinov2", 224),
    "dinov2_l_reg": ("vit_large_patch14_reg4_dinov2", 224),
    "dinov2_g_reg": ("vit_giant_patch14_reg4_dinov2", 224),
}


class ViT:
    """See `Family`."""

    model_class = VisionTransformer
    supported = "timm's deit_*, vit_*_patch*, vit_*_dinov2"
    short_names = SHORT_NAMES

    def refusal(self, model: Any) -> str | None:
        if not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
            return f"its patch embedding is {type(model.patch_embed).__name__}, not PatchEmbed"
        if getattr(model, "attn_pool", None) is not None:
            return "its head pools tokens by attention, which would have to know their sizes"
        for index, block in enumerate(model.blocks.children()):
            if type(block) is not Block:
                return f"block {index} is a {type(block).__name__}, not a plain pre-norm Block"
            if type(block.attn) is not Attention:
                return f"block {index} has {type(block.attn).__name__}, not plain Attention"
        return None

    def shape(self, model: Any) -> ModelShape:
        block = model.blocks[0]
        heads = [getattr(model, name, None) for name in ("head", "head_dist")]
        patches = model.patch_embed.num_patches
        config = getattr(model, "pretrained_cfg", None) or {}
        return ModelShape(
            name=config.get("architecture") or type(model).__name__,
            depth=len(model.blocks),
            width=model.embed_dim,
            num_prefix=model.num_prefix_tokens,
            num_patches=patches,
            attn_dim=block.attn.num_heads * block.attn.head_dim,
            head_dim=block.attn.head_dim,
            attn_weights=_linear_weights(block.attn),
            mlp_weights=_linear_weights(block.mlp),
            stem_macs=_stem_macs(model.patch_embed),
            head_macs=sum(_linear_weights(head) for head in heads if head is not None),
            has_class_token=model.cls_token is not None,
            qkv_weights=block.attn.qkv.weight.numel(),
            head_reads_prefix_only=model.global_pool == "token" and model.cls_token is not None,
        )

    def patch_embed(self, model: Any) -> Any:
        return model.patch_embed

    def fit_checkpoint(self, model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # It takes keys out of what it is given.
        fitted = checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True)
        if STEM in fitted and STEM in state and state[STEM].ndim == 4:
            fitted[STEM] = state[STEM]  # weights for another patch size are not resampled
        return fitted

    def embed(self, model: Any, images: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(model.patch_drop(x))

    def head(self, model: Any, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        return model.forward_head(model.norm(x), pre_logits=pre_logits)

    def heads(self, block: Any) -> tuple[int, int, float]:
        return block.attn.num_heads, block.attn.head_dim, block.attn.scale

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def run(self, block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return block(x) if mask is None else block(x, attn_mask=mask)

    def attend(
        self, block: Any, x: Tensor, mask: Tensor | None = None, first: int | None = None
    ) -> tuple[Tensor, Tensor]:
        attended, qkv = attention(block.attn, block.norm1(x), mask, first)
        own = x if first is None else x[:, :first]
        return own + block.drop_path1(block.ls1(attended)), qkv

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def attention(
    layer: Any, x: Tensor, mask: Tensor | None = None, first: int | None = None
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
    packed = layer.qkv(x)
    shape = (batch, tokens, layer.num_heads, layer.head_dim)
    q, k, v = (part.reshape(shape).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    has_qk_norm = not isinstance(layer.q_norm, nn.Identity)
    q, k = layer.q_norm(q[:, :, :first]), layer.k_norm(k)
    if layer.fused_attn:
        dropout = layer.attn_drop.p if layer.training else 0.0
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=layer.scale
        )
    else:
        logits = (q * layer.scale) @ k.transpose(-2, -1)
        if mask is not None:
            logits = logits + mask
        out = layer.attn_drop(logits.softmax(dim=-1)) @ v
    out = layer.norm(out.transpose(1, 2).flatten(2))
    gate = getattr(layer, "gate", None)
    if gate is not None:
        out = out * gate(x[:, :first]).sigmoid()
    out = layer.proj_drop(layer.proj(out))
    if has_qk_norm and first is None:
        packed = torch.cat(
            [part.transpose(1, 2).reshape(batch, tokens, -1) for part in (q, k)], dim=-1
        )
    return out, packed


def _stem_macs(stem: Any) -> int:
    """MACs per image of a patch embedding; that of a hybrid holds a whole network, which is run
    without numbers in it and counted by PyTorch."""
    if isinstance(stem, PatchEmbed):
        return int(stem.num_patches * stem.proj.weight.numel())
    empty = deepcopy(stem).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(torch.empty(1, 3, *stem.img_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def _linear_weights(module: nn.Module) -> int:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)
