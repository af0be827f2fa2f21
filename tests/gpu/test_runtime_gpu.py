"""`Engine` on a real GPU.

The first part needs no TensorRT: an execution context that copies the first values of each image
stands in for it, so that streams, graphs, pinned memory, contexts and arrays of other libraries
meet the real driver. The second runs a real engine where a TensorRT is installed.
"""

from __future__ import annotations

import gc
import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jmp_deploy.core.errors import EngineError, GpuMemoryError
from jmp_deploy.engine import api
from jmp_deploy.engine.cuda import open_cuda
from jmp_deploy.engine.runtime import Engine
from tests.fakes.tensorrt import FakeTensorRT, NewContext, plan

pytestmark = pytest.mark.gpu
pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

IMAGE, CLASSES = (3, 32, 32), 7


class CopyContext(NewContext):
    """Copies the first CLASSES values of each image, on the stream that it is given."""

    def _execute(self, stream: int) -> bool:
        from cuda.bindings import runtime

        assert self.shape is not None and self.scratch is not None
        row, width = 4 * int(np.prod(self.shape[1:])), 4 * CLASSES
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        target, source = self.addresses["logits"], self.addresses["images"]
        handle = runtime.cudaStream_t(stream)
        (status,) = runtime.cudaMemcpy2DAsync(
            target, width, source, row, width, self.shape[0], kind, handle
        )
        return int(status) == 0


class RealCuda:
    """What `fake_tensorrt` asks of its CUDA, answered for a real one."""

    def __init__(self) -> None:
        self.alive: Counter[str] = Counter()
        self.violations: list[str] = []
        self.lock = threading.RLock()
        self.memory, self.used = 1 << 62, 0

    def fails(self, name: str) -> bool:
        return False

    def inside(self, *arguments: object) -> bool:
        return True


@pytest.fixture
def copying(monkeypatch, tmp_path):
    """Opens an engine that copies; checks that its objects are gone at the end."""
    real = RealCuda()
    trt = FakeTensorRT(real)  # type: ignore[arg-type]
    trt.context_type = CopyContext
    monkeypatch.setattr(api, "load", lambda flavour: trt)

    def make(batch=(1, 4, 8), scratch=1 << 20, **options) -> Engine:
        path = tmp_path / "copy.plan"
        path.write_bytes(plan(batch=batch, image=IMAGE, classes=CLASSES, scratch=scratch))
        with pytest.warns(RuntimeWarning, match="without a manifest"):
            return Engine(path, use_manifest=False, flavour="tensorrt", **options)

    yield make
    gc.collect()
    assert not +real.alive and real.violations == []


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *IMAGE)).astype(np.float32)


def expected(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)[:, :CLASSES]


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("batch", [(1, 4, 8), (4, 4, 8)])
def test_host_arrays_of_any_size(copying, cuda_graph, batch):
    with copying(batch, cuda_graph=cuda_graph) as engine:
        for seed, count in enumerate((1, 3, 8, 9, 21, 3, 1, 8)):
            result = engine.infer(images(count, seed))["logits"]
            assert np.array_equal(result, expected(images(count, seed)))


def test_graphs_are_really_captured(copying, recwarn):
    with copying() as engine:
        engine.infer(images(3))
        assert engine._lanes[0]._plans[3].graphs
        assert np.array_equal(engine.infer(images(3, 1))["logits"], expected(images(3, 1)))
    assert not [one for one in recwarn if "no CUDA graphs" in str(one.message)]


def test_device_memory_is_given_back(copying):
    with copying():
        pass  # what CUDA itself takes once
    cuda = open_cuda()
    with cuda.current():
        before = cuda.free_memory()
    for _ in range(3):
        with copying(scratch=1 << 24, contexts=2) as engine:
            engine.infer(images(20))
    with cuda.current():
        assert abs(cuda.free_memory() - before) < 4 << 20


