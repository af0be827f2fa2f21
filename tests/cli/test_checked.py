"""A device's first run checks the engine, puts it on record, and says what it found; `build` too.

On a GPU and a TensorRT made of host memory.
"""

# ruff: noqa: F811 (fixtures of tests.fakes.engine)
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jmp_deploy.backends import engine as engine_backend
from jmp_deploy.bench import bench, twin
from jmp_deploy.cli.main import main
from jmp_deploy.compare import check
from jmp_deploy.core import artifact as files
from jmp_deploy.core import device
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.device import Gpu
from jmp_deploy.core.manifest import EngineCheck, EngineFacts, SpeedAt
from jmp_deploy.engine import api, builder, cuda, stage
from jmp_deploy.engine.cuda import Cuda
from jmp_deploy.jmp import models
from jmp_deploy.jmp.models import LoadedModel
from tests.fakes import tensorrt as fake_tensorrt
from tests.fakes import validation
from tests.fakes.artifacts import FILE_WEIGHTS, PREPROCESS
from tests.fakes.bench import FakeBackend
from tests.fakes.engine import HERE, PASSED, World, make_world, world  # noqa: F401
from tests.fakes.models import tiny_vit
from tests.fakes.tensorrt import plan

NOT_YET = "was not checked on a GPU yet"


@pytest.fixture
def gpu(monkeypatch):
    """Puts another GPU, or none, in the place of `HERE`."""

    def put(*found: Gpu) -> None:
        for module in (engine_backend, device, stage, check, twin):
            monkeypatch.setattr(module, "gpus", lambda: found)

    put(HERE)
    monkeypatch.setattr(api, "installed", lambda flavour: True)
    monkeypatch.setattr(engine_backend, "importable", lambda name: True)
    return put


@pytest.fixture
def asked(monkeypatch):
    """Counts the checks that are really made."""
    counted, real = [], check.check_engine

    def count(*arguments, **options):
        counted.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(check, "check_engine", count)
    return counted


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "one.png"
    Image.new("RGB", (9, 6), (200, 30, 90)).save(path)
    return path


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "unexpected" not in captured.err
    return code, captured.out, captured.err


def test_the_first_run_checks_and_later_ones_do_not(world, gpu, asked, picture, capsys):
    folder = world.artifact(checks=())
    code, _, err = command(capsys, "run", folder, picture)
    assert code == 0 and NOT_YET not in err and len(asked) == 1
    (found,) = Artifact.read(folder).engine.checks
    assert found.ok and found.gpu == HERE.name
    before = (folder / files.FILE).read_bytes()
    assert command(capsys, "run", folder, picture)[0] == 0 and len(asked) == 1
    assert (folder / files.FILE).read_bytes() == before
    shown = " ".join(command(capsys, "report", folder)[1].split())
    assert "ok: on Fake GPU against PyTorch: cosine 1.000000" in shown
    gpu(Gpu("Another GPU", (8, 6), 1 << 30))
    assert command(capsys, "run", folder, picture)[0] == 0 and len(asked) == 2
    assert [one.gpu for one in Artifact.read(folder).engine.checks] == ["Fake GPU", "Another GPU"]


def test_run_refuses_an_engine_that_is_off(world, gpu, asked, picture, capsys):
    folder = world.artifact(plan(off=True), checks=())
    for _ in range(2):
        code, out, err = command(capsys, "run", folder, picture)
        assert code == 1 and out == "" and err.count("error:") == 1
        assert f"the engine of {folder} does not agree with PyTorch on Fake GPU: cosine" in err
        assert f"python -m jmp_deploy compare {folder} --debug" in err
    assert len(asked) == 1 and Artifact.read(folder).engine.is_off
    assert "OUTSIDE TOLERANCE" in command(capsys, "report", folder)[1]
    # the way out is to say what one does: a plan of which nothing is known
    assert command(capsys, "run", folder / files.ENGINE, picture, "--no-manifest")[0] == 0


def test_a_folder_that_cannot_be_written_is_no_error(
    world, gpu, asked, picture, capsys, monkeypatch
):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    folder = world.artifact(checks=())
    before = (folder / files.FILE).read_bytes()
    monkeypatch.setattr("jmp_deploy.core.files.tempfile.mkstemp", refuse)
    code, _, err = command(capsys, "run", folder, picture)
    assert code == 0 and err.count("note:") == 1
    assert "cannot be kept" in err and "Read-only file system" in err
    assert (folder / files.FILE).read_bytes() == before and len(asked) == 1


