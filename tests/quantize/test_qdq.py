"""Q/DQ in the ONNX: which layers, with which scales and integers, and where there must be none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper

from jmp_deploy.core import ort
from jmp_deploy.core.errors import CalibrationError, GraphError
from jmp_deploy.core.images import INPUT
from jmp_deploy.engine import builder
from jmp_deploy.export import export, fuse, graph
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.plugin.library import plugin_library
from jmp_deploy.quantize import equalize, qdq, ranges
from jmp_deploy.quantize.formats import INT8
from jmp_deploy.quantize.layers import find_layers
from tests.fakes.models import tiny_vit

needs_rtx = pytest.mark.skipif(not builder.installed("rtx"), reason="TensorRT-RTX not installed")
STEPS = "1:12,2:8,4:5"


def export_tiny(path, *, dense=False, **options):
    model = tiny_vit(**options)
    if not dense:
        patch(model, schedule.parse(STEPS, model_shape(model)), tau=0.3)
    export.export_onnx(model, path, image_size=(32, 32))
    return model


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    path = tmp_path_factory.mktemp("qdq") / "fp32.onnx"
    export_tiny(path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def scales(portable, images):
    observed = ranges.observe(portable, find_layers(onnx.load(portable)), [images])
    return {name: found.scale for name, found in ranges.choose(observed, "max").items()}


def run(proto, images, *more):
    """Outputs of a model and of tensors inside it."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    for name in more:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return ort.session(proto, ort.EXACT_INT8).run(None, {INPUT: images})


