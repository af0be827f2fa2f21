"""FP8: its numbers, which tensors have them, and what TensorRT makes of such a model."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jmp_deploy.core import ort
from jmp_deploy.core.errors import CalibrationError
from jmp_deploy.core.images import INPUT
from jmp_deploy.export import export, fuse, graph, numerics
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.quantize import gated, qdq, ranges, sensitivity
from jmp_deploy.quantize.formats import FP8, INT8
from jmp_deploy.quantize.layers import find_layers
from tests.fakes.models import tiny_vit
from tests.fakes.rtx import layers_of

LAYER_NORM = "LayerNormalization"
STEPS = "1:50,2:40,4:20"
"""Of 64 patches: the last block has 21 tokens, fewer than FP8 attention is used for."""


def number(code: int) -> Fraction | None:
    """What a code of E4M3 stands for, by its definition: sign, 4 bits of exponent with bias 7, 3 of
    mantissa; the largest mantissa at the largest exponent is NaN."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 8) / 2**6
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


CODES = {code: number(code) for code in range(256)}
NUMBERS = {code: float(value) for code, value in CODES.items() if value is not None}


def nearest(values):
    """The oracle's rounding: the nearest number, of two the one with an even mantissa."""
    held = sorted((value, code) for code, value in NUMBERS.items() if code < 128)
    found = []
    for value in np.ravel(values):
        size = min(abs(float(value)), 448.0)
        best = min(held, key=lambda pair: (abs(pair[0] - size), pair[1] & 1))[0]
        found.append(np.copysign(best, value))
    return np.array(found).reshape(np.shape(values))


def roundtrip(values):
    """ONNX Runtime's QuantizeLinear and DequantizeLinear with scale 1."""
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    one = numpy_helper.from_array(np.float32(1), "s")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], [zero, one])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ort.session(proto).run(None, {"x": np.asarray(values, np.float32)})[0]


def test_all_codes_are_the_numbers_of_the_definition():
    assert len(NUMBERS) == 254 and max(NUMBERS.values()) == FP8.most == 448
    values = np.array([*NUMBERS.values()], dtype=np.float32)
    values[list(NUMBERS).index(0x80)] = -0.0
    codes = np.frombuffer(FP8.tensor("t", values).raw_data, np.uint8)
    np.testing.assert_array_equal(codes, [*NUMBERS])
    np.testing.assert_array_equal(roundtrip(values), values)
    stored = numpy_helper.to_array(FP8.tensor("t", values)).astype(np.float32)
    np.testing.assert_array_equal(stored, values)


def test_rounding_is_to_the_nearest_ties_to_even_and_stops_at_the_end():
    held = np.array(sorted(NUMBERS.values()))
    middles = (held[1:] + held[:-1]) / 2
    random = np.random.default_rng(0).normal(size=500) * 10.0 ** np.linspace(-4, 3, 500)
    values = np.concatenate([middles, random, [449.0, 464.0, 480.0, 1e6, -1e6, 2.0**-11]])
    values = values.astype(np.float32)
    want = nearest(values)
    stored = np.frombuffer(FP8.tensor("t", values).raw_data, np.uint8)
    np.testing.assert_array_equal([NUMBERS[code] for code in stored], want)
    np.testing.assert_array_equal(roundtrip(values), want)


@pytest.mark.parametrize("size", [1e-6, 3e-3, 7.0, 6e4])
def test_a_scale_wastes_nothing_and_clips_less_than_half_a_step(size):
    for value in size * np.linspace(1, 2, 97):
        scale = FP8.scale(value)
        assert scale == float(np.float16(scale)) > 0
        assert nearest(value / scale) <= 448 and FP8.clips_from * scale >= value
        assert 448 * scale <= value * (1 + 2**-11) + 448 * 2**-24
    weight = np.array([[0.5, -1.27], [3.0, 0.1]], dtype=np.float32)
    assert FP8.weight_scales(weight, 1) == FP8.scale(3.0)  # one for all of them
    assert FP8.weight_scales(np.zeros((2, 2), np.float32), 0) == 1


# --- the graph ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory, images):
    """(portable FP32 model, scales)"""
    path = tmp_path_factory.mktemp("fp8") / "fp32.onnx"
    made = tiny_vit(img_size=64)
    patch(made, schedule.parse(STEPS, model_shape(made)), tau=0.3)
    export.export_onnx(made, path, image_size=(64, 64))
    observed = ranges.observe(path, find_layers(onnx.load(path), FP8), [images])
    return path, {name: one.scale for name, one in ranges.choose(observed, "max", FP8).items()}


