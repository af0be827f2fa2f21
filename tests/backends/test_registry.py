"""The registry of backends: one file each, and what follows from it."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from jmp_deploy import backends
from jmp_deploy.backends import base
from jmp_deploy.backends import engine as engine_backend
from jmp_deploy.core.device import Gpu
from jmp_deploy.core.errors import EngineError
from jmp_deploy.core.manifest import EngineFacts
from jmp_deploy.engine import api
from tests.fakes.artifacts import make_artifact

FACTS = EngineFacts("tensorrt", "10.13.0.35", ("sm_86",), "fp16")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, and what engines need on it."""
    monkeypatch.setattr(engine_backend, "gpus", lambda: (Gpu("Fake GPU", (8, 6), 1),))
    monkeypatch.setattr(engine_backend, "importable", lambda package: True)
    monkeypatch.setattr(api, "installed", lambda flavour: True)


def made(folder, *files, **changes):
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    return make_artifact(folder, **changes)


@pytest.fixture
def whole(tmp_path):
    return made(tmp_path / "whole", "model.onnx", "model.engine", engine=FACTS)


@pytest.fixture
def portable(tmp_path):
    return made(tmp_path / "portable", "model.onnx")


def test_every_backend_is_one_file_and_every_file_of_one_is_listed():
    folder = Path(inspect.getfile(backends)).parent
    files = {Path(inspect.getfile(type(backend))).name for backend in backends.BACKENDS}
    assert len(files) == len(backends.BACKENDS) == len(set(backends.NAMES))
    assert files == {p.name for p in folder.glob("*.py")} - {"__init__.py", "base.py", "predict.py"}
    assert all(backends.get(name).name == name for name in backends.NAMES)
    assert all(bool(backend.file) == backend.is_deployed for backend in backends.BACKENDS)


def test_the_engine_is_taken_where_it_runs(gpu, whole, portable):
    backend, why = backends.pick([whole])
    assert (backend.name, why) == ("engine", "Fake GPU is here")
    assert backend.device() == "Fake GPU" and backend.precision(whole) == "fp16"
    assert backends.pick([whole], "onnxruntime")[1] == "asked for"
    backend, why = backends.pick([portable])
    assert (backend.name, why) == ("onnxruntime", "no engine: none was built")
    assert backend.device().startswith("CPU ")


def test_one_backend_runs_all_artifacts(gpu, whole, portable):
    backend, why = backends.pick([whole, portable])
    assert backend.name == "onnxruntime"
    assert why == f"no engine: {portable.folder}: none was built"
    with pytest.raises(EngineError, match=f"engine: {portable.folder}: none was built"):
        backends.pick([whole, portable], "engine")


def test_what_is_missing_is_named_with_its_cure(whole, monkeypatch):
    (whole.folder / "model.engine").unlink()
    monkeypatch.setattr(base, "importable", lambda package: package != "polygraphy")
    with pytest.raises(EngineError) as caught:
        backends.pick([whole])
    assert "engine: model.engine is missing; onnxruntime: polygraphy is not" in caught.value.message
    assert "pip install" in caught.value.message
    monkeypatch.setattr(base, "importable", lambda package: package != "timm")
    with pytest.raises(EngineError, match="torch: timm is not installed"):
        backends.pick([whole], "torch")


def test_precision_is_the_backend_s_own(tmp_path, monkeypatch):
    artifact = made(tmp_path / "a", precision="int8", engine=FACTS)
    found = {backend.name: backend.precision(artifact) for backend in backends.BACKENDS}
    assert found == {"torch": "fp32", "onnxruntime": "int8", "engine": "fp16"}
    torch, half = backends.get("torch"), made(tmp_path / "b", precision="fp16")
    monkeypatch.setattr(type(torch), "gpu", lambda self: "Fake GPU")
    assert torch.precision(half) == "fp32" and torch.timed_precision(half) == "fp16"
    assert torch.timed_precision(artifact) == "fp32"


def test_a_model_of_other_outputs_than_its_manifest_says_ends_in_one_message():
    pytest.importorskip("polygraphy")
    runner = base.function_runner(lambda images: {"other": images[:, 0, 0]}, "a model")
    with runner:
        found = base.infer(runner, np.zeros((3, 3, 4, 4), np.float32), (1, 2, 2))
    assert found["other"].shape == (3, 4)
    with pytest.raises(EngineError, match="no output logits, it has other"):
        found["logits"]
