"""`--int8-attention`: which attentions, their products, and what TensorRT makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from jmp_deploy.core import ort
from jmp_deploy.core.errors import CalibrationError
from jmp_deploy.core.images import INPUT
from jmp_deploy.export import export, fuse
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.quantize import qdq, ranges
from jmp_deploy.quantize.formats import FP8, INT8, INT8_ATTENTION
from jmp_deploy.quantize.layers import find_layers
from jmp_deploy.quantize.stage import QuantizeOptions, refuse_early
from tests.fakes.models import tiny_vit
from tests.fakes.rtx import layers_of

OFFERED = QuantizeOptions(calib="sample", attention=True)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory, images):
    """(portable FP32 model with one reduction, what was observed)"""
    path = tmp_path_factory.mktemp("int8") / "fp32.onnx"
    made = tiny_vit(img_size=64, depth=3)
    patch(made, schedule.parse("1:20", model_shape(made)), tau=0.3)
    export.export_onnx(made, path, image_size=(64, 64))
    return path, ranges.observe(path, find_layers(onnx.load(path), INT8_ATTENTION), [images])


def scales_of(observed):
    chosen = ranges.choose(observed, "max", INT8_ATTENTION)
    return {name: one.scale for name, one in chosen.items()}


def test_only_attentions_that_tensorrt_fuses():
    takes = INT8_ATTENTION.attention.takes
    assert takes(512, 512, 64) and takes(3, 3, 16)
    assert not takes(513, 513, 64) and not takes(1, 68, 64) and not takes(197, 197, 48)
    assert FP8.attention.takes(2000, 2000, 80) and not FP8.attention.takes(31, 31, 64)


def test_products_are_what_int8_arithmetic_gives(model, images):
    path, observed = model
    proto = onnx.load(path)
    scales = scales_of(observed)
    done = {layer.name: layer for layer in qdq.insert(proto, scales, INT8_ATTENTION)}
    layer = done["blocks.2.attention"]
    nodes = {n.name: n for n in proto.graph.node}
    read = {one.name.split(".")[-1]: one for one in layer.reads}
    score, value = (nodes[read[name].node].output[0] for name in ("q", "v"))
    names = [*(one.tensor for one in layer.reads), score, value]
    for name in names:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    as_written = ("session.disable_quant_qdq", "1")
    q, k, p, v, scores, out = ort.session(proto, as_written).run(names, {INPUT: images[:1]})

    def rounded(x, name):
        scale = scales[f"blocks.2.{name}"]
        return np.clip(np.rint(x.astype(np.float64) / scale), -127, 127) * scale

    near = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(scores, rounded(q, "q") @ rounded(k, "k"), **near)
    np.testing.assert_allclose(out, rounded(p, "softmax") @ rounded(v, "v"), **near)


def test_the_range_of_the_softmax_is_observed(model):
    """With 127 levels up to 1, most of an even softmax would be rounded to nothing."""
    _, observed = model
    chosen = ranges.choose(observed, "max", INT8_ATTENTION)
    ends = [chosen[f"blocks.{block}.softmax"].threshold for block in range(3)]
    seen = [observed[f"blocks.{block}.softmax"].amax for block in range(3)]
    assert all(end <= most for end, most in zip(ends, seen, strict=True)) and min(ends) < 1
    assert chosen["blocks.0.q"].threshold == observed["blocks.0.q"].amax


def test_what_cannot_be_is_refused_early(model):
    refuse_early(OFFERED, "int8", "build")
    assert OFFERED.form("int8") == INT8_ATTENTION and OFFERED.form("fp16") is None
    assert QuantizeOptions().form("int8") == INT8
    with pytest.raises(CalibrationError, match=r"--int8-attention .* FP8 has attention anyway"):
        refuse_early(OFFERED, "fp8", "build")
    with pytest.raises(CalibrationError, match="calibration options are for"):
        refuse_early(QuantizeOptions(attention=True), "fp16", "build")


def test_tensorrt_fuses_attention_in_int8_with_the_plugin_before_it(model, tmp_path):
    path, observed = model
    softmax = [n.name for n in onnx.load(path).graph.node if n.op_type == "Softmax"]
    qdq.quantize(path, tmp_path / "m", scales_of(observed), INT8_ATTENTION)
    fuse.to_deployable(tmp_path / "m", tmp_path / "t")
    (layers,) = layers_of(tmp_path, [tmp_path / "t"], profiles=[(1, 2, 4)])
    for node in softmax:
        (fused,) = (layer for layer in layers if node in layer.nodes)
        assert "_gemm_mha_v2" in fused.name
        kinds = [kind for kind, _ in fused.inputs.values()]
        # the sizes of merged tokens come in FP16, where there are some
        assert sorted(kinds) == ["Half"] * (node == softmax[2]) + ["Int8"] * 3
        assert [kind for kind, _ in fused.outputs.values()] == ["Int8"]
