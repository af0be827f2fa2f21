"""benchmarks/photos.py: crops are no photos, and what is reported is what is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import photos
from benchmarks.lib import data, measures
from jmp_deploy.core.images import Preprocess
from jmp_deploy.core.manifest import Interval, Recovered
from jmp_deploy.jmp import models
from jmp_deploy.jmp.patch import model_shape
from jmp_deploy.jmp.schedule import for_share, to_manifest
from tests.fakes.artifacts import FILE_WEIGHTS
from tests.fakes.models import tiny_vit

SPEC = Preprocess(32, 32, 32, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MNIST", 5)
    monkeypatch.setattr(data, "DIGITS_VALIDATION", 6)
    monkeypatch.setattr(
        models,
        "load_model",
        lambda *_, **__: models.LoadedModel(tiny_vit(), "tiny", FILE_WEIGHTS, SPEC, None),
    )
    random = np.random.default_rng(0)
    for part in ("validation", "test"):
        (tmp_path / part).mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((120, 90)).save(tmp_path / part / f"{number}.png")
    images = random.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", images=images, labels=np.arange(20) % 10)
    return tmp_path


def test_no_picture_serves_both_parts(folder):
    parts = {part: data.fetched(folder, part) for part in ("validation", "test")}
    for chosen, judged in zip(*parts.values(), strict=True):
        assert not {i.tobytes() for i in chosen.images} & {i.tobytes() for i in judged.images}
    crops, digits, mnist = parts["test"]
    assert list(crops.labels) == [0] * 4 + [1] * 4 + [2] * 4, "four crops of each photo"
    assert (len(set(digits.labels)), len(set(mnist.labels))) == (6, 5)


def test_figures_are_of_pictures_and_differences_are_paired(folder, capsys):
    out = folder / "result"
    options = [str(folder), "--budgets", "75", "--methods", "jmp,tome", "-o", str(out)]
    assert photos.main([*options, "--threads", "1"]) == 0
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["sets"]["photos"] == {"images": 12, "pictures": 3}
    first, second = found["rows"]
    for name in ("photos", "digits", "mnist"):
        assert first[name]["minus_first"] == {"mean": 0, "low": 0, "high": 0}
        assert first[name]["low"] <= first[name]["mean"] <= first[name]["high"]
        assert first[name]["geometric"] <= first[name]["mean"] <= first[name]["worst"]
        difference = second[name]["mean"] - first[name]["mean"]
        assert second[name]["minus_first"]["mean"] == pytest.approx(difference)
    written = out.with_suffix(".md").read_text()
    assert written.count("\n| jmp |") == 1 and "3 pictures (12 images)" in written
    assert "tome" in capsys.readouterr().out


def test_recovered_weights_are_judged_against_the_dense_model_before(folder, monkeypatch, capsys):
    """Three models: the dense one, the same weights called recovered, and others."""
    shape = model_shape(tiny_vit())
    plan, number = for_share(shape, 0.75), Interval(0.2, 0.1, 0.3)
    digests = {"images_sha256": "0" * 64, "weights_sha256": "0" * 64}
    counts = {"steps": 1, "best_step": 1, "batch": 1, "seed": 0, "images": 20, "judged": 4}
    about = Recovered(
        model="tiny", jmp=to_manifest(plan), image_size=(32, 32), train="all", learning_rate=1.0,
        before=number, after=number, gain=number, version="0", **digests, **counts,
    )  # fmt: skip
    plain = models.load_model

    def load_model(name, weights, **more):
        found = plain(name, weights)
        if weights.endswith(".safetensors"):
            found.origin = replace(FILE_WEIGHTS, recovered=about)
        if weights == "other.safetensors":
            with torch.no_grad():
                bias = found.model.blocks[1].mlp.fc2.bias
                bias += torch.linspace(-1, 1, len(bias))
        return found

    monkeypatch.setattr(models, "load_model", load_model)
    options = [str(folder), "--budgets", "75", "--methods", "jmp", "-o", str(folder / "found")]
    options += ["--recovered", "same.safetensors", "--recovered", "other.safetensors"]
    assert photos.main([*options, "--threads", "1"]) == 0
    rows = json.loads((folder / "found.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["jmp", "jmp, same", "jmp, other"]
    assert rows[1]["photos"]["minus_first"] == {"mean": 0, "low": 0, "high": 0}
    assert rows[2]["photos"]["minus_first"]["low"] > 0
    assert photos.main([*options, "--recovered", "dense.pth"]) == 2
    assert "dense.pth is not of `recover`" in capsys.readouterr().err


def test_a_picture_counts_once_however_many_crops_it_has():
    values = measures.by_picture(np.array([1.0, 2.0, 3.0, 10.0]), np.array([0, 0, 0, 1]))
    assert list(values) == [2.0, 10.0]
    assert photos.figures(values, 0)["mean"] == 6 and photos.figures(values, 0)["median"] == 6
    assert photos.figures(values, 0)["geometric"] == pytest.approx(20**0.5)


def test_a_folder_without_photos_names_the_script(tmp_path, capsys):
    assert photos.main([str(tmp_path), "--weights", "random", "--model", "deit_t"]) == 2
    assert "scripts/fetch_photos.py" in capsys.readouterr().err
