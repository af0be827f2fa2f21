"""The check of an engine: on a CUDA and a TensorRT made of host memory, with faults planted."""

# ruff: noqa: F811 (fixtures of tests.fakes.engine)
from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from jmp_deploy.backends.base import infer
from jmp_deploy.backends.engine import engine_runner
from jmp_deploy.compare import check
from jmp_deploy.compare.compare import run_and_pair
from jmp_deploy.core import artifact as files
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import ArtifactError, EngineError, GpuMemoryError, engine_errors
from jmp_deploy.engine import worker
from jmp_deploy.engine.cuda import Cuda
from jmp_deploy.engine.fit import EngineFile, locate
from jmp_deploy.engine.runtime import Engine
from tests.fakes.engine import HERE, images, make_world, world  # noqa: F401
from tests.fakes.tensorrt import answer, plan


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(check, "gpus", lambda: (HERE,))


def checked(world, content: bytes | None = None, **engine):
    folder = world.artifact(content, **engine)
    return check.check_engine(locate(folder), Artifact.read(folder))


def test_an_engine_that_answers_as_pytorch_did(world):
    found = checked(world)
    assert found.ok and found.gpu == HERE.name and found.problems == ()
    (pair,) = found.pairs
    assert (pair["a"], pair["b"], pair["output"]) == ("torch", "engine", "logits")
    assert pair["precision"] == "fp16" and pair["cosine"] > 0.999999
    given = images(3, seed=7)
    np.testing.assert_array_equal(world.trt.seen, given)  # the reference, all of it, unpadded


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"off": True}, "cosine of the median image"),
        ({"nan": True}, "logits of engine holds 5 NaN"),
    ],
)
def test_outputs_that_are_off(world, fault, problem):
    found = checked(world, plan(**fault))
    assert not found.ok and any(problem in words for words in found.problems)
    assert found.problems == tuple(found.pairs[0]["problems"])


def test_limits_are_those_of_the_engine_s_precision(world):
    folder = world.artifact()
    with np.load(folder / files.REFERENCE) as archive:
        stored = dict(archive)
    true = stored["output"]
    aside = np.zeros_like(true)
    aside[:, 0], aside[:, 1] = true[:, 1], -true[:, 0]  # at right angles: the cosine is 0.995
    norms = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (true, aside)]
    stored["output"] = true + 0.1 * aside * norms[0] / norms[1]
    np.savez(folder / files.REFERENCE, **stored)
    made = Artifact.read(folder).write()
    file = locate(folder)
    cosine = {}
    for precision in ("fp32", "fp16", "int8"):
        facts = replace(file.facts, precision=precision)
        found = check.check_engine(replace(file, facts=facts), made)
        cosine[precision] = found.ok
    assert cosine == {"fp32": False, "fp16": False, "int8": True}, found.pairs


@pytest.mark.filterwarnings("ignore:no CUDA graphs")
def test_an_engine_that_opens_and_fails_is_off_and_one_that_does_not_open_is_not_judged(make_world):
    world = make_world()
    folder = world.artifact()
    file, made = locate(folder), Artifact.read(folder)
    with Engine(file, max_batch=3):
        opened = len(world.cuda.calls)
    for fail_at in range(1000):
        world = make_world()
        world.cuda.fail_at = fail_at
        try:
            found = check.check_engine(file, made)
        except EngineError:
            assert fail_at < opened or world.cuda.failed == "cudaMalloc"
        else:
            if world.cuda.failed is None:
                break
            # a graph that cannot be captured is no wrong answer
            assert found.ok or found.problems[0].startswith("it does not run: ")
    assert fail_at > opened


def test_it_takes_no_more_memory_than_its_images(make_world):
    world = make_world(memory=3 * (4 * 53 + 1000) + 100)
    assert checked(world).ok  # the whole profile takes 8 images
    world = make_world(memory=1000)
    with pytest.raises(GpuMemoryError):
        checked(world)


def test_an_engine_for_another_gpu_is_not_judged(world):
    with pytest.raises(EngineError, match=r"expected sm_87, found sm_86"):
        checked(world, targets=("sm_87",))


def test_a_reference_that_was_altered_judges_nothing(world):
    folder = world.artifact()
    file, made = locate(folder), Artifact.read(folder)
    (folder / files.REFERENCE).write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"reference\.npz"):
        check.check_engine(file, made)


# --- What is recorded ----------------------------------------------------------------------------


