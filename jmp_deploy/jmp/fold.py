"""Normalisation of the input inside the model, so that raw 0-255 RGB goes in.

For who cannot divide by a standard deviation per channel: DeepStream's nvinfer knows one scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..core.errors import ModelError
from ..core.images import Preprocess

if TYPE_CHECKING:
    from torch import nn

MEAN, STD = (0.0,) * 3, (1 / 255,) * 3
"""Of `Preprocess` for a model that takes 0-255: images are on [0, 1] before they are normalised."""


def is_folded(preprocess: Preprocess) -> bool:
    """Whether a model with these images normalises them itself."""
    return preprocess.folded is not None


def fold_normalization(model: nn.Module, preprocess: Preprocess) -> Preprocess:
    """Puts (x / 255 - mean) / std of each channel into the patch embedding, in place.

    The convolution w * ((x / 255 - m) / s) + b is (w / (255 s)) * x + (b - sum of w m / s): exact,
    because it pads nothing. Computed in float64.

    Args:
        model: of a family in `families`, not yet folded.
        preprocess: of its images.

    Returns:
        The preprocessing that is left.

    Raises:
        ModelError: its patch embedding is not one convolution of the pixels without padding.
    """
    import torch

    from .families import family_of

    stem: Any = getattr(family_of(model).patch_embed(model), "proj", None)
    plain = isinstance(stem, torch.nn.Conv2d) and (stem.in_channels, stem.groups) == (3, 1)
    if not plain or stem.padding not in ((0, 0), "valid"):
        raise ModelError(
            "the normalisation cannot be folded: the patch embedding is not one convolution of "
            "the image",
            "build without --fold-normalization",
        )
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocess.mean, preprocess.std))
    weight = stem.weight.double()
    shift = (weight * (mean / std)[:, None, None]).sum(dim=(1, 2, 3))
    bias = stem.bias.double() if stem.bias is not None else torch.zeros_like(shift)
    dtype = stem.weight.dtype
    stem.weight = torch.nn.Parameter(
        (weight / (255 * std)[:, None, None]).to(dtype), requires_grad=False
    )
    stem.bias = torch.nn.Parameter((bias - shift).to(dtype), requires_grad=False)
    folded = (preprocess.mean, preprocess.std)
    return replace(preprocess, mean=MEAN, std=STD, folded=folded)
