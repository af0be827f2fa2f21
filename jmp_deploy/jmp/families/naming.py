"""Other projects' names for the tensors of a ViT -> timm's.

timm's own `checkpoint_filter_fn` knows the forms that timm's released weights came in (DINOv2, CLIP
within a whole model, RADIO, ...); here are those that users' files have besides: Hugging Face
transformers' ViT, DeiT, DINOv2 and CLIP, and OpenAI's and open_clip's vision tower alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

STEM = "patch_embed.proj.weight"
"""timm's name of the patch projection: it tells where a model stands among other tensors."""

STEMS = (
    (STEM, None),
    ("embeddings.patch_embeddings.projection.weight", None),  # transformers: ViT, DeiT, DINOv2
    ("embeddings.patch_embedding.weight", None),  # transformers: CLIP
    ("conv1.weight", "positional_embedding"),  # OpenAI's CLIP; ResNets have a conv1 too
)
"""(name of the patch projection, a name that has to be beside it)."""

_TRANSFORMERS = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"embeddings\.distillation_token$", "reg_token"),  # its head reads the class token alone
    (r"encoder\.layer\.", "blocks."),
    (r"attention\.attention\.(query|key|value)\.", r"attn.\1."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale(\d)\.lambda1$", r"ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
_TRANSFORMERS_CLIP = (
    (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"embeddings\.class_embedding$", "cls_token"),
    (r"encoder\.layers\.", "blocks."),
    (r"self_attn\.q_proj\.", "attn.query."),
    (r"self_attn\.k_proj\.", "attn.key."),
    (r"self_attn\.v_proj\.", "attn.value."),
    (r"self_attn\.out_proj\.", "attn.proj."),
    (r"layer_norm([12])\.", r"norm\1."),
    (r"^pre_layrnorm\.", "norm_pre."),  # their spelling
    (r"^post_layernorm\.", "norm."),
)
_CLIP = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^positional_embedding$", "pos_embed"),
    (r"^class_embedding$", "cls_token"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"attn\.in_proj_", "attn.qkv."),
    (r"attn\.out_proj\.", "attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"mlp\.c_fc\.", "mlp.fc1."),
    (r"mlp\.c_proj\.", "mlp.fc2."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
)
_NAMINGS = {
    "embeddings.patch_embeddings.projection.weight": _TRANSFORMERS,
    "embeddings.patch_embedding.weight": _TRANSFORMERS_CLIP,
    "conv1.weight": _CLIP,
}


def roots(names: Mapping[str, object]) -> list[str]:
    """The prefixes under which named tensors hold a ViT, "" or with a dot at the end, in order."""
    found = []
    for name in names:
        for stem, sibling in STEMS:
            prefix = name.removesuffix(stem)
            whole = name == stem or (prefix != name and prefix.endswith("."))
            if whole and (sibling is None or prefix + sibling in names):
                found.append(prefix)
    return found


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state with timm's names and shapes; one that has them, or is none of ours, as it is."""
    table = next((table for stem, table in _NAMINGS.items() if stem in state), None)
    if table is None:
        return dict(state)
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [renamed.pop(name.replace("query", part), None) for part in _QKV]
        whole = [part for part in parts if part is not None]
        if len(whole) == len(_QKV):
            renamed[name.replace("query", "qkv")] = torch.cat(whole)
    if table is _CLIP and "head.weight" in renamed:
        renamed["head.weight"] = renamed["head.weight"].transpose(0, 1)
    for name in ("cls_token", "pos_embed"):
        if name in renamed and renamed[name].ndim < 3:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    return renamed


_QKV = ("query", "key", "value")
