"""bench: turns, statistics and what it says, on fake runners and a fake clock."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jmp_deploy import backends as registry
from jmp_deploy.backends.base import Times
from jmp_deploy.bench import bench, measure
from jmp_deploy.bench.measure import Participant, Series, Settings
from jmp_deploy.cli import bench as command
from jmp_deploy.cli.main import main
from jmp_deploy.core.artifact import Artifact
from jmp_deploy.core.errors import ArtifactError, EngineError
from tests.fakes.bench import QUICK, FakeBackend, FakeSource, artifact


class Machine:
    """A clock that only inferences move, and a diary of who ran."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.diary = 0.0, drift, []

    def clock(self) -> float:
        return self.now

    def runner(self, name: str, seconds):
        """`seconds`: a number, or an iterator of them."""
        left = itertools.repeat(seconds) if isinstance(seconds, (int, float)) else seconds

        def infer() -> Times:
            start = self.now
            took = next(left) * (1 + self.drift * len(self.diary))
            self.now += took
            self.diary.append(name)
            return Times(start=1000 * start, total=1000 * took)

        return Participant(name, "onnxruntime", 1, infer)


def flat(series: Series) -> np.ndarray:
    values = measure.by_round(series, measure.total)
    assert values is not None
    return values


# --- turns --------------------------------------------------------------------------------------


def test_two_participants_take_turns_a_b_b_a():
    machine = Machine()
    runners = [machine.runner("A", 1.0), machine.runner("B", 1.0)]
    settings = Settings(warm_iterations=3, iterations=8, rounds=8)
    series, complete = measure.measure(runners, settings, clock=machine.clock)
    turns = [name for name, _ in itertools.groupby(machine.diary[6:])]  # 3 warm-ups each
    assert complete and machine.diary[:6] == ["A"] * 3 + ["B"] * 3
    assert "".join(machine.diary[6:]) == "ABBAABBAABBAABBA" and len(turns) == 9
    assert [len(item.rounds) for item in series] == [8, 8]


def test_drift_of_the_machine_does_not_reach_the_ratio():
    machine = Machine(drift=0.004)  # slower with every inference: by half at the end
    runners = [machine.runner("A", 0.02), machine.runner("B", 0.02)]
    settings = Settings(warm_iterations=3, iterations=40, warm_seconds=0.1)
    (a, b), _ = measure.measure(runners, settings, clock=machine.clock)
    assert flat(a).max() > 1.3 * flat(a).min()
    assert measure.ratio(flat(a), flat(b))["ratio"] == pytest.approx(1.0, abs=0.01)


def test_warm_up_goes_on_until_times_are_stable():
    machine = Machine()
    cooling = itertools.chain([0.1 * 0.9**k for k in range(20)], itertools.repeat(0.01))
    settings = Settings(warm_iterations=5, iterations=10, rounds=2)
    (item,), _ = measure.measure([machine.runner("A", cooling)], settings, clock=machine.clock)
    assert item.stable and 20 < item.warm_iterations < 40
    assert flat(item).max() == pytest.approx(10)  # ms: nothing of the warm-up is in it


def test_times_that_never_settle_are_said_to_be_unstable():
    machine = Machine()
    ever_slower = (0.1 * 1.05**k for k in itertools.count())
    settings = Settings(warm_iterations=5, warm_seconds=3.0, iterations=4, rounds=2)
    (item,), _ = measure.measure([machine.runner("A", ever_slower)], settings, clock=machine.clock)
    assert not item.stable


def test_a_slow_model_is_measured_in_the_time_given():
    machine = Machine()
    runners = [machine.runner("A", 10.0), machine.runner("B", 5.0)]
    series, complete = measure.measure(runners, Settings(), clock=machine.clock)
    assert complete and [flat(item).shape for item in series] == [(4, 1), (4, 1)]
    assert all(item.warm_iterations == 3 for item in series)


