"""Classifiers on frozen features: what makes a model without a classifier head answer.

A probe is fitted once, on the dense model's features of a train split, and then applied to the
features of every model alike: what differs in its answers differs in the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import MissingPackageError
from ..core.stats import softmax, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

KINDS = ("logistic", "ridge")
NEIGHBOURS = 5
RIDGE = 1e-2
BLOCK = 1024
"""Images whose similarities to the train split are held at a time."""


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

    def scores(self, features: Array) -> Array:
        """[n, C] -> [n, classes]; the largest is the answer, -inf for a class never seen."""
        return (features - self.mean) / self.std @ self.weight.T + self.bias

    def probabilities(self, features: Array) -> Array:
        """[n, C] -> [n, classes]."""
        return softmax(self.scores(features))

    def neighbours(self, features: Array, count: int = NEIGHBOURS) -> Array:
        """[n, C] -> [n] label by vote of the nearest training images, ties to the nearest.

        Near is a large cosine.
        """
        parts = [
            self._vote(features[start : start + BLOCK], count)
            for start in range(0, len(features), BLOCK)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _vote(self, features: Array, count: int) -> Array:
        near = np.argsort(-(unit(features) @ self.train.T), axis=1, kind="stable")[:, :count]
        votes = np.zeros((len(features), int(self.labels.max()) + 1))
        for rank in range(near.shape[1]):  # 1e-6: only a tie is decided by rank
            np.add.at(
                votes, (np.arange(len(features)), self.labels[near[:, rank]]), 1 - 1e-6 * rank
            )
        return votes.argmax(axis=1)


def pick_kind(wanted: str = "auto") -> str:
    """ "logistic" where scikit-learn is installed, else "ridge", which numpy alone can fit.

    Raises:
        MissingPackageError: logistic regression was asked for and scikit-learn is missing.
    """
    if wanted == "ridge":
        return wanted
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        if wanted == "auto":
            return "ridge"
        raise MissingPackageError(
            f"a logistic probe needs scikit-learn, which cannot be imported: {error}",
            "pip install scikit-learn, or use --probe ridge",
        ) from error
    return "logistic"


def fit(kind: str, features: Array, labels: Array) -> Probe:
    """Fits a probe of a kind to features [n, C] and labels [n]."""
    return fit_probe(features, labels) if kind == "logistic" else fit_ridge(features, labels)


def fit_probe(features: Array, labels: Array, strength: float = 1.0) -> Probe:
    """Logistic regression on standardised features; C = `strength`, to convergence."""
    from sklearn.linear_model import LogisticRegression

    mean, std = _spread(features)
    model = LogisticRegression(C=strength, max_iter=5000).fit((features - mean) / std, labels)
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row for two classes
        weight, bias = np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
    return _probe(features, labels, mean, std, model.classes_, weight, bias)


def fit_ridge(features: Array, labels: Array, strength: float = RIDGE) -> Probe:
    """Ridge regression of one-hot labels on standardised features, in closed form.

    W = (X'X + strength * n * I)^-1 X'Y with X centred, so the penalty does not depend on n
    (Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 3.4.1 and 4.2).
    """
    mean, std = _spread(features)
    scaled = ((features - mean) / std).astype(np.float64)
    scaled -= scaled.mean(0)
    classes, rows, counts = np.unique(labels, return_inverse=True, return_counts=True)
    # X'Y for one-hot Y is a sum of X over each class; Y itself would be [n, classes].
    sums = np.zeros((len(classes), scaled.shape[1]))
    np.add.at(sums, rows, scaled)
    penalty = strength * len(scaled) * np.eye(scaled.shape[1])
    weight = np.linalg.solve(scaled.T @ scaled + penalty, sums.T).T
    return _probe(features, labels, mean, std, classes, weight, counts / len(labels))


def _spread(features: Array) -> tuple[Array, Array]:
    return features.mean(0), features.std(0) + 1e-6


def _probe(
    features: Array,
    labels: Array,
    mean: Array,
    std: Array,
    classes: Array,
    weight: Array,
    bias: Array,
) -> Probe:
    """Spreads rows of the classes that were seen over all class numbers."""
    full = int(labels.max()) + 1
    wide, offsets = np.zeros((full, weight.shape[1])), np.full(full, -np.inf)
    wide[classes], offsets[classes] = weight, bias
    return Probe(mean, std, wide, offsets, unit(features), labels)
