"""Intervals and probes against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as distributions
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from jmp_deploy.core import stats
from jmp_deploy.core.errors import MissingPackageError
from jmp_deploy.validate import probe as validate_probe


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 9, 10, 19, 30, 99, 1000])
def test_student_s_t_is_scipy_s(freedom):
    assert stats.student_t(freedom) == pytest.approx(distributions.t.ppf(0.975, freedom), rel=1e-9)


def test_the_mean_s_interval_is_scipy_s():
    values = np.random.default_rng(3).normal(5, 2, 12)
    (low, high) = distributions.ttest_1samp(values, 0).confidence_interval(0.95)
    assert stats.mean_interval(values) == pytest.approx((values.mean(), low, high))


@pytest.mark.parametrize(
    ("hits", "n"), [(0, 1), (1, 1), (0, 100), (100, 100), (37, 50), (9, 10**6)]
)
def test_wilson_s_interval_is_scipy_s(hits, n):
    want = distributions.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    low, high = stats.share_interval(hits, n)
    assert (low, high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert 0 <= low < high <= 1


def chances(n: int, plus: float, minus: float) -> dict[tuple[int, int], float]:
    """Probability of every (lost, gained), in float64."""
    shares = [plus, minus, 1 - plus - minus]
    pairs = [(a, b) for a in range(n + 1) for b in range(n + 1 - a)]
    whole = distributions.multinomial(n, shares)
    return {pair: float(whole.pmf([*pair, n - sum(pair)])) for pair in pairs}


def test_the_paired_interval_holds_the_truth_as_often_as_it_says():
    """By adding up every sample that there can be, for shares of all kinds: at least 95 %."""
    n = 15
    intervals = {pair: stats.paired_difference(*pair, n) for pair in chances(n, 0.1, 0.1)}
    coverage = []
    for plus in (0.0, 0.02, 0.1, 0.3, 0.5, 0.9):
        for minus in (0.0, 0.02, 0.1, 0.5):
            if plus + minus <= 1:
                truth = plus - minus
                coverage.append(
                    sum(
                        chance
                        for pair, chance in chances(n, plus, minus).items()
                        if intervals[pair][0] - 1e-9 <= truth <= intervals[pair][1] + 1e-9
                    )
                )
    assert len(coverage) > 15 and min(coverage) >= 0.95


def test_the_paired_interval_of_many_images_is_the_usual_one_and_of_few_is_wider():
    for lost, gained, n, wider in ((600, 500, 50_000, 1.1), (10, 8, 1000, 1.6)):
        low, high = stats.paired_difference(lost, gained, n)
        mean = (lost - gained) / n
        half = 1.96 * ((lost + gained) / n**2 - mean**2 / n) ** 0.5
        assert low < mean - half and mean + half < high
        assert high - low < 2 * half * wider
        assert stats.paired_difference(gained, lost, n) == pytest.approx((-high, -low), abs=1e-9)


def test_models_that_never_disagreed_may_still_differ():
    """None of n: the rule of three says 3 / n, one-sided and for one kind of disagreement."""
    for n in (1, 20, 1000, 50_000):
        low, high = stats.paired_difference(0, 0, n)
        assert high == pytest.approx(-low) and 3 / n < high * 1.05 + 2 / n and high < 7 / n
    low, high = stats.paired_difference(20, 0, 20)
    assert 0.5 < low < 0.95 and high == pytest.approx(1)


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
