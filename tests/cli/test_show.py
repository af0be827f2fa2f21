"""What every command prints with: tables, words, JSON, and progress."""

from __future__ import annotations

import argparse
import io
import json
import math

import pytest
from rich.console import Console

from jmp_deploy.cli import show
from jmp_deploy.core.manifest import Weights


@pytest.fixture
def lines(monkeypatch):
    """Progress where there is no terminal: returns what was printed so far, as lines."""
    stream = io.StringIO()
    plain = Console(file=stream, force_terminal=False, width=100, highlight=False, markup=False)
    monkeypatch.setattr(show, "console", lambda *, stderr=False: plain)
    return lambda: stream.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that the display reads."""
    now = [100.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_stages_without_a_terminal_are_a_line_each(lines, clock):
    with show.Progress() as progress:
        progress.stage("export")
        progress.steps("tactics", 1, 2)
        clock(2.5)
        progress.stage("no label of ours")
        clock(1)
    assert lines() == ["exporting to ONNX: 2.5 s", "no label of ours: 1.0 s"]


def test_shares_without_a_terminal_are_a_line_now_and_then(lines, clock):
    with show.Progress("opening") as progress:
        progress.update("measuring", 0.0)
        progress.update("measuring", 0.1)
        clock(show.LINE_EVERY + 1)
        progress.update("measuring", 0.5, ", batch 8")
        progress.update("power", 0.6)
        progress.update("power", 0.9)
        progress.update("power", 1.0)
    assert lines() == [
        "    0 s    0%  measuring",
        "   21 s   50%  measuring, batch 8",
        "   21 s   60%  power",
        "   21 s  100%  power",
    ]


def test_what_is_transient_leaves_nothing_behind(lines):
    with show.Progress("comparing", transient=True):
        pass
    assert lines() == []


def test_a_stage_that_failed_is_not_said_to_have_ended(lines):
    with pytest.raises(ValueError, match="bad"), show.Progress() as progress:
        progress.stage("export")
        raise ValueError("bad")
    assert lines() == []


def test_on_a_terminal_there_are_bars(monkeypatch):
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100)
    monkeypatch.setattr(show, "console", lambda *, stderr=False: terminal)
    with show.Progress(remaining=True) as progress:
        progress.stage("fp16")
        progress.stage("validating")
        progress.update("validating", 0.5, ": 5 of [10] images")
        assert progress.bar.tasks[0].finished and progress.bar.tasks[1].percentage == 50
    drawn = stream.getvalue()
    assert "converting to FP16" in drawn and "━" in drawn
    assert "5 of [10] images" in drawn, "words are not taken for markup"


def test_json_is_written_where_it_is_wanted(tmp_path, capsys):
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": (1, "é")}
    want = {"a": None, "b": [None, 1.5], "c": [1, "é"]}
    show.show(argparse.Namespace(json=str(tmp_path / "x.json")), ["[b]words[/b]"], value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == want
    assert capsys.readouterr().out == "[b]words[/b]\n"
    show.show(argparse.Namespace(json="-"), ["words"], value)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == want and printed.err == "words\n"
    show.show(argparse.Namespace(json=None), ["words"], value)
    assert capsys.readouterr().out == "words\n"


def test_origins_of_weights_in_words():
    assert show.weights(Weights("pretrained", source="hub")) == "pretrained (hub)"
    assert show.weights(Weights("file", path="w", sha256="a" * 64)) == "w (sha256 aaaaaaaaaaaa...)"
    assert show.weights(Weights("random", seed=3)) == "RANDOM (seed 3)"
    fallen = Weights("random", seed=0, fallback_for="pretrained", reason="no network")
    assert show.weights(fallen) == "RANDOM (seed 0; no pretrained ones: no network)"


def test_figures_that_are_not_finite():
    assert show.number(1234.5) == "1.23e+03" and show.number(0.999, ".6f") == "0.999000"
    assert {show.number(value) for value in (None, math.nan, math.inf)} == {"not finite"}
