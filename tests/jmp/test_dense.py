"""Features of every patch, restored after reductions: against what the watcher saw of them."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch

from jmp_deploy import build
from jmp_deploy.cli.main import main
from jmp_deploy.core import ort, outputs
from jmp_deploy.core.errors import JmpDeployError, ScheduleError
from jmp_deploy.export.export import export_onnx
from jmp_deploy.export.graph import block_tensors, load_model
from jmp_deploy.export.precision import emulated
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.dense import DenseFeatures
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.jmp.trace import trace_torch
from jmp_deploy.quantize.stage import QuantizeOptions
from tests.fakes.models import tiny_eva, tiny_vit

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MODELS = {"ViT": tiny_vit, "RoPE": partial(tiny_eva, global_pool="token")}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_without_jmp_they_are_timms(model):
    prefix = model.num_prefix_tokens
    assert torch.equal(DenseFeatures(model)(IMAGES), model.forward_features(IMAGES)[:, prefix:])


def test_layers_without_jmp_are_timms(model):
    """With and without the last norm; the last layer is what `forward_features` gives."""
    random = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(model.norm.weight, 1, 0.3, generator=random)
    for word, normed in (("dense", True), ("raw", False)):
        got = DenseFeatures(model, [f"{word}_{layer}" for layer in (0, 3, 5)])(IMAGES)
        want = model.forward_intermediates(
            IMAGES, [0, 3, 5], norm=normed, output_fmt="NLC", intermediates_only=True
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    both = DenseFeatures(model, ["dense", "dense_5", "logits"])(IMAGES)
    assert torch.equal(both[0], both[1]) and torch.equal(both[2], model(IMAGES))
    assert not any(block._forward_hooks for block in model.blocks.children())


def slots(choices, image):
    """The token that each patch of an image is in, or resembles, after these reductions."""
    where = np.arange(16)
    for choice in choices:
        slot = np.zeros(len(choice.rating[image]), int)
        slot[choice.kept[image]] = np.arange(len(choice.kept[image]))
        slot[choice.rest[image]] = choice.target[image]
        where = slot[where]
    return where


@pytest.mark.parametrize("tau", [0.3, -1.0, 2.0])
def test_every_patch_has_the_features_of_the_token_that_it_went_to(model, tau):
    """At every depth, by the reductions so far."""
    patch(model, schedule.parse("1:12,2:9,4:5", model_shape(model)), tau=tau, restore=True)
    prefix = model.num_prefix_tokens
    seen = trace_torch(model, IMAGES.numpy(), blocks=True)
    last, *layers = DenseFeatures(model, ["dense", *(f"raw_{at}" for at in range(6))])(IMAGES)
    kept = [torch.from_numpy(block.out[:, prefix:]) for block in seen.blocks]
    for at, got in enumerate([*layers, last]):
        left = kept[at] if at < 6 else model.forward_features(IMAGES)[:, prefix:]
        choices = [choice for choice in seen.choices if choice.block <= at]
        for image in range(len(IMAGES)):
            assert torch.equal(got[image], left[image, slots(choices, image)])
    (normed,) = (DenseFeatures(model, ["dense_2"])(IMAGES),)
    assert torch.equal(normed, model.norm(layers[2]))


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
    model = tiny_eva(global_pool="token")
    torch.nn.init.uniform_(model.norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    patch(model, schedule.parse("1:12,2:9,4:5", model_shape(model)), tau=0.3, restore=True)
    names = ["logits", "dense", "raw_1", "dense_3"]
    path = export_onnx(model, tmp_path / "model.onnx", image_size=(32, 32), outputs=names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    assert [output.name for output in session.get_outputs()] == names
    found = session.run(None, {"images": IMAGES.numpy()})
    for got, want in zip(found, DenseFeatures(model, names)(IMAGES), strict=True):
        atol = 1e-5 * float(want.abs().max())
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=atol)
    assert len(block_tensors(load_model(path))) == 6


OUTPUTS = {"features": (48,), "dense_1": (16, 48), "dense_3": (16, 48), "raw_5": (16, 48)}


@pytest.mark.parametrize("engine", ["rtx"])
def test_from_build_to_a_file_of_features(engine, tmp_path, monkeypatch, capsys):
    from jmp_deploy.engine import builder

    engine = engine if builder.installed(engine) else "none"
    model = tiny_vit(num_classes=0)
    asked = {"output": "dense:1,3,raw:5,pooled", "schedule": "1:12,2:9,4:5"}
    made = build(model, tmp_path / "made", engine=engine, **asked)
    assert made.check.ok and made.model.outputs == tuple(OUTPUTS)
    assert {pair["output"] for pair in made.check.pairs} == {*OUTPUTS}
    assert {k: v.shape[1:] for k, v in made.reference().outputs.items()} == OUTPUTS
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
    assert {name: arrays[name].shape[1:] for name in OUTPUTS} == OUTPUTS
    assert np.isfinite(arrays["dense_3"]).all()
    (told,) = json.loads(record.read_text())
    assert len(told["features"]) == 48 and told["dense_3"]["patches"] == 16
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "made")]) == 0
    assert "dense_3 [B, M, C]" in capsys.readouterr().out
    compared = ["compare", str(tmp_path / "made"), "--backends", "torch,onnxruntime"]
    assert main([*compared, "--json", str(record)]) == 0  # stored outputs stand in for PyTorch
    assert {pair["output"] for pair in json.loads(record.read_text())["pairs"]} == {*OUTPUTS}


def test_int8_is_calibrated_and_checked_patch_by_patch(tmp_path, capsys):
    made = build(
        tiny_vit(num_classes=0),
        tmp_path / "made",
        output="dense",
        schedule="3:13",
        engine="none",
        precision="int8",
        quantize=QuantizeOptions(calib="sample", images=8),
    )
    assert made.int8.layers_quantized > 10 and made.model.outputs == ("dense",)
    reference = made.reference()
    with ort.session_runner(emulated(made.path("model.onnx"))) as runner:
        got = runner.infer({"images": reference.images})["dense"].astype(np.float64)
    want = reference.output.astype(np.float64)
    lengths = np.linalg.norm(got, axis=2) * np.linalg.norm(want, axis=2)
    by_image = np.median((got * want).sum(axis=2) / lengths, axis=1)
    assert made.check.ok and made.check.pairs[0]["precision"] == "int8"
    assert made.check.pairs[0]["cosine"] <= by_image.min() + 1e-6 and by_image.min() > 0.95
    # What needs one answer per image says so, and what instead.
    assert main(["validate", str(made.folder), "--data", str(tmp_path)]) == 2
    assert "--output pooled,dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("pooled", ("pooled",)),
        ("dense,pooled", ("pooled", "dense")),
        ("dense:3,6,9,11", ("dense_3", "dense_6", "dense_9", "dense_11")),
        ("raw:0,2,pooled,dense:2", ("pooled", "raw_0", "raw_2", "dense_2")),
    ],
)
def test_how_outputs_are_asked_for(asked, names):
    assert outputs.asked(asked) == names


@pytest.mark.parametrize(
    "odd", ["", "patches", "3", "dense:", "dense:3, 5", "dense\n", "dense,3", "dense:3,3", "raw:-1"]
)
def test_a_spelling_that_asks_for_nothing_is_refused(odd):
    with pytest.raises(JmpDeployError, match="--output"):
        outputs.asked(odd)


@pytest.mark.parametrize(
    ("asked", "other", "why"),
    [
        ("dense", {"softmax": True}, "--softmax is of classes"),
        ("dense", {"quantize": QuantizeOptions(max_drop=1.0)}, "points of accuracy"),
        ("dense:3,6", {}, "blocks 0 to 5, not 6"),
        ("dense:1,3", {}, "compute for nobody"),
        ("dense,dense:5", {}, "leave out 5"),
    ],
)
def test_what_does_not_go_with_it_is_said_at_once(asked, other, why, tmp_path):
    with pytest.raises(JmpDeployError) as caught:
        build(tiny_vit(), tmp_path / "made", output=asked, engine="none", **other)
    assert why in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "made").exists()
