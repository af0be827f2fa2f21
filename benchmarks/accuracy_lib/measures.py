"""Figures of merit of reduced features against dense ones, with paired intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Probe:
    """A linear classifier on dense features. It never sees a reduced one.

    Attributes:
        mean, std: [C] of the training features.
        weight: [classes, C].  bias: [classes].
        train: [n, C] training features, unit length; for the nearest neighbours.
        labels: [n] their labels.
    """

    mean: Array
    std: Array
    weight: Array
    bias: Array
    train: Array
    labels: Array

    def probabilities(self, features: Array) -> Array:
        """[n, C] -> [n, classes]."""
        return softmax((features - self.mean) / self.std @ self.weight.T + self.bias)

    def neighbours(self, features: Array, count: int = 5) -> Array:
        """[n, C] -> [n] label by vote of the nearest training images, ties to the nearest."""
        near = np.argsort(-(unit(features) @ self.train.T), axis=1, kind="stable")[:, :count]
        votes = np.zeros((len(features), int(self.labels.max()) + 1))
        for rank in range(near.shape[1]):  # 1e-6: only a tie is decided by rank
            np.add.at(
                votes, (np.arange(len(features)), self.labels[near[:, rank]]), 1 - 1e-6 * rank
            )
        return votes.argmax(axis=1)


def fit_probe(features: Array, labels: Array, strength: float = 1.0) -> Probe:
    """Logistic regression on standardised features; C = `strength`, to convergence."""
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0) + 1e-6
    model = LogisticRegression(C=strength, max_iter=5000).fit((features - mean) / std, labels)
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row for two classes
        weight, bias = np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
    full = int(labels.max()) + 1
    wide, offsets = np.zeros((full, weight.shape[1])), np.full(full, -np.inf)
    wide[model.classes_], offsets[model.classes_] = weight, bias
    return Probe(mean, std, wide, offsets, unit(features), labels)


def compare(
    dense: Array, reduced: Array, labels: Array, probe: Probe | None, *, seed: int = 0
) -> dict[str, Any]:
    """Measures of reduced features [n, C] (or logits) against dense ones.

    `probe=None` takes the features for logits of the model's own classifier. Differences are
    reduced minus dense, in points (percent), with 95 % intervals from a paired bootstrap.
    """
    cosine = (unit(dense) * unit(reduced)).sum(1)
    result: dict[str, Any] = {
        "n": len(labels),
        "cosine": _mean(cosine, seed),
        "cosine_worst": float(cosine.min()),
    }
    if probe is None:
        before, after = softmax(dense), softmax(reduced)
    else:
        before, after = probe.probabilities(dense), probe.probabilities(reduced)
        knn = [probe.neighbours(features) == labels for features in (dense, reduced)]
        result["knn"] = _accuracy(*knn, seed)
    guess, other = before.argmax(1), after.argmax(1)
    result["accuracy"] = _accuracy(guess == labels, other == labels, seed)
    result["agreement"] = 100 * float((guess == other).mean())
    tiny = 1e-12
    result["kl"] = float((before * np.log((before + tiny) / (after + tiny))).sum(1).mean())
    return result


def bootstrap(values: Array, *, seed: int = 0, rounds: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of per-image values: percentiles over resampled images."""
    random = np.random.default_rng(seed)
    means = [
        values[random.integers(0, len(values), (100, len(values)))].mean(1)
        for _ in range(rounds // 100)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def paired(a: Array, b: Array, *, seed: int = 0) -> dict[str, float]:
    """Mean of a - b over the same images, with its 95 % interval."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    low, high = bootstrap(difference, seed=seed)
    return {"mean": float(difference.mean()), "low": low, "high": high}


def unit(values: Array) -> Array:
    """Rows scaled to length 1."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def softmax(logits: Array) -> Array:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _mean(values: Array, seed: int) -> dict[str, float]:
    low, high = bootstrap(values, seed=seed)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _accuracy(dense: Array, reduced: Array, seed: int) -> dict[str, float]:
    difference = paired(100 * reduced, 100 * dense, seed=seed)
    return {
        "dense": 100 * float(dense.mean()),
        "reduced": 100 * float(reduced.mean()),
        "difference": difference["mean"],
        "low": difference["low"],
        "high": difference["high"],
    }
