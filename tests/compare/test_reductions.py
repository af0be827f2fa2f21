"""Which tokens two backends keep, and whether rounding explains the difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jmp_deploy.compare.reductions import report
from jmp_deploy.core.errors import GraphError
from jmp_deploy.jmp.trace import Choice, Trace, owners, patch_ids


def choose(rating, keep, *, block=2, importance=None, selection="importance", fate=None):
    """A reduction that keeps the best by rating; the others are pruned unless `fate` says."""
    rating = np.atleast_2d(np.asarray(rating, dtype=np.float32))
    kept = np.sort(np.argsort(-rating, axis=1, kind="stable")[:, :keep], axis=1)
    fate = np.full((len(rating), rating.shape[1] - keep), -1) if fate is None else fate
    return Choice(
        block=block,
        name=f"blocks.{block}.token_reduce",
        num_prefix=1,
        selection=selection,
        kept=kept,
        rating=rating,
        importance=rating if importance is None else np.atleast_2d(importance),
        target=np.maximum(fate, 0),
        fate=fate,
    )


def trace(name, *choices):
    return Trace(name, list(choices))


BASE = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.30001, 0.3, 0.6])


def test_the_same_tokens():
    result = report(trace("a", choose(BASE, 5)), trace("b", choose(BASE, 5)), "fp16")
    assert result["first"] is None and result["flagged"] == result["near_ties"] == 0
    assert result["nodes"][0]["same_set"] == result["nodes"][0]["shared"] == 1
    assert "same tokens everywhere" in result["verdict"]


def test_a_near_tie_is_no_error():
    other = BASE.copy()
    other[[5, 6]] = 0.3, 0.30001
    result = report(trace("a", choose(BASE, 5)), trace("b", choose(other, 5)), "fp16")
    (node,) = result["nodes"]
    assert result["first"] == "blocks.2.token_reduce"
    assert (node["near_ties"], node["flagged"], node["same_set"]) == (1, 0, 0)
    assert node["shared"] == pytest.approx(4 / 5)
    low, high = np.quantile(BASE.astype(np.float32), [0.25, 0.75])
    assert node["margin"] == pytest.approx(1e-5 / (high - low), rel=0.01)
    assert "near tie" in result["verdict"] and "no error" in result["verdict"]


def test_a_token_that_changes_places_over_a_large_gap_is_flagged():
    two, other = np.stack([BASE, BASE]), np.stack([BASE, BASE])
    other[1, [0, 1]] = 0.1, 0.9
    result = report(trace("a", choose(two, 5)), trace("b", choose(other, 5)), "fp16")
    (node,) = result["nodes"]
    assert node["flagged"] == 1 and node["images"] == [1] and node["same_set"] == 0.5
    assert node["margin"] > 1 and "more than rounding explains" in result["verdict"]


def test_the_same_near_tie_is_flagged_in_fp32():
    other = BASE.copy()
    other[[5, 6]] = 0.29, 0.31
    traces = trace("a", choose(BASE, 5)), trace("b", choose(other, 5))
    assert report(*traces, "fp16")["flagged"] == 0
    assert report(*traces, "fp32")["flagged"] == 1


def test_what_follows_a_difference_is_inherited():
    other = BASE.copy()
    other[[5, 6]] = 0.3, 0.30001
    later = np.array([0.5, 0.4, 0.3, 0.2, 0.1])
    a = trace("a", choose(BASE, 5), choose(later, 2, block=4))
    b = trace("b", choose(other, 5), choose(later[::-1], 2, block=4))
    result = report(a, b, "fp16")
    assert [node["first_here"] for node in result["nodes"]] == [1, 0]
    assert result["nodes"][1]["same_set"] == 0 and result["flagged"] == 0


def test_tokens_merged_elsewhere_are_counted_and_inherited():
    a = choose(BASE, 5, fate=np.array([[0, 1, 2]]))
    b = choose(BASE, 5, fate=np.array([[0, 1, -1]]))
    later = np.array([0.5, 0.4, 0.3, 0.2, 0.1])
    result = report(
        trace("a", a, choose(later, 2, block=4)),
        trace("b", b, choose(later[::-1], 2, block=4)),
        "fp16",
    )
    assert [node["merged_elsewhere"] for node in result["nodes"]] == [1, 0]
    assert result["first"] == "blocks.2.token_reduce" and result["nodes"][1]["same_set"] == 0
    assert "1 images first by what a kept token takes in" in result["verdict"]


def test_a_jump_of_redundancy_by_a_near_tie_of_importance_is_no_error():
    """Tokens 0 and 1 look alike; which of them is redundant is decided by who matters more."""
    importance = np.array([0.5, 0.49999, 0.9, 0.1, 0.3, 0.7])
    rating = np.array([-0.2, -0.98, np.inf, -0.5, -0.9, -0.3])
    flipped, other = importance.copy(), rating.copy()
    flipped[[0, 1]], other[[0, 1]] = (0.49999, 0.5), (-0.98, -0.2)
    options = {"selection": "distinct"}
    a = trace("a", choose(rating, 4, importance=importance, **options))
    b = trace("b", choose(other, 4, importance=flipped, **options))
    result = report(a, b, "fp16")
    assert result["near_ties"] == 1 and result["flagged"] == 0
    assert result["nodes"][0]["margin"] < 1e-3
    unmoved = trace("b", choose(other, 4, importance=importance, **options))
    assert report(a, unmoved, "fp16")["flagged"] == 1  # no change of order explains it


def test_other_reductions_are_refused():
    a, b = trace("a", choose(BASE, 5)), trace("b", choose(BASE, 5, block=3))
    with pytest.raises(GraphError, match=r"blocks\.3"):
        report(a, b, "fp16")


def test_owners_against_a_walk_over_single_patches():
    random = np.random.default_rng(0)
    images, patches = 3, 12
    choices, tokens = [], patches
    for keep in (9, 5, 2):
        fate = random.integers(-1, keep, (images, tokens - keep))
        choices.append(choose(random.normal(size=(images, tokens)), keep, fate=fate))
        tokens = keep
    found = owners(choices, patches, images)[-1]
    for image in range(images):
        members = [{patch} for patch in range(patches)]  # of every token
        stands = list(range(patches))
        for choice in choices:
            kept = choice.kept[image].tolist()
            rest = [token for token in range(len(members)) if token not in kept]
            for token, into in zip(rest, choice.fate[image], strict=True):
                if into >= 0:
                    members[kept[into]] |= members[token]
            members, stands = ([values[k] for k in kept] for values in (members, stands))
        want = np.full(patches, -1)
        for patch, inside in zip(stands, members, strict=True):
            want[sorted(inside)] = patch
        np.testing.assert_array_equal(found[image], want)
        assert stands == patch_ids(choices, patches, images)[-1][image].tolist()


def test_an_importance_that_is_no_number_does_not_break_the_report():
    broken = replace(choose(BASE, 5), rating=np.full((1, 8), -np.inf))
    result = report(trace("a", choose(BASE, 5)), trace("b", broken), "fp16")
    assert np.isfinite(result["nodes"][0]["moved"])
