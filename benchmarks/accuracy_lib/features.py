"""Features of a model, dense or with a rule of token reduction in it, and what they cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from jmp_deploy.files import atomic_path
from jmp_deploy.models import LoadedModel
from jmp_deploy.patch import patch, unpatch
from jmp_deploy.schedule import ModelShape, Schedule, resolve

from .data import Samples, batch
from .rules import Rule

BATCH = 50


@contextmanager
def reduced(
    model: nn.Module, schedule: Schedule, rule: Rule, *, proportional: bool = True
) -> Iterator[nn.Module]:
    """The model with `rule` in the blocks of `schedule`; dense again on leaving."""
    patch(model, schedule, proportional=proportional)
    try:
        model.blocks.reduce = rule
        yield model
    finally:
        unpatch(model)


def extract(loaded: LoadedModel, samples: Samples) -> NDArray[np.float64]:
    """What the head gets, [n, C]: forward_features and the head's pooling."""
    model = loaded.model
    rows = []
    with torch.inference_mode():
        for start in range(0, len(samples), BATCH):
            images = batch(samples.images[start : start + BATCH], loaded.preprocess)
            features = model.forward_head(
                model.forward_features(torch.from_numpy(images)), pre_logits=True
            )
            rows.append(features.double().numpy())
    return np.concatenate(rows)


def dense_features(loaded: LoadedModel, samples: Samples, cache: Path | None) -> NDArray[Any]:
    """`extract` of the dense model, kept in a file that names the weights and the images."""
    if cache is None:
        return extract(loaded, samples)
    digest = hashlib.sha256(repr((loaded.name, loaded.origin, loaded.preprocess)).encode())
    for image in samples.images:
        digest.update(image.tobytes())
    path = cache / f"dense-{samples.name}-{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path)
    features = extract(loaded, samples)
    with atomic_path(path) as temporary:
        np.save(temporary, features)
    return features


def counted_macs(model: nn.Module) -> int:
    """MACs for one image, by PyTorch's flop counter: every matrix product that is really run."""
    from torch.utils.flop_counter import FlopCounterMode

    fused = [(m, m.fused_attn) for m in model.modules() if hasattr(m, "fused_attn")]
    for module, _ in fused:  # the counter does not see into the fused kernel on a CPU
        module.fused_attn = False
    size = model.patch_embed.img_size
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, 3, *size))
    finally:
        for module, before in fused:
            module.fused_attn = before
    return counter.get_total_flops() // 2


def spread_total(shape: ModelShape, total: int, blocks: range) -> Schedule:
    """`total` patch tokens fewer, in steps as equal as whole numbers allow."""
    steps = [
        (block, shape.num_patches - round(total * (position + 1) / len(blocks)))
        for position, block in enumerate(blocks)
    ]
    return resolve(f"even@{blocks.start}-{blocks.stop - 1}", steps, shape)


def keep_rates(shape: ModelShape, rate: float, blocks: list[int]) -> Schedule:
    """`rate` of the patch tokens stays in each of `blocks` (EViT's way)."""
    left, steps = shape.num_patches, []
    for block in blocks:
        left = max(1, round(left * rate))
        steps.append((block, left))
    return resolve(f"rate@{','.join(map(str, blocks))}", steps, shape)

