"""The accuracy harness: its splits, its rules, its intervals, and what its command line says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import accuracy
from benchmarks.lib import data, features, measures
from benchmarks.lib.methods import METHODS
from benchmarks.lib.rules import Rule
from jmp_deploy.core.errors import ImageError
from jmp_deploy.core.images import Preprocess
from jmp_deploy.jmp.models import LoadedModel
from jmp_deploy.jmp.patch import model_shape
from jmp_deploy.jmp.reduction import make_plan, token_reduce
from jmp_deploy.jmp.schedule import improved, macs, parse
from tests.fakes.artifacts import RANDOM_WEIGHTS
from tests.fakes.models import attributes, inputs, tiny_vit


def tensors(attrs, batch=4, patches=12):
    x, qkv, size = inputs(batch, patches, attrs=attrs, channels=20)
    return tuple(torch.from_numpy(value) for value in (x, qkv, size))


@pytest.fixture(scope="module")
def loaded():
    model = tiny_vit()
    spec = Preprocess(32, 32, 32, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)
    return LoadedModel(model, "tiny", RANDOM_WEIGHTS, spec, None)


@pytest.fixture(scope="module")
def noise():
    random = np.random.default_rng(0)
    images = tuple(
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(9)
    )
    return data.Samples("noise", images, np.arange(9) % 3)


# --- Data ----------------------------------------------------------------------------------------


def test_no_digit_serves_two_purposes():
    task = data.digits(seed=3)
    parts = [task.train, task.validation, task.test]
    assert [len(part) for part in parts] == [400, 197, 1200]
    pixels = [{image.tobytes() for image in part.images} for part in parts]
    # scikit-learn's set itself holds a few scans twice
    assert all(len(a & b) <= 2 for a, b in ((pixels[0], pixels[1]), (pixels[0], pixels[2])))
    assert set(task.train.labels) == set(range(10))


def test_the_split_depends_on_the_seed_alone():
    first, again, other = data.digits(0), data.digits(0), data.digits(1)
    assert first.test.images[5].tobytes() == again.test.images[5].tobytes()
    assert (first.test.labels != other.test.labels).any()


def test_validation_and_test_crops_share_no_pixel(monkeypatch):
    # a photo whose red channel says which column a pixel is from
    ramp = np.zeros((200, 256, 3), np.uint8)
    ramp[..., 0] = np.arange(256)
    monkeypatch.setattr(data, "open_image", lambda path: Image.fromarray(ramp))
    task = data.photo_crops()
    reds = [np.array([np.asarray(i)[..., 0] for i in part.images]) for part in
            (task.validation, task.test)]  # fmt: skip
    assert reds[0].max() < 128 <= reds[1].min()


@pytest.mark.parametrize("kind", ["missing", "one class", "too few"])
def test_folders_that_are_no_data_set_are_refused(tmp_path, kind):
    for name in {"missing": (), "one class": ("a",), "too few": ("a", "b")}[kind]:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    with pytest.raises(ImageError, match=r"class folders|images, expected at least 8"):
        data.image_folder(tmp_path)


# --- Rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.rule is not None])
def test_every_rule_keeps_the_same_number_of_tokens(name):
    attrs = attributes(num_keep=8)
    x, qkv, size = tensors(attrs)
    y, out_size, log_size = METHODS[name].make_rule()(x, qkv, size, attrs)
    assert y.shape == (4, 9, 20) and out_size.shape == log_size.shape == (4, 9)
    assert torch.equal(y[:, 0], x[:, 0])  # the class token is nobody's victim
    assert torch.isfinite(y).all()


def test_the_plainest_rule_is_the_packages_own():
    attrs = attributes(num_keep=8, tau=-1.0)
    args = (*tensors(attrs), attrs)
    for ours, theirs in zip(Rule()(*args), token_reduce(*args), strict=True):
        torch.testing.assert_close(ours, theirs)
    order = replace(attrs, selection="distinct", merge_weight=0.4)
    rule = Rule(select="order_root", merge_weight=0.4)
    for ours, theirs in zip(rule(*args), token_reduce(*args[:3], order), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tome_merges_the_closest_pairs_of_its_two_halves():
    attrs = attributes(num_keep=3, num_heads=1, head_dim=2)
    x, qkv, size = tensors(attrs, batch=1, patches=4)
    qkv[0, 1:, 2:4] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.11]])
    plan = METHODS["tome"].make_rule().plan(x, qkv, size, attrs)
    assert plan.rest.tolist() == [[2]] and plan.kept.tolist() == [[0, 1, 3]]
    assert plan.target.tolist() == [[2]]  # the third kept token


def test_evit_fuses_what_goes_by_attention():
    attrs = attributes(num_keep=4, proportional=False)
    x, qkv, size = tensors(attrs, patches=6)
    y, out_size, _ = METHODS["evit"].make_rule()(x, qkv, size, attrs)
    plan = make_plan(qkv, size, replace(attrs, num_keep=3))
    weight = plan.importance.gather(1, plan.rest)
    gone = x[:, 1:].gather(1, plan.rest[..., None].expand(-1, -1, 20))
    fused = (gone * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(y[:, -1], fused)
    assert (out_size == 1).all()


def test_random_pruning_is_random_but_repeatable():
    attrs = attributes(num_keep=5)
    args = (*tensors(attrs), attrs)
    one, two = METHODS["random"].make_rule(), METHODS["random"].make_rule()
    first = one.plan(*args).kept
    assert torch.equal(first, two.plan(*args).kept)
    assert not torch.equal(first, one.plan(*args).kept)  # the next block draws anew


# --- Features ------------------------------------------------------------------------------------


def test_features_are_the_models_and_survive_in_the_cache(loaded, noise, tmp_path):
    source = features.Features(loaded, tmp_path)
    images = torch.from_numpy(data.batch(noise.images, loaded.preprocess))
    model = loaded.model
    want = model.forward_head(model.forward_features(images), pre_logits=True)
    np.testing.assert_allclose(source.dense(noise), want.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(source.logits(source.dense(noise)), model(images), atol=1e-4)

    steps = parse("2:9,4:5", model_shape(model))
    reduced = source.reduced(noise, steps, METHODS["jmp"])
    with features.reduced(loaded, steps, METHODS["jmp"]):
        want = model.forward_head(model.forward_features(images), pre_logits=True)
    np.testing.assert_allclose(reduced, want.numpy(), rtol=1e-4, atol=1e-5)
    assert not np.allclose(reduced, source.dense(noise))
    assert not hasattr(model.blocks, "reductions")  # dense again

    files = sorted(tmp_path.glob("*.npy"))
    assert len(files) == 2
    np.save(files[0], np.load(files[0]) + 1)  # what is read is the file
    again = features.Features(loaded, tmp_path)
    pair = [again.dense(noise), again.reduced(noise, steps, METHODS["jmp"])]
    assert sum(np.allclose(a, b) for a, b in zip(pair, (source.dense(noise), reduced),
                                                 strict=True)) >= 1  # fmt: skip
    other = again.reduced(noise, steps, METHODS["jmp-prune"])
    assert len(list(tmp_path.glob("*.npy"))) == 3 and not np.allclose(other, reduced)


def test_the_cost_of_jmp_is_the_closed_form(loaded):
    shape = model_shape(loaded.model)
    steps = improved(parse("2:9,4:5", shape), shape)
    with features.reduced(loaded, steps, METHODS["jmp"]):
        assert features.counted_macs(loaded.model) == macs(shape, steps)
    assert features.counted_macs(loaded.model) == macs(shape)


def test_shares_add_up(loaded, noise):
    steps = parse("2:9,4:5", model_shape(loaded.model))
    merge, prune = (
        features.shares(loaded, noise, steps, METHODS[name]) for name in ("jmp-merge", "jmp-prune")
    )
    assert [row["block"] for row in merge] == [2, 4]
    assert all(row["merged_percent"] == 100 and row["pruned_percent"] == 0 for row in merge)
    assert all(row["merged_percent"] == 0 and row["pruned_percent"] == 100 for row in prune)


# --- Measures ------------------------------------------------------------------------------------


def test_a_perfect_copy_scores_no_difference():
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    centres = 3 * random.normal(size=(3, 8))
    dense = centres[labels] + random.normal(size=(60, 8))
    probe = measures.fit_probe(dense, labels)
    same = measures.compare(dense, dense, labels, probe)
    assert same["agreement"] == 100 and same["kl"] == 0
    assert same["cosine"]["mean"] == pytest.approx(1)
    assert (same["accuracy"]["difference"], same["knn"]["difference"]) == (0, 0)
    worse = measures.compare(dense, np.roll(dense, 1, 0), labels, probe)
    assert worse["accuracy"]["high"] < -50 and worse["knn"]["high"] < -50
    assert worse["agreement"] < 30 and worse["kl"] > 1


def test_the_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        values = random.normal(1.0, 2.0, 80)
        low, high = measures.bootstrap(values, seed=seed, rounds=1000)
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 199


def test_pairing_removes_what_the_images_have_in_common():
    random = np.random.default_rng(0)
    common = random.normal(0, 10, 300)
    found = measures.paired(common + 0.5, common + random.normal(0, 0.1, 300))
    assert 0.45 < found["low"] < 0.5 < found["high"] < 0.55


def test_crops_of_one_photo_are_no_photos_of_their_own():
    """Ten crops of each of 12 photos, of which each photo's all say the same."""
    photos = np.repeat(np.arange(12), 10)
    dense = np.tile([1.0, 0.0], (120, 1))
    angles = np.random.default_rng(0).uniform(0, 0.5, 12)
    reduced = np.stack((np.cos(angles), np.sin(angles)), 1)[photos]
    probe = measures.fit_probe(np.eye(2)[photos % 2], photos % 2)
    found = measures.compare(dense, reduced, photos % 2, probe, pictures=photos)["cosine"]
    low, high = measures.bootstrap(np.cos(angles))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["mean"] == pytest.approx(np.cos(angles).mean())


# --- Command line --------------------------------------------------------------------------------


def test_a_smoke_run_writes_its_files_and_says_that_weights_are_random(tmp_path, capsys):
    out = tmp_path / "quick"
    options = ["--quick", "--model", "deit_t", "--weights", "random", "-o", str(out)]
    assert accuracy.main(options) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert [row["method"] for row in found["rows"]] == ["jmp", "tome"]
    assert found["rows"][0]["share"] <= 0.75
    assert {"digits", "photos"} <= set(found["rows"][0])
    assert found["rows"][0]["digits"]["head"]["n"] == accuracy.QUICK_IMAGES  # DeiT has a head
    assert "Random weights: these figures mean nothing" in out.with_suffix(".md").read_text()
    assert "random weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--budgets", "half"], "expected percentages"),
        (["--weights", "nowhere.pth"], "no such weights file"),
        (["--weights", "random", "--data-dir", "nowhere"], "class folders"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(options, message, capsys):
    assert accuracy.main(options) == 2
    assert message in capsys.readouterr().err
