"""16 bits in the ONNX: what they hold, what stays in FP32, a CPU that rounds as an engine does."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from jmp_deploy.core import ort
from jmp_deploy.core.errors import GraphError
from jmp_deploy.export import numerics, precision
from jmp_deploy.export.export import export_onnx
from jmp_deploy.export.graph import block_tensors, load_model, reductions
from jmp_deploy.jmp.patch import patch
from tests.fakes.models import tiny_vit

IMAGES = np.random.default_rng(3).normal(size=(4, 3, 32, 32)).astype(np.float32)
STEPS = "1:11,3:6"
HOT = 1e5


def big_activation(model):
    """One hidden unit of block 2's MLP reaches 1e5; what it adds is small."""
    mlp = model.blocks[2].mlp
    mlp.fc1.bias[7] = HOT
    mlp.fc2.weight[:, 7] *= 1e-5


def big_stream(model):
    """One channel of the residual stream stands at 8e4 from block 1 to block 4."""
    for block, value in ((1, 8e4), (4, -8e4)):
        model.blocks[block].mlp.fc2.weight[5] = 0
        model.blocks[block].mlp.fc2.bias[5] = value


def big_weight(model):
    """A weight that FP16 has no number for, and an input that makes it harmless."""
    model.blocks[2].mlp.fc1.weight[7] = 0
    model.blocks[2].mlp.fc1.bias[7] = 1e-3
    model.blocks[2].mlp.fc2.weight[3, 7] = HOT


PLANTED = {"activation": big_activation, "stream": big_stream, "weight": big_weight}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(fault, form) -> (model, portable FP32)."""

    @cache
    def make(fault, form):
        model = tiny_vit()
        if fault:
            PLANTED[fault](model)
        if form == "jmp":
            patch(model, STEPS)
        path = tmp_path_factory.mktemp("planted") / "m.onnx"
        return model, export_onnx(model, path, image_size=(32, 32))

    return make


def run(proto, images=IMAGES):
    return ort.session(proto).run(None, {"images": images})[0]


def one_by_one(proto, images=IMAGES):
    """A dense FP16 model node by node, each in a session of its own that gives its output in FP16:
    no cast between two operators can be left out."""
    values = {w.name: numpy_helper.to_array(w) for w in proto.graph.initializer}
    values["images"] = images
    for node in proto.graph.node:
        given = [name for name in dict.fromkeys(node.input) if name]
        kinds = [onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype) for name in given]
        graph = onnx.helper.make_graph(
            [node],
            "one",
            [
                onnx.helper.make_tensor_value_info(n, k, values[n].shape)
                for n, k in zip(given, kinds, strict=True)
            ],
            [onnx.helper.make_empty_tensor_value_info(name) for name in node.output],
        )
        one = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=9)
        session = onnxruntime.InferenceSession(one.SerializeToString(), ort_quiet())
        results = session.run(None, {name: values[name] for name in given})
        values |= dict(zip(node.output, results, strict=True))
    return values[proto.graph.output[0].name]


def ort_quiet():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def halved(path, kept=()):
    return precision.lower(load_model(path), "fp16", kept)


def test_the_emulation_rounds_as_single_operators_in_fp16_do(planted):
    _, path = planted(None, "dense")
    got, want = run(precision.emulate(halved(path))), one_by_one(halved(path))
    exact = run(path)
    assert np.abs(exact - want).mean() > 1e-3  # there is something to round
    assert (got == want).mean() > 0.5  # sums in another order round otherwise here and there
    assert np.abs(got - want).mean() <= 0.25 * np.abs(exact - want).mean()


def test_an_input_in_fp16_is_rounded_too():
    """A block by itself, as `compare --debug` cuts it out, has one."""
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        part (float16[n] x) => (float16[n] y) { y = Mul (x, x) }"""
    )
    x = np.array([1 + 2**-12, 300.0, 3.0], np.float32)
    (y,) = onnxruntime.InferenceSession(
        precision.emulate(proto).SerializeToString(), ort_quiet()
    ).run(None, {"x": x})
    assert y.tolist() == [1.0, np.inf, 9.0]


