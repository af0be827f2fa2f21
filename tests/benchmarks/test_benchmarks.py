"""The benchmarks' own arithmetic, and that they run to the end where there is no GPU."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks import endtoend, kernel
from benchmarks.lib import reduction_calls, report, timing
from jmp_deploy.core.images import INPUT
from jmp_deploy.export.export import export_onnx
from jmp_deploy.jmp.models import LoadedModel
from jmp_deploy.jmp.patch import patch
from tests.fakes.models import tiny_vit

FACTS = {"gpu": "A GPU", "cpu": "A CPU", "cores": 2, "driver": "1", "torch": "2", "date": "today"}
FACTS |= {"onnxruntime": None, "commit": "0123456789abcdef"}


def test_every_round_times_each_once_there_and_back_after_a_call_of_its_own():
    called = []
    timers = {name: lambda name=name: called.append(name) or 7.0 for name in "abc"}
    taken = timing.interleave(timers, rounds=6, seconds=1e9)
    assert taken == {name: [pytest.approx(7.0)] * 6 for name in "abc"}
    assert "".join(called[-36:]) == 3 * ("aabbcc" + "ccbbaa")


def test_time_ends_the_rounds_but_not_before_a_few():
    assert 2 <= len(timing.interleave({"a": lambda: 1.0}, rounds=500, seconds=0)["a"]) < 10


def test_ratios_are_taken_round_by_round():
    # The machine slows down by ten in the middle: the ratio of every pair is still 2.
    found = timing.ratio([2, 4, 20, 40, 6], [1, 2, 10, 20, 3])
    assert found == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 5}
    assert timing.summary([1, 2, 3, 4, 100]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    assert timing.summary([7.0])["q3"] == 7.0


def test_floor_counts_what_must_be_read_and_written():
    case = kernel.make_case("deit_s", "importance")
    # x 197x384, keys 197x384, one query row, 139x384 out, two sizes out; sizes in once.
    per_sample = 197 * 384 + 197 * 384 + 384 + 139 * (384 + 2)
    assert case.bytes_moved(256, 2) == 2 * (256 * per_sample + 197)
    assert case.bytes_moved(256, 2) / 1e6 == pytest.approx(105, abs=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [(kernel, []), (endtoend, ["--backend", "torch"])])
def test_without_a_gpu_they_end_with_one_clear_line(command, capsys):
    module, arguments = command
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert "GPU" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        (kernel, ["--models", "vgg"], "unknown 'vgg'"),
        (kernel, ["--dtypes", "int8"], "unknown 'int8'"),
        (endtoend, ["-b", "1,zero"], "expected numbers from 1 up"),
    ],
)
def test_wrong_words_are_named(module, arguments, said, capsys):
    assert module.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_endtoend_on_onnx_runtime(tmp_path, monkeypatch, capsys):
    def tiny(name, weights, **options):
        return LoadedModel(tiny_vit(), name, {"kind": "random"}, None, None)

    monkeypatch.setattr("jmp_deploy.jmp.models.load_model", tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(report, "machine", lambda: {**FACTS, "gpu": None})
    base = tmp_path / "e2e"
    arguments = ["--models", "tiny", "-b", "2", "--seconds", "0", "-o", str(base)]
    assert endtoend.main([*arguments, "--schedules", "1:9,3:5"]) == 0
    assert "on ONNX Runtime, on the CPU" in capsys.readouterr().out
    result = json.loads((tmp_path / "e2e.json").read_text())
    (row,) = result["rows"]
    assert result["backend"] == "onnxruntime" and row["speedup"]["n"] == row["jmp_us"]["n"] >= 5
    assert 1.2 < row["allowed"] < 2 and row["jmp_us"]["median"] > 0
    assert row["cut_speedup"]["n"] == row["bare_speedup"]["n"] == row["speedup"]["n"]
    assert "| tiny 1:9,3:5 | 2 |" in (tmp_path / "e2e.md").read_text()


def test_tokens_cut_off_are_the_same_in_both_forms(tmp_path):
    model = patch(tiny_vit(), "1:9,3:5", backend="reference")
    images = torch.rand(2, 3, 32, 32)
    reduced = model(images)
    path = tmp_path / "cut.onnx"
    exported = export_onnx(model, tmp_path / "jmp.onnx", image_size=(32, 32))
    endtoend.cut_in_onnx(exported, path)
    model.blocks.reduce = endtoend.cut_tokens
    want = model(images)
    assert not torch.allclose(want, reduced, atol=1e-3)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {INPUT: images.numpy()})
    np.testing.assert_allclose(found, want.detach().numpy(), atol=1e-5)


@pytest.fixture
def gpu_stand_in(monkeypatch):
    """Lets kernel.py run to its end on a CPU: the figures mean nothing, the machinery is real."""

    class Launcher:
        def workspace_bytes(self, params, *, plain):
            return 16

        def launch(self, params, addresses, workspace, stream, *, plain):
            assert len(addresses) == 6 and len(set(addresses)) == 6

    monkeypatch.setattr(reduction_calls, "DEVICE", "cpu")
    monkeypatch.setattr(reduction_calls, "load_kernel", lambda capability: Launcher())
    for name, value in {
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 16),
        "get_device_capability": lambda: (9, 0),
        "current_stream": lambda: SimpleNamespace(cuda_stream=0),
        "is_available": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        timing, "captured", lambda calls, repeats=1: lambda: [call() for call in calls]
    )
    monkeypatch.setattr(timing, "cuda", lambda work, calls=1: timing.wall(work))
    monkeypatch.setattr(kernel, "BIG_COPY", 1 << 16)
    monkeypatch.setattr(kernel, "MODELS", {"small": (12, 64, 1, 1)})
    monkeypatch.setattr(report, "machine", lambda: FACTS)


def test_kernel_to_the_end(tmp_path, gpu_stand_in):
    arguments = ["--models", "small", "-b", "1,3", "--compile", "none", "--seconds", "0"]
    assert kernel.main([*arguments, "-o", str(tmp_path / "k")]) == 0
    result = json.loads((tmp_path / "k.json").read_text())
    assert [(r["selection"], r["batch"]) for r in result["rows"]] == [
        ("importance", 1),
        ("importance", 3),
        ("distinct", 1),
        ("distinct", 3),
    ]
    row = result["rows"][0]
    assert row["tokens"] == [13, 10] and set(row["speedup"]) == {
        "plain",
        "eager",
        "eager_graph",
        "copy",
    }
    assert row["floor_us"] == pytest.approx(
        row["bytes"] / result["copy_bytes_per_second"] * 1e6, rel=1e-2
    )
    assert "| small importance float16 | 1 |" in (tmp_path / "k.md").read_text()


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    one = {"median": 2.0, "q1": 1.5, "q3": 2.5, "n": 5}
    rows = [
        {
            "model": "m",
            "selection": "distinct",
            "dtype": "float16",
            "batch": batch,
            "floor_us": 1.0,
            "ratio_to_floor": 2.0,
            "bytes": 1000,
            "microseconds": {"ours": one, "copy": one},
            "speedup": {"copy": one},
        }
        for batch in (1, 8)
    ]
    result = {"machine": FACTS, "rows": rows, "copy_bytes_per_second": 1e12}
    paths = report.write(
        tmp_path / "k", result, kernel.table(result), lambda plt, to: kernel.plot(result, plt, to)
    )
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_a_missing_matplotlib_costs_only_the_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    paths = report.write(tmp_path / "r", {}, "table", lambda plt, path: None)
    assert [p.suffix for p in paths] == [".json", ".md"]
    assert "no plot" in capsys.readouterr().err