def test_a_fast_model_gets_more_inferences_than_asked_for_and_settles_at_each_turn():
    machine = Machine()
    settings = Settings(warm_iterations=10, iterations=40, rounds=10, visit_seconds=0.05)
    (item,), _ = measure.measure([machine.runner("A", 0.001)], settings, clock=machine.clock)
    assert flat(item).shape == (10, 50)
    assert len(machine.diary) == item.warm_iterations + 10 * (1 + 50)


def interrupted_after(count: int, machine: Machine) -> list[Participant]:
    def infer() -> Times:
        if len(machine.diary) == count:
            raise KeyboardInterrupt
        return machine.runner("A", 1.0).infer()

    return [Participant("A", "onnxruntime", 1, infer), machine.runner("B", 1.0)]


def test_interrupt_keeps_whole_rounds_alone():
    machine = Machine()
    settings = Settings(warm_iterations=3, iterations=10, rounds=10, seconds=1000)
    # rounds of two; the interrupt comes in the fourth, after B's turn and before A's
    runners = interrupted_after(6 + 3 * 2 + 1, machine)
    series, complete = measure.measure(runners, settings, clock=machine.clock)
    assert not complete and [len(item.rounds) for item in series] == [3, 3]


@pytest.mark.parametrize("count", [0, 2, 6, 9])  # warming up, in the first round, in the second
def test_interrupt_before_two_rounds_gives_nothing(count):
    machine = Machine()
    settings = Settings(warm_iterations=3, iterations=10, rounds=10, seconds=1000)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(interrupted_after(count, machine), settings, clock=machine.clock)


# --- figures ------------------------------------------------------------------------------------


def test_percentiles_by_hand():
    figures = measure.latency(np.arange(1.0, 12.0).reshape(1, 11))  # 1..11 ms
    assert figures["p50"] == 6 and figures["p90"] == 10 and figures["mean"] == 6
    assert figures["p99"] == pytest.approx(10.9)  # 9.9 steps from the first of ten
    assert figures["std"] == pytest.approx(10**0.5)
    assert (figures["min"], figures["max"]) == (1, 11)
    assert measure.throughput(8, 4.0) == 2000


def test_ratio_is_paired_by_round():
    noise = np.array([[1.0], [3.0], [0.5], [9.0], [2.0]])  # a machine that jumps by rounds
    found = measure.ratio(2 * noise, noise)
    assert found["ratio"] == 2 and found["ci95"] == [2, 2]
    assert (found["round_min"], found["round_max"], found["rounds"]) == (2, 2, 5)


def test_interval_by_hand():
    # logarithms of the rounds' ratios 1 and 4: mean log 2, deviation log 4 / sqrt 2, t of one
    # degree of freedom tan(0.475 pi)
    found = measure.ratio(np.array([[1.0], [4.0]]), np.array([[1.0], [1.0]]))
    half = np.tan(0.475 * np.pi) * np.log(2)
    assert found["ratio"] == pytest.approx(2)
    assert found["ci95"] == pytest.approx([2 * np.exp(-half), 2 * np.exp(half)])


@pytest.mark.parametrize("rounds", [4, 10, 20])
@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_the_interval_covers_the_ratio_as_often_as_it_says(rounds, drift):
    """A simulated machine: noise of single inferences (3 %), of a turn (0.4 %), of a round that
    both share (2 %), and a drift over the whole run that A B B A meets at different times."""
    random, truth, runs, visits = np.random.default_rng(1), 1.5, 1500, 9
    first = 2 * np.arange(rounds) + np.arange(rounds) % 2
    second = 2 * np.arange(rounds) + 1 - np.arange(rounds) % 2
    hits = 0
    for _ in range(runs):
        level = drift * random.choice([-1, 1]) * np.arange(2 * rounds) / (2 * rounds - 1)
        common = random.normal(0, 0.02, rounds)

        def turn(when, ms, level=level, common=common):
            each = level[when] + common + random.normal(0, 0.004, rounds)
            return ms * np.exp(each[:, None] + random.normal(0, 0.03, (rounds, visits)))

        low, high = measure.ratio(turn(first, truth), turn(second, 1.0))["ci95"]
        hits += low <= truth <= high
    assert 0.93 <= hits / runs <= 0.97


