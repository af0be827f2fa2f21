"""recover: what it writes is better where it never looked, and an interrupted run is not lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jmp_deploy.cli.main import main
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import CheckError, ImageError, ScheduleError, WeightsError
from jmp_deploy.core.images import Preprocess, open_image, preprocess
from jmp_deploy.core.manifest import Weights
from jmp_deploy.jmp import checkpoint, models, schedule
from jmp_deploy.jmp.families import roots
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.recover import crops, lesson
from jmp_deploy.recover.recover import RecoverOptions, recover
from tests.fakes.artifacts import FILE_WEIGHTS, write_artifact
from tests.fakes.models import tiny_eva, tiny_vit

SPEC = Preprocess(32, 32, 36, "bicubic", "center", (0.5,) * 3, (0.25,) * 3)
SCHEDULE = "0:2"
TRAIN = ("small", "all")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower with more, the more so beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A hundred pictures of blocks of colour and noise."""
    where, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(100):
        coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((60, 48))).astype(float)
        picture += random.normal(0, 10 + number / 3, picture.shape)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(where / f"{number:03d}.png")
    return where


@pytest.fixture
def loaded(monkeypatch):
    """A small model in place of the one that is named."""
    model = tiny_vit().eval().requires_grad_(False)
    found = models.LoadedModel(model, model_shape(model).name, FILE_WEIGHTS, SPEC, None)
    monkeypatch.setattr(models, "load_model", lambda *given, **more: found)
    return found


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """(file, what the command says) of one run for several tests."""
    out = tmp_path_factory.mktemp("written") / "deep" / "w.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        model = tiny_vit().eval().requires_grad_(False)
        found = models.LoadedModel(model, model_shape(model).name, FILE_WEIGHTS, SPEC, None)
        patched.setattr(models, "load_model", lambda *given, **more: found)
        return out, recover(options(folder, out))


def options(folder: Path, out: Path, **changes) -> RecoverOptions:
    given = {
        "schedule": SCHEDULE,
        "crops": 96,
        "batch": 8,
        "learning_rate": 1e-2,
        "seed": 1,
        "train": "small",
    }
    return RecoverOptions("tiny", (folder,), out, **{**given, **changes})


def distances(model, reduced_state, images) -> np.ndarray:
    """By hand, in float64: 1 - cosine between dense and reduced answers, image by image."""
    dense, reduced = model().double().eval(), model().double().eval()
    reduced.load_state_dict(reduced_state)
    patch(reduced, schedule.parse(SCHEDULE, model_shape(reduced)), backend="reference")
    with torch.inference_mode():
        a, b = (m(torch.from_numpy(images).double()).numpy() for m in (dense, reduced))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return 1 - cosine


# --- what is written -----------------------------------------------------------------------------


def test_what_is_written_is_better_on_images_that_it_never_saw(written):
    out, found = written
    assert found["gain"]["low"] > 0 and found["judged"] == 20 and found["images"] == 100
    random = np.random.default_rng(99)
    others = np.stack(
        [
            preprocess(
                Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
                    (60, 48)
                ),
                SPEC,
            )
            for _ in range(24)
        ]
    )
    before = distances(tiny_vit, tiny_vit().state_dict(), others)
    after = distances(tiny_vit, load_file(out), others)
    assert after.mean() < 0.9 * before.mean()
    assert not out.with_name(out.name + ".state").exists()


def test_only_what_is_named_learns_and_only_behind_the_first_reduction(written, loaded):
    plan = schedule.parse("1:2", model_shape(loaded.model))
    small, all_of_it = (set(lesson.Pupil(loaded.model, plan, t, "cpu").trained) for t in TRAIN)
    vectors = {name for name, value in loaded.model.named_parameters() if value.ndim == 1}
    names = {name for name, _ in loaded.model.named_parameters()}
    behind = {n for n in names if n.startswith("blocks.") and not n.startswith("blocks.0.")}
    assert small == (behind & vectors) | {"norm.weight", "norm.bias"}
    assert all_of_it == behind | {"norm.weight", "norm.bias"}
    before, after = loaded.model.state_dict(), load_file(written[0])
    assert before.keys() == after.keys(), "the graph and the engine stay as they are"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= vectors


