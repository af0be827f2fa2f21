"""Figures of merit of reduced features against dense ones, with paired intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jmp_deploy.core.stats import bootstrap, softmax, unit
from jmp_deploy.validate.probe import Probe, fit_probe

__all__ = [
    "Probe",
    "bootstrap",
    "by_picture",
    "compare",
    "fit_probe",
    "interval",
    "paired",
    "softmax",
    "unit",
]

Array = NDArray[Any]


def by_picture(values: Array, pictures: Array | None) -> Array:
    """The mean over the parts of each picture, [n] -> [pictures]: ten crops are no ten photos.

    Args:
        pictures: [n] which picture each image is a part of; None: each is one of its own.
    """
    if pictures is None:
        return values
    return np.array([values[pictures == picture].mean() for picture in np.unique(pictures)])


def compare(
    dense: Array,
    reduced: Array,
    labels: Array,
    probe: Probe | None,
    *,
    seed: int = 0,
    pictures: Array | None = None,
) -> dict[str, Any]:
    """Measures of reduced features [n, C] (or logits) against dense ones.

    `probe=None` takes the features for logits of the model's own classifier. Differences are
    reduced minus dense, in points (percent), with 95 % intervals from a paired bootstrap over
    pictures (see `by_picture`).
    """
    cosine = (unit(dense) * unit(reduced)).sum(1)
    result: dict[str, Any] = {
        "n": len(labels),
        "cosine": interval(by_picture(cosine, pictures), seed),
        "cosine_worst": float(cosine.min()),
    }
    if probe is None:
        before, after = softmax(dense), softmax(reduced)
    else:
        before, after = probe.probabilities(dense), probe.probabilities(reduced)
        knn = [probe.neighbours(features) == labels for features in (dense, reduced)]
        result["knn"] = _accuracy(*knn, seed, pictures)
    guess, other = before.argmax(1), after.argmax(1)
    result["accuracy"] = _accuracy(guess == labels, other == labels, seed, pictures)
    result["agreement"] = 100 * float((guess == other).mean())
    tiny = 1e-12
    result["kl"] = float((before * np.log((before + tiny) / (after + tiny))).sum(1).mean())
    return result


def paired(a: Array, b: Array, *, seed: int = 0, pictures: Array | None = None) -> dict[str, float]:
    """Mean of a - b over the same images, with its 95 % interval over pictures: {"mean", "low",
    "high"}."""
    return interval(by_picture(a.astype(np.float64) - b.astype(np.float64), pictures), seed)


def interval(values: Array, seed: int) -> dict[str, float]:
    """The mean of independent values [n] with its 95 % interval: {"mean", "low", "high"}."""
    low, high = bootstrap(values, seed=seed)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _accuracy(dense: Array, reduced: Array, seed: int, pictures: Array | None) -> dict[str, float]:
    difference = paired(100 * reduced, 100 * dense, seed=seed, pictures=pictures)
    return {
        "dense": 100 * float(dense.mean()),
        "reduced": 100 * float(reduced.mean()),
        "difference": difference["mean"],
        "low": difference["low"],
        "high": difference["high"],
    }