def test_trtexec_times_have_its_keys_and_add_up():
    turns = [
        [Times(start=5.0, total=3.5, enqueue=0.2, h2d=1.0, compute=2.0, d2h=0.25)],
        [Times(start=9.0, total=4.0)],
    ]
    gpu, cpu = measure.trtexec_times(turns)
    assert gpu == {
        "startEnqMs": 0.0,
        "endEnqMs": 0.2,
        "startH2dMs": 0.0,
        "endH2dMs": 1.0,
        "startComputeMs": 1.0,
        "endComputeMs": 3.0,
        "startD2hMs": 3.0,
        "endD2hMs": 3.25,
        "h2dMs": 1.0,
        "computeMs": 2.0,
        "d2hMs": 0.25,
        "latencyMs": 3.25,
    }
    assert cpu["startComputeMs"] == 4.0 and cpu["computeMs"] == cpu["latencyMs"] == 4.0


# --- the whole, with fake backends ---------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    return artifact(tmp_path / "dense"), artifact(tmp_path / "jmp", macs=2.5)


def run(pair, backends, *, sources=(), **options):
    left = iter(backends)
    asked = bench.BenchOptions(folder=pair[0], against=pair[1], settings=QUICK, **options)
    return bench.bench(asked, opener=lambda *_: next(left), sources=list(sources))


def test_a_planted_slow_artifact_is_slower_by_what_was_planted(pair):
    backends = [FakeBackend(6.0), FakeBackend(4.0)]
    result, _ = run(pair, backends, batches=(1, 8), threads=3)
    rows = {(row["artifact"], row["batch"]): row for row in result["rows"]}
    assert len(rows) == 4 and result["complete"]
    assert rows[str(pair[0]), 8]["throughput"] == pytest.approx(8000 / 6)
    assert rows[str(pair[1]), 8]["latency_ms"]["p50"] == 4.0
    assert rows[str(pair[1]), 8]["gpu_ms"] is None
    for entry in result["ratios"]:
        assert entry["ratio"] == pytest.approx(1.5) and entry["ci95"] == pytest.approx([1.5, 1.5])
        assert (entry["first"], entry["second"]) == (str(pair[0]), str(pair[1]))
        assert entry["promised_by_flops"] == pytest.approx(1.6)
    assert [entry["batch"] for entry in result["ratios"]] == [1, 8]
    assert "3 threads" in result["device"] and "Fake 1.0" in result["device"]
    assert any("CPU" in words for words in result["notes"])
    assert all(backend.closed for backend in backends)


def test_gpu_time_and_end_to_end_time_are_told_apart_with_and_without_graph(pair, monkeypatch):
    engine = registry.get("engine")
    monkeypatch.setattr(bench, "pick", lambda *_: (engine, ""))
    backends = [FakeBackend(9.0, on_gpu=True), FakeBackend(5.0, on_gpu=True)]
    result, everything = run(pair, backends, batches=(8,))
    ways = [(Path(row["artifact"]).name, row["cuda_graph"]) for row in result["rows"]]
    assert ways == [("dense", False), ("jmp", False), ("dense", True), ("jmp", True)]
    assert [row["latency_ms"]["p50"] for row in result["rows"]] == [9, 5, 8, 4]
    assert [row["gpu_ms"]["p50"] for row in result["rows"]] == [4.5, 2.5, 4, 2]
    assert result["rows"][3]["gpu_throughput"] == pytest.approx(4000)
    assert [entry["ratio"] for entry in result["ratios"]] == [9 / 5, 2]
    assert [entry["gpu"]["ratio"] for entry in result["ratios"]] == [4.5 / 2.5, 2]
    assert not any("CPU" in words for words in result["notes"])
    assert len(everything) == 4
    result, _ = run(pair, [FakeBackend(9, on_gpu=True), FakeBackend(5, on_gpu=True)],
                    batches=(8,), cuda_graph="off")  # fmt: skip
    assert [row["cuda_graph"] for row in result["rows"]] == [False, False]


