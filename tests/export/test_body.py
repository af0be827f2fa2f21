"""The node's portable body, run by ONNX Runtime, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from jmp_deploy.core.errors import GraphError
from jmp_deploy.export import body
from jmp_deploy.jmp import node
from jmp_deploy.jmp.node import TokenReduce
from jmp_deploy.jmp.reduction import token_reduce
from tests.fakes.models import attributes, expected, inputs

ORT = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
RANK = {"x": 3, "qkv": 3, "size": 2, "y": 3, "out_size": 2, "log_size": 2, "index": 2}


def run_body(x, qkv, size, attrs: TokenReduce):
    parts = qkv.shape[2] // (attrs.num_heads * attrs.head_dim)
    kind = {np.dtype("f4"): TensorProto.FLOAT, np.dtype("f2"): TensorProto.FLOAT16}[x.dtype]
    names_in, names_out = ("x", "qkv", "size"), attrs.outputs
    kinds = dict.fromkeys(names_out, kind) | {"index": TensorProto.INT32}
    reduction = helper.make_node(
        node.OP_TYPE, names_in, names_out, domain=node.DOMAIN, **attrs.to_onnx()
    )
    graph = helper.make_graph(
        [reduction],
        "one",
        [helper.make_tensor_value_info(n, kind, [None] * RANK[n]) for n in names_in],
        [helper.make_tensor_value_info(n, kinds[n], [None] * RANK[n]) for n in names_out],
    )
    opsets = [helper.make_opsetid("", node.OPSET), helper.make_opsetid(node.DOMAIN, attrs.version)]
    model = helper.make_model(
        graph, functions=[body.body(attrs, parts)], opset_imports=opsets, ir_version=10
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x, "qkv": qkv, "size": size})


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("selection", ["importance", "distinct"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tau", [-1.0, 0.3, 2.0])
def test_equals_the_oracle(granularity, importance, proportional, selection, dtype, tau):
    attrs = attributes(
        granularity=granularity,
        importance=importance,
        proportional=proportional,
        selection=selection,
        tau=tau,
        index=True,
    )
    arrays = inputs(8, attrs=attrs, dtype=dtype)
    want = expected(*arrays, attrs)
    clear = want.clear(1e-5)
    assert clear.sum() >= 4
    y, out_size, log_size, index = run_body(*arrays, attrs)
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index[clear], want.index[clear])
    assert y.dtype == out_size.dtype == log_size.dtype == dtype
    tolerance = 2e-5 if dtype == np.float32 else 2**-10
    np.testing.assert_allclose(y[clear], want.y[clear], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(out_size[clear], want.out_size[clear].astype(dtype))
    np.testing.assert_allclose(log_size[clear], want.log_size[clear], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("prefix", "patches", "keep", "batch", "parts"),
    [(1, 1, 1, 1, 3), (2, 13, 1, 33, 2), (5, 16, 16, 2, 3), (1, 196, 138, 2, 3)],
)
@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_odd_sizes(prefix, patches, keep, batch, parts, selection):
    if keep == patches and ORT < (1, 24):
        pytest.skip("TopK of nothing ends the process in ONNX Runtime 1.23")
    attrs = attributes(num_prefix=prefix, num_keep=keep, selection=selection)
    arrays = inputs(batch, patches, attrs=attrs, parts=parts)
    want = expected(*arrays, attrs)
    clear = want.clear(1e-5)
    assert clear.any()
    y, _, _ = run_body(*arrays, attrs)
    np.testing.assert_allclose(y[clear], want.y[clear], rtol=2e-5, atol=2e-5)


def test_without_a_prefix():
    attrs = attributes(num_prefix=0, importance="received")
    arrays = inputs(4, attrs=attrs)
    want = expected(*arrays, attrs)
    y, _, _ = run_body(*arrays, attrs)
    clear = want.clear(1e-5)
    assert clear.any()
    np.testing.assert_allclose(y[clear], want.y[clear], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_ties_and_broadcast_sizes_as_in_the_reference(selection):
    attrs = attributes(num_keep=4, tau=-1.0, scale=0.5, selection=selection)
    x, qkv, size = inputs(3, 9, attrs=attrs)
    qkv[:], size[:] = 0.5, 1
    ours = run_body(x, qkv, size[:1], attrs)
    tensors = (torch.from_numpy(value) for value in (x, qkv, size))
    for mine, theirs in zip(ours, token_reduce(*tensors, attrs), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-6, atol=1e-6)
    assert ours[1][0].tolist() == [1, 6, 1, 1, 1]


@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_nan_in_one_sample_leaves_the_others_alone(selection):
    attrs = attributes(selection=selection)
    x, qkv, size = inputs(3, attrs=attrs)
    clean = run_body(x, qkv, size, attrs)
    x[1, 4], qkv[1, 5] = np.nan, np.nan
    for ours, theirs in zip(run_body(x, qkv, size, attrs), clean, strict=True):
        np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])


@pytest.mark.parametrize("selection", ["importance", "distinct"])
@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_sample_of_bad_numbers_is_its_own_affair(selection, importance, granularity, bad, where):
    attrs = attributes(
        selection=selection, importance=importance, granularity=granularity, tau=-1.0
    )
    arrays = inputs(3, attrs=attrs)
    clean = run_body(*arrays, attrs)
    arrays[where][1] = bad
    for ours, theirs in zip(run_body(*arrays, attrs), clean, strict=True):
        np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])


@pytest.mark.parametrize("selection", ["importance", "distinct"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_key_is_its_samples_own_affair(selection, bad):
    attrs = attributes(num_keep=60, num_heads=2, selection=selection)
    x, qkv, size = inputs(24, 99, attrs=attrs)
    clean = run_body(x, qkv, size, attrs)
    rng = np.random.default_rng(0)
    for sample in range(0, 24, 2):  # one number of one key, wherever it sorts to
        qkv[sample, rng.integers(100), 16 + rng.integers(16)] = bad
    for ours, theirs in zip(run_body(x, qkv, size, attrs), clean, strict=True):
        np.testing.assert_array_equal(ours[1::2], theirs[1::2])


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_a_pruned_token_leaves_no_trace(prefix, selection):
    kind = "class" if prefix else "received"
    attrs = attributes(num_prefix=prefix, importance=kind, selection=selection, tau=2.0)
    x, qkv, size = inputs(4, attrs=attrs)
    clean = run_body(x, qkv, size, attrs)
    for sample, destination in enumerate(expected(x, qkv, size, attrs).destination):
        x[sample, destination < 0] = np.nan
    for ours, theirs in zip(run_body(x, qkv, size, attrs), clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_a_token_that_takes_nothing_in_is_copied(dtype, selection):
    attrs = attributes(selection=selection)
    arrays = inputs(16, attrs=attrs, dtype=dtype)
    want = expected(*arrays, attrs)
    y, out_size, _ = run_body(*arrays, attrs)
    copies = 0
    for sample in np.flatnonzero(want.clear(1e-5)):
        destination = want.destination[sample]
        for token in range(attrs.num_prefix, len(destination)):
            place = destination[token]
            if place >= 0 and (destination == place).sum() == 1:
                np.testing.assert_array_equal(y[sample, place], arrays[0][sample, token])
                assert out_size[sample, place] == arrays[2][sample, token]
                copies += 1
    assert copies > 10


@pytest.mark.parametrize("selection", ["importance", "distinct"])
def test_a_sample_is_the_same_alone_and_again(selection):
    attrs = attributes(num_keep=70, num_heads=6, head_dim=64, scale=0.125, selection=selection)
    x, qkv, size = inputs(5, 98, attrs=attrs, channels=384)
    together = run_body(x, qkv, size, attrs)
    for ours, theirs in zip(run_body(x, qkv, size, attrs), together, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    alone = run_body(x[3:4], qkv[3:4], size[3:4], attrs)
    for ours, theirs in zip(alone, together, strict=True):
        np.testing.assert_allclose(ours[0], theirs[3], rtol=1e-6, atol=1e-6)


def test_attributes_survive_onnx():
    attrs = attributes(granularity="sample", importance="received", proportional=False, tau=0.5)
    attrs = replace(attrs, selection="distinct")
    assert TokenReduce.from_onnx(attrs.to_onnx(), outputs=len(attrs.outputs)) == attrs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": None}, "missing attributes \\['tau'\\]"),
        ({"extra": 1}, "unknown attributes \\['extra'\\]"),
        ({"num_keep": 1.5}, "num_keep=1.5 should be of type int"),
        ({"granularity": 7}, "granularity=7 is not valid"),
        ({"selection": 2}, "selection=2 is not valid"),
    ],
)
def test_wrong_attributes_are_named(change, message):
    values = {**attributes().to_onnx(), **change}
    with pytest.raises(GraphError, match=message):
        TokenReduce.from_onnx({name: value for name, value in values.items() if value is not None})
