"""`reduction.token_reduce` against the float64 oracle, and the properties that users rely on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jmp_deploy.core.errors import GraphError, ScheduleError
from jmp_deploy.jmp.node import TokenReduce
from jmp_deploy.jmp.reduction import make_plan, positions_of, slots_of, token_reduce
from tests.fakes.models import attributes, expected, inputs


def reduce(x, qkv, size, attrs):
    tensors = (torch.from_numpy(value) for value in (x, qkv, size))
    return [value.numpy() for value in token_reduce(*tensors, attrs)]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_equals_the_oracle_wherever_no_decision_is_a_near_tie(data):
    draw = data.draw
    patches = draw(st.integers(1, 23), "patches")
    importance = draw(st.sampled_from(["class", "received"]), "importance")
    prefix = draw(st.sampled_from([1, 2, 5] if importance == "class" else [0, 1, 4]), "prefix")
    attrs = TokenReduce(
        num_prefix=prefix,
        num_keep=draw(st.integers(1, patches), "keep"),
        num_heads=draw(st.integers(1, 4), "heads"),
        head_dim=draw(st.sampled_from([1, 3, 8]), "head_dim"),
        scale=draw(st.sampled_from([0.125, 0.35, 1.0]), "scale"),
        tau=draw(st.sampled_from([-1.0, 0.0, 0.3, 0.7, 1.5]), "tau"),
        granularity=draw(st.sampled_from(["token", "sample"]), "granularity"),
        importance=importance,
        proportional=draw(st.booleans(), "proportional"),
        selection=draw(st.sampled_from(["importance", "distinct"]), "selection"),
        merge_weight=draw(st.sampled_from([0.0, 0.25, 1.0]), "merge_weight"),
        index=True,
    )
    arrays = inputs(
        draw(st.integers(1, 4), "batch"),
        patches,
        attrs=attrs,
        channels=draw(st.sampled_from([1, 7, 16]), "channels"),
        parts=draw(st.sampled_from([2, 3]), "parts"),
        seed=draw(st.integers(0, 10**6), "seed"),
    )
    want = expected(*arrays, attrs)
    clear = want.clear(1e-5)
    y, out_size, log_size, index = reduce(*arrays, attrs)
    np.testing.assert_allclose(y[clear], want.y[clear], rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(out_size[clear], want.out_size[clear])
    np.testing.assert_allclose(log_size[clear], want.log_size[clear], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(index[clear], want.index[clear])


def test_positions_and_slots_follow_from_the_index():
    attrs = attributes(num_prefix=2, num_keep=7, index=True)
    x, qkv, size = inputs(4, 20, attrs=attrs)
    want = expected(x, qkv, size, attrs)
    index = token_reduce(*map(torch.from_numpy, (x, qkv, size)), attrs)[3]
    before = torch.arange(100, 120).expand(4, -1)
    stand = positions_of(index, 7, before)
    np.testing.assert_array_equal(stand, want.kept - 2 + 100)
    slots = slots_of(index, 7)
    went = want.destination[:, 2:] - 2
    assert (went >= 0).any() and (went < 0).any(), "some are merged, some pruned"
    np.testing.assert_array_equal(slots[went >= 0], went[went >= 0])
    assert ((slots >= 0) & (slots < 7)).all()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_the_whole_size_goes_over_but_only_a_share_of_the_content(weight):
    attrs = attributes(num_keep=1, num_prefix=1, tau=-1.0, merge_weight=weight)
    x, qkv, size = inputs(1, 2, attrs=attrs)
    size[:] = [[1, 3, 3]]
    y, out_size, _ = reduce(x, qkv, size, attrs)
    kept = int(np.abs(x[0, 1:] - y[0, 1]).sum(axis=1).argmin())  # at weight 1 either will do
    other = x[0, 2 - kept]
    np.testing.assert_allclose(
        y[0, 1], (x[0, 1 + kept] + weight * other) / (1 + weight), rtol=1e-5, atol=1e-6
    )
    assert out_size.tolist() == [[1, 6]]


def test_float64_reference_has_float64_accuracy():
    attrs = attributes()
    arrays = inputs(4, attrs=attrs, dtype=np.float64)
    y, _, _ = reduce(*arrays, attrs)
    np.testing.assert_allclose(y, expected(*arrays, attrs).y, rtol=1e-12, atol=1e-12)


def test_distinct_keeps_an_unimportant_token_that_resembles_nothing():
    attrs = attributes(num_keep=2, num_heads=1, head_dim=2, tau=-1.0)
    _, qkv, size = inputs(2, attrs=attrs)
    qkv[:, :, 2:4] = [1, 0]  # all keys alike,
    qkv[:, 0, :2] = [1, 0]
    qkv[:, 11, 2:4] = [-1, 0]  # but for one that the class token looks away from
    size[:] = 1
    for selection, kept in (("importance", [0, 1]), ("distinct", [0, 10])):
        chosen = replace(attrs, selection=selection)
        plan = make_plan(torch.from_numpy(qkv), torch.from_numpy(size), chosen)
        assert plan.kept.tolist() == [kept] * 2
        assert (plan.target == 0).all()


def test_distinct_lets_the_less_important_of_two_alike_go():
    attrs = attributes(num_keep=2, num_heads=1, head_dim=2, selection="distinct")
    _, qkv, size = inputs(1, 3, attrs=attrs)
    qkv[:, 0, :2] = [1, 0]
    qkv[0, 1:, 2:4] = [[1, 0], [0, 3], [5, 0]]  # the first and third point the same way
    size[:] = 1
    plan = make_plan(torch.from_numpy(qkv), torch.from_numpy(size), attrs)
    assert plan.kept.tolist() == [[1, 2]] and plan.target.tolist() == [[1]]


@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_ties_in_importance_keep_the_lower_index(importance, selection):
    attrs = attributes(num_keep=4, importance=importance, scale=0.5, selection=selection)
    _, qkv, size = inputs(2, 9, attrs=attrs)
    qkv[:] = 0.5  # all logits equal and exact
    size[:] = 1
    plan = make_plan(torch.from_numpy(qkv), torch.from_numpy(size), attrs)
    assert plan.kept.tolist() == [[0, 1, 2, 3]] * 2
    assert plan.target.tolist() == [[0] * 5] * 2  # ties in similarity: the lower index too


def test_identical_tokens_merge_into_the_first():
    attrs = attributes(num_keep=4, tau=-1.0, scale=0.5)
    x, qkv, size = inputs(1, 9, attrs=attrs)
    qkv[:], x[:], size[:] = 0.5, 3.25, 1
    y, out_size, log_size = reduce(x, qkv, size, attrs)
    assert out_size.tolist() == [[1, 6, 1, 1, 1]]
    assert (y == 3.25).all()
    np.testing.assert_allclose(log_size[0, 1], np.log(6), rtol=1e-6)


def test_zero_keys_resemble_nothing():
    attrs = attributes(tau=0.1)
    _, qkv, size = inputs(1, attrs=attrs)
    qkv[:, :, 24:48] = 0
    plan = make_plan(torch.from_numpy(qkv), torch.from_numpy(size), attrs)
    assert (plan.similarity == 0).all() and not plan.merged.any()


def test_keeping_all_changes_nothing():
    attrs = attributes(num_keep=11)
    x, qkv, size = inputs(attrs=attrs)
    y, out_size, _ = reduce(x, qkv, size, attrs)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(out_size, size)


def test_tau_of_minus_one_merges_everything():
    attrs = attributes(tau=-1.0)
    x, qkv, size = inputs(5, attrs=attrs)
    y, out_size, _ = reduce(x, qkv, size, attrs)
    np.testing.assert_allclose(out_size.sum(1), size.sum(1))
    ours = (y * out_size[..., None]).sum(1)
    np.testing.assert_allclose(ours, (x * size[..., None]).sum(1), rtol=1e-4, atol=1e-4)


def test_opposite_keys_still_merge_at_tau_of_minus_one():
    """A cosine of -1 may round to just below it."""
    attrs = attributes(num_keep=1, tau=-1.0, num_heads=1, head_dim=3, scale=1.0)
    x, qkv, size = inputs(1, 2, attrs=attrs)
    size[:] = 1
    qkv[0, 1, 3:6] = [0.1, 0.2, 0.7]
    qkv[0, 2, 3:6] = [-0.1, -0.2, -0.7]
    _, out_size, _ = reduce(x, qkv, size, attrs)
    assert out_size.sum() == 3


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_tau_above_one_prunes_everything(granularity):
    attrs = attributes(tau=1.01, granularity=granularity)
    x, qkv, size = inputs(attrs=attrs)
    y, out_size, _ = reduce(x, qkv, size, attrs)
    kept = 1 + make_plan(torch.from_numpy(qkv), torch.from_numpy(size), attrs).kept.numpy()
    np.testing.assert_array_equal(y[:, 1:], np.take_along_axis(x, kept[..., None], 1))
    np.testing.assert_array_equal(out_size[:, 1:], np.take_along_axis(size, kept, 1))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_sample_granularity_decides_for_each_sample_alone():
    attrs = attributes(granularity="sample")
    _, qkv, size = inputs(16, attrs=attrs, seed=5)
    plan = make_plan(torch.from_numpy(qkv), torch.from_numpy(size), attrs)
    per_sample = plan.merged.float().mean(1)
    assert set(per_sample.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_sample_is_the_same_alone_and_in_a_batch(dtype):
    attrs = TokenReduce(1, 97, 6, 64, 0.125, 0.2)
    arrays = inputs(33, 138, attrs=attrs, channels=384, dtype=dtype)
    together = reduce(*arrays, attrs)
    for index in (0, 7, 32):
        alone = reduce(*(value[index : index + 1] for value in arrays), attrs)
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_array_equal(ours[0], theirs[index])


@pytest.mark.parametrize("where", ["x", "qkv"])
@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_nan_in_one_sample_leaves_the_others_alone(where, selection):
    attrs = attributes(selection=selection)
    x, qkv, size = inputs(3, attrs=attrs)
    clean = reduce(x, qkv, size, attrs)
    (x if where == "x" else qkv)[1, 4] = np.nan
    dirty = reduce(x, qkv, size, attrs)
    for ours, theirs in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])
    assert dirty[0].shape == clean[0].shape


def test_a_pruned_nan_leaves_no_trace():
    attrs = attributes(tau=2.0)
    x, qkv, size = inputs(1, attrs=attrs)
    plan = make_plan(torch.from_numpy(qkv), torch.from_numpy(size), attrs)
    x[0, 1 + plan.rest[0, 0]] = np.nan
    y, _, _ = reduce(x, qkv, size, attrs)
    assert np.isfinite(y).all()


def test_sizes_of_one_row_serve_the_whole_batch():
    attrs = attributes()
    x, qkv, size = inputs(4, attrs=attrs)
    size[:] = size[0]
    for ours, theirs in zip(
        reduce(x, qkv, size[:1], attrs), reduce(x, qkv, size, attrs), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_half_precision_results_are_rounded_once():
    attrs = attributes()
    x, qkv, size = inputs(4, attrs=attrs, dtype=np.float16)
    y, out_size, log_size = reduce(x, qkv, size, attrs)
    want = expected(x, qkv, size, attrs)
    clear = want.clear(1e-5)
    assert clear.any() and y.dtype == out_size.dtype == log_size.dtype == np.float16
    np.testing.assert_allclose(y[clear], want.y[clear], rtol=2**-11 * 1.01, atol=1e-6)


def test_too_few_tokens_are_refused():
    attrs = attributes(num_keep=12)
    with pytest.raises(ScheduleError, match="keeps 12 patch tokens but only 11 come in"):
        reduce(*inputs(1, 11, attrs=attributes()), attrs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_keep", 0),
        ("num_prefix", 0),  # importance "class" needs a class token
        ("num_heads", 0),
        ("scale", 0.0),
        ("tau", float("nan")),
        ("granularity", "image"),
        ("importance", "entropy"),
        ("selection", "random"),
    ],
)
def test_bad_attributes_are_named(name, value):
    with pytest.raises(GraphError, match=name):
        attributes(**{name: value})