def test_enqueue_time_is_told_and_where_it_is_what_bounds(pair, monkeypatch):
    monkeypatch.setattr(bench, "pick", lambda *_: (registry.get("engine"), ""))
    backends = [
        FakeBackend(9.0, on_gpu=True, enqueue=0.25),
        FakeBackend(5.0, on_gpu=True, enqueue=2.25),
    ]
    result, _ = run(pair, backends, batches=(8,))
    assert [row["enqueue_ms"]["p50"] for row in result["rows"]] == [0.25, 2.25] * 2
    # computation takes half of the time, and a graph 1 ms less: 4.5, 2.5, 4, 2
    assert [row["enqueue_bound"] for row in result["rows"]] == [False, False, False, True]
    (words,) = (text for text in result["warnings"] if "bound by the host" in text)
    assert "batch 8 (CUDA graph)" in words and "2.250 ms" in words and "2.000 ms" in words
    assert result["settings"]["throughput"].startswith("batch / median latency")
    result, _ = run(pair, [FakeBackend(9.0), FakeBackend(5.0)], batches=(8,))  # on a CPU
    assert {row["enqueue_bound"] for row in result["rows"]} == {None}


def test_energy_per_image_is_power_by_time(pair):
    source = FakeSource(power_w=10.0)
    backends = [FakeBackend(6.0), FakeBackend(4.0)]
    result, _ = run(pair, backends, batches=(8,), sources=[source], energy_seconds=0.01)
    # power is read at the ends alone by a source that is not live: none inside the window
    assert [row["mj_per_image"] for row in result["rows"]] == [None, None]
    source.live = True
    monitored, _ = run(
        pair, [FakeBackend(6.0), FakeBackend(4.0)], batches=(8,), sources=[source],
        energy_seconds=0.5,
    )  # fmt: skip
    assert [row["power_w"] for row in monitored["rows"]] == [10.0, 10.0]
    assert [row["mj_per_image"] for row in monitored["rows"]] == [10 * 6 / 8, 10 * 4 / 8]


def test_throttling_and_other_load_are_said(pair):
    source = FakeSource(others=["load average 9.0 on 2 CPUs"], throttled=("power limit",))
    result, _ = run(pair, [FakeBackend(6.0), FakeBackend(4.0)], batches=(1,), sources=[source])
    words = " / ".join(result["warnings"])
    assert "busy" in words and "load average 9.0" in words
    assert "throttled: power limit" in words


def test_artifacts_that_should_not_be_compared_are_told(tmp_path):
    pair = artifact(tmp_path / "a"), artifact(tmp_path / "b", precision="fp32")
    result, _ = run(pair, [FakeBackend(6.0), FakeBackend(4.0)], batches=(1,))
    assert "the artifacts differ in precision: fp16 and fp32" in result["warnings"]


def test_interrupt_in_the_second_batch_leaves_the_first(pair):
    backends = [FakeBackend(6.0), FakeBackend(4.0, stop_at=8)]
    result, everything = run(pair, backends, batches=(1, 8, 32))
    assert not result["complete"] and len(everything) == 2
    assert [row["batch"] for row in result["rows"]] == [1, 1]
    assert [entry["batch"] for entry in result["ratios"]] == [1]
    assert all(backend.closed for backend in backends)


def test_interrupt_while_power_is_read_keeps_the_times(pair):
    backends = [FakeBackend(6.0), FakeBackend(4.0)]
    calls = itertools.count()

    def interrupt_in_power(words, share):
        if words.startswith("power of") and next(calls) == 1:
            raise KeyboardInterrupt

    left = iter(backends)
    asked = bench.BenchOptions(
        folder=pair[0], against=pair[1], settings=QUICK, batches=(1, 8), energy_seconds=0.01
    )
    result, _ = bench.bench(
        asked,
        opener=lambda *_: next(left),
        sources=[FakeSource(power_w=10.0)],
        on_progress=interrupt_in_power,
    )
    assert result["stopped"] == "interrupted" and len(result["rows"]) == 2
    assert result["ratios"][0]["ratio"] == pytest.approx(1.5)