def values_of(proto, images, names):
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for name in names:
        proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    as_written = ("session.disable_quant_qdq", "1")  # or Q moves up through views to what is shown
    return ort.session(proto, as_written).run([*names], {INPUT: images})


def test_attentions_are_layers_where_they_are_large_enough(model):
    found = find_layers(onnx.load(model[0]), FP8)
    attentions = {layer.block: layer.shape for layer in found if layer.products}
    assert attentions == dict(enumerate((n, n, 16) for n in (65, 65, 51, 41, 41)))
    # a classifier of 10 classes has nothing to gain either
    assert "head" not in {layer.name for layer in found} >= {"patch_embed", "blocks.5.fc2"}
    assert not any(layer.products for layer in find_layers(onnx.load(model[0]), INT8))


def test_products_are_what_fp8_arithmetic_gives(model, images):
    """Attention and a linear layer against float64 arithmetic with the oracle's rounding."""
    path, scales = model
    proto = onnx.load(path)
    plain = {tensor.name: tensor for tensor in proto.graph.initializer}
    done = {layer.name: layer for layer in qdq.insert(proto, scales, FP8)}
    nodes = {n.name: n for n in proto.graph.node}
    images = images[:1]

    layer = done["blocks.2.attention"]
    read = {one.name.split(".")[-1]: one for one in layer.reads}
    score, value = (nodes[read[name].node].output[0] for name in ("q", "v"))
    names = [*(one.tensor for one in layer.reads), score, value]
    q, k, p, v, scores, out = values_of(proto, images, names)

    def rounded(x, scale):
        return nearest(x.astype(np.float64) / scale) * scale

    near = {"rtol": 1e-5, "atol": 1e-4}
    s = {name: scales.get(f"blocks.2.{name}") for name in "qkv"}
    np.testing.assert_allclose(scores, rounded(q, s["q"]) @ rounded(k, s["k"]), **near)
    assert p.min() >= 0 and p.max() <= 1
    want = rounded(p, float(np.float16(1 / 448))) @ rounded(v, s["v"])
    np.testing.assert_allclose(out, want, **near)
    # queries are scaled and keys are transposed before they are rounded
    assert q.shape[-1] == k.shape[-2] == 16

    layer = done["blocks.3.fc1"]
    x, y = values_of(proto, images, [layer.tensor, nodes[layer.node].output[0]])
    weight = numpy_helper.to_array(plain[layer.weight]).astype(np.float64)
    scale = float(np.float16(np.abs(weight).max() / 448))
    exact = rounded(x, scales["blocks.3.fc1"]) @ rounded(weight, scale)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)