@pytest.mark.parametrize("fault", ["activation", "stream"])
def test_fp16_overflows_where_onnx_runtime_alone_does_not_see_it(planted, fault):
    _, path = planted(fault, "dense")
    assert not np.isfinite(one_by_one(halved(path))).all()
    assert not np.isfinite(run(precision.emulate(halved(path)))).all()


@pytest.mark.parametrize(
    ("fault", "form"),
    [
        ("activation", "jmp"),
        ("activation", "dense"),
        ("stream", "jmp"),
        ("stream", "dense"),
        ("weight", "jmp"),
    ],
)
def test_what_is_too_large_stays_in_fp32_by_itself(planted, fault, form):
    model, path = planted(fault, form)
    kept = numerics.keep_fp32(path, IMAGES)
    if fault == "weight":
        assert len(kept.weights) == 1 and not kept.large
    else:
        assert kept.large
        assert kept.largest.largest == pytest.approx(
            HOT if fault == "activation" else 8e4, rel=0.01
        )
        where = {one.place for one in kept.large}
        assert "blocks.2 MLP" in where and "blocks.5 MLP" not in where
        assert (len(where) == 1) == (fault == "activation")
    lowered = halved(path, kept.nodes)
    want = model(torch.from_numpy(IMAGES)).numpy()
    got = run(precision.emulate(copy.deepcopy(lowered)))
    assert np.isfinite(got).all()
    cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert np.median(cosines) > 0.999
    if form == "dense":
        assert np.abs(one_by_one(lowered) - want).max() < 0.05 * np.abs(want).max()
    stay = [n for n in lowered.graph.node if n.name in set(kept.nodes)]
    assert 0 < len(stay) < len(lowered.graph.node) / 2
    types = precision.float_types(lowered)
    assert {types[name] for n in stay for name in n.output if name in types} == {TensorProto.FLOAT}


def test_nothing_stays_in_fp32_where_nothing_is_large(planted):
    kept = numerics.keep_fp32(planted(None, "jmp")[1], IMAGES)
    assert kept.nodes == kept.large == kept.weights == () and 1 < kept.largest.largest < 1000


def test_magnitudes_are_those_of_the_tensors(planted):
    proto = load_model(planted(None, "jmp")[1])
    seen = numerics.magnitudes(proto, IMAGES)
    assert all(value.is_finite for value in seen.values())
    marked = copy.deepcopy(proto)
    names = [place.out for place in block_tensors(proto)]
    marked.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    for name, value in zip(names, ort.session(marked).run(names, {"images": IMAGES}), strict=True):
        assert seen[name].largest == pytest.approx(np.abs(value).max(), rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_tensor_that_is_not_finite_is_named(planted, value):
    proto = load_model(planted(None, "dense")[1])
    products = [n for n in proto.graph.node if n.op_type == "MatMul"]
    weights = {w.name: w for w in proto.graph.initializer}
    gelu = [n for n in proto.graph.node if n.op_type == "Gelu"][3]
    last = next(n for n in products if gelu.output[0] in n.input)
    array = numpy_helper.to_array(weights[last.input[1]]).copy()
    array[0, 0] = value
    weights[last.input[1]].CopyFrom(numpy_helper.from_array(array, last.input[1]))
    assert numerics.first_not_finite(proto, IMAGES) == f"blocks.3 MLP: tensor {last.output[0]!r}"


def test_the_first_tensor_that_overflows_in_fp16_is_named(planted):
    _, path = planted("activation", "dense")
    assert numerics.first_not_finite(load_model(path), IMAGES) is None
    found = numerics.first_not_finite(halved(path), IMAGES)
    assert found is not None and found.startswith("blocks.2 MLP: tensor")


@pytest.mark.parametrize("kind", precision.LOW)
def test_a_lowered_model_has_its_types_and_its_blocks(planted, kind):
    _, path = planted(None, "jmp")
    proto = precision.lower(load_model(path), kind)
    assert [p[::3] for p in block_tensors(proto)] == [
        p[::3] for p in block_tensors(load_model(path))
    ]
    types = precision.float_types(proto)
    low = precision.LOW[kind]
    for node in proto.graph.node:
        read = {types[name] for name in node.input if name in types}
        if node.op_type not in ("Cast", "Shape"):
            assert len(read) <= 1, node.name
        if node.op_type in ("MatMul", "Gemm", "Softmax", "Gelu", "JMPTokenReduce"):
            assert read == {low}
        if node.op_type == "LayerNormalization":
            assert read == {TensorProto.FLOAT}
    assert {types[n] for n in ("images", proto.graph.output[0].name)} == {TensorProto.FLOAT}
    error = np.abs(run(precision.emulate(proto)) - run(path))
    assert 0 < np.median(error) < {"fp16": 0.02, "bf16": 0.2}[kind]


def test_bf16_takes_what_fp16_cannot(planted):
    model, path = planted("activation", "dense")
    got = run(precision.emulate(precision.lower(load_model(path), "bf16")))
    want = model(torch.from_numpy(IMAGES)).numpy()
    cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosines.min() > 0.99


def test_weights_are_rounded_to_the_nearest_and_never_clamped():
    values = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, 65504, 1e5, -1e38, 2.0**-26], np.float32)
    weight = numpy_helper.from_array(values, "w")
    bf16 = numpy_helper.to_array(precision._converted(weight, TensorProto.BFLOAT16, "w"))
    want = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(np.asarray(bf16, dtype=np.float32), want)


