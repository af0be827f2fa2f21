"""doctor: always a report, never a traceback; what it says is what the machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from jmp_deploy.cli import doctor, probes
from jmp_deploy.cli.doctor import CAN, Check
from jmp_deploy.core.device import Gpu

ABILITIES = {
    "export models",
    "build the plugin",
    "build with TensorRT",
    "build with TensorRT-RTX",
    "run engines",
    "run portable models",
}


@pytest.fixture(scope="module")
def report() -> list[Check]:
    return doctor.collect()


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def printed(checks: list[Check], width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(doctor.render(checks), crop=False)
    return console.export_text()


def test_versions_are_those_installed(report: list[Check]) -> None:
    found = by_name(report)
    assert found["Python"].found.startswith(".".join(map(str, sys.version_info[:3])))
    for package in probes.PACKAGES:
        check = found[package.name]
        if check.status != "missing":
            assert check.found.startswith(version(package.distribution))
    assert found["PyTorch"].status == "ok"


def test_every_ability_has_an_answer_and_a_reason(report: list[Check]) -> None:
    answers = {check.name: check for check in report if check.area == CAN}
    assert set(answers) == ABILITIES
    assert all(check.found for check in answers.values())
    # pytest runs in an environment with the export extra
    assert answers["export models"].status == "ok"
    assert answers["run portable models"].status == "ok"


def test_json_holds_the_same(report: list[Check]) -> None:
    data = json.loads(json.dumps(doctor.as_json(report)))
    assert set(data["can"]) == ABILITIES
    assert data["can"]["export models"]["yes"] is True
    assert {check["name"] for check in data["checks"]} >= {"Python", "GPU", "PyTorch", "TensorRT"}


def test_commands_are_never_broken_in_two(report: list[Check]) -> None:
    long = f"python -m pip install -e '/{'far/' * 40}[export]'"
    text = printed([*report, Check("packages", "nothing", "missing", "not installed", long)])
    assert long in text


def test_gaps_are_named_with_their_command() -> None:
    """A bare machine: each no has its reasons, each reason its command."""
    checks = [Check("packages", "polygraphy", "missing", "not installed", "pip install polygraphy")]
    answers = by_name(list(doctor._abilities(checks)))
    assert {check.status for check in answers.values()} == {"missing"}
    rtx = answers["build with TensorRT-RTX"]
    assert "polygraphy: not installed" in rtx.found and rtx.fix == "pip install polygraphy"


def test_probe_that_fails_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Check]:
        yield Check("machine", "Python", "ok", "3")
        raise OSError("no such\nsecond line")

    monkeypatch.setattr(probes, "AREAS", {"machine": broken})
    checks = doctor.collect()
    assert checks[0].found == "3"
    assert checks[1].status == "warn" and checks[1].found.endswith("no such")
    assert {check.name for check in checks if check.area == CAN} == ABILITIES


def make_module(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            "warn",
            "nvinfer",
        ),
        ("import os; os.abort()", "warn", "ended with code -6"),
        ("class Logger: ...\n__version__ = '8.6.2'", "warn", "IPluginV3"),
        ("class Logger: ...\n__version__ = '10.3.0'", "ok", "10.3.0"),
    ],
)
def test_tensorrt_in_every_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, status: str, words: str
) -> None:
    """Also one whose import ends the process: doctor outlives it."""
    make_module(tmp_path, "tensorrt", code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = by_name(list(probes.AREAS["TensorRT"]()))["TensorRT"]
    assert check.status == status and words in check.found


def test_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("JMP_DEPLOY_CACHE", str(blocked / "cache"))
    check = by_name(list(probes._cache()))["cache"]
    assert check.status == "missing" and str(blocked) in check.found
    assert check.fix is not None and "JMP_DEPLOY_CACHE" in check.fix


def test_offline_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked"))
    assert "HF_HUB_OFFLINE" in next(iter(probes.AREAS["network"]())).found


BARE = """
import sys, importlib.util
HEAVY = {"torch", "timm", "torchvision", "onnx", "onnxruntime", "onnxscript", "polygraphy",
         "onnx_graphsurgeon", "onnxconverter_common", "safetensors", "tensorrt", "tensorrt_rtx",
         "huggingface_hub", "skimage", "sklearn", "scipy", "cuda"}
find = importlib.util.find_spec
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from jmp_deploy.cli import doctor
from rich import print
checks = doctor.collect()
print(doctor.render(checks))
assert not [c for c in checks if "could not be looked at" in c.found], checks
assert {c.status for c in checks if c.name in ("PyTorch", "onnx", "TensorRT")} == {"missing"}
assert all(c.fix for c in checks if c.name in ("PyTorch", "onnx", "polygraphy"))
print("report complete")
"""


def test_base_install_alone_is_enough() -> None:
    """Every optional package hidden, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "report complete" in done.stdout and "pip install" in done.stdout


@pytest.mark.parametrize(
    ("capability", "status", "words"),
    [((8, 9), "ok", "TensorRT-RTX"), ((9, 0), "missing", "does not build for 9.0")],
)
def test_gpu_decides_who_runs_engines(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str, words: str
) -> None:
    """With TensorRT-RTX alone: yes on a GPU that it has targets for, no on Hopper."""
    monkeypatch.setattr(probes, "gpus", lambda: (Gpu("Some GPU", capability, 80 * 2**30),))
    checks = [
        *probes.AREAS["GPU"](),
        Check("TensorRT", "TensorRT", "missing", "not installed"),
        Check("TensorRT", "TensorRT-RTX", "ok", "1.7.1"),
        Check("packages", "cuda-bindings", "ok", "13.5.0"),
    ]
    answer = by_name(list(doctor._abilities(checks)))["run engines"]
    assert answer.status == status and words in answer.found