def arrays(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def quantized(path, scales, **options):
    proto = onnx.load(path)
    done = qdq.insert(proto, scales, **options)
    return proto, done


KINDS = {
    "plain": {},
    "layer scale, distilled": {"init_values": 0.1, "reg_tokens": 1},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
    "QK norm, no biases": {"qk_norm": True, "qkv_bias": False, "proj_bias": False},
    "pooled, no classifier": {"class_token": False, "global_pool": "avg", "num_classes": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_found_by_its_place(kind, tmp_path):
    model = export_tiny(tmp_path / "m.onnx", depth=5, **KINDS[kind])
    found = find_layers(onnx.load(tmp_path / "m.onnx"))
    names = [f"blocks.{b}.{k}" for b in range(5) for k in ("qkv", "proj", "fc1", "fc2")]
    head = ["head"] if model.num_classes else []
    assert [layer.name for layer in found] == ["patch_embed", *names, *head]
    weights = arrays(onnx.load(tmp_path / "m.onnx"))
    blocks = list(model.blocks.children())
    for layer in found:
        if layer.block is None:
            continue
        block = blocks[layer.block]
        module = getattr(block.attn if layer.kind in ("qkv", "proj") else block.mlp, layer.kind)
        want = module.weight.numpy()
        have = weights[layer.weight]
        np.testing.assert_array_equal(have if layer.axis == 0 else have.T, want)
        assert layer.after_norm == (layer.kind in ("qkv", "fc1"))


def test_two_fc1_that_read_one_tensor(tmp_path):
    export_tiny(
        tmp_path / "m.onnx", dense=True, mlp_layer=timm.layers.SwiGLU, act_layer=torch.nn.SiLU
    )
    found = [layer for layer in find_layers(onnx.load(tmp_path / "m.onnx")) if layer.block == 0]
    assert [layer.name.split(".")[-1] for layer in found] == ["qkv", "proj", "fc1", "fc1_2", "fc2"]
    # one of the two in FP16: it must read the tensor as it was
    proto, _ = quantized(tmp_path / "m.onnx", {"blocks.0.fc1": 0.1}, keep_float=["blocks.0.fc1_2"])
    nodes = {n.name: n for n in proto.graph.node}
    assert nodes[found[3].node].input[0] == found[3].tensor
    assert nodes[found[2].node].input[0] != found[2].tensor


def test_a_scale_computed_by_hand():
    # 1/127 lies between 1032 and 1033 steps of 2**-17, the spacing of FP16 there; 1032 is nearer
    assert Fraction(INT8.scale(1.0)) == Fraction(1032, 2**17)
    assert INT8.scale(63.5) == 0.5
    weight = np.array([[0.5, -1.27, 0.0], [-0.25, 0.635, 0.0]], dtype=np.float32)
    by_column = INT8.weight_scales(weight, 1)
    want = [0.5 / 127, 0.01, 1.0]  # the last column is zero: any scale will do
    np.testing.assert_allclose(by_column, want, rtol=2**-11)
    np.testing.assert_allclose(INT8.weight_scales(weight, 0), [0.01, 0.005], rtol=2**-11)
    assert (by_column.astype(np.float16).astype(np.float32) == by_column).all()


@pytest.mark.parametrize("size", [1e-6, 3e-5, 1e-3, 7.0, 3e4])
def test_rounding_a_scale_to_fp16_clips_less_than_half_a_step(size):
    for value in size * np.linspace(1, 2, 97):
        scale = INT8.scale(value)
        assert scale == float(np.float16(scale)) > 0
        assert 127.5 * scale >= value
        # and wastes little, except below what FP16 can tell apart
        assert 127 * scale <= value * (1 + 2**-11) + 127 * 2**-24


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_that_is_none(value):
    with pytest.raises(CalibrationError, match="cannot be quantized"):
        INT8.scale(value)


def test_integers_and_products_are_what_int8_arithmetic_gives(portable, scales, images):
    """One layer of each kind of input, against integer arithmetic done here."""
    proto, done = quantized(portable, scales)
    before = arrays(onnx.load(portable))
    nodes = {n.name: n for n in proto.graph.node}
    producers = {n.output[0]: n for n in proto.graph.node}
    for layer in done:
        if layer.name not in ("blocks.0.qkv", "blocks.1.proj", "blocks.4.fc2"):
            continue
        dequantize = producers[nodes[layer.node].input[1]]
        integers, weight_scale = (arrays(proto)[name] for name in dequantize.input[:2])
        weight = before[layer.weight].astype(np.float64)
        want = np.rint(weight / (np.abs(weight).max(axis=0) / 127))
        assert integers.dtype == np.int8 and np.abs(integers - want).max() <= 1
        x, y = run(proto, images, layer.tensor, nodes[layer.node].output[0])[-2:]
        steps = np.clip(np.rint(x.astype(np.float64) / scales[layer.name]), -128, 127)
        exact = steps @ integers.astype(np.float64) * scales[layer.name] * weight_scale
        np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_only_weighted_layers_and_never_the_reductions_are_quantized(portable, scales):
    proto, done = quantized(portable, scales)
    touched = {
        name
        for n in proto.graph.node
        if n.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in (n.input[0], n.output[0])
    }
    inside = {layer.node for layer in done}
    reductions = [n for n in proto.graph.node if n.op_type == "JMPTokenReduce"]
    assert len(reductions) == 3
    outputs = {
        name for n in proto.graph.node if n.op_type == "DequantizeLinear" for name in n.output
    }
    for n in proto.graph.node:
        if n.op_type == "JMPTokenReduce":
            assert not touched & {*n.input, *n.output}
        if outputs & {*n.input}:
            assert n.name in inside
    attention = [n for n in proto.graph.node if n.op_type == "MatMul" and n.name not in inside]
    assert len(attention) == 2 * 6
    assert len(done) == 26 == sum(n.op_type == "QuantizeLinear" for n in proto.graph.node)


def test_quantizing_a_reductions_input_is_refused(portable, scales):
    proto = onnx.load(portable)
    reduction = next(n for n in proto.graph.node if n.op_type == "JMPTokenReduce")
    producer = next(n for n in proto.graph.node if reduction.input[0] in n.output)
    names = ["s", "z"]
    proto.graph.initializer.extend(
        [
            numpy_helper.from_array(np.float32(0.1), "s"),
            numpy_helper.from_array(np.int8(0), "z"),
        ]
    )
    pair = [
        onnx.helper.make_node("QuantizeLinear", [producer.output[0], *names], ["xq"], "q"),
        onnx.helper.make_node("DequantizeLinear", ["xq", *names], ["xd"], "d"),
    ]
    index = list(proto.graph.node).index(producer)
    for offset, node in enumerate(pair):
        proto.graph.node.insert(index + 1 + offset, node)
    reduction.input[0] = "xd"
    with pytest.raises(GraphError, match="has quantized tensors"):
        qdq.insert(proto, scales)


def test_fp16_and_fp32_forms_have_the_same_numbers(portable, scales, images, tmp_path):
    for half in (True, False):
        qdq.quantize(portable, tmp_path / f"{half}.onnx", scales, half=half)
    half, full = (onnx.load(tmp_path / f"{form}.onnx") for form in (True, False))
    # FLOAT: of the LayerNorms
    assert set(graph.weight_types(half)) == {"FLOAT", "FLOAT16", "INT8", "INT64"}
    assert half.functions and full.functions
    ours, theirs = arrays(half), arrays(full)
    for n in full.graph.node:
        if n.op_type == "DequantizeLinear":
            for name in n.input:
                if name in theirs:
                    np.testing.assert_array_equal(
                        theirs[name], ours[name].astype(theirs[name].dtype)
                    )
    want = run(onnx.load(portable), images)[0].astype(np.float64)
    for proto in (half, full):
        got = run(proto, images)[0]
        cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
        # random weights: any rounding may choose another token in some image
        assert got.dtype == np.float32 and np.median(cosine) > 0.97


def test_twice_is_the_same_file(portable, scales, tmp_path):
    for name in ("a", "b"):
        qdq.quantize(portable, tmp_path / name, scales)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["fc2"], {f"blocks.{b}.fc2" for b in range(6)}),
        (["blocks.3"], {f"blocks.3.{k}" for k in ("qkv", "proj", "fc1", "fc2")}),
        (["blocks.5.qkv", "head"], {"blocks.5.qkv", "head"}),
        (["gate"], set()),  # a kind that this model has none of
    ],
)
def test_layers_kept_in_floating_point(portable, scales, words, kept):
    _, done = quantized(portable, scales, keep_float=words)
    assert {layer.name for layer in done} == set(scales) - kept


