"""An engine as `bench` runs it, on a CUDA and a TensorRT made of host memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from jmp_deploy import backends
from jmp_deploy.backends.engine import TimedEngine, engine_runner
from jmp_deploy.bench import bench
from jmp_deploy.bench.measure import Settings
from jmp_deploy.core import artifact as manifest
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import EngineError
from jmp_deploy.core.manifest import EngineFacts
from jmp_deploy.engine import api, bound, runtime
from jmp_deploy.engine.cuda import Cuda
from jmp_deploy.engine.fit import EngineFile, locate
from tests.fakes.artifacts import write_artifact
from tests.fakes.cuda import FakeCuda, Status
from tests.fakes.tensorrt import CLASSES, IMAGE, FakeTensorRT, plan


class TimedFakeCuda(FakeCuda):
    """Every piece of work takes 1 ms; events know how much of it lies between them."""

    def cuEventElapsedTime(self, start: int, end: int) -> tuple:
        (stream, first), (same, last) = (self.objects[int(e)][1].mark for e in (start, end))
        assert stream is same and stream.executed >= last, "asked before the work was done"
        return Status.CUDA_SUCCESS, float(last - first)


@pytest.fixture
def world(monkeypatch, tmp_path):
    cuda = TimedFakeCuda()
    trt = FakeTensorRT(cuda)
    monkeypatch.setattr(runtime, "open_cuda", lambda device=None: Cuda(cuda.driver, device))
    monkeypatch.setattr(api, "load", lambda name: trt)
    found = SimpleNamespace(cuda=cuda, trt=trt, folder=tmp_path, several=False)
    yield found
    gc.collect()
    # The fake counts contexts of all engines together: with several, one always goes before others.
    violations = [v for v in cuda.violations if not (found.several and "went before" in v)]
    assert violations == [] and cuda.leaks() == []


def artifact(world, name: str = "a", **engine) -> Artifact:
    folder = world.folder / name
    folder.mkdir()
    (folder / manifest.ENGINE).write_bytes(plan())
    version = world.trt.__version__
    facts = EngineFacts("tensorrt", version, ("sm_86",), "fp16", builder="TensorRT")
    return write_artifact(folder, side=4, engine=replace(facts, **engine))


def timed(world, made: Artifact) -> TimedEngine:
    cuda = Cuda(world.cuda.driver)
    return TimedEngine(locate(made.folder), cuda=cuda)


@pytest.mark.parametrize("graph", [False, True])
def test_copies_and_computation_are_timed_apart(world, graph):
    backend = timed(world, artifact(world))
    infer = backend.prepare(4, graph)
    for _ in range(4):
        times = infer()
    # one copy in, one launch, one copy out, by the events; all of it by the host's clock
    assert (times.h2d, times.compute, times.d2h) == (1.0, 1.0, 1.0)
    assert times.total >= times.enqueue > 0
    assert (world.cuda.launches > 0) is graph
    assert backend.library == f"TensorRT {world.trt.__version__}"
    backend.close()


@pytest.mark.parametrize("graph", [False, True])
def test_nothing_but_the_launch_is_between_the_events_of_the_computation(world, graph):
    backend = timed(world, artifact(world))
    infer = backend.prepare(2, graph)
    world.cuda.calls.clear()
    infer()
    launch = "cuGraphLaunch" if graph else "execute_async_v3"
    assert world.cuda.calls == [
        *("cuEventRecord", "cuMemcpyAsync", "cuEventRecord"),
        *("cuStreamIsCapturing", launch),
        *("cuEventRecord", "cuMemcpyAsync", "cuEventRecord", "cuStreamSynchronize"),
    ]
    backend.close()


@pytest.mark.parametrize("capturable", [False, True])
def test_tensorrt_rtx_is_timed_with_its_final_kernels_and_asked_for_graphs(
    world, monkeypatch, capturable
):
    world.several = True
    trt = FakeTensorRT(world.cuda, "rtx", "1.7.1.116")
    monkeypatch.setattr(api, "load", lambda name: trt)
    monkeypatch.setenv("JMP_DEPLOY_CACHE", str(world.folder / "cache"))
    trt.capturable = capturable
    made = artifact(world, flavour="rtx", version=trt.__version__)
    backend = timed(world, made)
    assert backend.has_graphs is capturable
    assert trt.specialization == "eager"
    assert backend.prepare(2, capturable)().compute == 1.0
    if not capturable:
        with pytest.raises(EngineError, match="batch of 2 cannot be run as a CUDA graph"):
            backend.prepare(2, True)
    backend.close()


def test_what_is_compared_and_validated_is_not_a_provisional_kernel(world, monkeypatch):
    pytest.importorskip("polygraphy")
    trt = FakeTensorRT(world.cuda, "rtx", "1.7.1.116")
    monkeypatch.setattr(api, "load", lambda name: trt)
    monkeypatch.setenv("JMP_DEPLOY_CACHE", str(world.folder / "cache"))
    made = artifact(world, flavour="rtx", version=trt.__version__)
    with engine_runner(locate(made.folder)):
        assert trt.specialization == "eager"


def test_both_ways_and_several_batches_live_side_by_side(world):
    world.several = True
    backend = timed(world, artifact(world))
    infers = [backend.prepare(batch, graph) for batch in (1, 8) for graph in (False, True)]
    for _ in range(3):
        for infer in infers:
            assert infer().compute == 1.0
    backend.close()


def test_what_is_timed_is_the_inference_of_every_image(world, monkeypatch):
    backend = timed(world, artifact(world))
    seen = []
    original = backend._pair

    def spy(batch, tensor):
        seen.append(original(batch, tensor))
        return seen[-1]

    monkeypatch.setattr(backend, "_pair", spy)
    infer = backend.prepare(8, True)
    infer()
    (images, _), (logits, _) = seen
    assert images.shape == (8, *IMAGE) and logits.shape == (8, CLASSES)
    from tests.fakes.tensorrt import answer

    assert np.isfinite(logits).all() and np.allclose(logits, answer(images), rtol=1e-5, atol=1e-5)
    del images, logits
    seen.clear()
    backend.close()


def test_an_engine_of_another_version_is_refused_and_leaves_nothing(world):
    backend = timed(world, artifact(world, version="10.3.0"))
    with pytest.raises(EngineError, match=r"10\.3\.0"):
        backend.prepare(1, False)
    backend.close()


def test_a_plan_of_ours_needs_no_manifest_and_no_warning(world, recwarn):
    path = world.folder / "chain.engine"
    path.write_bytes(plan())
    cuda = Cuda(world.cuda.driver)
    backend = TimedEngine(EngineFile(path, "tensorrt", artifact(world).engine), cuda=cuda)
    assert backend.prepare(2, False)().compute == 1.0
    assert not [w for w in recwarn if "manifest" in str(w.message)]
    backend.close()


def test_bench_of_two_engines(world, monkeypatch):
    world.several = True
    dense, jmp = artifact(world, "dense"), artifact(world, "jmp")
    monkeypatch.setattr(bench, "pick", lambda *_: (backends.get("engine"), ""))
    quick = Settings(warm_iterations=3, iterations=4, rounds=4, visit_seconds=0.0)
    asked = bench.BenchOptions(
        folder=dense.folder, against=jmp.folder, batches=(2,), settings=quick
    )
    result, _ = bench.bench(asked, opener=lambda made, _: timed(world, made), sources=[])
    assert [row["cuda_graph"] for row in result["rows"]] == [False, False, True, True]
    for row in result["rows"]:
        assert row["gpu_ms"]["p50"] == 1.0 and row["gpu_throughput"] == 2000
        assert row["latency_ms"]["p50"] > 0
    for entry in result["ratios"]:
        assert entry["gpu"]["ratio"] == 1 and entry["gpu"]["ci95"] == [1, 1]


def test_engines_that_cannot_be_captured_are_measured_without_graphs(world, monkeypatch):
    def refuse(*_):
        return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)

    world.several = True
    world.cuda.driver.cuStreamBeginCapture = refuse
    folder = artifact(world).folder
    monkeypatch.setattr(bench, "pick", lambda *_: (backends.get("engine"), ""))
    quick = Settings(warm_iterations=3, iterations=4, rounds=4, visit_seconds=0.0)
    options = {"opener": lambda made, _: timed(world, made), "sources": []}
    asked = bench.BenchOptions(folder=folder, batches=(2,), settings=quick)
    result, _ = bench.bench(asked, **options)
    assert [row["cuda_graph"] for row in result["rows"]] == [False]
    assert any("CUDA graphs" in words for words in result["notes"])
    with pytest.raises(EngineError, match="cannot be run as CUDA graphs"):
        bench.bench(replace(asked, cuda_graph="on"), **options)


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), RuntimeError("a CUDA call")])
@pytest.mark.parametrize("at", [0, 3])  # on opening, and while it is timed
def test_errors_of_the_system_and_of_cuda_end_in_an_engine_error(world, monkeypatch, fault, at):
    def fail(*_, **__):
        raise fault

    backend = timed(world, artifact(world))
    if at == 0:
        monkeypatch.setattr(runtime.Engine, "_start", fail)
    with pytest.raises(EngineError, match=r"Input/output error|a CUDA call"):
        infer = backend.prepare(4, True)
        for _ in range(at):
            infer()
        monkeypatch.setattr(bound.BoundCall, "__call__", fail)
        infer()
    backend.close()
