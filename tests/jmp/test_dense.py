"""Features of every patch, restored after reductions: against what the watcher saw of them."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch

from jmp_deploy import BuildOptions, build
from jmp_deploy.cli.main import main
from jmp_deploy.core.errors import JmpDeployError, ScheduleError
from jmp_deploy.export.export import export_onnx
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.dense import DenseFeatures
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.jmp.trace import trace_torch
from tests.fakes.models import tiny_eva, tiny_vit

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MODELS = {"ViT": tiny_vit, "RoPE": tiny_eva}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_without_jmp_they_are_timms(model):
    prefix = model.num_prefix_tokens
    assert torch.equal(DenseFeatures(model)(IMAGES), model.forward_features(IMAGES)[:, prefix:])


@pytest.mark.parametrize("tau", [0.3, -1.0, 2.0])
def test_every_patch_has_the_features_of_the_token_that_it_went_to(model, tau):
    patch(model, schedule.parse("1:12,2:9,4:5", model_shape(model)), tau=tau, restore=True)
    got = DenseFeatures(model)(IMAGES)
    kept = model.forward_features(IMAGES)[:, model.num_prefix_tokens :]
    choices = trace_torch(model, IMAGES.numpy()).choices
    for image in range(len(IMAGES)):
        where = np.arange(16)  # the token that each patch is in, or resembles
        for choice in choices:
            slot = np.full(len(choice.rating[image]), -1)
            slot[choice.kept[image]] = np.arange(len(choice.kept[image]))
            rest = np.flatnonzero(slot < 0)
            into = choice.fate[image]
            slot[rest] = into
            # Of the pruned the watcher does not say whom they resemble: any kept one will do.
            where = np.where(where < 0, -1, slot[where])
        known = np.flatnonzero(where >= 0)
        assert torch.equal(got[image, known], kept[image, where[known]])
        rows = {row.numpy().tobytes() for row in kept[image]}
        assert all(row.numpy().tobytes() in rows for row in got[image])
        if tau != 0.3:
            assert len(known) == {-1.0: 16, 2.0: 5}[tau]


def test_pruned_patches_get_the_features_of_their_likes():
    """Two kinds of patches, without position: whoever goes, every patch keeps its kind's."""
    model = tiny_vit(pos_embed="none")
    images = torch.ones(1, 3, 32, 32)
    images[..., :8, :] = -1.0
    before = DenseFeatures(model)(images)
    shape = model_shape(model).for_patches()
    steps = schedule.improved(schedule.parse("1:4,3:3", shape), shape)
    patch(model, steps, tau=2.0, proportional=False, restore=True)
    after = DenseFeatures(model)(images)
    near = torch.cdist(after[0], before[0])
    kind = (torch.arange(16) >= 4).long()
    assert torch.equal(kind[near.argmin(dim=1)], kind)


def test_a_schedule_that_leaves_patches_out_of_the_last_block_is_refused():
    model = tiny_vit()
    steps = schedule.improved(schedule.parse("1:12", model_shape(model)), model_shape(model))
    assert steps.last_prefix_only
    with pytest.raises(ScheduleError, match="cannot leave them out"):
        patch(model, steps, restore=True)


def test_a_model_that_does_not_keep_slots_says_how(model):
    patch(model, "1:12")
    with pytest.raises(JmpDeployError, match="does not say where") as caught:
        DenseFeatures(model)(IMAGES)
    assert "restore=True" in (caught.value.hint or "")


def test_the_onnx_restores_them_too(tmp_path):
    model = tiny_eva()
    patch(model, schedule.parse("1:12,2:9,4:5", model_shape(model)), tau=0.3, restore=True)
    path = export_onnx(model, tmp_path / "model.onnx", image_size=(32, 32), dense=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    assert [output.name for output in session.get_outputs()] == ["dense"]
    (got,) = session.run(None, {"images": IMAGES.numpy()})
    want = DenseFeatures(model)(IMAGES).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("engine", ["rtx"])
def test_from_build_to_a_file_of_features(engine, tmp_path, monkeypatch):
    from jmp_deploy.engine import builder

    engine = engine if builder.installed(engine) else "none"
    model = tiny_vit(num_classes=0)
    made = build(model, tmp_path / "made", output="dense", schedule="1:12,2:9,4:5", engine=engine)
    assert made.check.ok and made.model.output == "dense"
    assert made.reference().output.shape[1:] == (16, 48)
    assert engine == "none" or made.engine.plugin_layers == 3
    photo = tmp_path / "photo.png"
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    saved, record = tmp_path / "features.npz", tmp_path / "run.json"
    backend = ["--backend", "onnxruntime"]
    asked = ["run", str(tmp_path / "made"), str(photo), *backend]
    assert main([*asked, "--save", str(saved), "--json", str(record)]) == 0
    arrays = np.load(saved)
    assert arrays["images"].tolist() == [str(photo)]
    assert arrays["dense"].shape == (1, 16, 48) and np.isfinite(arrays["dense"]).all()
    assert json.loads(record.read_text())[0]["patches"] == 16
    assert main(["validate", str(tmp_path / "made"), "--data", str(tmp_path)]) == 2
    assert main(["package", str(tmp_path / "made"), "--for", "triton"]) == 2
    compared = ["compare", str(tmp_path / "made"), "--backends", "torch,onnxruntime"]
    assert main(compared) == 0


@pytest.mark.parametrize("other", [{"softmax": True}, {"precision": "int8"}])
def test_what_does_not_go_with_it_is_said_at_once(other, tmp_path):
    options = BuildOptions("deit_t", tmp_path / "made", output="dense", **other)
    with pytest.raises(JmpDeployError, match="--output dense"):
        build(options)
    assert not (tmp_path / "made").exists()
