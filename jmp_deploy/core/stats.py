"""Means over images with their uncertainty: what validation and the benchmarks both report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MANY = 5_000
"""Images from which `bootstrap` draws counts of outcomes in place of images, where it can."""
FEW_OUTCOMES = 8


def bootstrap(values: Array, *, seed: int = 0, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of per-image values [n]: percentiles over resampled images.

    The percentile bootstrap of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993),
    chapter 13. Resampling n images with replacement and counting how often each distinct value
    came up is one draw of a multinomial; for right/wrong differences of many images that draws the
    same distribution a thousand times faster.
    """
    random = np.random.default_rng(seed)
    outcomes, counts = np.unique(values, return_counts=True)
    if len(values) > MANY and len(outcomes) <= FEW_OUTCOMES:
        draws = random.multinomial(len(values), counts / len(values), size=rounds)
        means = draws @ outcomes.astype(np.float64) / len(values)
    else:
        parts = [
            values[random.integers(0, len(values), (100, len(values)))].mean(1)
            for _ in range(rounds // 100)
        ]
        means = np.concatenate(parts)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def paired(a: Array, b: Array, *, seed: int = 0) -> dict[str, float]:
    """Mean of a - b over the same images, with its 95 % interval: {"mean", "low", "high"}."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    low, high = bootstrap(difference, seed=seed)
    return {"mean": float(difference.mean()), "low": low, "high": high}


def unit(values: Array) -> Array:
    """Rows of [n, C] scaled to length 1."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def sigmoid(values: Array) -> Array:
    """1 / (1 + exp(-x)) of each value, without overflow."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def softmax(logits: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
