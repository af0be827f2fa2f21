"""timm's `Eva`: pre-norm blocks whose queries and keys are rotated by their position.

DINOv3, EVA-02, Perception Encoder, RoPE-ViT; without rotation EVA and EVA-CLIP.

The table of rotations has a row for each patch of the image. Kept tokens take their rows along:
`Rotary` knows where each token stands, from the reductions' `index`, and gathers the rows by it.

Importance and similarity are judged by rotated queries and keys, as attention itself sees them:
tokens whose rotated keys are alike are alike to every query, so that one can stand for the other,
and importance is the model's own attention. Keys from before the rotation would also call two
tokens alike that look alike in different places, and the one that goes takes its place with it.
(Reasoned, not measured: no weights of these models were at hand.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MethodType
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import Tensor, nn

from ...core.errors import ModelError
from ..reduction import positions_of
from ..schedule import ModelShape
from . import naming
from .vit import ViT, basics, grid_of, image_size, products, shape_of

SHORT_NAMES: dict[str, tuple[str, int | None]] = {
    "dinov3_s": ("vit_small_patch16_dinov3", 224),
    "dinov3_b": ("vit_base_patch16_dinov3", 224),
    "dinov3_l": ("vit_large_patch16_dinov3", 224),
    "eva02_s": ("eva02_small_patch14_224", None),
    "eva02_b": ("eva02_base_patch14_224", None),
    "pe_core_t": ("vit_pe_core_tiny_patch16_384", None),
    "pe_core_s": ("vit_pe_core_small_patch16_384", None),
    "pe_core_b": ("vit_pe_core_base_patch16_224", None),
    "pe_core_l": ("vit_pe_core_large_patch14_336", None),
}


@dataclass(frozen=True)
class Rotary:
    """Rotations of the patch tokens that are left.

    Attributes:
        table: for every patch of the image, sines and cosines side by side: [M, 2d], one for all
            blocks and heads, or [depth, H, M, 2d].
        stand: [B, K] int64, the patch that each token left stands at; None: all of them do.
    """

    table: Tensor
    stand: Tensor | None = None

    def rows(self, block: int) -> Tensor:
        """Of the tokens left, as timm's blocks take them: [M, 2d] or [H, M, 2d]; of samples that
        kept different tokens [B, 1, K, 2d] or [B, H, K, 2d]."""
        if self.table.ndim == 2:
            return self._shared
        rows = self._gather(self.table[block])
        return rows if self.stand is None else rows.transpose(0, 1)

    def follow(self, index: Tensor, keep: int) -> Rotary:
        """After a reduction to `keep` patch tokens that gave `index` (see `node.py`)."""
        before = self.stand
        if before is None:
            before = torch.arange(self.table.shape[-2], device=index.device)[None]
        return replace(self, stand=positions_of(index, keep, before))

    @cached_property
    def _shared(self) -> Tensor:
        rows = self._gather(self.table)
        return rows if self.stand is None else rows.unsqueeze(1)

    def _gather(self, table: Tensor) -> Tensor:
        if self.stand is None:
            return table
        rows = table.index_select(-2, self.stand.flatten())
        return rows.reshape(*table.shape[:-2], *self.stand.shape, table.shape[-1])


class Rope(ViT):
    """See `Family`; what is not here is as in `ViT`."""

    model_class = Eva
    supported = "timm's dinov3, eva02_*, vit_pe_*, vit_*_rope_*"
    short_names = SHORT_NAMES

    def refuse_block(self, block: Any) -> str | None:
        if type(block) is not EvaBlock:
            return f"is {_named(block)}, not a plain pre-norm EvaBlock"
        if type(block.attn) not in (EvaAttention, AttentionRope):
            return f"has {type(block.attn).__name__}, not EvaAttention or AttentionRope"
        if getattr(block.attn, "num_kv_groups", 1) > 1:
            return "has fewer heads of keys than of queries"
        return None

    def refusal(self, model: Any) -> str | None:
        if (reason := super().refusal(model)) is not None:
            return reason
        if getattr(type(model), "forward_features", None) is not Eva.forward_features:
            return "it has a forward_features of its own, which JMP would pass over"
        return None

    def shape(self, model: Any) -> ModelShape:
        attn = model.blocks[0].attn
        # With a projection of their own the queries of the last block are computed for the prefix.
        entering = [attn.qkv] if attn.qkv is not None else [attn.k_proj, attn.v_proj]
        return shape_of(self, model, qkv_weights=sum(layer.weight.numel() for layer in entering))

    def to_timm(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(state)  # `fit_checkpoint` knows the names of all that `Eva` has weights of

    def settings(
        self, model: Any, state: dict[str, Tensor], size: tuple[int, int] | None = None
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        if naming.STEM not in state:
            return {}, ()
        found, notes = basics(model, state, SHORT_NAMES)
        grid = grid_of(model, state, model.num_prefix_tokens, size, found)
        if grid is not None:
            found["img_size"] = image_size(model, grid, found)
        return found, tuple(notes)

    def fit_checkpoint(self, model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        fitted = checkpoint_filter_fn(dict(state), model)
        stem = state.get(naming.STEM)
        if stem is not None and stem.ndim == 4:
            fitted[naming.STEM] = stem  # weights for another patch size are not resampled
        return fitted

    def embed(self, model: Any, images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        if model.dynamic_img_size and tuple(x.shape[1:3]) != tuple(model.patch_embed.grid_size):
            raise ModelError(
                f"the image has {x.shape[1]}x{x.shape[2]} patches, the schedule is for "
                "{}x{}".format(*model.patch_embed.grid_size),
                "take JMP out with jmp_deploy.unpatch(model), give the model its image size "
                "(timm: model.set_input_size(img_size=...)), and patch it again",
            )
        return model.norm_pre(model._pos_embed(x)[0])

    def rotary(self, model: Any) -> Rotary | None:
        return None if model.rope is None else Rotary(_table(model))

    def put(self, model: Any, blocks: nn.Module) -> None:
        model.blocks = blocks
        if isinstance(blocks, nn.ModuleList):  # timm's own
            vars(model).pop("forward_features", None)
        else:
            model.forward_features = MethodType(_forward_features, model)

    def run(
        self, block: Any, x: Tensor, mask: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        return block(x, rope=rope, attn_mask=mask)

    def attend(
        self,
        block: Any,
        x: Tensor,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
        first: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        attended, qkv = attention(block.attn, block.norm1(x), mask, rope, first)
        own = x if first is None else x[:, :first]
        return own + block.drop_path1(_scaled(attended, block.gamma_1)), qkv

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return x + block.drop_path2(_scaled(block.mlp(block.norm2(x)), block.gamma_2))


@contextmanager
def constant_rotations(model: nn.Module) -> Iterator[None]:
    """The tables as numbers of now: an exporter would write down how to compute them, and what
    lowers precision would have sines of large angles computed in 16 bits."""
    turning = [m for m in model.modules() if isinstance(m, Eva) and m.rope is not None]
    for each in turning:
        each.rope.get_embed = partial(_given, _table(each).detach().clone())
    try:
        yield
    finally:
        for each in turning:
            del each.rope.get_embed


def _given(table: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return table


def attention(
    layer: Any,
    x: Tensor,
    mask: Tensor | None = None,
    rope: Tensor | None = None,
    first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """timm's `EvaAttention.forward` and `AttentionRope.forward`, keeping hold of queries and keys.

    Args:
        layer: either of them.
        x: [B, N, C].
        mask: added to the logits.
        rope: rows of `Rotary`.
        first: only the first tokens ask, prefix tokens all: the output is [B, first, C].

    Returns:
        The attention's output [B, N, C], and the queries and keys that it compared, [B, N, 2*D]
        (queries of all heads first); where it compares what the projection gave, that, [B, N, 3*D].
    """
    q, k, v, packed = _project(layer, x, first)
    q, k = layer.q_norm(q), layer.k_norm(k)
    if first is None and (packed is None or rope is not None):
        # Turned at once, and laid out as the reduction reads them.
        both = _turned(layer, torch.cat((q, k), dim=2), rope)
        q, k = both.chunk(2, dim=2)
        packed = both.flatten(2)
    else:
        k = _turned(layer, k, rope)
    out = products(layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    out = layer.norm(out.transpose(1, 2).flatten(2))
    if layer.gate is not None:
        out = out * layer.gate(x[:, :first]).sigmoid()
    return layer.proj_drop(layer.proj(out)), k if packed is None else packed


def _project(
    layer: Any, x: Tensor, first: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries [B, N or first, H, d], keys and values [B, N, H, d], and what they are parts of where
    no norm comes between."""
    packed = None
    if layer.qkv is None:
        parts = layer.q_proj(x[:, :first]), layer.k_proj(x), layer.v_proj(x)
    else:
        biases = [getattr(layer, name, None) for name in ("q_bias", "k_bias", "v_bias")]
        if biases[0] is None:
            packed = layer.qkv(x)
        elif layer.qkv_bias_separate:
            packed = layer.qkv(x) + torch.cat(biases)
        else:
            packed = nn.functional.linear(x, layer.qkv.weight, torch.cat(biases))
        q, k, v = packed.chunk(3, dim=-1)
        parts = q[:, :first], k, v
        if not isinstance(layer.q_norm, nn.Identity):
            packed = None
    return *(part.unflatten(-1, (-1, layer.head_dim)) for part in parts), packed


