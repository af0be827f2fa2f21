"""The command `run` on an engine: what it prints, and what it says where the engine does not fit.

The GPU and TensorRT are those of tests/fakes/engine.py, except where TensorRT-RTX really builds.
"""

# ruff: noqa: F811 (fixtures of engine_world)
from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jmp_deploy import backends
from jmp_deploy.backends import engine as engine_backend
from jmp_deploy.cli.main import main
from jmp_deploy.compare import check
from jmp_deploy.core import artifact, device
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import EngineError
from jmp_deploy.core.images import load_batch
from jmp_deploy.core.manifest import EngineFacts
from jmp_deploy.engine import api, builder, stage
from jmp_deploy.engine.api import installed
from tests.fakes.engine import HERE, World, make_world, world  # noqa: F401
from tests.fakes.tensorrt import answer, plan

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture
def gpu(monkeypatch, request):
    if "real_machine" in request.keywords:
        return
    for module in (engine_backend, device, stage, check):
        monkeypatch.setattr(module, "gpus", lambda: (HERE,))
    monkeypatch.setattr(api, "installed", lambda flavour: True)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(11):
        pixels = random.integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["run", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_the_engine_answers_what_its_function_says(world, pictures, tmp_path, capsys):
    folder, out = world.artifact(), tmp_path / "out.json"
    code, shown, _ = run(capsys, folder, pictures, "--json", out)
    assert code == 0 and "run with engine (Fake GPU is here)" in shown
    spec = Artifact.read(folder).preprocess
    paths = sorted(pictures.glob("*.png"))
    expected = answer(load_batch(paths, spec))
    records = json.loads(out.read_text())
    assert [record["image"] for record in records] == [str(path) for path in paths]
    for record, row in zip(records, expected, strict=True):
        best = record["top"][0]
        scores = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert best["index"] == int(row.argmax())
        assert best["score"] == pytest.approx(scores.max(), rel=1e-5)


def test_flags_reach_the_engine(world, pictures, capsys):
    folder = world.artifact()
    code, _, _ = run(capsys, folder, pictures, "--batch", "2", "--no-cuda-graph")
    assert code == 0
    assert world.cuda.count("execute_async_v3") == 6 and world.cuda.launches == 0
    code, _, err = run(capsys, folder, pictures, "--batch", "9")
    assert code == 2 and "max_batch 9 is outside of the engine's 1 to 8" in err


def test_an_engine_that_does_not_fit(world, pictures, capsys):
    folder = world.artifact(version="10.3.0.26", targets=("sm_87",))
    code, _, err = run(capsys, folder, pictures)
    assert code == 2
    assert "expected 10.3.0.26, found 10.13.0.35" in err and "expected sm_87, found sm_86" in err
    assert "--rebuild" in err


def test_polygraphy_s_runner_asks_the_same_first(world, monkeypatch):
    pytest.importorskip("polygraphy")
    monkeypatch.setattr(api, "load", lambda flavour: world.trt)
    folder = world.artifact(version="10.3.0.26", targets=("sm_87",))
    with pytest.raises(EngineError, match=r"expected 10\.3\.0\.26.*expected sm_87") as caught:
        backends.get("engine").open(Artifact.read(folder)).runner.activate()
    assert "--rebuild" in caught.value.hint


def test_nan_names_the_image_and_is_a_failed_check(world, pictures, capsys):
    code, _, err = run(capsys, world.artifact(plan(nan=True)), pictures)
    assert code == 1 and "07.png is not finite" in err and "NaN" in err


def test_out_of_memory_names_the_batch(make_world, pictures, capsys):
    world = make_world(memory=6 * (4 * 53 + 1000) + 100)
    code, _, err = run(capsys, world.artifact(), pictures)
    assert code == 2 and "batch 6 fits" in err and "--batch 6" in err
    assert run(capsys, world.artifact(), pictures, "--batch", "6")[0] == 0
    world.assert_clean()


def test_unreadable_images_are_skipped_listed_and_above_one_percent_a_failure(
    world,
    pictures,
    tmp_path,
    capsys,
):
    (pictures / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out.json"
    code, _, err = run(capsys, world.artifact(), pictures, "--json", out)
    assert code == 1 and "1 of 12 images cannot be read" in err and "broken.jpg" in err
    records = json.loads(out.read_text())
    assert len(records) == 12 and "error" in records[-1]
    for index in range(100):
        shutil.copy(pictures / "00.png", pictures / f"more{index}.png")
    code, _, err = run(capsys, world.artifact(), pictures)
    assert code == 0 and "skipped: cannot read" in err


def test_without_a_manifest(world, pictures, capsys):
    path = world.artifact() / artifact.ENGINE
    (path.parent / artifact.FILE).unlink()
    code, _, err = run(capsys, path.parent, pictures)
    assert code == 2 and "manifest.json" in err
    code, shown, err = run(capsys, path, pictures, "--no-manifest")
    assert code == 0 and "without a manifest" in shown
    assert "warning: no manifest says how images are prepared" in err
    assert err.count("warning:") == 2 and "RuntimeWarning" not in err


def test_rebuild_makes_the_engine_anew_only_where_it_does_not_fit(
    world,
    pictures,
    monkeypatch,
    capsys,
):
    folder = world.artifact(version="10.3.0.26", plugin_layers=0)
    (folder / artifact.DEPLOYABLE).write_bytes(b"onnx")
    old = Artifact.read(folder).write()
    built = []

    def build_engine(model, target, flavour, spec, **options):
        built.append((flavour, spec.batch, spec.image, options["plugin"]))
        target.write_bytes(plan(scratch=500))
        return EngineFacts(flavour, world.trt.__version__, ("sm_86",), spec.precision)

    monkeypatch.setattr(builder, "build_engine", build_engine)
    choice = builder.Choice("tensorrt", "it is here")
    monkeypatch.setattr(builder, "choose", lambda wanted: choice)
    code, _, err = run(capsys, folder, pictures, "--rebuild")
    assert code == 0, err
    assert built == [("tensorrt", (1, 4, 8), (3, 4, 4), None)]
    assert "made anew: TensorRT version: expected 10.3.0.26, found 10.13.0.35" in err
    new = Artifact.read(folder)
    new.verify()
    assert new.engine.version == "10.13.0.35"
    assert replace(new, engine=old.engine, no_engine=old.no_engine, files=old.files) == old
    code, _, err = run(capsys, folder, pictures, "--rebuild")
    assert code == 0 and len(built) == 1 and "anew" not in err
    (folder / artifact.ENGINE).write_bytes(b"damaged")
    assert run(capsys, folder, pictures, "--rebuild")[0] == 0 and len(built) == 2
    (folder / artifact.DEPLOYABLE).write_bytes(b"other")
    (folder / artifact.ENGINE).write_bytes(b"damaged")
    code, _, err = run(capsys, folder, pictures, "--rebuild")
    assert code == 2 and artifact.DEPLOYABLE in err and len(built) == 2


def test_a_rebuild_that_fails_leaves_everything_as_it_was(world, pictures, monkeypatch, capsys):
    folder = world.artifact(version="10.3.0.26")
    (folder / artifact.DEPLOYABLE).write_bytes(b"onnx")
    Artifact.read(folder).write()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*arguments, **options):
        raise EngineError("the builder is out of memory")

    monkeypatch.setattr(builder, "build_engine", fail)
    choice = builder.Choice("tensorrt", "it is here")
    monkeypatch.setattr(builder, "choose", lambda wanted: choice)
    code, _, err = run(capsys, folder, pictures, "--rebuild")
    assert code == 2 and "the builder is out of memory" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.skipif(not installed("rtx"), reason="TensorRT-RTX is not installed")
@pytest.mark.skipif(bool(device.gpus()), reason="with a GPU another engine is built")
def test_tensorrt_rtx_really_rebuilds(built, tmp_path, photos, capsys, monkeypatch):
    monkeypatch.undo()  # the real machine
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    assert stage.why_rebuild(Artifact.read(folder)) is None
    (folder / artifact.ENGINE).write_bytes(b"damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code, _, err = run(capsys, folder, photos[0], "--rebuild")
    assert code == 0 and "made anew" in err
    new, old = Artifact.read(folder), Artifact.read(built)
    new.verify()
    assert new.engine.plugin_layers == old.engine.plugin_layers > 0
    assert new.engine.targets == old.engine.targets
    assert stage.why_rebuild(new) is None