# --- --fp32 --------------------------------------------------------------------------------------


def test_attention_in_chosen_blocks_is_in_fp32_and_no_other(planted):
    _, path = planted(None, "jmp")
    proto = load_model(path)
    names = numerics.asked_nodes(proto, ["attention:0,4-5"])
    kinds = sorted(n.op_type for n in proto.graph.node if n.name in names)
    # scale, QK^T, softmax; after a reduction the mask too
    assert kinds == sorted(["Mul", "MatMul", "Softmax"] * 3 + ["Add"] * 2)
    lowered = precision.lower(proto, "fp16", names)
    types = precision.float_types(lowered)
    softmax = [types[n.output[0]] for n in lowered.graph.node if n.op_type == "Softmax"]
    wide = TensorProto.FLOAT
    assert [kind == wide for kind in softmax] == [True, False, False, False, True, True]
    assert np.isfinite(run(precision.emulate(lowered))).all()


def test_an_mlp_in_fp32(planted):
    proto = load_model(planted(None, "jmp")[1])
    names = numerics.asked_nodes(proto, ["mlp:3"])
    kinds = [n.op_type for n in proto.graph.node if n.name in names]
    assert kinds == ["LayerNormalization", "MatMul", "Add", "Gelu", "MatMul", "Add"]


def test_reductions_may_differ_in_their_type(planted):
    _, path = planted(None, "jmp")
    names = {reductions(load_model(path))[1].name}
    lowered = precision.lower(load_model(path), "fp16", names)
    types = precision.float_types(lowered)
    assert [types[n.input[0]] for n in reductions(lowered)] == [
        TensorProto.FLOAT16,
        TensorProto.FLOAT,
    ]
    assert np.isfinite(run(precision.emulate(lowered))).all()


@pytest.mark.parametrize(
    "word", ["attentions", "attention:", "attention:a", "mlp:1-", "", "mlp:3;"]
)
def test_a_word_that_means_nothing_is_refused(word):
    with pytest.raises(GraphError, match="--fp32"):
        numerics.parse_asked(word)


def test_a_block_that_is_not_there_is_refused(planted):
    proto = load_model(planted(None, "dense")[1])
    with pytest.raises(GraphError, match="blocks 0 to 5"):
        numerics.asked_nodes(proto, ["mlp:6"])