def test_a_word_that_means_no_layer(portable, scales):
    with pytest.raises(CalibrationError, match=r"no layer 'blocks\.9\.fc2'"):
        quantized(portable, scales, keep_float=["blocks.9.fc2"])


def test_weights_that_are_not_finite(portable, scales):
    proto = onnx.load(portable)
    layer = next(x for x in find_layers(proto) if x.name == "blocks.2.fc1")
    weight = next(t for t in proto.graph.initializer if t.name == layer.weight)
    values = numpy_helper.to_array(weight).copy()
    values[3, 5] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, layer.weight))
    with pytest.raises(CalibrationError, match="weight is not finite"):
        qdq.insert(proto, scales)


def test_a_channel_of_zeros(portable, scales, images):
    proto = onnx.load(portable)
    layer = next(x for x in find_layers(proto) if x.name == "blocks.2.fc1")
    weight = next(t for t in proto.graph.initializer if t.name == layer.weight)
    values = numpy_helper.to_array(weight).copy()
    values[:, 7] = 0
    weight.CopyFrom(numpy_helper.from_array(values, layer.weight))
    qdq.insert(proto, scales)
    output = next(n.output[0] for n in proto.graph.node if n.name == layer.node)
    logits, inner = run(proto, images, output)
    assert np.isfinite(logits).all() and not inner[..., 7].any()


