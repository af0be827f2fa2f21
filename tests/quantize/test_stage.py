"""`build --precision int8` from end to end, on a small model."""

from __future__ import annotations

import copy
import json
import sys
import types

import onnx
import pytest

from jmp_deploy import backends, pipeline
from jmp_deploy.backends.base import infer
from jmp_deploy.cli.build import quantization_rows
from jmp_deploy.cli.main import main
from jmp_deploy.core import artifact, manifest
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.device import gpus
from jmp_deploy.core.errors import CalibrationError
from jmp_deploy.core.images import Preprocess
from jmp_deploy.engine import builder
from jmp_deploy.export import graph
from jmp_deploy.jmp import models
from jmp_deploy.jmp.models import LoadedModel
from jmp_deploy.pipeline import BuildOptions
from jmp_deploy.quantize import ranges, recipes, stage
from jmp_deploy.quantize.stage import QuantizeOptions
from tests.fakes.artifacts import RANDOM_WEIGHTS
from tests.fakes.models import tiny_vit

needs_rtx = pytest.mark.skipif(not builder.installed("rtx"), reason="TensorRT-RTX not installed")
without_gpu = pytest.mark.skipif(bool(gpus()), reason="tells what happens without a GPU")
SPEC = Preprocess(
    32, 32, 36, "bicubic", "center", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def use_tiny(patcher):
    model = tiny_vit(depth=3)

    def load(name, weights="auto", **options):
        return LoadedModel(copy.deepcopy(model), name, RANDOM_WEIGHTS, SPEC, None)

    patcher.setattr(models, "load_model", load)
    return model


@pytest.fixture
def tiny(monkeypatch):
    """Builds take this model whatever name is asked for; returns a place to change it."""
    return use_tiny(monkeypatch)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense artifact, without an engine."""
    folder = tmp_path_factory.mktemp("dense") / "a"
    with pytest.MonkeyPatch.context() as patcher:
        use_tiny(patcher)
        build(folder, dense=True)
    return folder


def build(out, *, engine="none", precision="int8", schedule="0:12,1:7", dense=False, **int8):
    settings = {"calib": "sample", "images": 16, **int8}
    made = pipeline.build(
        BuildOptions(
            model="tiny",
            out=out,
            precision=precision,
            **({"dense": True} if dense else {"schedule": schedule}),
            engine=engine,
            quantize=QuantizeOptions(**settings) if precision in ("int8", "fp8") else None,
        )
    )
    made.verify()
    return made.to_json()


def test_the_artifact_is_whole_and_a_cache_rebuilds_it_bit_for_bit(tiny, tmp_path):
    data = build(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "model.onnx",
        "model.trt.onnx",
        "model.fp16.trt.onnx",
        "calibration.json",
        "reference.npz",
        "manifest.json",
    }
    found = data["int8"]
    assert found["images"]["demonstration"] and found["images"]["count"] == 16
    assert "only 16 images" in found["images"]["warnings"][0]
    assert (found["layers"], found["layers_quantized"]) == (14, 12)
    assert found["keep_fp16"] == {"patch_embed": "recipe default", "head": "recipe default"}
    assert 0.5 < found["macs_share"] < 1
    assert found["activations_bytes"]["int8"] < 0.7 * found["activations_bytes"]["fp16"]
    types_ = graph.weight_types(onnx.load(tmp_path / "a" / "model.onnx"))
    assert types_ == found["weights_bytes"] and set(types_) == {"INT8", "FLOAT", "FLOAT16", "INT64"}

    cache = tmp_path / "a" / "calibration.json"
    again = build(tmp_path / "b", calib=None, cache=cache)
    for name in ("model.onnx", "model.trt.onnx", "calibration.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert again["int8"]["from_cache"] == str(cache)
    with pytest.raises(CalibrationError, match=r"schedule .*not \[\[1, 11\]\]"):
        build(tmp_path / "c", calib=None, cache=cache, schedule="1:11")
    tiny.blocks[2].norm1.bias[3] += 0.5
    with pytest.raises(CalibrationError, match="weights"):
        build(tmp_path / "c", calib=None, cache=cache)
    assert not (tmp_path / "c").exists()


def test_attention_in_int8_if_asked_for(tiny, tmp_path):
    data = build(tmp_path / "a", attention=True)
    found = data["int8"]
    assert found["attention"] and (found["layers"], found["layers_quantized"]) == (17, 15)
    rows = dict(quantization_rows("int8", Artifact.read(tmp_path / "a").quantization))
    assert "attention of one query, or more than 512 tokens, LayerNorm" in rows["kept in FP16"]
    cache = tmp_path / "a" / "calibration.json"
    with pytest.raises(CalibrationError, match=r"--int8-attention\): true, not false"):
        build(tmp_path / "b", calib=None, cache=cache)
    wide = tiny_vit(depth=1, num_heads=1)  # of 48 columns
    tiny.blocks, tiny.embed_dim = wide.blocks, wide.embed_dim
    with pytest.raises(CalibrationError, match="heads of 16, 32, 64 columns and at most 512"):
        build(tmp_path / "b", attention=True, dense=True)


def test_share_of_macs_is_counted_by_what_runs(dense):
    """By hand: 17 tokens, 12 C*C per token and block in linear layers."""
    data = Artifact.read(dense).to_json()
    linear = 3 * 17 * 12 * 48 * 48
    assert data["int8"]["macs_share"] == pytest.approx(linear / data["macs"]["dense"])
    values = 3 * 17 * (3 * 48 + 192)
    rest = 2 * (16 * 3 * 8 * 8 + 48)
    assert data["int8"]["activations_bytes"] == {"int8": values + rest, "fp16": 2 * values + rest}


def test_the_check_holds_int8_and_its_twin_against_pytorch(dense):
    data = Artifact.read(dense).to_json()
    ours, twin = data["check"]["pairs"]
    assert data["check"]["ok"] and "FP16 twin" in twin["b"]
    assert 0.99 <= ours["cosine"] < twin["cosine"] and twin["cosine"] >= 0.999


def test_the_artifact_runs_on_onnx_runtime(dense):
    made = Artifact.read(dense)
    reference = made.reference()
    with backends.get("onnxruntime").open(made).runner as runner:
        got = infer(runner, reference.images, made.batch)["logits"]
    assert (got.argmax(1) == reference.output.argmax(1)).all()


@needs_rtx
@without_gpu
def test_both_engines_are_built_and_speed_is_not_claimed(tiny, tmp_path):
    data = build(tmp_path / "a", engine="rtx")
    assert data["engine"]["precision"] == "int8" and data["engine"]["plugin_layers"] == 2
    assert data["int8"]["speed"]["ratio"] is None
    assert data["int8"]["speed"]["why"].startswith("speed unknown: no GPU is here")
    for name in ("model.engine", "model.fp16.engine"):
        assert data["files"][name]["bytes"] > 10_000
    sizes = data["int8"]["engine_bytes"]
    assert sizes["int8"] == data["files"]["model.engine"]["bytes"]
    assert sizes["fp16"] == data["files"]["model.fp16.engine"]["bytes"]
    # built again in FP16, nothing of INT8 is left
    build(tmp_path / "a", precision="fp16")
    left = {path.name for path in (tmp_path / "a").iterdir()} - {artifact.BUILD_LOG}
    assert left == {"model.onnx", "model.trt.onnx", "reference.npz", "manifest.json"}


@needs_rtx
@without_gpu
def test_fp8_from_images_and_from_the_cache_for_the_gpus_that_have_it(tiny, tmp_path):
    data = build(tmp_path / "a", engine="rtx", precision="fp8")
    assert data["int8"] is None and data["fp8"]["layers_quantized"] == 13 == data["fp8"]["layers"]
    assert data["check"]["ok"] and data["check"]["pairs"][0]["precision"] == "fp8"
    assert data["fp8"]["keep_fp16"] == {}
    targets = set(data["engine"]["targets"])
    assert {"sm_89", "sm_120"} <= targets and not {"sm_75", "sm_80", "sm_86"} & targets
    assert data["engine"]["precision"] == "fp8" and set(data["fp8"]["engine_bytes"]) == {
        "fp8",
        "fp16",
    }
    cache = tmp_path / "a" / "calibration.json"
    build(tmp_path / "b", calib=None, cache=cache, precision="fp8")
    for name in ("model.onnx", "model.trt.onnx", "calibration.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    with pytest.raises(CalibrationError, match="number format: fp8, not int8"):
        build(tmp_path / "c", calib=None, cache=cache)


def test_layers_that_cost_too_much_stay_in_fp16_and_in_the_cache(tiny, tmp_path, monkeypatch):
    asked = {}
    measured = {
        "ranking": [],
        "groups": [],
        "precision": "int8",
        "all_quantized": {"noise": 0.0, "points": 0.0},
    }
    measured |= {"measure": "m", "images": 16, "flips": None, "drop": 0.1, "budget": 0.3}
    measured |= {"macs_share": 0.9}

    def choose(model, scales, images, form, *, max_drop, keep_float, on_progress):
        asked.update(max_drop=max_drop, keep=set(keep_float), scales=dict(scales), n=len(images))
        on_progress(1, 1)
        return types.SimpleNamespace(
            keep_fp16={"blocks.1.fc2": "costs 4 points"}, drop=0.1, result=measured
        )

    module = types.SimpleNamespace(choose=choose)
    monkeypatch.setitem(sys.modules, "jmp_deploy.quantize.sensitivity", module)
    monkeypatch.setattr("jmp_deploy.quantize.sensitivity", module, raising=False)
    data = build(tmp_path / "a", max_drop=0.3)
    assert asked["max_drop"] == 0.3 and asked["keep"] == set()
    assert len(asked["scales"]) == 14 and asked["n"] == 16
    # what was measured stands in place of the recipe's list
    assert data["int8"]["keep_fp16"] == {"blocks.1.fc2": "costs 4 points"}
    assert data["int8"]["layers_quantized"] == 13 and data["int8"]["sensitivity"] == measured
    build(tmp_path / "b", calib=None, cache=tmp_path / "a" / "calibration.json")
    assert (tmp_path / "b/model.onnx").read_bytes() == (tmp_path / "a/model.onnx").read_bytes()


@pytest.mark.parametrize(("method", "passes"), [("max", [8]), ("percentile:99.9", [4, 8])])
def test_equalised_models_are_calibrated_as_they_will_be(
    tiny, tmp_path, monkeypatch, method, passes
):
    (tmp_path / "default.toml").write_text("equalize = 0.5")
    monkeypatch.setattr(recipes, "recipes_dir", lambda: tmp_path)
    monkeypatch.setattr(stage, "FACTOR_IMAGES", 4)
    genuine, counts = ranges.observe, []

    def observe(model, layers, batches, **options):
        counts.append(options["total"])
        return genuine(model, layers, batches, **options)

    monkeypatch.setattr(ranges, "observe", observe)
    data = build(tmp_path / "a", images=8, method=method, dense=True)
    assert counts == passes and len(data["int8"]["equalized"]) == 6
    # the check is against the model as it was; the cache makes it again
    assert data["check"]["pairs"][0]["cosine"] > 0.98
    build(tmp_path / "b", calib=None, cache=tmp_path / "a" / "calibration.json", dense=True)
    assert (tmp_path / "b/model.onnx").read_bytes() == (tmp_path / "a/model.onnx").read_bytes()


def test_weights_that_are_not_finite(tiny, tmp_path):
    tiny.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"blocks\.1\.fc2 is not finite"):
        build(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_ctrl_c_while_images_run_leaves_nothing(tiny, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranges, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a")
    assert not (tmp_path / "a").exists()


INT8_FACTS = {
    "images": {"demonstration": False, "source": "photos", "count": 256},
    "method": "max",
    "from_cache": None,
    "weights_bytes": {"INT8": 10},
    "activations_bytes": {"int8": 1, "fp16": 2},
}
BASE = ["build", "deit_t", "--weights", "random", "--engine", "none", "-o", "OUT"]
INT8 = [*BASE, "--precision", "int8"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (INT8, "needs images", "--precision int8 --calib DIR"),
        ([*BASE, "--calib", "sample"], "this is fp16", "--precision int8"),
        ([*INT8, "--calib", "sample", "--calib-cache", "c"], "exclude each other", "choose one"),
        ([*INT8, "--calib-cache", "c", "--max-drop", "1"], "measures on images", "--calib DIR"),
        ([*INT8, "--calib", "sample", "--max-drop", "0"], "must be above 0", ""),
        ([*INT8, "--calib", "sample", "--calib-method", "mean"], "unknown calibration", "entropy"),
        ([*INT8, "--calib-cache", "c", "--calib-method", "max"], "does nothing", "leave one"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_at_once(
    tmp_path, capsys, monkeypatch, arguments, message, hint
):
    monkeypatch.setattr(models, "load_model", None)  # refused before any work
    out = str(tmp_path / "a")
    assert main([out if word == "OUT" else word for word in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and hint in err and "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_kept_layers_are_listed_shortly():
    reasons = {f"blocks.{b}.fc2": "recipe x" for b in (0, 1, 2, 5)}
    lines = dict(
        quantization_rows(
            "int8", manifest.Quantization(**INT8_FACTS, keep_fp16={**reasons, "head": "zero"})
        )
    )
    assert lines["kept in FP16"].splitlines()[:2] == [
        "fc2 of blocks 0-2, 5: recipe x",
        "head: zero",
    ]


def test_the_summary_says_what_it_is(tiny, tmp_path, capsys):
    out = tmp_path / "a"
    command = [str(out) if word == "OUT" else word for word in INT8]
    command += ["--calib", "sample", "--calib-images", "8", "--dense"]
    assert main([*command, "--json", str(tmp_path / "b.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "INT8 in 12 of 14 weighted layers" in printed
    assert "DEMONSTRATION" in printed and "patch_embed, head: recipe default" in printed
    assert "calibration: only 8 images" in printed
    assert json.loads((tmp_path / "b.json").read_text())["int8"]["layers_quantized"] == 12