def _turned(layer: Any, heads: Tensor, rope: Tensor | None) -> Tensor:
    """[B, N, heads, d] with the patch tokens rotated."""
    if rope is None:
        return heads
    # [M or K, H or 1, 2d], with a batch in front where samples kept different tokens.
    rows = (rope[None] if rope.ndim == 2 else rope).transpose(-3, -2)
    if rows.shape[-2] not in (1, heads.shape[2]):  # of each head, here queries' and keys'
        rows = torch.cat((rows, rows), dim=-2)
    prefix = layer.num_prefix_tokens
    turned = apply_rot_embed_cat(heads[:, prefix:], rows, half=layer.rotate_half)
    return torch.cat((heads[:, :prefix], turned), dim=1)


def _forward_features(
    model: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm's `Eva.forward_features` with the blocks called as one, as in its VisionTransformer."""
    if attn_mask is not None or is_causal or model.grad_checkpointing:
        raise ModelError(
            "a JMP-patched model takes no attention mask and no gradient checkpointing",
            "call it with images alone, or take JMP out first with jmp_deploy.unpatch(model)",
        )
    return model.norm(model.blocks(Rope().embed(model, x)))


def _table(model: Any) -> Tensor:
    """As timm's model takes it: see `Rotary`."""
    if not model.dynamic_img_size and hasattr(model.rope, "feat_shape"):
        return model.rope.get_embed()
    return model.rope.get_embed(shape=model.patch_embed.grid_size)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _named(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