def test_error_at_a_later_batch_keeps_what_was_measured(runnable, tmp_path, monkeypatch, capsys):
    class Full(FakeBackend):
        def prepare(self, batch, cuda_graph):
            if batch == 4:
                raise EngineError("out of GPU memory: batch 4 needs 9 GiB")
            return super().prepare(batch, cuda_graph)

    monkeypatch.setattr(bench, "_open_timed", lambda *_, **__: Full(1.0))
    out = tmp_path / "r.json"
    assert main(["bench", str(runnable[0]), "-b", "1,4", "--json", str(out)]) == 2
    result = json.loads(out.read_text())
    assert not result["complete"] and [row["batch"] for row in result["rows"]] == [1]
    assert "out of GPU memory" in result["stopped"]
    assert "out of GPU memory" in capsys.readouterr().err
    assert main(["bench", str(runnable[0]), "-b", "4"]) == 2  # nothing to keep


def test_batches_are_those_of_both_profiles(tmp_path):
    wide, narrow = (
        artifact(tmp_path / "w", batch=(1, 8, 64)),
        artifact(tmp_path / "n", batch=(4, 8, 16)),
    )
    both = [Artifact.read(folder) for folder in (wide, narrow)]
    assert bench.choose_batches(both[:1], ()) == (1, 8, 32)
    assert bench.choose_batches(both, ()) == (8,)
    assert bench.choose_batches(both[:1], (64, 2, 64)) == (64, 2)
    with pytest.raises(ArtifactError, match=r"batch 2 is outside the profile of .*n: 4 to 16"):
        bench.choose_batches(both, (8, 2))
    both[1] = replace(both[1], batch=(100, 100, 100))
    with pytest.raises(ArtifactError, match="no batch size in common: 1 to 64 and 100 to 100"):
        bench.choose_batches(both, ())


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def runnable(tmp_path):
    """Two artifacts whose model is one pooling, for ONNX Runtime itself."""
    onnx = pytest.importorskip("onnx")

    text = """
    <ir_version: 8, opset_import: ["": 17]>
    pool (float[B,3,8,8] images) => (float[B,3] logits)
    {
      pooled = GlobalAveragePool (images)
      logits = Flatten (pooled)
    }
    """
    folders = []
    for name in ("dense", "jmp"):
        folder = artifact(tmp_path / name, batch=(1, 2, 4))
        onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
        Artifact.read(folder).write()
        folders.append(folder)
    return folders


