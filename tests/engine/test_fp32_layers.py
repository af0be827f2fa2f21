"""What stays in FP32 as TensorRT-RTX builds it: read off its own list of layers; no GPU needed."""

from __future__ import annotations

import numpy as np
import pytest

from jmp_deploy.export import numerics, precision
from jmp_deploy.export.export import export_onnx
from jmp_deploy.export.fuse import to_deployable
from jmp_deploy.export.graph import load_model, save_model
from jmp_deploy.jmp.patch import patch
from jmp_deploy.quantize import qdq
from jmp_deploy.quantize.layers import find_layers
from tests.fakes.models import tiny_vit
from tests.fakes.rtx import layers_of

CHOSEN = {0, 4}
FUSED = "_gemm_mha_v2"


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """{form: (softmax node of each block, layers)}."""
    folder = tmp_path_factory.mktemp("layers")
    model = patch(tiny_vit(), "1:11,3:6")
    full = export_onnx(model, folder / "full.onnx", image_size=(32, 32))
    proto = load_model(full)
    softmax = [n.name for n in proto.graph.node if n.op_type == "Softmax"]
    asked = numerics.asked_nodes(proto, ["attention:0,4"])
    scales = {layer.name: float(np.float16(0.02)) for layer in find_layers(proto)}
    always = precision.ALWAYS_FP32
    models = {
        "norms in FP16": lambda path: save_model(precision.lower(proto), path),
        "fp16": lambda path: precision.to_low(full, path, "fp16"),
        "bf16": lambda path: precision.to_low(full, path, "bf16"),
        "fp16, --fp32": lambda path: precision.to_low(full, path, "fp16", asked),
        "int8, --fp32": lambda path: qdq.quantize(full, path, scales, fp32=asked),
    }
    paths = []
    for index, (name, make) in enumerate(models.items()):
        precision.ALWAYS_FP32 = frozenset() if name == "norms in FP16" else always
        make(folder / f"{index}.onnx")
        precision.ALWAYS_FP32 = always
        paths.append(folder / f"{index}.trt.onnx")
        to_deployable(folder / f"{index}.onnx", paths[-1])
    found = layers_of(folder, paths, capability="SM89", profiles=[(1, 2, 4)])
    return softmax, dict(zip(models, found, strict=True))


def fused(layers, softmax):
    """Blocks whose attention is one kernel."""
    return {
        block
        for block, node in enumerate(softmax)
        if any(node in layer.nodes and FUSED in layer.name for layer in layers)
    }


@pytest.mark.parametrize("form", ["fp16, --fp32", "int8, --fp32"])
def test_attention_is_in_fp32_in_the_chosen_blocks_and_fused_in_the_others(engines, form):
    softmax, forms = engines
    layers = forms[form]
    assert fused(layers, softmax) == set(range(6)) - CHOSEN
    for block in CHOSEN:
        own = [layer for layer in layers if softmax[block] in layer.nodes]
        kinds = {kind for layer in own for kind, _ in layer.inputs.values()}
        assert "Float" in kinds, (block, own)


@pytest.mark.parametrize("form", ["fp16", "bf16"])
def test_norms_in_fp32_cost_no_layer_and_no_fused_attention(engines, form):
    softmax, forms = engines
    assert fused(forms[form], softmax) == set(range(6))
    assert len(forms[form]) == len(forms["norms in FP16"])