def test_a_weight_that_two_layers_share(portable, scales):
    """One of them in FP16 must keep its own: the exporter merges equal tensors."""
    proto = onnx.load(portable)
    found = {layer.name: layer for layer in find_layers(proto)}
    nodes = {n.name: n for n in proto.graph.node}
    shared = found["blocks.0.qkv"].weight
    nodes[found["blocks.1.qkv"].node].input[1] = shared
    before = arrays(proto)[shared]
    qdq.insert(proto, scales, keep_float=["blocks.1.qkv"])
    nodes = {n.name: n for n in proto.graph.node}
    np.testing.assert_array_equal(arrays(proto)[nodes[found["blocks.1.qkv"].node].input[1]], before)
    assert nodes[found["blocks.0.qkv"].node].input[1] != shared


def test_a_model_that_is_quantized_already(portable, scales):
    proto, _ = quantized(portable, scales)
    with pytest.raises(GraphError, match="quantized already"):
        find_layers(proto)


def test_equalising_changes_nothing_but_the_ranges(portable, images):
    proto = onnx.load(portable)
    found = find_layers(proto)
    observed = ranges.observe(portable, found, [images])
    # a planted outlier channel, as DINOv2 and AugReg models have them
    layer = next(x for x in found if x.name == "blocks.1.fc1")
    norm = next(n for n in proto.graph.node if layer.tensor in n.output)
    factors = equalize.factors(proto, found, observed, 0.5)
    assert set(factors) == {f"blocks.{b}.{k}" for b in range(6) for k in ("qkv", "fc1")}
    assert all(np.log2(value) == int(np.log2(value)) for v in factors.values() for value in v)
    equalize.apply(proto, found, factors)
    np.testing.assert_array_equal(run(proto, images)[0], run(onnx.load(portable), images)[0])
    again = find_layers(proto)
    path = portable.parent / "equal.onnx"
    graph.save_model(proto, path)
    seen = ranges.observe(path, again, [images])
    for name, one in observed.items():
        np.testing.assert_array_equal(
            seen[name].channel_amax, one.divided(factors.get(name)).channel_amax
        )
    assert norm.op_type == "LayerNormalization"


def test_equalising_pays_for_an_outlier_channel(tmp_path, images):
    model = tiny_vit()
    norm, layer = model.blocks[2].norm2, model.blocks[2].mlp.fc1
    norm.weight[5] *= 300
    layer.weight[:, 5] /= 300
    path = tmp_path / "m.onnx"
    export.export_onnx(model, path, image_size=(32, 32))
    want = run(onnx.load(path), images)[0]

    def error(alpha):
        proto = onnx.load(path)
        found = find_layers(proto)
        observed = ranges.observe(path, found, [images])
        factors = equalize.factors(proto, found, observed, alpha) if alpha else {}
        equalize.apply(proto, found, factors)
        seen = {name: one.divided(factors.get(name)) for name, one in observed.items()}
        scales = {"blocks.2.fc1": ranges.choose(seen, "max")["blocks.2.fc1"].scale}
        qdq.insert(proto, scales)
        return np.abs(run(proto, images)[0] - want).mean()

    assert error(0.5) < error(0) / 10


@needs_rtx
def test_tensorrt_builds_it_with_our_plugin(portable, scales, tmp_path):
    qdq.quantize(portable, tmp_path / "m.onnx", scales)
    fuse.to_deployable(tmp_path / "m.onnx", tmp_path / "t.onnx")
    spec = builder.EngineSpec((1, 2, 8), (3, 32, 32), precision="int8")
    facts = builder.build_engine(
        tmp_path / "t.onnx", tmp_path / "e", "rtx", spec, plugin=plugin_library()
    )
    assert facts.plugin_layers == 3 and facts.bytes > 10_000
    found = builder.parse_network(tmp_path / "t.onnx", "rtx", plugin=plugin_library())
    plugins = [layer for layer in found["layers"] if layer["type"] == "PLUGIN_V3"]
    assert {t["dtype"] for layer in plugins for t in layer["outputs"]} == {"HALF"}
