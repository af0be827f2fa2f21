"""The examples run, on the GPU of tests/fakes/engine.py; that of PyTorch needs a real one."""

# ruff: noqa: F811 (fixtures of engine_world)
from __future__ import annotations

import ast
import ctypes
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jmp_deploy import build
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.images import load_batch
from jmp_deploy.engine.runtime import Engine
from tests.fakes.engine import make_world, world  # noqa: F401
from tests.fakes.models import tiny_vit
from tests.fakes.tensorrt import IMAGE, answer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str):
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name)))


def test_numpy(world, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    folder = world.artifact()
    load("run_numpy.py").main([str(folder), str(tmp_path / "a.png")])
    spec = Artifact.read(folder).preprocess
    logits = answer(load_batch([tmp_path / "a.png"], spec))[0]
    share = np.exp(logits.max()) / np.exp(logits).sum()
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'} {share:6.1%}  {logits.argmax()}\n"


def test_a_linear_head_on_features_of_patches(tmp_path, capsys):
    """Two colours in two classes: what the head learns from three photos holds on a fourth."""
    random = np.random.default_rng(0)
    photos, masks, wanted = [], [], []
    for index in range(4):
        split = 8 * (1 + index % 3)  # at a border of patches
        mask = np.zeros((32, 32), np.uint8)
        mask[:, split:] = 1
        pixels = np.where(mask[..., None] == 1, (200, 60, 40), (40, 90, 210))
        noisy = np.clip(pixels + random.integers(-30, 30, pixels.shape), 0, 255).astype(np.uint8)
        photos.append(tmp_path / f"photo{index}.png")
        masks.append(tmp_path / f"mask{index}.png")
        Image.fromarray(noisy).save(photos[-1])
        Image.fromarray(mask).save(masks[-1])
        wanted.append(mask)
    folder, head, out = tmp_path / "made", tmp_path / "head.npz", tmp_path / "out"
    asked = {"output": "dense", "schedule": "1:14,3:12", "engine": "none", "precision": "fp32"}
    # as timm's: scaled to 32 pixels and nothing cut off
    model = tiny_vit(num_classes=0)
    model.pretrained_cfg = {"crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    build(model, folder, **asked)
    run = load("dense_head.py").main
    run([str(folder), *map(str, photos[:3]), "--masks", *map(str, masks[:3]), "--head", str(head)])
    assert "2 classes, 100.0% of the patches right" in capsys.readouterr().out
    run([str(folder), str(photos[3]), "--head", str(head), "--out", str(out)])
    found = np.asarray(Image.open(out / "photo3.png"))
    assert found.shape == (32, 32) and (found == wanted[3]).mean() > 0.9


class GpuArray:
    """pycuda.gpuarray.GPUArray, as far as the example uses it; memory goes with the object."""

    def __init__(self, cuda, shape, dtype):
        self.cuda, self.shape, self.dtype = cuda, shape, np.dtype(dtype)
        self.size = int(np.prod(shape)) * self.dtype.itemsize
        self.address = cuda.cuMemAlloc(self.size)[1]

    def __del__(self):
        self.cuda.cuMemFree(self.address)

    @property
    def __cuda_array_interface__(self):
        facts = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False)}
        return {**facts, "strides": None, "stream": None, "version": 3}

    def get(self):
        raw = ctypes.string_at(self.address, self.size)
        return np.frombuffer(raw, self.dtype).reshape(self.shape)


class Stream:
    def __init__(self, cuda):
        self.cuda, self.handle = cuda, int(cuda.cuStreamCreate(1)[1])

    def __del__(self):
        self.cuda.cuStreamDestroy(self.handle)

    def synchronize(self):
        self.cuda.cuStreamSynchronize(self.handle)


def fake_pycuda(cuda) -> dict[str, ModuleType]:
    """pycuda with a context of its own, which is current until it is popped."""

    def make_context():
        cuda.push(0xBEEF)
        return SimpleNamespace(pop=cuda.pop, synchronize=cuda.drain_all)

    def to_gpu(values):
        array = GpuArray(cuda, values.shape, values.dtype)
        values = np.ascontiguousarray(values)
        ctypes.memmove(array.address, values.ctypes.data, values.nbytes)
        return array

    root, driver, arrays = map(ModuleType, ("pycuda", "pycuda.driver", "pycuda.gpuarray"))
    driver.init = lambda: None
    driver.Device = lambda number: SimpleNamespace(make_context=make_context)
    driver.Stream = lambda: Stream(cuda)
    arrays.to_gpu = to_gpu
    arrays.empty = lambda shape, dtype: GpuArray(cuda, shape, dtype)
    root.driver, root.gpuarray = driver, arrays
    return {"pycuda": root, "pycuda.driver": driver, "pycuda.gpuarray": arrays}


def test_pycuda(world, monkeypatch, capsys):
    for name, module in fake_pycuda(world.cuda).items():
        monkeypatch.setitem(sys.modules, name, module)
    found = load("run_pycuda.py").main(str(world.artifact()))
    noise = np.random.default_rng(0).normal(size=(4, *IMAGE)).astype(np.float32)
    assert np.allclose(found, answer(noise), rtol=1e-5, atol=1e-6)
    assert world.cuda.count("cuMemcpyAsync") == 0, "nothing was copied"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("run_*.py")), ids=lambda path: path.name)
def test_examples_use_what_engine_has(path):
    """PyTorch's cannot run without a GPU; its calls of Engine can be checked."""
    tree = ast.parse(path.read_text("utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "engine"
    }
    made = {"inputs", "outputs", "batch", "max_batch"}  # by __init__
    assert used and all(name in made or hasattr(Engine, name) for name in used)
