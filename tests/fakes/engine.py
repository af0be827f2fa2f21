"""A machine for tests: a GPU, a TensorRT and a folder, made of host memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jmp_deploy.core import artifact as manifest
from jmp_deploy.core.device import Gpu
from jmp_deploy.core.manifest import EngineCheck, EngineFacts
from jmp_deploy.engine import api, runtime
from jmp_deploy.engine.cuda import Cuda
from tests.fakes.artifacts import write_artifact
from tests.fakes.cuda import PRIMARY, FakeCuda
from tests.fakes.tensorrt import IMAGE, FakeTensorRT, answer, plan

HERE = Gpu("Fake GPU", (8, 6), 1 << 30)
PASSED = EngineCheck(True, HERE.name, "2026-11-25T00:00:00+00:00")


def write_reference(folder: Path) -> None:
    """`reference.npz` of three images, with the answers of the fake TensorRT's function."""
    given = images(3, seed=7)
    names = np.array(["a", "b", "c"])
    np.savez(folder / manifest.REFERENCE, images=given, output=answer(given), names=names)


@dataclass
class World:
    """A machine: its GPU, its TensorRT, and a folder for artifacts."""

    folder: Path
    cuda: FakeCuda = field(default_factory=FakeCuda)
    trt: FakeTensorRT = None  # type: ignore[assignment]

    def artifact(self, content: bytes | None = None, **engine: Any) -> Path:
        """A folder with an engine and its manifest, made for this machine and checked on it unless
        told otherwise, and with the reference that a check takes."""
        folder = self.folder / "artifact"
        folder.mkdir(exist_ok=True)
        (folder / manifest.ENGINE).write_bytes(plan() if content is None else content)
        write_reference(folder)
        flavour = "rtx" if self.trt.__name__ == "tensorrt_rtx" else "tensorrt"
        facts = EngineFacts(flavour, self.trt.__version__, ("sm_86",), "fp16", checks=(PASSED,))
        write_artifact(folder, side=IMAGE[1], engine=replace(facts, **engine))
        return folder

    def device_array(self, values: np.ndarray) -> SimpleNamespace:
        """An array of a library that knows `__cuda_array_interface__`."""
        values = np.ascontiguousarray(values)
        address = self.cuda.cuMemAlloc(values.nbytes)[1]
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        facts = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (address, False),
            "version": 3,
        }
        return SimpleNamespace(__cuda_array_interface__=facts)

    def read(self, array) -> np.ndarray:
        facts = array.__cuda_array_interface__
        size = int(np.prod(facts["shape"])) * np.dtype(facts["typestr"]).itemsize
        raw = ctypes.string_at(facts["data"][0], size)
        return np.frombuffer(raw, facts["typestr"]).reshape(facts["shape"])

    @contextmanager
    def current(self) -> Iterator[None]:
        """The GPU's own context is current, as where PyTorch is used."""
        self.cuda.push(PRIMARY)
        yield
        self.cuda.pop()

    def free(self, *arrays) -> None:
        for array in arrays:
            self.cuda.cuMemFree(array.__cuda_array_interface__["data"][0])

    def assert_clean(self) -> None:
        gc.collect()
        assert self.cuda.violations == [], self.cuda.violations
        assert self.cuda.leaks() == []


@pytest.fixture
def make_world(monkeypatch, tmp_path):
    def make(flavour="tensorrt", version="10.13.0.35", **cuda) -> World:
        world = World(tmp_path, FakeCuda(**cuda))
        world.trt = FakeTensorRT(world.cuda, flavour, version)
        monkeypatch.setattr(
            runtime, "open_cuda", lambda device=None: Cuda(world.cuda.driver, device)
        )
        monkeypatch.setattr(api, "load", lambda name: world.trt)
        monkeypatch.setenv("JMP_DEPLOY_CACHE", str(tmp_path / "cache"))
        return world

    return make


@pytest.fixture
def world(make_world):
    world = make_world()
    yield world
    world.assert_clean()


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype(np.float32)


def close_to(found: np.ndarray, given: np.ndarray) -> bool:
    return found.dtype == np.float32 and np.allclose(found, answer(given), rtol=1e-6, atol=1e-6)
