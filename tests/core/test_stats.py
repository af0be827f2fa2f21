"""Intervals and probes against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from jmp_deploy.core import stats
from jmp_deploy.core.errors import MissingPackageError
from jmp_deploy.validate import probe as validate_probe


def test_counting_outcomes_draws_the_same_intervals_as_drawing_images(monkeypatch):
    """Large samples take the short cut; both are compared on the same values."""
    random = np.random.default_rng(0)
    values = 100.0 * random.choice([-1, 0, 1], size=4000, p=[0.05, 0.9, 0.05])
    slow = stats.bootstrap(values)
    monkeypatch.setattr(stats, "MANY", 10)
    quick = stats.bootstrap(values)
    error = values.std() / np.sqrt(len(values))
    assert slow != quick  # another stream of random numbers
    np.testing.assert_allclose(quick, slow, atol=0.1 * error)
    np.testing.assert_allclose(
        quick, values.mean() + 1.96 * error * np.array([-1, 1]), atol=0.15 * error
    )


def test_many_images_take_no_time():
    hits = np.random.default_rng(0).random(1_000_000) < 0.8
    low, high = stats.bootstrap(100.0 * hits)
    assert low < 100 * hits.mean() < high and high - low < 0.2


def test_ridge_is_ridge_regression_of_one_hot_labels():
    random = np.random.default_rng(1)
    features, labels = random.normal(size=(60, 7)) * 5 + 3, random.integers(0, 3, 60) * 2
    probe = validate_probe.fit_ridge(features, labels, strength=0.05)
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-6)
    model = Ridge(alpha=0.05 * 60).fit(scaled, np.eye(5)[labels][:, [0, 2, 4]])
    fresh = random.normal(size=(20, 7))
    want = model.predict((fresh - features.mean(0)) / (features.std(0) + 1e-6))
    np.testing.assert_allclose(probe.scores(fresh)[:, [0, 2, 4]], want, atol=1e-9)
    assert np.isneginf(probe.scores(fresh)[:, [1, 3]]).all()  # classes never seen


def test_neighbours_are_those_of_the_largest_cosine(monkeypatch):
    random = np.random.default_rng(2)
    features, labels = random.normal(size=(80, 6)), random.integers(0, 2, 80)
    probe = validate_probe.fit("ridge", features, labels)
    fresh = random.normal(size=(50, 6))
    # an odd number of neighbours and two classes: no ties
    want = KNeighborsClassifier(5, metric="cosine").fit(features, labels).predict(fresh)
    monkeypatch.setattr(validate_probe, "BLOCK", 7)
    np.testing.assert_array_equal(probe.neighbours(fresh), want)


def test_the_probe_says_what_it_needs(monkeypatch):
    assert validate_probe.pick_kind("auto") == "logistic"
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    assert validate_probe.pick_kind("auto") == "ridge" == validate_probe.pick_kind("ridge")
    with pytest.raises(MissingPackageError, match="needs scikit-learn"):
        validate_probe.pick_kind("logistic")