def test_an_artifact_without_its_reference_runs_and_says_so(world, gpu, picture, capsys):
    folder = world.artifact(checks=())
    (folder / files.REFERENCE).unlink()
    code, _, err = command(capsys, "run", folder, picture)
    assert code == 0 and err.count("note:") == 1
    assert NOT_YET in err and "reference.npz is missing" in err


def test_what_keeps_an_engine_from_running_is_said_once(world, gpu, picture, capsys):
    folder = world.artifact(checks=(), version="10.3.0.26")
    code, _, err = command(capsys, "run", folder, picture)
    assert code == 2 and err.count("10.3.0.26") == 1 and "--rebuild" in err
    assert Artifact.read(folder).engine.checks == ()


@pytest.mark.parametrize("off", [False, True])
def test_bench_measures_an_engine_that_is_off_and_ends_with_1(
    world, gpu, asked, capsys, monkeypatch, tmp_path, off
):
    folder, out = world.artifact(plan(off=off), checks=()), tmp_path / "b.json"
    monkeypatch.setattr(bench, "_open_timed", lambda *_, **__: FakeBackend(4.0, on_gpu=True))
    code, _, err = command(
        capsys, "bench", folder, "-b", 1, "--no-energy", "--seconds", 0.1, "--json", out
    )
    result = json.loads(out.read_text())
    assert code == int(off) and len(asked) == 1 and result["rows"]
    assert [w for w in result["warnings"] if "does not agree with PyTorch" in w] != [] or not off
    assert ("does not agree" in err) is off and Artifact.read(folder).engine.is_off is off


@pytest.mark.parametrize("off", [False, True])
def test_validate_measures_an_engine_that_is_off_and_ends_with_1(
    world, gpu, asked, picture, capsys, tmp_path, off
):
    folder, out = world.artifact(plan(off=off), checks=()), tmp_path / "v.json"
    for label in ("0", "4"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "one.png").write_bytes(picture.read_bytes())
    arguments = ("--data", tmp_path / "data", "--workers", 0, "--json", out)
    code, _, err = command(capsys, "validate", folder, *arguments)
    result = json.loads(out.read_text())
    assert result["backend"] == "engine" and result["n"] == 2
    assert code == int(off) and result["ok"] is not off and len(asked) == 1
    assert any("does not agree" in note for note in result["notes"]) is off
    assert ("does not agree" in err) is off and "unreadable" not in err


def test_compare_puts_it_on_record_anew(world, gpu, asked, capsys):
    stale = EngineCheck(False, HERE.name, "2026-01-01", ("NaN, with a driver of before",))
    folder = world.artifact(checks=(stale,))
    code, *_ = command(capsys, "compare", folder, "--backends", "torch,engine")
    assert code == 0 and len(asked) == 1
    (found,) = Artifact.read(folder).engine.checks
    assert found.ok and found.date > stale.date


def with_onnx(folder: Path, **engine) -> Path:
    """An artifact that runs on ONNX Runtime too, whose engine is for a GPU elsewhere."""
    facts = EngineFacts("tensorrt", "10.13", ("sm_86",), "fp16", **engine)
    return validation.write_artifact(folder, validation.weights(5), engine=facts, no_engine=None)


@pytest.mark.parametrize("checks", [(), (PASSED,)])
def test_without_a_gpu_it_is_said_of_an_engine_that_no_gpu_has_seen(
    gpu, asked, picture, capsys, tmp_path, checks
):
    gpu()
    folder = with_onnx(tmp_path / "a", checks=checks, unchecked="no GPU was here")
    notes, out = int(not checks), tmp_path / "out.json"
    code, _, err = command(capsys, "run", folder, picture)
    assert code == 0 and err.count(NOT_YET) == notes
    quick = ("-b", 1, "--num-bench-iter", 4, "--seconds", 0.1, "--no-energy")
    command(capsys, "bench", folder, *quick, "--json", out)
    assert sum(NOT_YET in note for note in json.loads(out.read_text())["notes"]) == notes
    (tmp_path / "data" / "0").mkdir(parents=True)
    (tmp_path / "data" / "0" / "one.png").write_bytes(picture.read_bytes())
    command(capsys, "validate", folder, "--data", tmp_path / "data", "--workers", 0, "--json", out)
    assert sum(NOT_YET in note for note in json.loads(out.read_text())["notes"]) == notes
    shown = " ".join(command(capsys, "report", folder)[1].split())
    assert shown.count("its ONNX alone was checked (no GPU was here)") == notes
    assert asked == []


