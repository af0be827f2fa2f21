"""benchmarks/quantized.py: what it compares with what, and a run that was cut goes on."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import quantized
from jmp_deploy.core.images import Preprocess
from jmp_deploy.jmp import models
from jmp_deploy.jmp.models import LoadedModel
from jmp_deploy.quantize import stage
from tests.fakes.artifacts import RANDOM_WEIGHTS
from tests.fakes.models import tiny_vit

pytest.importorskip("sklearn")
SPEC = Preprocess(32, 32, 32, "bicubic", "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A tiny model, and a folder of two classes of 16 images."""
    model = tiny_vit(depth=3)

    def load(name, weights="auto", **options):
        return LoadedModel(copy.deepcopy(model), name, RANDOM_WEIGHTS, SPEC, None)

    monkeypatch.setattr(models, "load_model", load)
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(16):
            pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((32, 32))
            picture.save(tmp_path / "data" / label / f"{index}.png")
    data = str(tmp_path / "data")
    command = ["--model", "tiny", "--schedule", "0:12,1:7", "--data-dir", data, "--calib", data]
    command += ["--calib-images", "16", "--cache", str(tmp_path / "cache")]
    return [*command, "-o", str(tmp_path / "out" / "int8-1.5")]


def test_rows_are_held_against_dense_fp32_and_int8_against_its_own_fp16(
    command, tmp_path, monkeypatch, capsys
):
    assert quantized.main([*command, "--max-drop", "20"]) == 0
    result = json.loads((tmp_path / "out" / "int8-1.5.json").read_text())
    rows = {(row["form"], row["precision"]): row["data"] for row in result["rows"]}
    assert len(rows) == 8 and result["judge"] == "own classifier"
    assert rows["dense", "FP32"]["cosine_worst"] == pytest.approx(1)
    assert rows["dense", "FP16"]["cosine"]["mean"] > rows["dense", "INT8"]["cosine"]["mean"]
    for form in quantized.FORMS:
        for precision in ("INT8", "INT8 mixed"):
            beyond = rows[form, precision]["beyond_fp16"]
            assert beyond["accuracy"]["dense"] == rows[form, "FP16"]["accuracy"]["reduced"]
            assert 0.9 < beyond["cosine"]["mean"] < 0.99999
        assert result["sensitivity"][form]["budget"] == 20
    # reducing tokens costs this model more than INT8 does: the two are told apart
    jmp = rows["jmp", "INT8"]
    assert jmp["beyond_fp16"]["cosine"]["mean"] > jmp["cosine"]["mean"]
    text = (tmp_path / "out" / "int8-1.5.md").read_text()
    assert "Random weights: these figures mean nothing" in text
    assert text.count("| jmp | INT8 mixed |") == 2 and "### Sensitivity, dense" in text

    # nothing is computed a second time
    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(stage, "calibrate", refuse)
    monkeypatch.setattr(quantized._Store, "_session", refuse)
    assert quantized.main([*command, "--max-drop", "20"]) == 0
    assert json.loads((tmp_path / "out" / "int8-1.5.json").read_text()) == result


def test_an_unknown_form_is_refused(command, capsys):
    assert quantized.main([*command, "--forms", "dense,sparse"]) == 2
    assert "dense,jmp" in capsys.readouterr().err
