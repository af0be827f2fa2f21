"""scripts/kernel_sweep.py: a small part of it, and that it notices what is wrong."""

from __future__ import annotations

import faulthandler
import os
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import kernel_sweep
from tests.plugin.test_kernel_host import KERNEL, compile_host


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    return kernel_sweep


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ["-O0", "-shared", "-fPIC", "-x", "c++", str(KERNEL)]
    return compile_host(tmp_path_factory.mktemp("sweep") / "kernel.so", *options)


def options(**changes: int) -> Namespace:
    return Namespace(**{"seed": 2, "first": 0, "count": 16, "most_batch": 40, "jobs": 1} | changes)


def test_a_small_part(sweep: ModuleType, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.sweep(library, options(), gpu=False) == 0
    assert "16 cases of seed 2 by the stand-in" in capsys.readouterr().out


def test_a_number_is_a_case(sweep: ModuleType) -> None:
    assert str(sweep.draw(2, 5)) == str(sweep.draw(2, 5)) != str(sweep.draw(1, 5))
    assert (sweep.draw(2, 5).case[0] == sweep.draw(2, 5).case[0]).all()
    assert 65_535 < len(sweep.draw(1, 249).which) <= 70_000


def test_a_fault_ends_it_with_the_command_that_repeats_it(
    sweep: ModuleType,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep, "WAYS", sweep.WAYS[2:3])  # clusters
    monkeypatch.setenv("JMP_SKIP_CLUSTER", "1")
    genuine = sweep.work

    def work(*arguments: Any) -> None:
        faulthandler.disable()  # a crash is one of the answers
        genuine(*arguments)

    monkeypatch.setattr(sweep, "work", work)
    assert sweep.sweep(library, options(first=32, count=12), gpu=False) == 1
    said = capfd.readouterr().err
    assert "batch " in said and "scripts/kernel_sweep.py --seed 2 --first" in said
    number = int(said.split("--first ")[1].split()[0])
    again = options(first=number, count=1)
    assert sweep.sweep(library, again, gpu=False) == 1
    monkeypatch.delenv("JMP_SKIP_CLUSTER")
    assert sweep.sweep(library, again, gpu=False) == 0


def test_one_sample_of_many_that_differs_is_noticed(sweep: ModuleType, library: Path) -> None:
    drawn = sweep.draw(1, 249, 70)
    run = sweep.on_host(sweep.KernelLibrary(library), drawn)

    def spoilt(*case: object) -> object:
        got = run(*case)
        got.y[69] += 1
        return got

    saved = dict(os.environ)
    sweep.check(drawn, run)
    with pytest.raises(AssertionError, match=r"y of samples \[69\]"):
        sweep.check(drawn, spoilt)
    os.environ.clear()
    os.environ.update(saved)