def test_bench_measures_onnx_runtime_on_a_cpu(runnable, tmp_path, capsys):
    dense, jmp = runnable
    out = tmp_path / "bench.json"
    command = ["bench", str(dense), "--against", str(jmp), "-b", "1,4", "--threads", "1"]
    command += ["--num-warm-iter", "3", "--num-bench-iter", "20", "--seconds", "0.2"]
    assert main([*command, "--times", str(tmp_path / "t.json"), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert "CPU" in result["device"] and "ONNX Runtime" in result["device"]
    assert "1 thread" in result["device"] and result["settings"]["threads"] == 1
    assert [(row["backend"], row["batch"]) for row in result["rows"]] == [
        ("onnxruntime", batch) for batch in (1, 1, 4, 4)
    ]
    for row in result["rows"]:
        latency = row["latency_ms"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
        assert row["throughput"] == pytest.approx(1000 * row["batch"] / latency["p50"])
    for entry, (first, second) in zip(
        result["ratios"], [result["rows"][:2], result["rows"][2:]], strict=True
    ):
        # rounds weigh alike here, single inferences there
        assert entry["ratio"] == pytest.approx(second["throughput"] / first["throughput"], rel=0.3)
        assert entry["ci95"][0] <= entry["ratio"] <= entry["ci95"][1]
    assert len(result["files"]) == 4
    for path, row in zip(result["files"], result["rows"], strict=True):
        times = json.loads(Path(path).read_text())
        assert len(times) == row["iterations"] and "computeMs" in times[0]
    printed = capsys.readouterr().out
    assert "jmp over dense" in printed and "random weights" in printed


def test_batch_outside_the_profile_is_refused_with_the_range(runnable, capsys):
    assert main(["bench", str(runnable[0]), "-b", "1,8"]) == 2
    error = capsys.readouterr().err
    assert "batch 8 is outside the profile" in error and "1 to 4" in error


@pytest.mark.parametrize(
    "arguments",
    [["-b", "0"], ["-b", "x"], ["--backend", "tpu"], ["--seconds", "0"], ["--threads", "-1"]],
)
def test_wrong_words_are_refused(runnable, arguments, capsys):
    assert main(["bench", str(runnable[0]), *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_engine_without_a_gpu_is_refused_with_the_reason(runnable, capsys):
    assert main(["bench", str(runnable[0]), "--backend", "engine"]) == 2
    assert "none was built" in capsys.readouterr().err


def test_interrupted_command_writes_what_it_has_and_says_so(
    runnable, tmp_path, monkeypatch, capsys
):
    left = iter([FakeBackend(1.0, stop_at=4)])
    monkeypatch.setattr(bench, "_open_timed", lambda *_, **__: next(left))
    out = tmp_path / "r.json"
    assert main(["bench", str(runnable[0]), "-b", "1,4", "--json", str(out)]) == 130
    result = json.loads(out.read_text())
    assert result["complete"] is False and [row["batch"] for row in result["rows"]] == [1]
    assert "INCOMPLETE" in capsys.readouterr().out


def test_interrupted_before_anything_writes_nothing(runnable, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_open_timed", lambda *_, **__: FakeBackend(1.0, stop_at=1))
    out = tmp_path / "r.json"
    assert main(["bench", str(runnable[0]), "-b", "1,4", "--json", str(out)]) == 130
    assert not out.exists() and "nothing was measured" in capsys.readouterr().err


def test_plot_without_matplotlib_is_refused_before_measuring(
    runnable, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "_open_timed", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", str(runnable[0]), "--plot", str(tmp_path / "p.png")]) == 2
    assert "[plot]" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot_is_drawn(pair, tmp_path):
    result, _ = run(pair, [FakeBackend(6.0), FakeBackend(4.0)], batches=(1, 8))
    for name in ("latency.png", "latency.svg"):
        command.plot(result, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_names_are_as_short_as_can_be_told_apart():
    assert command.short_names(["a/x", "b/y"]) == {"a/x": "x", "b/y": "y"}
    assert command.short_names(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
    assert command.short_names(["a/x", "a/x"]) == {"a/x": "x"}


def test_pytorch_is_measured_too(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    import torch

    from jmp_deploy.backends.torch import TimedModel
    from jmp_deploy.jmp import models
    from tests.fakes.models import tiny_vit

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "restore_model", lambda data: tiny_vit(depth=2))
    folder = artifact(tmp_path / "a", side=32)
    model = TimedModel(Artifact.read(folder), 1)
    times = model.prepare(2, False)()
    assert times.total > 0 and times.compute is None and "FP32" in model.library
    model.close()
    out = tmp_path / "r.json"
    command = [
        "bench",
        str(folder),
        "-b",
        "2",
        "--backend",
        "torch,onnxruntime",
        "--seconds",
        "0.1",
    ]
    monkeypatch.setattr(bench, "_open_timed", lambda *_, **__: FakeBackend(2.0))
    assert main([*command, "--seconds", "0.1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["backend"] for row in result["rows"]] == ["torch", "onnxruntime"]
    assert any("PyTorch, ONNX Runtime" in words for words in result["notes"])
    assert main([*command[:4], "--backend", "torch", "--table", str(out)]) == 2