def test_an_engine_that_is_off_stands_in_no_other_backend_s_way(
    gpu, asked, picture, capsys, tmp_path
):
    off = EngineCheck(False, HERE.name, "2026-11-25", ("cosine",))
    folder = with_onnx(tmp_path / "a", checks=(off,))
    (folder / files.ENGINE).write_bytes(plan())
    Artifact.read(folder).write()
    assert command(capsys, "run", folder, picture)[0] == 1
    assert command(capsys, "run", folder, picture, "--backend", "onnxruntime")[0] == 0
    assert asked == []


# --- build ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, world, gpu):
    """Builds take a tiny dense model; the fake TensorRT answers as it does, plus planted faults."""
    model = tiny_vit(depth=2)
    spec = type(PREPROCESS)(32, 32, 36, "bicubic", "center", (0.5,) * 3, (0.25,) * 3)

    def load(name, weights="auto", **options):
        return LoadedModel(tiny_vit(depth=2), name, FILE_WEIGHTS, spec, None)

    def answer(given):
        with torch.inference_mode():
            return model(torch.from_numpy(np.array(given))).numpy().astype(np.float64)

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.setattr(fake_tensorrt, "answer", answer)
    monkeypatch.setattr(
        cuda, "open_cuda", lambda device=None: Cuda(world.cuda.runtime, world.cuda.driver, device)
    )
    monkeypatch.setattr(builder, "choose", lambda wanted: builder.Choice("tensorrt", "it is here"))
    monkeypatch.setattr(twin, "time_engines", time_engines)
    faults: dict[str, bool] = {}

    def build_engine(model, target, flavour, spec, **options):
        off = faults.get(spec.precision, False)
        target.write_bytes(plan(spec.batch, image=spec.image, classes=10, off=off))
        version = world.trt.__version__
        return EngineFacts(flavour, version, ("sm_86",), spec.precision, bytes=1)

    monkeypatch.setattr(builder, "build_engine", build_engine)
    return faults


def time_engines(engines, artifact):
    return [SpeedAt(8, {"int8": 1.0, "fp16": 2.0}, 2.0, (2.0, 2.0), True)]


def build(capsys, out: Path, *more) -> tuple[int, str, str]:
    return command(capsys, "build", "tiny", "--dense", "--batch", "1,2,4", "-o", out, *more)


def test_build_checks_what_it_built_and_rebuild_does_too(tiny, tmp_path, capsys, picture):
    folder = tmp_path / "a"
    tiny["fp16"] = True
    code, out, err = build(capsys, folder)
    made = Artifact.read(folder)
    made.verify()
    (found,) = made.engine.checks
    assert code == 1 and not found.ok and found.problems and made.check.ok
    assert f"the engine of {folder} does not agree with PyTorch on Fake GPU: cosine" in err
    assert f"compare {folder} --debug" in err and "OUTSIDE TOLERANCE" in out
    # known from now on: nobody has to find out again
    assert command(capsys, "run", folder, picture)[0] == 1
    for off in (True, False):
        tiny["fp16"] = off
        (folder / files.ENGINE).write_bytes(b"damaged")
        code, _, err = command(capsys, "run", folder, picture, "--rebuild")
        assert code == int(off) and ("does not agree" in err) is off
        assert Artifact.read(folder).engine.is_off is off
        Artifact.read(folder).verify()


def test_both_engines_of_int8_are_checked_by_build_and_by_rebuild(tiny, tmp_path, capsys, picture):
    folder = tmp_path / "a"
    flags = ("--precision", "int8", "--calib", "sample", "--calib-images", 8)
    tiny["int8"] = True
    ended = [build(capsys, folder, *flags)]
    made = [Artifact.read(folder)]
    (folder / files.ENGINE).write_bytes(b"damaged")
    ended.append(command(capsys, "run", folder, picture, "--rebuild"))
    made.append(Artifact.read(folder))
    for (code, _, err), one in zip(ended, made, strict=True):
        # twice as fast, and wrong: the FP16 engine is what users run, and the build has failed
        assert code == 1 and one.engine.precision == one.int8.speed.engine == "fp16"
        assert [check.ok for check in one.engine.checks] == [True]
        assert [check.ok for check in one.int8.other_checks] == [False]
        assert (
            err.count("does not agree") == 1
            and str(folder / files.QUANTIZED_ENGINES["int8"]) in err
        )
    made[-1].verify()
    assert command(capsys, "run", folder, picture)[0] == 0
    tiny["int8"] = False
    (folder / files.ENGINE).write_bytes(b"damaged")
    assert command(capsys, "run", folder, picture, "--rebuild")[0] == 0
    assert Artifact.read(folder).engine.precision == "int8"