def test_out_of_memory_names_the_batch_that_fits(copying):
    cuda = open_cuda()
    with cuda.current():
        free = cuda.free_memory()
    with pytest.raises(GpuMemoryError, match=r"batch 8 needs .*; batch [4-7] fits"):
        copying(scratch=free // 7)


def test_many_threads(copying):
    with copying(contexts=3) as engine, ThreadPoolExecutor(8) as threads:

        def work(seed: int) -> bool:
            given = images(1 + seed % 11, seed)
            return np.array_equal(engine.infer(given)["logits"], expected(given))

        assert all(threads.map(work, range(200)))


def test_pytorch_tensors_in_place_on_its_stream(copying):
    torch = pytest.importorskip("torch")
    with copying() as engine:
        given = torch.from_numpy(images(13)).cuda()
        found = torch.as_tensor(engine.infer(given)["logits"], device="cuda")
        assert np.array_equal(found.cpu().numpy(), expected(images(13)))
        stream = torch.cuda.Stream()
        out = torch.empty((6, CLASSES), device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for seed in range(4):  # the later ones are a graph
                values = torch.from_numpy(images(6, seed)).cuda(non_blocking=False)
                given = given[:6] if seed else given[:6].clone()
                given.copy_(values)
                engine.infer(given, stream=stream, out={"logits": out})
                assert np.array_equal(out.cpu().numpy(), expected(images(6, seed)))
        with pytest.raises(EngineError, match="not contiguous"):
            engine.infer(torch.zeros((32, 32, 3, 4), device="cuda").permute(3, 2, 0, 1))
        with pytest.raises(EngineError, match="float16, expected float32"):
            engine.infer(given.half())
        del found, given, out


def test_a_bound_call_alone_and_in_pytorch_s_own_graph(copying):
    torch = pytest.importorskip("torch")
    with copying() as engine:
        given, out = (
            torch.zeros((6, *IMAGE), device="cuda"),
            torch.empty((6, CLASSES), device="cuda"),
        )
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with engine.bind(given, {"logits": out}, stream) as call:
            assert call.is_graph
            for seed in range(3):
                with torch.cuda.stream(stream):
                    given.copy_(torch.from_numpy(images(6, seed)))
                call()
                stream.synchronize()
                assert np.array_equal(out.cpu().numpy(), expected(images(6, seed)))
            with pytest.raises(EngineError, match="is being captured"):
                refused = torch.cuda.CUDAGraph()
                with torch.cuda.graph(refused, stream=stream):
                    engine.infer(given, stream=stream, out={"logits": out})
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                call()
            given.copy_(torch.from_numpy(images(6, 9)))
            graph.replay()
            torch.cuda.synchronize()
            assert np.array_equal(out.cpu().numpy(), expected(images(6, 9)))
            del graph, refused


def test_no_context_is_left_current(copying):
    from cuda.bindings import driver

    def run() -> int:
        with copying() as engine:
            engine.infer(images(3))
        return int(driver.cuCtxGetCurrent()[1])

    with ThreadPoolExecutor(1) as threads:  # a thread begins with none
        assert threads.submit(run).result() == 0


def test_cupy_arrays_in_place(copying):
    cupy = pytest.importorskip("cupy")
    with copying() as engine:
        given, out = cupy.asarray(images(5)), cupy.empty((5, CLASSES), cupy.float32)
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        for _ in range(3):
            engine.infer({"images": given}, stream=stream, out={"logits": out})
        stream.synchronize()
        assert np.array_equal(cupy.asnumpy(out), expected(images(5)))
        found = cupy.asarray(engine.infer(given)["logits"])
        assert np.array_equal(cupy.asnumpy(found), expected(images(5)))
        del found


def test_pycuda_context_arrays_and_stream(copying):
    cuda = pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    from pycuda import gpuarray

    cuda.init()
    context = cuda.Device(0).make_context()
    try:
        with copying() as engine:
            given = gpuarray.to_gpu(images(5))
            out = gpuarray.empty((5, CLASSES), np.float32)
            context.synchronize()
            stream = cuda.Stream()
            for _ in range(3):
                engine.infer(given, stream=stream, out={"logits": out})
            stream.synchronize()
            assert np.array_equal(out.get(), expected(images(5)))
            with ThreadPoolExecutor(1) as threads:  # where the context is not current
                result = threads.submit(engine.infer, images(9)).result()["logits"]
            assert np.array_equal(result, expected(images(9)))
            del given, out, stream
    finally:
        context.pop()


# --- A real engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """JMP_DEPLOY_ARTIFACT, or a small model that is built here."""
    if given := os.environ.get("JMP_DEPLOY_ARTIFACT"):
        return Path(given)
    if not any(api.installed(flavour) for flavour in api.FLAVOURS):
        pytest.skip("neither TensorRT nor TensorRT-RTX is installed")
    pytest.importorskip("timm")
    from jmp_deploy.cli.main import main

    folder = tmp_path_factory.mktemp("engine") / "deit_t"
    assert main(["build", "deit_t", "--weights", "random", "-o", str(folder)]) == 0
    return folder


def reference(artifact: Path) -> SimpleNamespace:
    with np.load(artifact / "reference.npz", allow_pickle=False) as archive:
        return SimpleNamespace(images=archive["images"], output=archive["output"])


def smallest_cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_real_engine_answers_what_pytorch_did(artifact, cuda_graph):
    stored = reference(artifact)
    precision = json.loads((artifact / "manifest.json").read_text())["precision"]
    limit = 0.99999 if precision == "fp32" else 0.999
    with Engine(artifact, cuda_graph=cuda_graph) as engine:
        for count in (1, 4, engine.max_batch + 3, 4, 1):
            rows = np.arange(count) % len(stored.images)
            (result,) = engine.infer(stored.images[rows]).values()
            assert smallest_cosine(result, stored.output[rows]) >= limit


def test_a_real_engine_in_many_threads(artifact):
    stored = reference(artifact)
    with Engine(artifact, contexts=2) as engine, ThreadPoolExecutor(4) as threads:
        (alone,) = engine.infer(stored.images).values()

        def work(_: int) -> float:
            (result,) = engine.infer(stored.images).values()
            return smallest_cosine(result, alone)

        assert min(threads.map(work, range(40))) > 0.99999
