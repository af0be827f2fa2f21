"""What backends compute on the way, and the block that loses the accuracy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from jmp_deploy import backends
from jmp_deploy.backends import engine as engine_backend
from jmp_deploy.backends.base import Opened
from jmp_deploy.backends.onnxruntime import trace_onnx
from jmp_deploy.cli.main import main
from jmp_deploy.compare import debug
from jmp_deploy.core import artifact
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import EngineError, GraphError
from jmp_deploy.core.images import load_batch
from jmp_deploy.core.manifest import EngineFacts, EngineOptions, PluginFile
from jmp_deploy.core.ort import session_runner
from jmp_deploy.engine import builder
from jmp_deploy.engine import stage as engine_stage
from jmp_deploy.export.body import add_bodies
from jmp_deploy.export.graph import block_tensors, mark
from jmp_deploy.jmp.trace import owners, trace_torch
from jmp_deploy.jmp.visualize import picture
from jmp_deploy.plugin import library as plugin
from tests.fakes.compare import IMAGES, artifact_of, plant

PROFILE = (1, 4, 8)
FORMS = {
    "jmp": {},
    "dense": {"steps": None},
    "distinct, last block for the prefix alone": {"steps": "spread"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers, QK norm, no classes": {"reg_tokens": 4, "qk_norm": True, "num_classes": 0},
}

PLUGIN = PluginFile("library.so", "0" * 64)


@pytest.fixture(scope="module", params=list(FORMS))
def form(request, tmp_path_factory):
    return artifact_of(tmp_path_factory.mktemp("form") / "a", **FORMS[request.param])


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return artifact_of(tmp_path_factory.mktemp("half") / "a", precision="fp16", steps="spread")


def portable(folder):
    return onnx.load_model(folder / artifact.PORTABLE)


def broken_copy(source, target, *fault, file=artifact.PORTABLE):
    shutil.copytree(source, target)
    plant(target, *fault, file=file)
    return target


def test_both_backends_show_the_same(form):
    folder, model = form
    before = model(torch.from_numpy(IMAGES))
    a = trace_torch(model, IMAGES, blocks=True)
    b = trace_onnx(portable(folder), IMAGES, PROFILE, blocks=True)
    assert torch.equal(model(torch.from_numpy(IMAGES)), before)  # the model is as it was
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert len(a.blocks) == len(b.blocks) == 6 and a.num_prefix == b.num_prefix
    for x, y in zip(a.blocks, b.blocks, strict=True):
        for ours, theirs in zip(x, y, strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    for x, y in zip(a.choices, b.choices, strict=True):
        assert x.name == y.name and x.block == y.block
        for what in ("kept", "fate"):
            np.testing.assert_array_equal(getattr(x, what), getattr(y, what))
        np.testing.assert_allclose(x.rating, y.rating, atol=1e-4)
        np.testing.assert_allclose(x.importance, y.importance, atol=1e-4)
        best = np.sort(np.argsort(-x.rating, axis=1, kind="stable")[:, : x.kept.shape[1]], axis=1)
        np.testing.assert_array_equal(best, x.kept)  # the rating is what chose


@pytest.mark.parametrize("form", [name for name in FORMS if name != "dense"], indirect=True)
def test_visualize_draws_patches_in_the_tokens_that_compare_finds(form, photos):
    folder, model = form
    spec = Artifact.read(folder).preprocess
    seen = trace_onnx(portable(folder), load_batch(photos, spec), PROFILE)
    found = owners(seen.choices, 16, len(photos))
    for image, path in enumerate(photos):
        drawn = picture(model, path, spec).stages
        assert [stage.block for stage in drawn] == [choice.block for choice in seen.choices]
        for stage, choice, after in zip(drawn, seen.choices, found[1:], strict=True):
            np.testing.assert_array_equal(stage.seat, after[image])
            fate = choice.fate[image]
            assert (stage.merged, stage.pruned) == ((fate >= 0).sum(), (fate < 0).sum())


def opened(folder: Path, model) -> tuple[Opened, Opened]:
    """PyTorch and ONNX Runtime."""
    torch_ = backends.get("torch")
    watch = partial(trace_torch, model)
    runner = backends.torch.torch_runner(model, "logits")
    return Opened(torch_, runner, watch), backends.get("onnxruntime").open(Artifact.read(folder))


def test_a_sound_model_has_no_block_outside(form):
    folder, model = form
    a, b = opened(folder, model)
    found = debug.examine(Artifact.read(folder), a, b, IMAGES, 0.99999)
    assert found["first"] is None and found["cause"] is None
    assert [row["stage"] for row in found["stages"]] == [
        "embedding",
        *(f"blocks.{index}" for index in range(6)),
    ]
    assert all(row["ok"] and row["precision"] == "fp32" for row in found["alone"])
    assert all(0 < row["attention"] < 1e-4 and 0 < row["mlp"] < 1e-4 for row in found["alone"])
    assert "every block is within tolerance" in found["verdict"]
    assert "no block stands out" in found["verdict"]


@pytest.mark.parametrize(
    ("block", "layer", "part"), [(3, "fc1", "MLP"), (2, "proj", "attention"), (5, "fc2", "MLP")]
)
def test_a_planted_fault_is_found_by_name(half, tmp_path, monkeypatch, capsys, block, layer, part):
    source, model = half
    folder = broken_copy(source, tmp_path / "a", block, layer, lambda w: np.roll(w, 1, axis=0))
    monkeypatch.setattr("jmp_deploy.jmp.models.restore_model", lambda data, weights=None: model)
    out = tmp_path / "c.json"
    assert main(["compare", str(folder), "--debug", "--json", str(out)]) == 1
    result = json.loads(out.read_text())
    (found,) = result["debug"]
    assert found["first"] == found["cause"] == f"blocks.{block}"
    assert found["cause_part"] == part and found["first_precision"] == "fp16"
    bad = [row["stage"] for row in found["alone"] if not row["ok"]]
    assert bad == [f"blocks.{block}"]  # by itself every other block is sound
    printed = " ".join(capsys.readouterr().out.split())
    assert f"blocks.{block} (fp16) is the first outside tolerance" in printed
    assert f"blocks.{block} (fp16) is off in its {part}" in printed and "…" not in printed


def test_the_order_of_the_backends_does_not_hide_the_fault(half, tmp_path):
    source, model = half
    folder = broken_copy(source, tmp_path / "a", 1, "fc2", lambda w: w * 3)
    b, a = opened(folder, model)
    found = debug.examine(Artifact.read(folder), a, b, IMAGES, 0.999)
    assert found["cause"] == "blocks.1" and found["a"] == "onnxruntime"


def test_a_fault_in_a_reduction_is_found(half):
    """Targets counted in full besides what they take in: the same tokens are kept."""
    folder, model = half
    proto = portable(folder)
    a = trace_torch(model, IMAGES, blocks=True)
    (share,) = (n for n in proto.functions[0].node if n.output[0] == "share_own")
    share.input[1] = "size_place"
    rows = {row["stage"]: row for row in debug.by_itself(proto, a, "fp16", 0.999)}
    assert any(row["same_set"] is not None and not row["ok"] for row in rows.values())
    for row in rows.values():
        assert row["attention"] < 0.01 and row["mlp"] < 0.01 and row["precision"] == "fp16"
        assert row["ok"] == (row["reduction"] is None or row["reduction"] < 0.01)


def test_the_engine_is_built_anew_with_its_blocks_marked(half, tmp_path, monkeypatch):
    """The builder and the runner are stood in for by ONNX Runtime; the graph is the real one."""
    source, model = half
    folder = broken_copy(source, tmp_path / "a", 4, "fc1", lambda w: -w, file=artifact.DEPLOYABLE)
    facts = EngineFacts("rtx", "1", ("sm_86",), "fp16")
    made = replace(Artifact.read(folder), engine=facts)
    asked = []

    def build_engine(onnx_file, target, flavour, spec, *, plugin=None):
        asked.append((flavour, spec, plugin))
        shutil.copy2(onnx_file, target)
        return replace(facts, version="2")

    def engine_runner(marked):
        assert marked.facts.version == "2" and marked.facts.plugin == PLUGIN
        proto = onnx.load_model(marked.path)
        for node in proto.graph.node:
            kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
            if node.domain == "jmp_deploy":
                del node.attribute[:]
                node.attribute.extend(kept)
        add_bodies(proto)
        return session_runner(proto, "engine")

    engine = backends.get("engine")
    b = Opened(engine, session_runner(portable(folder), "engine"), engine.open(made).watch)
    monkeypatch.setattr(builder, "build_engine", build_engine)
    monkeypatch.setattr(engine_backend, "engine_runner", engine_runner)
    monkeypatch.setattr(engine_stage, "find_plugin", lambda: ("library.so", PLUGIN))
    for a in opened(folder, model):
        found = debug.examine(made, a, b, IMAGES, 0.999)
        assert found["first"] == "blocks.4" and found["alone"] is None
        assert "not of engine" in found["verdict"]
        assert all(row["matched"] is None for row in found["stages"])
    flavour, spec, library = asked[0]
    assert (flavour, library) == ("rtx", "library.so")
    assert (
        spec.batch == (1, 4, 8) and spec.options.targets == ("sm_86",) and spec.image == (3, 32, 32)
    )


@pytest.mark.skipif(not builder.installed("rtx"), reason="TensorRT-RTX not installed")
def test_a_real_builder_takes_the_marked_model(half, tmp_path):
    folder, _ = half
    proto = onnx.load_model(folder / artifact.DEPLOYABLE)
    names = [place.out for place in block_tensors(proto)]
    onnx.save_model(mark(proto, names), tmp_path / "marked.onnx")
    spec = builder.EngineSpec(PROFILE, (3, 32, 32), EngineOptions(("sm_86",)))
    library = plugin.plugin_library()
    target = tmp_path / "e"
    facts = builder.build_engine(tmp_path / "marked.onnx", target, "rtx", spec, plugin=library)
    reductions = [n for n in proto.graph.node if n.domain == "jmp_deploy"]
    assert facts.plugin_layers == len(reductions) > 0 and target.stat().st_size > 0


def test_marking_keeps_the_names_of_the_blocks_in_the_deployable_model(half):
    folder, _ = half
    deployable = onnx.load_model(folder / artifact.DEPLOYABLE)
    assert block_tensors(deployable) == block_tensors(portable(folder))


def test_a_model_without_blocks_is_refused(half):
    proto = portable(half[0])
    for node in proto.graph.node:
        if node.op_type == "LayerNormalization":
            node.op_type = "Identity"
    with pytest.raises(GraphError, match="cannot be told apart"):
        block_tensors(proto)


def test_a_reduction_without_its_body_is_refused(half):
    proto = onnx.load_model(half[0] / artifact.DEPLOYABLE)
    with pytest.raises(GraphError, match="no body"):
        trace_onnx(proto, IMAGES, PROFILE)


def test_runner_of_a_model_that_does_not_open(half):
    proto = portable(half[0])
    del proto.functions[:]
    with (
        pytest.raises(EngineError, match="cannot open"),
        session_runner(proto),
    ):
        pass


@pytest.mark.parametrize(("layer", "proposal"), [("proj", "--fp32 attention:3"), ("fc2", None)])
def test_an_attention_at_fault_brings_the_flag_that_computes_it_in_fp32(
    half, tmp_path, layer, proposal
):
    folder = broken_copy(half[0], tmp_path / "a", 3, layer, lambda weight: -weight)
    a = trace_torch(half[1], IMAGES, blocks=True)
    b = trace_onnx(portable(folder), IMAGES, PROFILE, blocks=True)
    way = debug.along_the_way(a, b, 0.999)
    found = debug.conclusion("torch", "engine", 0.999, "fp16", way, None)
    assert found["first"] == "blocks.3" and found["proposal"] == proposal
    assert (proposal or "--fp32") in found["verdict"] or proposal is None
    assert debug.conclusion("a", "b", 0.999, "fp32", way, None)["proposal"] is None
