"""The calibration cache: there and back, and never for another model."""

from __future__ import annotations

import json

import pytest

from jmp_deploy.core.errors import CalibrationError
from jmp_deploy.jmp.models import weights_digest
from jmp_deploy.quantize import cache, recipes
from jmp_deploy.quantize.cache import Calibration
from jmp_deploy.quantize.formats import FP8, INT8, INT8_ATTENTION
from jmp_deploy.quantize.layers import Layer
from jmp_deploy.quantize.ranges import Range
from tests.fakes.artifacts import CALIBRATED
from tests.fakes.models import tiny_vit

LAYERS = [Layer("blocks.0.qkv", 0, "qkv", "n", "x", "w", 1, (48, 144), True)]
JMP = {"schedule_name": "paper", "schedule": [(3, 138)], "tau": 0.7, "granularity": "token"}


def identity(**changes):
    values = {
        "model": "deit_tiny_patch16_224",
        "image_size": 224,
        "weights": "a" * 64,
        "preprocess": {"mean": (0.5, 0.5, 0.5), "resize": 248},
        "jmp": JMP,
        "form": INT8,
        "layers": LAYERS,
    }
    return cache.identity(**{**values, **changes})


@pytest.fixture
def made():
    return Calibration(
        identity=identity(),
        method="percentile:99.99",
        images={**CALIBRATED, "sha256": "b" * 64},
        ranges={"blocks.0.qkv": Range(1 / 3, 0.1 + 0.2, 0.0078125, 196.0, 48)},
        keep_fp16={"head": "recipe default"},
        equalization={"blocks.0.qkv": [0.25, 1.0, 8.0]},
    )


def test_there_and_back(made, tmp_path):
    path = tmp_path / "c.json"
    cache.write(path, made)
    again = cache.read(path)
    assert again == made and again.scales == {"blocks.0.qkv": 0.0078125}
    cache.check(path, again, identity())
    cache.write(tmp_path / "d.json", again)
    assert (tmp_path / "d.json").read_bytes() == path.read_bytes()
    # readable: one can look a scale up
    assert json.loads(path.read_text())["layers"]["blocks.0.qkv"]["scale"] == 0.0078125


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "deit_small_patch16_224"}, ["model: deit_tiny", "not deit_small"]),
        ({"weights": "c" * 64}, ["weights (sha256): aaaaaaaaaaaa..., not cccccccccccc..."]),
        ({"image_size": 160}, ["image size: 224, not 160"]),
        ({"form": FP8}, ["number format: int8, not fp8"]),
        ({"form": INT8_ATTENTION}, ["(--int8-attention): false, not true"]),
        ({"jmp": None}, ["schedule and decision", "not none (dense)"]),
        ({"jmp": {**JMP, "schedule": [(3, 100)]}}, ["schedule [[3, 138]], not [[3, 100]]"]),
        ({"jmp": {**JMP, "tau": 0.9}, "image_size": 160}, ["tau 0.7, not 0.9", "image size"]),
        ({"preprocess": {"mean": (0.5, 0.5, 0.5), "resize": 256}}, ["resize 248, not 256"]),
    ],
)
def test_another_models_cache_is_refused_with_what_differs(made, tmp_path, changes, words):
    with pytest.raises(CalibrationError, match="cache of another model") as error:
        cache.check(tmp_path / "c.json", made, identity(**changes))
    for word in words:
        assert word in error.value.message


def test_the_name_of_a_schedule_makes_no_difference(made, tmp_path):
    cache.check(tmp_path, made, identity(jmp={**JMP, "schedule_name": "list"}))


def test_weights_are_told_apart_by_their_values():
    model, same, other = tiny_vit(), tiny_vit(), tiny_vit()
    other.blocks[3].norm1.bias[5] += 1e-6
    digests = [weights_digest(m) for m in (model, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_truncated_cache(made, tmp_path):
    path = tmp_path / "c.json"
    cache.write(path, made)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match="is not a calibration cache"):
            cache.read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.0078125", "0.015625", "changed after it was written"),
        ('"format": 1', '"format": 7', "has format 7"),
        ('"method"', '"methods"', "changed after it was written"),
        ('"threshold"', '"treshold"', "changed after it was written"),
    ],
)
def test_a_spoiled_cache(made, tmp_path, old, new, message):
    path = tmp_path / "c.json"
    cache.write(path, made)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CalibrationError, match=message):
        cache.read(path)


def test_no_cache(tmp_path):
    with pytest.raises(CalibrationError, match="no such calibration cache"):
        cache.read(tmp_path / "none.json")


def test_recipes_are_found_by_family():
    assert recipes.for_model("vit_small_patch14_dinov2.lvd142m").name == "dinov2"
    assert recipes.for_model("vit_base_patch14_reg4_dinov2").name == "dinov2"
    assert recipes.for_model("some_vit").name == "default"
    eight = recipes.for_model("vit_base_patch14_dinov2", precision="fp8")
    assert (eight.equalize, eight.keep_fp16, eight.method) == (0, ("head",), "max")
    assert "fc2" in recipes.for_model("vit_base_patch14_dinov2", precision="int8").keep_fp16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('method = "minmax"', "unknown calibration method"),
        ("equalize = 2", "not between 0 and 1"),
        ('keep = ["fc2"]', "keep = .* is not part of a recipe"),
        ("method = 3", "method = 3 is not part"),
        ("fp8 = 3", "fp8 = 3 is not a table"),
        ("method = ", "cannot be read"),
    ],
)
def test_a_recipe_that_is_wrong(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        recipes.for_model("x", tmp_path)
