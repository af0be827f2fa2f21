"""The harness of dense features: what it judges, and what its command line says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import dense
from jmp_deploy.core.images import Preprocess
from jmp_deploy.jmp import models
from tests.fakes.artifacts import RANDOM_WEIGHTS
from tests.fakes.models import tiny_vit


def test_collages_have_a_photo_in_each_quarter_and_its_label():
    images = np.stack([np.full((3, 8, 8), index, np.float32) for index in range(5)])
    made, classes = dense._collages(images, 10 + np.arange(5), (4, 4), 0)
    patches = made.reshape(5, 3, 4, 2, 4, 2).transpose(0, 2, 4, 1, 3, 5).reshape(5, 16, -1)
    assert (patches == classes[..., None] - 10).all()
    quarters = classes.reshape(5, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(5, 4, 4)
    assert (quarters == quarters[..., :1]).all()
    assert all(sorted(quarter) == [10, 11, 12, 13, 14] for quarter in quarters[..., 0].T)


def test_the_benchmark_judges_patch_by_patch(tmp_path, monkeypatch):
    spec = Preprocess(32, 32, 32, "bicubic", "center", (0.5,) * 3, (0.5,) * 3)
    loaded = models.LoadedModel(tiny_vit(num_classes=0), "tiny", RANDOM_WEIGHTS, spec, None)
    monkeypatch.setattr(models, "load_model", lambda *args, **options: loaded)
    asked = [
        "--limit",
        "3",
        "--budgets",
        "75",
        "--methods",
        "jmp,tome",
        "--layers",
        "0,3",
        "-o",
        str(tmp_path / "d"),
    ]
    assert dense.main(asked) == 0
    result = json.loads((tmp_path / "d.json").read_text())
    rows = result["rows"]
    assert [row["method"] for row in rows] == ["jmp", "tome"]
    assert all(0 < row["cosine"]["low"] <= row["cosine"]["mean"] < 1 for row in rows)
    for row in rows:  # before the first reduction nothing is lost
        nothing, some = (row["layers"][name]["cosine"]["mean"] for name in ("dense_0", "dense_3"))
        assert nothing > 1 - 1e-5 > some > 0
        told = row["collages"]
        points = told["points"]
        assert points["low"] <= points["mean"] <= points["high"]
        whole = result["collages"]["right"]
        assert points["mean"] == pytest.approx(told["right"] - whole)
    assert "random weights" in (tmp_path / "d.md").read_text()
    assert dense.main(["--methods", "evit"]) == 2