def test_a_record_changes_nothing_else_and_blesses_no_altered_file(world):
    folder = world.artifact(checks=())
    made = Artifact.read(folder)
    (folder / files.REFERENCE).write_bytes(b"altered after the build")
    passed = made.record(files.EngineCheck(True, "GPU 1", "d"))
    failed = made.record(files.EngineCheck(False, "GPU 2", "d", ("cosine",)))
    again = made.record(files.EngineCheck(False, "GPU 1", "e", ("NaN",)))
    assert passed.engine.check_on("GPU 1").ok and not failed.engine.check_on("GPU 2").ok
    assert [one.gpu for one in again.engine.checks] == ["GPU 2", "GPU 1"] and again.engine.is_off
    assert Artifact.read(folder) == again
    assert replace(again, engine=made.engine) == made
    with pytest.raises(ArtifactError, match=r"reference\.npz"):
        again.verify()


def test_an_engine_that_was_built_anew_meanwhile_keeps_its_own_record(world):
    folder = world.artifact(checks=())
    before = Artifact.read(folder)
    (folder / files.ENGINE).write_bytes(plan(scratch=500))
    after = before.write()
    with pytest.raises(ArtifactError, match="built anew meanwhile"):
        before.record(files.EngineCheck(True, "GPU 1", "d"))
    assert Artifact.read(folder) == after


# --- What runs an engine -------------------------------------------------------------------------


def test_no_way_to_open_a_plan_lets_it_run_code_of_the_host(world, monkeypatch):
    folder = world.artifact()
    for opened in (Engine(folder), engine_runner(folder)):
        with opened:
            pass
    monkeypatch.setattr(worker.api, "load", lambda flavour: world.trt)
    request = {"flavour": "tensorrt", "plugin": None, "engine": str(folder / files.ENGINE)}
    with Cuda(world.cuda.driver).current():  # TensorRT's own, in a process that does nothing else
        assert worker.ACTIONS["inspect"](request)["layers"] == ["a", "b"]
        (folder / files.ENGINE).write_bytes(b"no plan")
        words = "cannot be opened here: Serialization assertion failed"
        with pytest.raises(EngineError, match=words):
            worker.ACTIONS["inspect"](request)
        gc.collect()
    # the fake's runtime counts a violation where it is allowed: see `world`


def test_engines_run_without_polygraphy_s_own_cuda(world, monkeypatch):
    cuda = pytest.importorskip("polygraphy.cuda")

    def refuse(*_, **__):
        raise AssertionError("it finds no CUDA runtime in the wheels of CUDA 13")

    for name in ("Cuda", "DeviceArray", "DeviceView", "Stream"):
        monkeypatch.setattr(getattr(cuda, name), "__init__", refuse)
    given = images(5)
    runners = [engine_runner(world.artifact()), engine_runner(world.artifact())]
    for name, runner in zip("ab", runners, strict=True):
        runner.name = name
    pairs, _, by_name = run_and_pair(runners, given, (1, 4, 8), {"a": "fp16", "b": "fp16"})
    assert pairs[0].ok
    np.testing.assert_allclose(by_name["a"]["logits"], answer(given), rtol=1e-5)


class Broken(Exception):
    """As of Polygraphy."""


Broken.__module__ = "polygraphy.exception.exception"


@pytest.mark.parametrize(
    "fault", [OSError(5, "Input/output error"), RuntimeError("a CUDA call"), Broken("a runner")]
)
@pytest.mark.parametrize("where", ["opening", "running"])
def test_errors_of_others_become_ours(world, monkeypatch, fault, where):
    def fail(*_, **__):
        raise fault

    folder = world.artifact()
    made = Artifact.read(folder)
    runner = engine_runner(EngineFile(folder / files.ENGINE, "tensorrt", made.engine))
    monkeypatch.setattr(Engine, "infer" if where == "running" else "_start", fail)
    with pytest.raises(EngineError, match=r"Input/output error|a CUDA call|a runner"):
        run_and_pair([runner, runner], images(2), (1, 4, 8), {})
    if where == "running":
        with runner, pytest.raises(EngineError):
            infer(runner, images(2), (1, 4, 8))
        assert not check.check_engine(locate(folder), made).ok
    else:
        with pytest.raises(EngineError):
            check.check_engine(locate(folder), made)


@pytest.mark.parametrize("fault", [TypeError("a bug"), KeyboardInterrupt(), ArtifactError("ours")])
def test_bugs_and_errors_of_ours_stay_what_they_are(fault):
    with pytest.raises(type(fault)), engine_errors("x"):
        raise fault
