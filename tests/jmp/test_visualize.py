"""What became of each patch: nothing is lost, and the pictures can be opened anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jmp_deploy.cli.main import main
from jmp_deploy.core.images import Preprocess, read_image
from jmp_deploy.core.manifest import Jmp
from jmp_deploy.jmp import draw, models, schedule
from jmp_deploy.jmp.dense import DenseFeatures
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.jmp.trace import (
    GONE,
    KEPT,
    MERGED,
    PRUNED,
    Picture,
    Stage,
    stages,
    trace_torch,
)
from jmp_deploy.jmp.visualize import picture
from tests.fakes.artifacts import RANDOM_WEIGHTS, write_artifact
from tests.fakes.models import tiny_vit

STEPS = "1:11,2:7,4:3"
SPEC = Preprocess(32, 32, 36, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 3, 32, 32)).astype(np.float32)


def patched(tau: float, **options):
    model = tiny_vit(**options)
    return patch(model, schedule.parse(STEPS, model_shape(model)), tau=tau)


def as_input(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_image(path, SPEC)[None])


def traced(model) -> list[tuple[Stage, ...]]:
    return stages(trace_torch(model, images()).choices)


def some_tau() -> float:
    """A threshold at which the tiny model both merges and prunes."""
    for tau in np.linspace(0.2, 0.95, 16):
        found = [s for sample in traced(patched(float(tau))) for s in sample]
        if sum(s.merged for s in found) and sum(s.pruned for s in found):
            return float(tau)
    raise AssertionError("no threshold with both")


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_every_token_is_accounted_for_once_in_every_stage(options):
    for sample in traced(patched(some_tau(), **options)):
        assert [(s.block, s.tokens, s.kept) for s in sample] == [(1, 16, 11), (2, 11, 7), (4, 7, 3)]
        for stage in sample:
            assert stage.kept + stage.merged + stage.pruned == stage.tokens
            assert len(stage.moves) == stage.merged
            assert len(np.unique(stage.seat[stage.seat >= 0])) == stage.kept


def test_patches_are_followed_through_all_stages():
    both = 0
    for sample in traced(patched(some_tau())):
        seat_before = np.arange(16)
        for stage in sample:
            gone = np.isin(stage.fate, (GONE, PRUNED))
            assert np.array_equal(gone, stage.seat < 0), "gone patches are in no token"
            assert np.array_equal(stage.fate == GONE, seat_before < 0), "once gone, always gone"
            assert np.array_equal(np.isnan(stage.importance), stage.fate == GONE)
            kept = stage.fate == KEPT
            assert np.array_equal(stage.seat[kept], seat_before[kept]), (
                "kept tokens keep their seat"
            )
            targets = dict(stage.moves)
            merged = np.flatnonzero(stage.fate == MERGED)
            assert [targets[int(seat_before[p])] for p in merged] == stage.seat[merged].tolist()
            both += bool(len(merged)) and bool((stage.fate == PRUNED).any())
            seat_before = stage.seat
    assert both, "the case in which both happen was not met"


def test_group_sizes_are_those_that_the_model_computes():
    """Patches per token, counted in the picture, equal the sizes that reach later attention."""
    model = patched(some_tau())
    sizes: list[np.ndarray] = []
    plain = model.blocks.reduce

    def spy(*arguments):
        result = plain(*arguments)
        sizes.append(result[1][:, 1:].numpy())
        return result

    model.blocks.reduce = spy

    with torch.inference_mode():
        model(torch.from_numpy(images()))
    model.blocks.reduce = plain
    for index, sample in enumerate(traced(model)):
        for number, stage in enumerate(sample):
            counted = np.bincount(stage.seat[stage.seat >= 0], minlength=16)
            assert counted[counted > 0].tolist() == sizes[number][index].tolist()


@pytest.fixture
def pictures(photos: list[Path]) -> list[Picture]:
    """Two photos, traced at a threshold at which the first meets every fate."""
    for tau in np.linspace(0.5, 0.999, 50):
        model = patched(float(tau))
        first = picture(model, photos[0], SPEC)
        if {int(fate) for stage in first.stages for fate in stage.fate} == {0, 1, 2, 3}:
            return [first, picture(model, photos[1], SPEC)]
    raise AssertionError("no threshold with all of them")


CAPTION = draw.Caption("tiny <model>", STEPS, 0.5)


def test_merged_kept_and_pruned_patches_look_different(pictures):
    item = pictures[0]
    plain = np.asarray(draw.photo(item, (128, 128)), np.float32)
    seen = set()
    for stage in (replace(stage, moves=()) for stage in item.stages):  # lines cross other patches
        drawn = np.asarray(draw.token_map(item, stage, (128, 128)), np.float32)
        sizes = np.bincount(stage.seat[stage.seat >= 0], minlength=16)
        for index, fate in enumerate(stage.fate):
            row, column = index // 4 * 32, index % 4 * 32
            part = (slice(row + 3, row + 9), slice(column + 3, column + 9))  # off dot and lines
            change = np.abs(drawn[part] - plain[part]).mean()
            if fate == GONE:
                assert drawn[part].mean() < 60
            elif fate == KEPT and sizes[stage.seat[index]] == 1:
                assert change < 6, "a token of one patch shows the photo"
            else:
                assert change > 6
            seen.add(int(fate))
    assert seen == {GONE, KEPT, MERGED, PRUNED}


def test_heat_is_brightest_where_importance_is_highest(pictures):
    stage = pictures[0].stages[0]
    heat = np.asarray(draw.heat_map(pictures[0], stage, (64, 64)), np.float32)
    light = heat.sum(2).reshape(4, 16, 4, 16).mean((1, 3)).ravel()
    order = np.argsort(stage.importance)
    assert light[order[-1]] > light[order[0]]


def test_page_is_self_contained_and_escapes_names(pictures):
    text = draw.page(pictures, CAPTION)
    assert "//" not in re.sub(r"base64,[^\"]*", "", text), "no address, not even a relative one"
    sources = re.findall(r'src="([^"]*)"', text)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    # photo, and two maps for each of three stages, for two images; five signs
    assert len(sources) == 2 * (1 + 2 * 3) + 5
    assert "tiny &lt;model&gt;" in text and "<model>" not in text


def run(capsys, *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


@pytest.fixture
def small_model(monkeypatch):
    """`load_model` gives the tiny model."""

    def load(name, weights="auto", **options):
        return models.LoadedModel(tiny_vit(), "tiny", RANDOM_WEIGHTS, SPEC, None)

    monkeypatch.setattr(models, "load_model", load)


def test_command_writes_a_picture_per_image_and_a_page(small_model, photos, tmp_path, capsys):
    out = tmp_path / "v0.1"  # a dot in a folder's name is no file type
    report = tmp_path / "report.json"
    code, _ = run(
        capsys, "visualize", "tiny", *photos[:2], "-o", out, "--schedule", STEPS, "--json", report
    )
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == ["astronaut.png", "chelsea.png", "index.html"]
    for name in ("astronaut.png", "chelsea.png"):
        with Image.open(out / name) as image:
            image.verify()
    data = json.loads(report.read_text())
    for stage in data["images"][0]["stages"]:
        assert stage["kept"] + stage["merged"] + stage["pruned"] == stage["tokens"]


def test_features_are_drawn_without_jmp_and_with_it(small_model, photos, tmp_path, capsys):
    """In colours that the image's own principal components give, where JMP changes little."""
    report, out = tmp_path / "r.json", tmp_path / "drawn"
    asked = ("visualize", "tiny", photos[0], "--features", "--json", report)
    assert run(capsys, *asked, "-o", out, "--schedule", "1:15")[0] == 0
    plain = tmp_path / "plain.png"
    assert run(capsys, "visualize", "tiny", photos[0], "-o", plain, "--schedule", "1:15")[0] == 0
    with Image.open(out / "astronaut.png") as drawn, Image.open(plain) as without:
        assert drawn.width > without.width
    assert "features of astronaut" in (out / "index.html").read_text()
    told = json.loads(report.read_text())["images"][0]["features"]
    model = tiny_vit()
    patch(model, schedule.parse("1:15", model_shape(model).for_patches()), restore=True)
    seen = picture(model, photos[0], SPEC, features=True).features
    assert told == {"mean": seen.cosine.mean(), "min": seen.cosine.min()}
    near = seen.cosine > 0.999
    assert near.any() and np.abs(seen.dense - seen.restored)[near].max() < 0.2
    dense = DenseFeatures(tiny_vit())(as_input(photos[0]))[0].double().numpy()
    centred = dense - dense.mean(0)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :3]  # the same, another way
    for ours, theirs in zip(seen.dense.T, (centred @ vectors).T, strict=True):
        inside = (ours > 0) & (ours < 1)
        assert abs(np.corrcoef(ours[inside], theirs[inside])[0, 1]) > 0.9999
    assert run(capsys, *asked, "-o", tmp_path / "c.png", "--batch", "--schedule", "1:15")[0] == 0


