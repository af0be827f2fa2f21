"""--max-drop: the layer that INT8 ruins is found and kept; nothing is kept without need."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console, Group

from benchmarks.lib import quantized_report
from jmp_deploy.cli import build
from jmp_deploy.core import ort
from jmp_deploy.core.errors import CalibrationError
from jmp_deploy.core.images import INPUT
from jmp_deploy.export import export
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.quantize import gated, qdq, ranges, sensitivity
from jmp_deploy.quantize.layers import find_layers
from jmp_deploy.quantize.sensitivity import choose
from tests.fakes.models import tiny_vit

STEPS = "1:12,2:7"
BAD = "blocks.2.fc2"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)


def plant(model):
    """One hidden unit of block 2 is always 3000, where GELU is the identity; nothing reads it.

    So the model computes what it did, but the one scale of fc2's input leaves nothing for the rest.
    """
    mlp = model.blocks[2].mlp
    mlp.fc1.weight[5] = 0
    mlp.fc1.bias[5] = 3000
    mlp.fc2.weight[:, 5] = 0


def exported(path, images, *, bad=False, dense=False, **options):
    model = tiny_vit(depth=3, **options)
    if bad:
        plant(model)
    if not dense:
        patch(model, schedule.parse(STEPS, model_shape(model)), tau=0.3)
    export.export_onnx(model, path, image_size=(32, 32))
    found = ranges.choose(ranges.observe(path, find_layers(onnx.load(path)), [images]), "max")
    return path, {name: one.scale for name, one in found.items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory, images):
    return exported(tmp_path_factory.mktemp("good") / "m.onnx", images)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, images):
    return exported(tmp_path_factory.mktemp("bad") / "m.onnx", images, bad=True)


@pytest.fixture(scope="module")
def bad_features(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("features") / "m.onnx"
    return exported(path, images, bad=True, dense=True, num_classes=0)


def run(proto, images):
    return ort.session(proto, ort.EXACT_INT8).run(None, {INPUT: images})[0]


# --- points ---------------------------------------------------------------------------------------


def test_points_of_a_classifier_are_what_noise_of_that_size_costs_on_average():
    """Against a simulation: labels drawn from the model's own confidence, noise drawn anew."""
    random = np.random.default_rng(1)
    before = 2 * random.normal(size=(400, 2))
    after = before + 0.5 * random.normal(size=before.shape)
    found = sensitivity.estimate(before, after, classifies=True)
    confidence = np.exp(before) / np.exp(before).sum(1, keepdims=True)
    rows, flips, loss = np.arange(400), [], []
    for _ in range(400):
        best = (before + 0.5 * random.normal(size=before.shape)).argmax(1)
        flips.append(100 * (best != before.argmax(1)).mean())
        loss.append(100 * (confidence.max(1) - confidence[rows, best]).mean())
    assert found.flips == pytest.approx(np.mean(flips), rel=0.15)
    assert found.points == pytest.approx(np.mean(loss), rel=0.35)
    assert 0 < found.points < found.flips


def test_points_by_hand():
    """Margin 3 and the distance moved by 1.5: two standard deviations."""
    before = np.array([[3.0, 0.0], [0.0, 3.0]])
    after = np.array([[2.25, 0.75], [0.75, 2.25]])
    found = sensitivity.estimate(before, after, classifies=True)
    flips = 0.5 * math.erfc(2 / math.sqrt(2))
    assert found.flips == pytest.approx(100 * flips)
    assert found.points == pytest.approx(100 * flips * math.tanh(1.5))
    assert found.noise == pytest.approx(0.25)
    # features: what is the same for all images tells nothing, and counts for nothing
    moved = sensitivity.estimate(before + 50, after + 50, classifies=False)
    assert (
        moved.points == pytest.approx(sensitivity.POINTS_PER_NOISE * 0.25) and moved.flips is None
    )


def test_a_model_that_is_too_modest_does_not_hide_its_loss():
    """Logits a hundred times smaller say the same of the images; 80 % is what they stand for."""
    before = np.array([[3.0, 0.0], [0.0, 3.0]]) / 100
    after = np.array([[2.25, 0.75], [0.75, 2.25]]) / 100
    found = sensitivity.estimate(before, after, classifies=True)
    flips = 0.5 * math.erfc(2 / math.sqrt(2))
    assert found.flips == pytest.approx(100 * flips)
    assert found.points == pytest.approx(100 * flips * (0.8 - 0.2), rel=1e-6)


def test_no_change_costs_nothing():
    same = np.random.default_rng(0).normal(size=(9, 5))
    assert sensitivity.estimate(same, same, classifies=True) == sensitivity.Drop(0.0, 0.0, 0.0)
    assert sensitivity.estimate(same, same, classifies=False) == sensitivity.Drop(0.0, 0.0)


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("patch_embed", "blocks.1.qkv"), ("blocks.2.fc1", "head")])
def test_gates_give_the_model_that_is_written(good, images, names):
    path, scales = good
    model = gated.Gated(path, scales)
    proto = onnx.load(path)
    qdq.insert(proto, {name: scales[name] for name in names})
    np.testing.assert_allclose(model.run(names, images), run(proto, images), atol=2e-4)
    assert model.classifies and len(model.layers) == 14


def test_gates_where_layers_share_an_input(tmp_path, images):
    """SwiGLU's two linear layers read one tensor: one in INT8 must not quantize the other's."""
    import timm

    path, scales = exported(
        tmp_path / "m.onnx",
        images,
        dense=True,
        mlp_layer=timm.layers.SwiGLU,
        act_layer=torch.nn.SiLU,
    )
    model = gated.Gated(path, scales)
    plain = model.run((), images)
    shared = [layer.name for layer in model.layers if layer.kind == "fc1" and layer.block == 1]
    assert len(shared) == 2
    for names in ([shared[0]], [shared[1]], shared):
        proto = onnx.load(path)
        qdq.insert(proto, {name: scales[name] for name in names})
        found = model.run(names, images)
        np.testing.assert_allclose(found, run(proto, images), atol=2e-4)
        assert np.abs(found - plain).max() > 1e-3


