"""Every family as TensorRT-RTX builds it: the plugin where the schedule says, attention fused."""

from __future__ import annotations

import numpy as np
import pytest

from jmp_deploy.export import precision
from jmp_deploy.export.export import export_onnx
from jmp_deploy.export.fuse import to_deployable
from jmp_deploy.export.graph import load_model
from jmp_deploy.jmp.patch import patch
from jmp_deploy.quantize import qdq
from jmp_deploy.quantize.layers import find_layers
from tests.engine.test_fp32_layers import fused
from tests.fakes.models import tiny_eva, tiny_vit
from tests.fakes.rtx import layers_of

CAT = {"rope_type": "cat", "rope_rotate_half": False}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
MODELS = {
    "DINOv3": lambda: tiny_eva(depth=2),
    "EVA-02": lambda: tiny_eva(depth=2, **CAT, **EVA02),
    "PE": lambda: tiny_eva(depth=2, **CAT, attn_type="rope", global_pool="map"),
    "SigLIP": lambda: tiny_vit(depth=2, class_token=False, global_pool="map"),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """{(family, precision): (softmax nodes, layers)}."""
    folder = tmp_path_factory.mktemp("families")
    found, paths = {}, []
    for family, make in MODELS.items():
        full = export_onnx(patch(make(), "0:11"), folder / "full.onnx", image_size=(32, 32))
        proto = load_model(full)
        softmax = [n.name for n in proto.graph.node if n.op_type == "Softmax"]
        scales = {layer.name: float(np.float16(0.02)) for layer in find_layers(proto)}
        for kind in ("fp16", "int8"):
            low = folder / f"{len(paths)}.onnx"
            if kind == "fp16":
                precision.to_low(full, low, kind)
            else:
                qdq.quantize(full, low, scales)
            paths.append(low.with_suffix(".trt.onnx"))
            to_deployable(low, paths[-1])
            found[family, kind] = softmax
    layers = layers_of(folder, paths, capability="SM89", profiles=[(1, 2, 4)], slow=True)
    return dict(zip(found, zip(found.values(), layers, strict=True), strict=True))


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("family", MODELS)
def test_the_plugin_is_there_and_attention_is_one_kernel(engines, family, kind):
    softmax, layers = engines[family, kind]
    ours = [layer for layer in layers if layer.kind == "custom_layer"]
    names = [name for layer in ours for name in layer.nodes]
    assert names == ["blocks.0.token_reduce"]
    # Of the blocks; a pooling that asks once is a softmax more.
    assert fused(layers, softmax) >= set(range(2))
    if kind == "int8":
        assert any("Int8" in types for layer in layers for types, _ in layer.inputs.values())
