"""The normalisation folded into a model: raw pixels in, the same out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jmp_deploy.core.errors import ModelError
from jmp_deploy.core.images import Preprocess
from jmp_deploy.jmp.fold import fold_normalization, is_folded
from jmp_deploy.jmp.models import load_model, restore_model
from tests.fakes.artifacts import make_artifact
from tests.fakes.models import tiny_vit

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def plain(side: int) -> Preprocess:
    return Preprocess(side, side, side, "bicubic", "center", *IMAGENET)


def test_raw_pixels_give_what_normalised_ones_gave() -> None:
    model = tiny_vit().eval().double()
    before = plain(model.patch_embed.img_size[0])
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (2, 3, before.height, before.width), generator=generator).double()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in IMAGENET)
    with torch.inference_mode():
        expected = model((raw / 255 - mean) / std)
        after = fold_normalization(model, before)
        found = model(raw)
    assert is_folded(after) and not is_folded(before)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_model_is_restored_as_it_was_built(tmp_path) -> None:
    """`compare` and `visualize` make PyTorch's model again, from the weights alone."""
    from tests.fakes.artifacts import RANDOM_WEIGHTS

    loaded = load_model("deit_t", "random")
    folded = fold_normalization(loaded.model, loaded.preprocess)
    artifact = make_artifact(
        tmp_path, name=loaded.name, weights=RANDOM_WEIGHTS, preprocess=folded, side=folded.height
    )
    restored = restore_model(replace(artifact, preprocess=folded))
    assert torch.equal(restored.patch_embed.proj.weight, loaded.model.patch_embed.proj.weight)


def test_a_stem_that_pads_is_refused() -> None:
    model = tiny_vit()
    model.patch_embed.proj.padding = (1, 1)
    with pytest.raises(ModelError, match="cannot be folded"):
        fold_normalization(model, plain(model.patch_embed.img_size[0]))