# --- the choice -----------------------------------------------------------------------------------


def test_the_layer_that_int8_ruins_is_named_and_kept(bad, images, tmp_path):
    path, scales = bad
    steps = []
    found = choose(path, scales, images, max_drop=1.5, on_progress=lambda *at: steps.append(at))
    assert set(found.keep_fp16) == {BAD}
    assert "rank 1 of 14" in found.keep_fp16[BAD]
    result = found.result
    assert result["all_quantized"]["points"] > 5 > 1.5 >= found.drop
    first, *rest = result["ranking"]
    assert first["name"] == BAD and first["kept"] and not any(row["kept"] for row in rest)
    assert first["noise"] > 10 * max(row["noise"] for row in rest)
    kinds = {row["name"]: row["noise"] for row in result["groups"]}
    assert max(kinds, key=lambda name: kinds[name]) in ("fc2", "blocks.2")
    json.dumps(result, allow_nan=False)
    # what it says of the model is true of the model that is written
    proto = onnx.load(path)
    qdq.insert(proto, scales, keep_float=set(found.keep_fp16))
    written = sensitivity.estimate(
        run(onnx.load(path), images), run(proto, images), classifies=True
    )
    assert written.points == pytest.approx(found.drop, rel=0.5, abs=0.2)
    total = {done_and_all[1] for done_and_all in steps}
    assert len(total) == 1 and steps[-1][0] == steps[-1][1]
    assert [at[0] for at in steps] == sorted(at[0] for at in steps)


def test_features_have_no_classes_and_are_judged_by_their_noise(bad_features, images):
    path, scales = bad_features
    found = choose(path, scales, images, max_drop=1.0)
    assert BAD in found.keep_fp16 and found.result["ranking"][0]["name"] == BAD
    assert found.drop <= 1.0 < found.result["all_quantized"]["points"]
    assert found.drop == pytest.approx(sensitivity.POINTS_PER_NOISE * found.result["noise"])
    assert found.result["flips"] is None


def test_a_model_that_int8_suits_keeps_nothing(good, images):
    path, scales = good
    found = choose(path, scales, images, max_drop=50)
    assert found.keep_fp16 == {} and found.result["macs_share"] == 1
    assert found.drop == found.result["all_quantized"]["points"] <= 50
    # all layers are ranked, by their groups: none had to be measured alone
    assert len(found.result["ranking"]) == 14
    alone = {row["name"] for row in found.result["ranking"] if row["measured"]}
    assert alone == {"patch_embed", "head"}


def test_a_tighter_budget_keeps_more_and_the_same_first(bad, images):
    path, scales = bad
    wide = choose(path, scales, images, max_drop=1.5)
    tight = choose(path, scales, images, max_drop=wide.drop / 3)
    assert set(wide.keep_fp16) < set(tight.keep_fp16)
    assert tight.drop <= wide.drop / 3
    assert tight.result["macs_share"] < wide.result["macs_share"] < 1


def test_the_same_images_give_the_same_choice(bad, images):
    path, scales = bad
    assert choose(path, scales, images, max_drop=0.5) == choose(path, scales, images, max_drop=0.5)


def test_layers_without_a_choice_are_left_out(bad, images):
    path, scales = bad
    found = choose(path, scales, images, max_drop=1.5, keep_float={"fc2", "head"})
    assert found.keep_fp16 == {}
    assert not [row for row in found.result["ranking"] if row["name"].endswith("fc2")]


def test_a_budget_that_only_fp16_holds(bad_features, images):
    path, scales = bad_features
    with pytest.raises(CalibrationError, match="no layer can be in INT8 within 1e-09") as caught:
        choose(path, scales, images, max_drop=1e-9)
    assert "allow more with --max-drop" in (caught.value.hint or "")


def test_what_cannot_be_measured_is_refused(good, images):
    path, scales = good
    with pytest.raises(CalibrationError, match="at least 8 images"):
        choose(path, scales, images[:3], max_drop=1)
    with pytest.raises(CalibrationError, match="same output for every"):
        choose(path, scales, np.repeat(images[:1], 8, axis=0), max_drop=1)
    with pytest.raises(CalibrationError, match="no layer is left"):
        choose(path, {}, images, max_drop=1)
    broken = images.copy()
    broken[9, 0, 3, 3] = np.nan
    with pytest.raises(CalibrationError, match="not finite"):
        choose(path, scales, broken, max_drop=1)


# --- for people -----------------------------------------------------------------------------------


def test_the_table_says_what_stays(bad, images):
    path, scales = bad
    result = choose(path, scales, images, max_drop=1.5).result
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(Group(*build.ranking(result)))
    text = " ".join(console.export_text().split())
    assert f"│ 1 │ {BAD} │" in text and text.count("FP16 │") == 1
    assert "1 of 14 layers stay in FP16" in text and "of 1.5 allowed" in text
    assert "... and 8 layers that cost less, in INT8" in text


def test_the_plot(bad, images, tmp_path):
    pytest.importorskip("matplotlib")
    path, scales = bad
    result = choose(path, scales, images, max_drop=1.5).result
    assert quantized_report.plot(result, tmp_path / "p.png") is None
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(quantized_report, "find_spec", lambda name: None)
    why = quantized_report.plot({}, tmp_path / "p.png")
    assert why is not None and "matplotlib is not installed" in why