def test_weights_are_stored_in_fp8_scales_in_fp16_and_reductions_untouched(model, tmp_path):
    path, scales = model
    done = qdq.quantize(path, tmp_path / "a", scales, FP8)
    qdq.quantize(path, tmp_path / "b", scales, FP8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    proto = onnx.load(tmp_path / "a")
    sizes = graph.weight_types(proto)
    want = sum(int(np.prod(layer.shape)) for layer in done if layer.weight)
    # and a zero for each scale
    assert want < sizes["FLOAT8E4M3FN"] < want + 200
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    made = {INPUT: ""} | {name: n.op_type for n in proto.graph.node for name in n.output}
    made |= dict.fromkeys(tensors, "weight")
    edges = set()
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            # images and LayerNorms are FP32, and are rounded from there
            wide = node.op_type == "QuantizeLinear" and made[node.input[0]] in ("", LAYER_NORM)
            scale = tensors[node.input[1]]
            assert scale.data_type == (TensorProto.FLOAT if wide else TensorProto.FLOAT16)
            value = numpy_helper.to_array(scale)
            assert value == value.astype(np.float16)
            edges |= {node.input[0], node.output[0]}
    reductions = graph.reductions(proto)
    assert len(reductions) == 3
    assert not any(edges & {*node.input, *node.output} for node in reductions)
    # q, k, softmax and v of five attentions, and the inputs of 25 weighted layers
    assert sum(node.op_type == "QuantizeLinear" for node in proto.graph.node) == 4 * 5 + 25


@pytest.mark.parametrize("kept", [(), ("attention",), ("blocks.1", "fc2")])
def test_gates_give_the_model_that_is_written(model, images, kept):
    path, scales = model
    switched = gated.Gated(path, scales, FP8)
    proto = onnx.load(path)
    names = {layer.name for layer in qdq.insert(proto, scales, FP8, keep_float=kept)}
    (want,) = values_of(proto, images, [proto.graph.output[0].name])
    np.testing.assert_allclose(switched.run(names, images), want, atol=1e-4)
    assert np.abs(switched.run((), images) - want).max() > 1e-3


def test_max_drop_measures_attentions_too(model):
    path, scales = model
    many = np.random.default_rng(1).normal(size=(8, 3, 64, 64)).astype(np.float32)
    found = sensitivity.choose(path, scales, many, FP8, max_drop=99)
    rows = {row["name"]: row for row in found.result["ranking"]}
    assert not found.keep_fp16 and found.result["precision"] == "fp8"
    # by hand: queries x keys x head size, twice, in 3 heads; and 12 C*C per token
    attention, linear = 2 * 65 * 65 * 16 * 3, 65 * 48 * 48 * 4
    shares = [rows[name]["macs_share"] for name in ("blocks.0.attention", "blocks.0.fc1")]
    assert shares[0] / shares[1] == pytest.approx(attention / linear)
    assert rows["blocks.0.attention"]["noise"] > 0
    assert "in FP8" in sensitivity.summary(found.result)


def test_entropy_is_for_even_levels():
    from jmp_deploy.quantize.stage import QuantizeOptions, refuse_early

    asked = QuantizeOptions(calib="sample", method="entropy")
    refuse_early(asked, "int8", "build")
    with pytest.raises(CalibrationError, match=r"entropy .* FP8 does not have"):
        refuse_early(asked, "fp8", "build")


# --- TensorRT -------------------------------------------------------------------------------------


def test_tensorrt_fuses_attention_in_fp8_with_the_plugin_around_it(model, tmp_path):
    path, scales = model
    proto = onnx.load(path)
    softmax = [n.name for n in proto.graph.node if n.op_type == "Softmax"]
    done = {layer.name: layer for layer in qdq.quantize(path, tmp_path / "m", scales, FP8)}
    fuse.to_deployable(tmp_path / "m", tmp_path / "t")
    (layers,) = layers_of(tmp_path, [tmp_path / "t"], capability="SM89", profiles=[(1, 2, 4)])
    fused = {
        block: layer
        for block, node in enumerate(softmax)
        for layer in layers
        if node in layer.nodes and "_gemm_mha_v2" in layer.name
    }
    assert set(fused) == set(range(6))  # the last in FP16
    kinds = [{kind for kind, _ in fused[block].inputs.values()} for block in range(6)]
    assert all("FP8" in one for one in kinds[:5]) and "FP8" not in kinds[5], kinds
    for name in ("blocks.0.qkv", "blocks.2.fc1", "blocks.5.fc2"):
        own = [layer for layer in layers if done[name].node in layer.nodes]
        assert any("FP8" in kind for one in own for kind, _ in one.inputs.values()), own


def test_an_attention_in_fp32_is_not_rounded(model, tmp_path):
    from types import SimpleNamespace

    from jmp_deploy.quantize.stage import Quantized, quantize

    path, _ = model
    proto = onnx.load(path)
    layers = find_layers(proto, FP8)
    observed = ranges.observe(path, layers, [np.ones((1, 3, 64, 64), np.float32)])
    made = SimpleNamespace(ranges=ranges.choose(observed, "max", FP8), keep_fp16={})
    made.scales = {name: one.scale for name, one in made.ranges.items()}
    asked = numerics.asked_nodes(proto, ["attention:1"])
    result = Quantized(FP8, made, layers)
    quantize(result, path, tmp_path / "m", macs=10**9, kept=asked)
    assert result.facts["layers_quantized"] == len(layers) - 1
    written = onnx.load(tmp_path / "m")
    makers = {name: n.op_type for n in written.graph.node for name in n.output}
    rounded = [
        makers[n.input[0]] == "DequantizeLinear"
        for n in written.graph.node
        if n.op_type == "MatMul" and makers.get(n.input[0]) and n.name in {x.node for x in layers}
        if next(x for x in layers if x.node == n.name).products
    ]
    assert rounded == [True, False, True, True, True]