def test_the_file_says_where_it_is_from_and_the_manifest_keeps_it(written, tmp_path):
    found = checkpoint.read(written[0], roots)
    about = found.recovered
    assert about and about.jmp.schedule == ((0, 2),) and about.seed == 1
    assert about.weights_sha256 == models.weights_digest(tiny_vit())
    assert about.gain.low > 0 and "never saw" in found.notes[-1]
    weights = replace(FILE_WEIGHTS, recovered=about)
    made = write_artifact(tmp_path / "artifact", weights=weights, jmp=about.jmp)
    assert Artifact.read(made.folder).weights == weights
    assert about.caution(about.jmp) == ""
    assert "another reduction" in about.caution(replace(about.jmp, tau=0.1))
    assert "dense" in about.caution(None)


def test_a_file_of_others_that_claims_to_be_recovered_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    for text in ("{}", "not JSON", '{"model": 3}'):
        save_file(tiny_vit().state_dict(), path, metadata={checkpoint.RECOVERED: text})
        with pytest.raises(WeightsError, match="never does"):
            checkpoint.read(path, roots)


def test_control_characters_of_a_file_stay_away_from_the_terminal(written, tmp_path):
    out = tmp_path / "w.safetensors"
    with safe_open(written[0], "pt") as file:
        about = json.loads(file.metadata()[checkpoint.RECOVERED])
    about["jmp"]["schedule_name"] = "x\x1b[2J"
    save_file(load_file(written[0]), out, metadata={checkpoint.RECOVERED: json.dumps(about)})
    with pytest.raises(WeightsError):
        checkpoint.read(out, roots)


def test_no_gain_writes_nothing(folder, loaded, tmp_path):
    out = tmp_path / "w.safetensors"
    with pytest.raises(CheckError, match="nothing is written") as failure:
        recover(options(folder, out, crops=8, learning_rate=1e-9))
    assert failure.value.exit_code == 1 and not list(tmp_path.iterdir())


# --- an interrupted run --------------------------------------------------------------------------


def test_a_resumed_run_writes_the_very_weights_of_one_that_was_not_interrupted(
    folder, loaded, tmp_path
):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    recover(options(folder, whole, train="all", learning_rate=3e-4))

    def interrupt(phase, share, best):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(options(folder, cut, train="all", learning_rate=3e-4), on_progress=interrupt)
    assert not cut.exists() and cut.with_name("cut.safetensors.state").exists()
    asked: list[float] = []
    recover(
        options(folder, cut, train="all", learning_rate=3e-4, resume=True),
        on_progress=lambda phase, share, best: asked.append(share),
    )
    assert min(share for share in asked if share) > 0.5, "it began anew"
    first, second = load_file(whole), load_file(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_of_another_run_or_none_is_refused(folder, loaded, tmp_path):
    out = tmp_path / "w.safetensors"
    state = out.with_name("w.safetensors.state")

    def interrupt(phase, share, best):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(options(folder, out), on_progress=interrupt)
    for changes in (
        {"seed": 2},
        {"learning_rate": 1e-3},
        {"schedule": "0:9,1:5"},
        {"train": "all"},
    ):
        with pytest.raises(WeightsError, match="of a run with another"):
            recover(options(folder, out, resume=True, **changes))
    for content in (b"", state.read_bytes()[:-9], b"\x08\0\0\0\0\0\0\0{}      "):
        state.write_bytes(content)
        with pytest.raises(WeightsError, match="no state of `recover`"):
            recover(options(folder, out, resume=True))


# --- crops ---------------------------------------------------------------------------------------


def test_crops_follow_from_their_number_and_every_picture_has_its_turn(folder):
    pictures = crops.read(sorted(folder.glob("*.png")), SPEC)
    album = crops.Album(tuple(pictures[:5]), SPEC, 3)
    together = album.batch(0, 10)
    assert together.shape == (10, 3, 32, 32) and together.dtype == np.float32
    assert np.array_equal(together[4:], np.concatenate((album.batch(4, 3), album.batch(7, 3))))
    flat = tuple(Image.new("RGB", (40, 50), (shade, 0, 0)) for shade in (60, 120, 180, 240, 20))
    means = crops.Album(flat, SPEC, 0).batch(0, 10)[:, 0].mean((1, 2))
    for turn in (means[:5], means[5:]):
        assert len(set(np.round(turn, 2))) == 5


@pytest.mark.parametrize("shape", [(1, 200), (7, 7), (300, 41)])
def test_pictures_of_any_shape_and_arrays_are_cropped(shape):
    random = np.random.default_rng(0)
    grey = replace(SPEC, mean=(0.5,), std=(0.2,))
    five = replace(SPEC, mean=(0.5,) * 5, std=(0.2,) * 5)
    array = random.random((*shape, 5), dtype=np.float32)
    for picture, spec in (
        (Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)), SPEC),
        (Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)), grey),
        (array, five),
    ):
        made = crops.Album((picture,), spec, 0).batch(0, 8)
        assert made.shape == (8, spec.channels, 32, 32) and np.isfinite(made).all()
    pieces = crops.Album((array,), five, 0).batch(0, 8) * 0.2 + 0.5
    assert pieces.min() > -0.3 and pieces.max() < 1.3, "arrays are not taken for bytes"


