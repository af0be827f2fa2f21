"""INT8 or FP16: the rule for two batches, the timing behind it, and what fails in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jmp_deploy.backends.base import Times
from jmp_deploy.bench import twin
from jmp_deploy.bench.measure import Settings
from jmp_deploy.core.errors import EngineError, GpuMemoryError
from jmp_deploy.core.manifest import EngineCheck, EngineFacts, Quantization, SpeedAt
from jmp_deploy.engine.fit import EngineFile
from jmp_deploy.engine.stage import Clock
from tests.fakes.artifacts import make_artifact


def row(batch: int, ratio: float, ours: str = "int8") -> SpeedAt:
    return SpeedAt(batch, {ours: 1 / ratio, "fp16": 1.0}, ratio, (ratio, ratio), True)


@pytest.mark.parametrize(
    ("opt", "one", "force", "wins", "why"),
    [
        (1.06, 1.06, False, "int8", "with CUDA graphs"),
        (1.06, 0.96, False, "int8", ""),  # 4 % at batch 1 are within what clocks do
        (1.06, 0.94, False, "fp16", "slower at batch 1"),
        (1.04, 1.30, False, "fp16", "less than 1.05x at batch 8"),
        (0.50, 0.50, False, "fp16", "less than 1.05x at batch 8 and slower at batch 1"),
        (0.50, 0.50, True, "int8", "kept by --force-int8"),
        (1.06, None, False, "int8", ""),
        (1.04, None, False, "fp16", ""),
    ],
)
def test_int8_has_to_gain_at_the_opt_batch_and_not_to_lose_at_batch_1(opt, one, force, wins, why):
    rows = [row(8, opt), *([row(1, one)] if one else [])]
    speed = twin.decide("int8", rows, "", force=force)
    assert speed.engine == wins and why in speed.why and f"batch 8: INT8 {1 / opt:.3f}" in speed.why
    eight = twin.decide("fp8", [row(8, 1.0, "fp8")], "", force=True)
    assert eight.engine == "fp8" and "kept by --force-fp8" in eight.why and "INT8" not in eight.why
    assert speed.ratio == opt and speed.ms == rows[0].ms and speed.at == tuple(rows)


class FakeTimed:
    """An engine whose inferences take `ms[batch]`, on a GPU of some memory, with a diary."""

    def __init__(self, world: World, engine: EngineFile) -> None:
        self.world, self.name = world, engine.facts.precision
        self.has_graphs_read = False
        world.opened.add(self.name)
        world.diary.append(f"+{self.name}")
        assert len(world.opened) <= world.room or world.complains

    @property
    def has_graphs(self) -> bool:
        if len(self.world.opened) > self.world.room:
            raise GpuMemoryError("out of memory")
        self.has_graphs_read = True
        return self.world.graphs

    def free_memory(self) -> int:
        return 100 - (self.world.takes if self.has_graphs_read else 0)

    def prepare(self, batch: int, cuda_graph: bool):
        self.world.asked.add((self.name, batch, cuda_graph))
        ms = self.world.ms[self.name][batch]

        def infer() -> Times:
            if self.world.fault:
                raise self.world.fault
            self.world.diary.append(self.name[0])
            return Times(0.0, 2 * ms, compute=ms)

        return infer

    def close(self) -> None:
        self.world.opened.discard(self.name)


class World:
    """room: engines that fit; takes: of a hundred units of memory, one engine; complains: an
    engine too many is an error of CUDA, not foreseen."""

    def __init__(self, room=2, takes=10, graphs=True, fault=None, complains=False) -> None:
        self.room, self.takes, self.graphs, self.fault = room, takes, graphs, fault
        self.complains = complains
        self.opened: set[str] = set()
        self.diary: list[str] = []
        self.asked: set[tuple[str, int, bool]] = set()
        self.ms = {"int8": {4: 2.0, 1: 1.0}, "fp16": {4: 3.0, 1: 1.0}}

    def open(self, engine: EngineFile) -> FakeTimed:
        return FakeTimed(self, engine)


def engines(tmp_path, off=()) -> dict[str, EngineFile]:
    found = {}
    for size, name in enumerate(("int8", "fp16"), 1):
        checks = (EngineCheck(name not in off, "a GPU", "2026-11-25"),)
        facts = EngineFacts("rtx", "1.7", ("sm_86",), name, bytes=size, checks=checks)
        found[name] = EngineFile(tmp_path / name, "rtx", facts)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    settings = Settings(warm_iterations=2, iterations=4, rounds=4, visit_seconds=0.0, seconds=1)
    monkeypatch.setattr(twin, "SETTINGS", settings)


@pytest.mark.parametrize(
    "world",
    [World(), World(graphs=False), World(room=1, takes=40), World(room=1, complains=True)],
    ids=["together", "without graphs", "no room", "no room, unforeseen"],
)
def test_both_batches_are_timed_in_turns_however_many_engines_fit(world, tmp_path):
    rows = twin.time_engines(engines(tmp_path), make_artifact(tmp_path), opener=world.open)
    assert [(r.batch, r.ms, r.cuda_graph) for r in rows] == [
        (4, {"int8": 2.0, "fp16": 3.0}, world.graphs),
        (1, {"int8": 1.0, "fp16": 1.0}, world.graphs),
    ]
    assert [r.ratio for r in rows] == pytest.approx([1.5, 1.0])
    assert all(np.isfinite(r.ci95).all() for r in rows)
    assert world.asked == {(n, b, world.graphs) for n in ("int8", "fp16") for b in (4, 1)}
    visits = [entry for entry in world.diary if entry.startswith("+")]
    if world.room == 2:
        assert visits == ["+fp16", "+int8"]  # the larger first: then it is known what is left
    else:
        assert visits[-8:] == [f"+{n}" for n in 2 * ("int8", "fp16", "fp16", "int8")]
    assert not world.opened


def test_batch_1_is_left_out_where_the_profile_lacks_it(tmp_path):
    world = World()
    artifact = make_artifact(tmp_path, batch=(4, 4, 8))
    (only,) = twin.time_engines(engines(tmp_path), artifact, opener=world.open)
    assert only.batch == 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (EngineError("built for sm_86"), "built for sm_86"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (RuntimeError("cudaErrorIllegalAddress"), "RuntimeError: cudaErrorIllegalAddress"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
)
def test_whatever_fails_in_timing_leaves_int8_with_the_reason(tmp_path, monkeypatch, fault, reason):
    world, real = World(fault=fault), twin.time_engines
    monkeypatch.setattr(twin, "gpus", lambda: ("a GPU",))
    monkeypatch.setattr(twin, "time_engines", lambda *a: real(*a, opener=world.open))
    artifact = make_artifact(tmp_path, precision="int8", int8=Quantization("max", {}, {}))
    speed = twin.settle(engines(tmp_path), artifact, Clock())
    assert speed.engine == "int8" and speed.ratio is None and speed.at == ()
    assert speed.why == f"speed unknown: the engines cannot be timed on this GPU: {reason}"
    assert not world.opened


@pytest.mark.parametrize(("off", "wins"), [("int8", "fp16"), ("fp16", "int8")])
def test_an_engine_that_is_off_loses_however_fast_it_is(tmp_path, monkeypatch, off, wins):
    monkeypatch.setattr(twin, "time_engines", None)  # nothing to time
    monkeypatch.setattr(twin, "gpus", lambda: ("a GPU",))
    settings = Quantization("max", {}, {}, force=True)
    artifact = make_artifact(tmp_path, precision="int8", int8=settings)
    speed = twin.settle(engines(tmp_path, off={off}), artifact, Clock())
    assert speed.engine == wins and off.upper() in speed.why and "tolerance" in speed.why


def test_without_a_gpu_int8_is_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(twin, "gpus", lambda: ())
    artifact = replace(make_artifact(tmp_path), int8=Quantization("max", {}, {}))
    speed = twin.settle(engines(tmp_path), artifact, Clock())
    assert speed.engine == "int8" and "no GPU" in speed.why
