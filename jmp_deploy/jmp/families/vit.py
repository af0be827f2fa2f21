"""timm's `VisionTransformer` of plain pre-norm blocks: DeiT (distilled too), ViT, DINOv2, SigLIP.

SigLIP pools by the attention of a learnt query: log sizes are added there as in the blocks. It has
no class token; importance is the attention that a token receives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...core.errors import WeightsError
from ..schedule import ModelShape
from . import naming
from .naming import STEM

PARTS = ("blocks", "patch_embed", "embed_dim", "num_prefix_tokens", "global_pool", "norm", "head")
"""What a subclass may have taken away."""

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
    "siglip2_b": ("vit_base_patch16_siglip_224.v2_webli", None),
    "siglip2_so400m": ("vit_so400m_patch14_siglip_224.v2_webli", None),
}


class ViT:
    """See `Family`."""

    model_class = VisionTransformer
    supported = "timm's deit_*, vit_*_patch*, vit_*_dinov2, vit_*_siglip_*"
    short_names = SHORT_NAMES

    def refuse_block(self, block: Any) -> str | None:
        """Why a block is none of the family's, as "is ..." or "has ..."; None if it is one."""
        if type(block) is not Block:
            return f"is a {type(block).__name__}, not a plain pre-norm Block"
        if type(block.attn) is not Attention:
            return f"has {type(block.attn).__name__}, not plain Attention"
        return None

    def refusal(self, model: Any) -> str | None:
        missing = [name for name in PARTS if not hasattr(model, name)]
        if missing:
            return f"it has no {' and no '.join(missing)}"
        if not isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d):
            return f"its patch embedding is {type(model.patch_embed).__name__}, not PatchEmbed"
        pooling = self.pooling(model)
        if pooling is not None and type(pooling) is not AttentionPoolLatent:
            return f"its head pools by {type(pooling).__name__}, which takes no sizes of tokens"
        if getattr(pooling, "pos_embed", None) is not None:
            return "its pooling adds a position embedding to every token of the image"
        for index, block in enumerate(model.blocks.children()):
            if (reason := self.refuse_block(block)) is not None:
                return f"block {index} {reason}"
            for name, module in block.named_modules():
                if (odd := _odd(module)) is not None:
                    return f"block {index} has {odd} at {name}"
        return None

    def shape(self, model: Any) -> ModelShape:
        return shape_of(self, model, qkv_weights=model.blocks[0].attn.qkv.weight.numel())

    def patch_embed(self, model: Any) -> Any:
        return model.patch_embed

    def roots(self, names: Mapping[str, Any]) -> list[str]:
        return naming.roots(names)

    def to_timm(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return naming.to_timm(state)

    def settings(
        self, model: Any, state: dict[str, Tensor], size: tuple[int, int] | None = None
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        if STEM not in state:
            return {}, ()
        own = model.state_dict()
        found, notes = basics(model, state, SHORT_NAMES)

        def say(words: str, **settings: Any) -> None:
            found.update(settings)
            notes.append(words)

        registers = state.get("reg_token", state.get("register_tokens"))
        count = 0 if registers is None else registers.shape[1]
        if count != (0 if model.reg_token is None else model.reg_token.shape[1]):
            say(f"{count} register tokens", reg_tokens=count)
        if (has_class := "cls_token" in state) != (model.cls_token is not None):
            say(f"{'a' if has_class else 'no'} class token", class_token=has_class)
        if "fc_norm.weight" in state and "fc_norm.weight" not in own:
            say("average pooling (it has fc_norm)", global_pool="avg")
        elif "norm.weight" in state and "fc_norm.weight" in own:
            if has_class:
                say("pooling by the class token (it has norm, not fc_norm)", global_pool="token")
            else:
                say("the norm stands before the pooling", fc_norm=False)
        elif not has_class and model.global_pool == "token":
            say("average pooling (it has no class token)", global_pool="avg")
        if ("norm_pre.weight" in state) != ("norm_pre.weight" in own):
            found["pre_norm"] = "norm_pre.weight" in state
        first = {name.removeprefix("blocks.0.") for name in state if name.startswith("blocks.0.")}
        usual = {name.removeprefix("blocks.0.") for name in own if name.startswith("blocks.0.")}
        if first:
            scaled = bool({"ls1.gamma", "gamma_1"} & first)
            if scaled != ("ls1.gamma" in usual):
                say(
                    f"{'with' if scaled else 'no'} layer scale", init_values=1.0 if scaled else None
                )
            for name, setting in (("attn.qkv.bias", "qkv_bias"), ("attn.q_norm.weight", "qk_norm")):
                if (name in first) != (name in usual):
                    say(f"{setting} {name in first}", **{setting: name in first})
        grid = grid_of(model, state, has_class + count, size, found)
        if grid is not None:
            found["img_size"] = image_size(model, grid, found)
        return found, tuple(notes)

    def fit_checkpoint(self, model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # It takes keys out of what it is given.
        fitted = checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True)
        if STEM in fitted and STEM in state and state[STEM].ndim == 4:
            fitted[STEM] = state[STEM]  # weights for another patch size are not resampled
        return fitted

    def channels(self, model: Any) -> int:
        return _channels(model.patch_embed)

    def embed(self, model: Any, images: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(model.patch_drop(x))

    def head(self, model: Any, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        return model.forward_head(model.norm(x), pre_logits=pre_logits)

    def reads_prefix_only(self, model: Any) -> bool:
        return model.global_pool == "token" and model.cls_token is not None

    def pooling(self, model: Any) -> nn.Module | None:
        return getattr(model, "attn_pool", None)

    def rotary(self, model: Any) -> Any:
        return None

    def put(self, model: Any, blocks: nn.Module) -> None:
        model.blocks = blocks

    def passed_over(self, block: Any) -> list[tuple[str, nn.Module]]:
        return [("", block), (".attn", block.attn)]

    def heads(self, block: Any) -> tuple[int, int, float]:
        return block.attn.num_heads, block.attn.head_dim, block.attn.scale

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def run(
        self, block: Any, x: Tensor, mask: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        return block(x) if mask is None else block(x, attn_mask=mask)

    def attend(
        self,
        block: Any,
        x: Tensor,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
        first: int | None = None,
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
    out = products(layer, q, k, v, mask)
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


def products(layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T + mask) v as timm's attention computes it; all [B, H, N, d]."""
    if layer.fused_attn:
        dropout = layer.attn_drop.p if layer.training else 0.0
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=layer.scale
        )
    logits = (q * layer.scale) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits + mask
    return layer.attn_drop(logits.softmax(dim=-1)) @ v


def shape_of(family: Any, model: Any, *, qkv_weights: int) -> ModelShape:
    """The sizes of a model of blocks with `attn` and `mlp`.

    Args:
        qkv_weights: of the projections that the last block computes for all tokens, whoever asks.
    """
    block = model.blocks[0]
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]
    config = getattr(model, "pretrained_cfg", None) or {}
    fixed, per_token = _pooling_macs(family.pooling(model))
    if getattr(model, "pool_include_prefix", True):
        fixed += model.num_prefix_tokens * per_token
    return ModelShape(
        name=config.get("architecture") or type(model).__name__,
        depth=len(model.blocks),
        width=model.embed_dim,
        num_prefix=model.num_prefix_tokens,
        num_patches=model.patch_embed.num_patches,
        attn_dim=block.attn.num_heads * block.attn.head_dim,
        head_dim=block.attn.head_dim,
        attn_weights=linear_weights(block.attn),
        mlp_weights=linear_weights(block.mlp),
        stem_macs=_stem_macs(model.patch_embed),
        head_macs=fixed + sum(linear_weights(head) for head in heads if head is not None),
        head_macs_per_patch=per_token,
        has_class_token=model.cls_token is not None,
        qkv_weights=qkv_weights,
        head_reads_prefix_only=family.reads_prefix_only(model),
    )


def basics(
    model: Any, state: Mapping[str, Tensor], short_names: Mapping[str, tuple[str, int | None]]
) -> tuple[dict[str, Any], list[str]]:
    """What the shapes of a state tell of any model: channels, patches, classes. It has a STEM.

    Raises:
        WeightsError: it is of a model of another width or depth.
    """
    found: dict[str, Any] = {}
    notes: list[str] = []
    stem = state[STEM]
    width, depth = len(stem), 1 + max(map(_block, state), default=-1)
    if width != model.embed_dim or (depth and depth != len(model.blocks)):
        raise WeightsError(
            f"the weights are of a model of width {width} with {depth} blocks, this one has "
            f"width {model.embed_dim} and {len(model.blocks)} blocks",
            f"name the model that they are of{_named_like(width, depth, short_names)}",
        )
    if stem.ndim == 4 and stem.shape[1] != model.patch_embed.proj.weight.shape[1]:
        found["in_chans"] = stem.shape[1]
        notes.append(f"{stem.shape[1]} input channels")
    patch = tuple(stem.shape[2:]) if stem.ndim == 4 else model.patch_embed.patch_size
    if patch != tuple(model.patch_embed.patch_size):
        found["patch_size"] = _one_if_square(patch)
        notes.append(f"patches of {patch[0]}x{patch[1]} pixels")
    classes = 0 if (head := state.get("head.weight")) is None else len(head)
    if classes != model.num_classes:
        words = f"{classes} class{'es' * (classes > 1)}" if classes else "no classifier"
        notes.append(f"{words}: the model gives {'logits' if classes else 'features'}")
        found["num_classes"] = classes
    return found, notes


def grid_of(
    model: Any,
    state: Mapping[str, Tensor],
    prefix: int,
    size: tuple[int, int] | None,
    found: Mapping[str, Any],
) -> tuple[int, int] | None:
    """(rows, columns) of a state's position embeddings; None where it has none, or they do not say.

    Args:
        prefix: class, distillation and register tokens of the state.
        size: (height, width) in pixels, where something else says it.
        found: settings of the state that differ from the model's.

    Raises:
        WeightsError: they are of no square, and nothing says of which rectangle.
    """
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or model.pos_embed is None:
        return None
    return _grid(positions.shape[1], model, prefix, size, _patch(model, found))


def image_size(model: Any, grid: tuple[int, int], found: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of a grid of patches."""
    height, width = _patch(model, found)
    return grid[0] * height, grid[1] * width


def _patch(model: Any, found: Mapping[str, Any]) -> tuple[int, int]:
    patch = found.get("patch_size", model.patch_embed.patch_size)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return height, width


def _pooling_macs(pool: Any) -> tuple[int, int]:
    """MACs of pooling by attention: for one image, and for each token that it reads."""
    if pool is None:
        return 0, 0
    asking = [layer for layer in (pool.q, pool.proj, pool.mlp) if layer is not None]
    fixed = pool.latent_len * sum(map(linear_weights, asking))
    width = pool.num_heads * pool.head_dim
    return fixed, linear_weights(pool.kv) + 2 * pool.latent_len * width


def _channels(stem: nn.Module) -> int:
    """Of the images: what the first convolution takes (a hybrid's `proj` comes after a network)."""
    first = next(module for module in stem.modules() if isinstance(module, nn.Conv2d))
    return int(first.in_channels)


def _stem_macs(stem: Any) -> int:
    """MACs per image of a patch embedding; that of a hybrid holds a whole network, which is run
    without numbers in it and counted by PyTorch."""
    if isinstance(stem, PatchEmbed):
        return int(stem.num_patches * stem.proj.weight.numel())
    empty = deepcopy(stem).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(torch.empty(1, _channels(stem), *stem.img_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def linear_weights(module: nn.Module) -> int:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)


def _odd(module: nn.Module) -> str | None:
    """What a part of a block is, if it is neither PyTorch's nor timm's or holds no plain floats."""
    kind = type(module)
    if not kind.__module__.startswith(("torch.nn.", "timm.")):
        return (
            f"a {kind.__name__} of {kind.__module__} (merge LoRA weights first, with peft: "
            "model.merge_and_unload())"
        )
    for value in module.parameters(recurse=False):
        plain = type(value.data) is Tensor and value.is_floating_point()
        if not plain:
            return f"quantized weights in a {kind.__name__} (take those from before)"
    return None


def _block(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() else -1


def _one_if_square(size: tuple[int, ...]) -> Any:
    return size[0] if len(set(size)) == 1 else size


def _named_like(width: int, depth: int, short_names: Mapping[str, tuple[str, int | None]]) -> str:
    """Short names of models of that size, for a hint."""
    import timm

    names = []
    for name, (timm_name, _) in short_names.items():
        with torch.device("meta"):
            model = timm.create_model(timm_name)
        if (model.embed_dim, len(model.blocks)) == (width, depth):
            names.append(name)
    return f": {', '.join(names)} are of that size" if names else ""


def _grid(
    count: int, model: Any, prefix: int, size: tuple[int, int] | None, patch: tuple[int, ...]
) -> tuple[int, int] | None:
    """(rows, columns) of position embeddings, the one of `size` in pixels if it fits; or None.

    Raises:
        WeightsError: they are of no square, and nothing says of which rectangle.
    """
    usual = tuple(model.patch_embed.grid_size)
    counts = [count - tokens for tokens in (0 if model.no_embed_class else prefix, prefix, 1, 0)]
    asked = (size[0] // patch[0], size[1] // patch[1]) if size else usual
    for grid in (asked, usual):
        if grid[0] * grid[1] in counts[:2]:
            return grid
    for patches in counts:
        side = math.isqrt(max(patches, 0))
        if side and side * side == patches:
            return side, side
    patches = counts[0]
    if size is not None or patches < 2:
        return None
    shapes = [(rows, patches // rows) for rows in range(1, patches) if patches % rows == 0]
    rows, columns = min(shapes, key=lambda shape: (abs(shape[0] - shape[1]), shape))
    height, width = rows * patch[0], columns * patch[1]
    raise WeightsError(
        f"the weights have {patches} position embeddings, of an image that is not square",
        f"say its height and width in pixels, e.g. --img-size {height},{width} or "
        f"--img-size {width},{height}",
    )