def test_large_photos_are_kept_small(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (900, 600)).save(path)
    (picture,) = crops.read([path], SPEC)
    assert picture.size == (96, 64) and open_image(path).size == (900, 600)


# --- the lesson ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_vit, tiny_eva])
def test_distances_are_those_of_the_whole_models(make):
    model = make().eval()
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    plan = schedule.parse("1:5", model_shape(model))
    pupil = lesson.Pupil(model, plan, "small", "cpu")
    reduced = make().double().eval()
    patch(reduced, plan, backend="reference")
    with torch.inference_mode():
        a, b = (m(torch.from_numpy(images).double()) for m in (make().double().eval(), reduced))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).numpy()
    assert pupil.measure(images, 2) == pytest.approx(1 - cosine, abs=2e-6)


def test_a_gradient_is_the_slope_of_the_loss():
    """Against central differences in float64, where no selection changes."""
    model = tiny_vit().double().eval()
    pupil = lesson.Pupil(model, schedule.parse("0:10,1:5", model_shape(model)), "small", "cpu")
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32))
    value = pupil.trained["blocks.0.mlp.fc2.bias"]
    (slope,) = torch.autograd.grad(pupil.distances(images).sum(), value)
    step = 1e-6
    for index in (0, 7):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value[index] += sign * step
                ends.append(float(pupil.distances(images).sum()))
                value[index] -= sign * step
        assert float(slope[index]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


# --- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_answered_in_one_message(folder, loaded, tmp_path, monkeypatch):
    out = tmp_path / "w.safetensors"
    few = tmp_path / "few"
    few.mkdir()
    for number in range(25):  # of one content
        Image.new("RGB", (40, 40), (9, 9, 9)).save(few / f"{number}.png")
    with pytest.raises(ImageError, match="1 different image: `recover` takes 20"):
        recover(options(few, out))
    with pytest.raises(WeightsError, match="is to hold safetensors"):
        recover(options(folder, tmp_path / "w.pth"))
    with pytest.raises(ScheduleError, match="unknown schedule"):
        recover(options(folder, out, schedule="nonsense"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(models.ModelError, match="no GPU"):
        recover(options(folder, out, device="cuda"))
    loaded.origin = Weights("random", seed=0, fallback_for="pretrained", reason="no network")
    with pytest.raises(WeightsError, match="no trained weights to recover: no network"):
        recover(options(folder, out))
    assert not list(tmp_path.glob("*safetensors*"))


def test_the_command_says_what_was_gained_and_how_to_build(folder, loaded, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    asked = ["recover", "tiny", "--images", str(folder), "--schedule", SCHEDULE, "-o", str(out)]
    asked += [
        "--crops",
        "96",
        "--batch",
        "8",
        "--learning-rate",
        "1e-2",
        "--train",
        "small",
        "--json",
        "-",
    ]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["gain"]["low"] > 0
    assert "only 100 images" in shown.err and "build tiny --weights" in " ".join(shown.err.split())
