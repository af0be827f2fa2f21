"""`build` of a module in hand, of one channel, and what the commands make of such a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import jmp_deploy
from jmp_deploy import pipeline
from jmp_deploy.cli.build import rows_of
from jmp_deploy.cli.main import main
from jmp_deploy.jmp import models, published
from jmp_deploy.jmp.models import OwnModel
from jmp_deploy.pipeline import BuildOptions
from jmp_deploy.quantize.stage import QuantizeOptions
from tests.fakes.artifacts import FILE_WEIGHTS, PREPROCESS, RANDOM_WEIGHTS, make_artifact
from tests.fakes.models import tiny_vit

OWN = OwnModel(mean=(0.5,), std=(0.25,))


def grey() -> torch.nn.Module:
    return tiny_vit(in_chans=1)


def many() -> torch.nn.Module:
    return tiny_vit(in_chans=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders of grey images: 8 and 16 bits, and arrays of both shapes."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index in range(10):
        (folder / f"c{index}").mkdir()
        levels = random.integers(0, 256, (40, 40), dtype=np.uint8)
        stem = folder / f"c{index}" / "x"
        if index % 4 < 2:
            wide = levels if index % 4 else levels.astype(np.uint16) * 257
            Image.fromarray(wide).save(stem.with_suffix(".png"))
        else:
            np.save(stem.with_suffix(".npy"), levels if index % 4 == 2 else levels[..., None])
    return folder


def test_a_grey_module_in_hand_from_build_to_validate(data, tmp_path, capsys):
    model = grey().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = jmp_deploy.build(
        model,
        tmp_path / "a",
        own=OWN,
        precision="int8",
        quantize=QuantizeOptions(calib=str(data)),
        images=(data,),
        batch=(1, 2, 4),
        engine="none",
    )
    assert model.training and type(model.blocks) is torch.nn.Sequential
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # INT8 of random weights on noise may be further off than its limit; the FP16 twin is not
    quantized, twin = made.check.pairs
    assert twin["ok"] and quantized["cosine"] > 0.9
    assert made.preprocess.channels == 1 and made.int8
    assert made.rebuild.startswith(f"jmp_deploy.build(VisionTransformer, '{tmp_path / 'a'}', own=")
    assert "6 blocks and 16 patches" in made.jmp.caution
    image = str(data / "c0" / "x.png")
    assert main(["run", str(made.folder), image]) == 0
    assert main(["validate", str(made.folder), "--data", str(data)]) == 0
    assert main(["inspect", str(made.folder)]) == 0
    assert "spread:80 takes less" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("function", "channels"), [("grey", 1), ("many", 4)])
def test_pictures_and_tune_of_a_users_function(tmp_path, capsys, function, channels):
    (data := tmp_path / "data").mkdir()
    for number in range(12):
        random = np.random.default_rng(number)
        levels = random.integers(0, 256, (40, 40, channels), dtype=np.uint8)
        np.save(data / f"{number}.npy", levels)
    own = ["--from", f"{__name__}:{function}", "--mean", "0.5", "--std", "0.25"]
    image = str(data / "0.npy")
    assert main(["visualize", "mine", image, "-o", str(tmp_path / "x.png"), *own]) == 0
    assert Image.open(tmp_path / "x.png").mode == "RGB"
    out = ["-o", str(tmp_path / "t.json"), "--speedup", "1.3", "--passes", "3"]
    assert main(["tune", "mine", "--images", str(data), *out, *own]) == 0
    words = "".join(capsys.readouterr().out.split())
    assert f"--from{__name__}:{function}" in words and "--std0.25" in words


@pytest.mark.parametrize(
    ("changes", "weights", "words"),
    [
        ({}, FILE_WEIGHTS, "as measured at tau 0.7"),
        ({"tau": 0.9}, FILE_WEIGHTS, "as measured at tau 0.9"),
        ({"strategy": "merge"}, FILE_WEIGHTS, ""),
        ({"granularity": "sample"}, FILE_WEIGHTS, ""),
        ({"proportional": False}, FILE_WEIGHTS, ""),
        ({}, RANDOM_WEIGHTS, ""),
    ],
)
def test_expected_accuracy_is_of_the_method_as_it_was_measured(
    tmp_path, monkeypatch, changes, weights, words
):
    """`published.expected` knows schedules; how one is applied, and to what, is looked at here."""
    monkeypatch.setattr(published, "expected", lambda s, shape: f"as measured at tau {s.tau:g}")
    loaded = models.LoadedModel(tiny_vit(), "tiny", weights, PREPROCESS, None)
    jmp = pipeline._patch(loaded, BuildOptions("tiny", tmp_path, schedule="2:9", **changes))
    assert jmp.expected == words
    shown = dict(rows_of(make_artifact(tmp_path, jmp=jmp)))
    assert shown.get("expected", "") == words
