"""Small models and node inputs for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from jmp_deploy.jmp.node import GRANULARITIES, IMPORTANCES, TokenReduce
from tests import oracle


def tiny_vit(**options: Any) -> VisionTransformer:
    """A ViT of 16 patch tokens, 6 blocks and 10 classes."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 3}
    return _widened(lambda: VisionTransformer(**{**settings, "num_classes": 10, **options}))


def tiny_eva(**options: Any) -> Eva:
    """The same size with rotated queries and keys, a class token and two registers, as DINOv3's."""
    settings: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6}
    settings |= {"num_heads": 3, "num_classes": 10, "num_reg_tokens": 2, "init_values": 0.5}
    settings |= {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "no_embed_class": True}
    settings |= {"rope_type": "dinov3", "rope_rotate_half": True}
    return _widened(lambda: Eva(**{**settings, **options}))


def _widened(make: Callable[[], Any]) -> Any:
    """With seeded random weights, wider than timm's init: that makes attention so even that every
    selection is a near tie."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def attributes(**changes: Any) -> TokenReduce:
    """Attributes for `inputs`' default sizes."""
    values: dict[str, Any] = {
        "num_prefix": 1,
        "num_keep": 6,
        "num_heads": 3,
        "head_dim": 8,
        "scale": 8**-0.5,
        "tau": 0.3,
    }
    return TokenReduce(**{**values, **changes})


def inputs(
    batch: int = 3,
    patches: int = 11,
    *,
    attrs: TokenReduce,
    channels: int = 20,
    parts: int = 3,
    seed: int = 0,
    dtype: type = np.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random x [B, N, C], qkv [B, N, parts*H*d] and size [B, N]."""
    random = np.random.default_rng(seed)
    tokens = attrs.num_prefix + patches
    width = parts * attrs.num_heads * attrs.head_dim
    x = random.normal(size=(batch, tokens, channels)).astype(dtype)
    qkv = random.normal(size=(batch, tokens, width)).astype(dtype)
    size = random.integers(1, 5, size=(batch, tokens)).astype(dtype)
    return x, qkv, size


def expected(
    x: np.ndarray, qkv: np.ndarray, size: np.ndarray, attrs: TokenReduce
) -> oracle.Reduced:
    """The float64 oracle's answer."""
    values = attrs.to_onnx()
    assert GRANULARITIES == ("token", "sample") and IMPORTANCES == ("class", "received")
    return oracle.token_reduce(x, qkv, size, **values)