def test_features_of_an_artifact_of_pooled_outputs_are_refused(tmp_path, photos, capsys):
    folder = artifact(tmp_path / "a", Jmp("list", ((2, 9),), 2.0))
    code, err = run(capsys, "visualize", folder, photos[0], "--features", "-o", tmp_path / "b.png")
    assert code == 2 and "restores no patches" in err


def test_contact_sheet_has_a_row_per_image(small_model, photos, tmp_path, capsys):
    heights = []
    for count in (1, 2, 4):
        out = tmp_path / f"{count}.png"
        code, _ = run(
            capsys, "visualize", "tiny", *photos[:count], "-o", out, "--batch", "--schedule", STEPS
        )
        assert code == 0
        heights.append(Image.open(out).height)
    assert heights[2] - heights[1] == 2 * (heights[1] - heights[0]) > 0


def test_tau_comes_from_the_schedule_file_unless_named(small_model, photos, tmp_path, capsys):
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"steps": [[1, 8]], "tau": 2.0}))
    report = tmp_path / "report.json"
    for more, merges in (((), False), (("--tau", "-1"), True)):
        arguments = ("visualize", "tiny", photos[0], "-o", tmp_path / "a.png", "--schedule", file)
        assert run(capsys, *arguments, "--json", report, *more)[0] == 0
        stage = json.loads(report.read_text())["images"][0]["stages"][0]
        assert (stage["merged"], stage["pruned"]) == ((8, 0) if merges else (0, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "out.pdf"), "cannot draw a .pdf file"),
        (("-o", "out.png", "{second}"), "do not go into one picture"),
        (("nowhere.jpg",), "no such image"),
        (("--schedule", "sprd"), "unknown schedule"),
    ],
)
def test_bad_input_is_one_error(
    small_model, photos, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    arguments = [a.format(second=photos[1]) for a in arguments]
    code, err = run(capsys, "visualize", "tiny", *arguments, photos[0])
    assert code == 2 and words in err and "Traceback" not in err
    assert not list(tmp_path.glob("**/*.png"))


def artifact(folder: Path, jmp: Jmp | None) -> Path:
    write_artifact(folder, name="tiny", weights=RANDOM_WEIGHTS, preprocess=SPEC, jmp=jmp)
    return folder


def test_artifact_is_drawn_as_it_was_built(small_model, monkeypatch, photos, tmp_path, capsys):
    folder = artifact(tmp_path, Jmp("list", ((2, 9), (3, 5)), 2.0, strategy="prune"))
    report = tmp_path / "report.json"
    arguments = ("visualize", folder, photos[0], "-o", tmp_path / "a.html", "--json", report)
    assert run(capsys, *arguments)[0] == 0
    data = json.loads(report.read_text())
    stages = [(s["block"], s["kept"], s["pruned"]) for s in data["images"][0]["stages"]]
    assert stages == [(2, 9, 7), (3, 5, 4)] and data["tau"] == 2.0
    code, err = run(capsys, *arguments, "--tau", "0.5")
    assert code == 2 and "an artifact has its own schedule" in err


def test_dense_artifact_is_refused(tmp_path, photos, capsys):
    code, err = run(capsys, "visualize", artifact(tmp_path, None), photos[0])
    assert code == 2 and "built without JMP" in err
