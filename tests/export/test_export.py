"""PyTorch -> portable ONNX -> deployable ONNX -> engine, for every kind of model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import timm
import torch

from jmp_deploy.core.errors import EngineError, GraphError
from jmp_deploy.core.images import INPUT
from jmp_deploy.core.manifest import EngineOptions
from jmp_deploy.engine import builder
from jmp_deploy.export import body, export, fuse, graph, precision
from jmp_deploy.jmp import node, schedule
from jmp_deploy.jmp.patch import model_shape, patch, unpatch
from jmp_deploy.plugin.library import plugin_library
from tests.fakes.models import tiny_eva, tiny_vit

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"reg_tokens": 1},
    "registers": {"reg_tokens": 4},
    "layer scale": {"init_values": 0.1},
    "SwiGLU": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
    "QK norm": {"qk_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no classifier": {"num_classes": 0},
    "pooling by attention": {"class_token": False, "global_pool": "map"},
}
ROPE: dict[str, dict[str, Any]] = {
    "DINOv3": {},
    "EVA-02, rotations of each head": {
        "rope_type": "mixed",
        "rope_rotate_half": False,
        "scale_attn_inner": True,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
    },
}
needs_rtx = pytest.mark.skipif(not builder.installed("rtx"), reason="TensorRT-RTX not installed")


def run(path, images):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    return session.run(None, {INPUT: images})[0]


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=[*KINDS, *ROPE])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    kind = request.param
    model = tiny_vit(**KINDS[kind]) if kind in KINDS else tiny_eva(**ROPE[kind])
    steps = schedule.parse("1:12,2:8,4:5", model_shape(model))
    patch(model, steps, tau=0.3)
    export.export_onnx(model, folder / "model.onnx", image_size=(32, 32))
    precision.to_low(folder / "model.onnx", folder / "half.onnx", "fp16")
    for name in ("model", "half"):
        fuse.to_deployable(folder / f"{name}.onnx", folder / f"{name}.trt.onnx")
    return model, folder


def test_fp32_equals_pytorch(exported, images):
    model, folder = exported
    want = model(torch.from_numpy(images)).numpy()
    got = run(folder / "model.onnx", images)
    assert np.abs(got - want).max() <= 1e-5 * max(1, np.abs(want).max())


def test_fp16_is_close_and_keeps_fp32_at_the_ends(exported, images):
    model, folder = exported
    want = model(torch.from_numpy(images)).numpy()
    got = run(folder / "half.onnx", images)
    # Most samples; in one a near tie in importance may fall the other way in FP16.
    assert got.dtype == np.float32 and np.median(cosine(got, want)) >= 0.9999
    assert cosine(got, want).min() >= 0.9
    proto = onnx.load(folder / "half.onnx")
    norms = {n for node in proto.graph.node if "LayerNorm" in node.op_type for n in node.input}
    wide = {w.name for w in proto.graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
    assert wide and wide <= norms


def test_the_batch_is_dynamic(exported, images):
    _, folder = exported
    together = run(folder / "model.onnx", images)
    for count in (1, 3):
        alone = run(folder / "model.onnx", images[:count])
        np.testing.assert_allclose(alone, together[:count], rtol=1e-4, atol=1e-5)


def test_onnx_runtime_computes_no_shapes_and_splits_qkv_once(tmp_path):
    model = tiny_vit(img_size=64)
    patch(model, "spread")
    path = export.export_onnx(model, tmp_path / "model.onnx", image_size=(64, 64))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options)
    found = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "OneHot" in found and {"Range", "Less", "Trilu", "Equal"}.isdisjoint(found)
    assert found.count("Shape") <= 1  # of the images, for the class token
    assert found.count("Split") == 6


def test_a_body_needs_the_width_of_qkv(plain):
    proto = graph.load_model(plain[1] / "model.onnx")
    del proto.graph.value_info[:]
    with pytest.raises(GraphError, match="two or three parts"):
        body.add_bodies(proto)


def test_there_and_back_is_the_same_model(exported, images, tmp_path):
    _, folder = exported
    for name in ("model", "half"):
        found = fuse.to_portable(folder / f"{name}.trt.onnx", tmp_path / "back.onnx")
        assert [attributes.num_keep for attributes in found] == [12, 8, 5]
        again = run(tmp_path / "back.onnx", images)
        np.testing.assert_array_equal(again, run(folder / f"{name}.onnx", images))


def test_nothing_of_the_machine_is_left_in_the_file(exported):
    _, folder = exported
    data = (folder / "model.onnx").read_bytes()
    assert b"site-packages" not in data and b".py" not in data


@needs_rtx
@pytest.mark.parametrize("name", ["model", "half"])
def test_tensorrt_builds_it_with_our_plugin(exported, tmp_path, name):
    _, folder = exported
    spec = builder.EngineSpec(
        (1, 2, 8), (3, 32, 32), precision="fp32" if name == "model" else "fp16"
    )
    facts = builder.build_engine(
        folder / f"{name}.trt.onnx", tmp_path / "e", "rtx", spec, plugin=plugin_library()
    )
    assert facts.plugin_layers == 3
    assert facts.bytes == (tmp_path / "e").stat().st_size > 10_000


@needs_rtx
def test_the_parser_sees_the_plugin_where_the_schedule_says(exported):
    model, folder = exported
    found = builder.parse_network(folder / "half.trt.onnx", "rtx", plugin=plugin_library())
    plugins = [layer for layer in found["layers"] if layer["type"] == "PLUGIN_V3"]
    assert [layer["name"] for layer in plugins] == [f"blocks.{i}.token_reduce" for i in (1, 2, 4)]
    prefix = model.num_prefix_tokens
    for layer, keep, came in zip(plugins, (12, 8, 5), (16, 12, 8), strict=True):
        y, size, log_size, *became = layer["outputs"]
        assert [tensor["shape"] for tensor in became] == [[-1, came]] * hasattr(model, "rope")
        assert y["shape"] == [-1, prefix + keep, 48] and y["dtype"] == "HALF"
        assert size["shape"] == log_size["shape"] == [-1, prefix + keep]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    model = tiny_vit()
    patch(model, schedule.parse("1:12,4:5", model_shape(model)))
    export.export_onnx(model, folder / "model.onnx", image_size=(32, 32))
    fuse.to_deployable(folder / "model.onnx", folder / "model.trt.onnx")
    return model, folder


def test_a_dense_model_passes_through(tmp_path, images):
    dense = tiny_vit()
    export.export_onnx(dense, tmp_path / "d.onnx", image_size=(32, 32))
    assert fuse.to_deployable(tmp_path / "d.onnx", tmp_path / "d.trt.onnx") == []
    want = dense(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(tmp_path / "d.trt.onnx", images), want, atol=1e-5)


def test_exporting_leaves_the_model_as_it_was(plain, images):
    model, _ = plain
    fused = [block.attn.fused_attn for block in model.blocks.children()]
    assert all(fused)
    before = model(torch.from_numpy(images))
    unpatch(model)
    patch(model, schedule.parse("1:12,4:5", model_shape(model)))
    assert torch.equal(model(torch.from_numpy(images)), before)


def edit(source, target, change):
    proto = onnx.load(source)
    change(proto)
    onnx.save(proto, target)
    return target


def reductions(proto):
    return [n for n in proto.graph.node if n.domain == node.DOMAIN]


def remove_body(proto):
    del proto.functions[:]


def alter_body(proto):
    proto.functions[0].node[0].attribute[0].ints[0] = 5


def add_function(proto):
    proto.functions.append(
        onnx.parser.parse_function('<opset_import: ["": 20]> f (a) => (b) {b = Neg(a)}')
    )


def add_foreign_operator(proto):
    proto.graph.node[3].domain = "com.microsoft"


def remove_attribute(proto):
    attributes = reductions(proto)[0].attribute
    attributes.remove(next(a for a in attributes if a.name == "tau"))


def keep_too_many(proto):
    for attribute in reductions(proto)[1].attribute:
        if attribute.name == "num_keep":
            attribute.i = 13


def cut_an_input(proto):
    reductions(proto)[0].input[1] = "nothing"


def break_the_size_chain(proto):
    reductions(proto)[1].input[2] = reductions(proto)[0].input[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_body, "without their body"),
        (alter_body, "not the one of this version"),
        (add_function, "unexpected local functions"),
        (add_foreign_operator, "unexpected operator in the model: com.microsoft"),
        (remove_attribute, "missing attributes"),
        (keep_too_many, "keeps 13 of 12 patch tokens"),
        (cut_an_input, "nothing computes its input 1"),
        (break_the_size_chain, "sizes do not come from the reduction before it"),
    ],
)
def test_anything_unexpected_is_refused(plain, tmp_path, change, message):
    _, folder = plain
    source = edit(folder / "model.onnx", tmp_path / "edited.onnx", change)
    with pytest.raises(GraphError, match=message):
        fuse.to_deployable(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_the_expected_schedule_is_checked(plain, tmp_path):
    _, folder = plain
    found = fuse.to_deployable(folder / "model.onnx", tmp_path / "a.onnx")
    with pytest.raises(GraphError, match=r"2 reductions \(keep 12, 5\), expected 1 \(keep 12\)"):
        fuse.to_deployable(folder / "model.onnx", tmp_path / "b.onnx", expected=found[:1])


def test_the_way_back_takes_only_deployable_models(plain, tmp_path):
    _, folder = plain
    with pytest.raises(GraphError, match="portable already"):
        fuse.to_portable(folder / "model.onnx", tmp_path / "a.onnx")


@pytest.mark.parametrize("name", ["model", "half"])
def test_inlined_needs_no_local_functions_and_answers_the_same(exported, images, tmp_path, name):
    _, folder = exported
    fuse.to_inlined(folder / f"{name}.onnx", tmp_path / "inlined.onnx")
    proto = onnx.load(tmp_path / "inlined.onnx")
    onnx.checker.check_model(proto)
    assert not proto.functions and {entry.domain for entry in proto.opset_import} == {""}
    want = run(folder / f"{name}.onnx", images)
    np.testing.assert_array_equal(run(tmp_path / "inlined.onnx", images), want)


def test_inlined_by_another_engine(plain, images, tmp_path):
    model, folder = plain
    fuse.to_inlined(folder / "model.onnx", tmp_path / "inlined.onnx")
    engine = onnx.reference.ReferenceEvaluator(str(tmp_path / "inlined.onnx"))
    (found,) = engine.run(None, {INPUT: images})
    want = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("is_inlined", [False, True])
def test_folding_by_graphsurgeon_keeps_the_types(plain, images, tmp_path, is_inlined):
    _, folder = plain
    source = folder / "model.onnx"
    if is_inlined:
        fuse.to_inlined(source, source := tmp_path / "inlined.onnx")
    proto = onnx.load(source)
    folded = gs.export_onnx(gs.import_onnx(proto).fold_constants().cleanup(), do_type_check=False)
    folded.ir_version = proto.ir_version
    del folded.opset_import[:]  # it leaves out the domain of the reductions
    folded.opset_import.extend(proto.opset_import)
    onnx.save(folded, tmp_path / "folded.onnx")
    want = run(folder / "model.onnx", images)
    np.testing.assert_allclose(run(tmp_path / "folded.onnx", images), want, atol=1e-5)


def test_only_portable_models_are_inlined(plain, tmp_path):
    _, folder = plain
    with pytest.raises(GraphError, match="without their body"):
        fuse.to_inlined(folder / "model.trt.onnx", tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_truncated_files_are_recognised(plain, tmp_path, size):
    _, folder = plain
    (tmp_path / "cut.onnx").write_bytes((folder / "model.onnx").read_bytes()[:size])
    with pytest.raises(GraphError, match="truncated or not an ONNX model"):
        fuse.to_deployable(tmp_path / "cut.onnx", tmp_path / "out.onnx")


@needs_rtx
def test_a_model_that_the_parser_refuses_is_an_error_in_its_words(plain, tmp_path):
    _, folder = plain
    spec = builder.EngineSpec((1, 1, 1), (3, 32, 32))
    with pytest.raises(EngineError, match=r"cannot parse .*Plugin not found") as caught:
        builder.build_engine(folder / "model.trt.onnx", tmp_path / "e", "rtx", spec)
    assert "model.trt.onnx" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_the_builders_log_is_kept_when_it_fails(plain, tmp_path):
    _, folder = plain
    spec = builder.EngineSpec((1, 1, 1), (3, 32, 32), EngineOptions(("sm_75",)), "fp32")
    with pytest.raises(EngineError, match=r"could not build the engine: .*Turing") as caught:
        builder.build_engine(
            folder / "model.trt.onnx",
            tmp_path / "e",
            "rtx",
            spec,
            plugin=plugin_library(),
            log=tmp_path / "build.log",
        )
    assert "build.log" in caught.value.hint and "Turing" in (tmp_path / "build.log").read_text()


@needs_rtx
@pytest.mark.parametrize("target", ["sm_87", "sm_90"])
def test_targets_that_the_builder_does_not_know(plain, tmp_path, target):
    _, folder = plain
    spec = builder.EngineSpec((1, 1, 1), (3, 32, 32), EngineOptions((target,)))
    with pytest.raises(EngineError, match=f"cannot build for {target}"):
        builder.build_engine(
            folder / "model.trt.onnx", tmp_path / "e", "rtx", spec, plugin=plugin_library()
        )


@needs_rtx
def test_progress_reaches_its_end(plain, tmp_path):
    _, folder = plain
    steps = []
    builder.build_engine(
        folder / "model.trt.onnx",
        tmp_path / "e",
        "rtx",
        builder.EngineSpec((1, 1, 1), (3, 32, 32), EngineOptions(("sm_86",))),
        plugin=plugin_library(),
        on_progress=lambda *step: steps.append(step),
    )
    assert steps and steps[-1][1] == steps[-1][2]


@needs_rtx
def test_a_dying_builder_is_an_error_not_a_dead_process(plain, tmp_path, monkeypatch):
    """The trap of TensorRT-RTX's parser: without our environment the process is terminated."""
    import os

    _, folder = plain
    monkeypatch.setattr(
        builder,
        "worker_environment",
        lambda flavour: {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    with pytest.raises(EngineError, match="process ended with SIGABRT"):
        builder.parse_network(folder / "model.trt.onnx", "rtx", plugin=plugin_library())
