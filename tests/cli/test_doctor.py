"""doctor: always a report, never a traceback; what it says is what the machine has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jmp_deploy
from jmp_deploy.cli import doctor, probes
from jmp_deploy.cli.doctor import CAN, Check
from jmp_deploy.core import device, errors, packages
from jmp_deploy.core.device import Gpu
from jmp_deploy.plugin import toolchain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
            assert check.found.startswith(version(package.distributions[0]))
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
            "unfit",
            "nvinfer",
        ),
        ("import os; os.abort()", "unfit", "ended with code -6"),
        ("class Logger: ...\n__version__ = '8.6.2'", "unfit", "IPluginV3"),
        ("class Logger: ...\n__version__ = '10.3.0'", "warn", "NVIDIA/TensorRT#4723"),
        ("class Logger: ...\n__version__ = '11.1.0'", "ok", "11.1.0"),
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


def test_what_cannot_be_imported_is_unfit_and_nothing_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a crash and between two failures, each package gets its own answer."""
    make_module(tmp_path, "torchvision", "raise RuntimeError('operator nms does not exist\\nmore')")
    make_module(tmp_path, "onnx", "import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = list(probes.AREAS["packages"]())
    found = by_name(checks)
    torch = version("torch")
    assert found["torchvision"].status == found["timm"].status == found["onnx"].status == "unfit"
    assert f"beside torch {torch}" in found["torchvision"].found
    assert found["torchvision"].found.endswith("operator nms does not exist")
    assert "cannot import torchvision" in found["timm"].found
    assert found["timm"].fix and "torch torchvision" in found["timm"].fix
    assert "ended with code -6" in found["onnx"].found
    assert found["PyTorch"].status == found["safetensors"].status == "ok"
    answer = by_name(list(doctor._abilities(checks)))["export models"]
    assert answer.status == "missing" and "operator nms does not exist" in answer.found


def test_import_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_module(tmp_path, "tensorrt", "import threading; threading.Event().wait()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "TRIAL_SECONDS", 3)
    trial = packages.try_imports([packages.TENSORRT])["TensorRT"]
    assert "did not end within 3 s" in trial.trouble


def test_unmet_requirements_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair may import and still not be made for each other: torchvision's metadata say so."""
    meta = tmp_path / "torchvision-9.9.dist-info"
    meta.mkdir()
    needs = "Requires-Dist: torch>=99; python_version >= '3'\nRequires-Dist: x; extra == 'y'\n"
    text = f"Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n{needs}"
    (meta / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.unmet("torchvision") == ["torch>=99"]
    status, words, fix = probes._known_problem(packages.PACKAGES[1], "9.9")
    assert status == "warn" and "torch>=99" in words
    assert fix and fix.startswith("python -m pip install --force-reinstall torch torchvision")


def test_nothing_printed_steers_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "one\x1b[31m \x07two\r\u202e\udc80"

    def foreign() -> Iterator[Check]:
        yield Check("machine", "Python", "ok", evil, evil)
        raise OSError(evil)

    monkeypatch.setattr(probes, "AREAS", {"machine": foreign})
    checks = doctor.collect()
    texts = [text for check in checks for text in (check.found, check.fix or "")]
    assert all(text.isprintable() for text in texts) and "two" in texts[0]
    assert "\x1b[31m" not in printed(checks)


# --- Machines that are not here ------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Check]]:
    """The report of a machine of a certain kind, on which nothing optional is installed."""

    def report_of(
        *, cuda: tuple[int, int] | None, jetson: str = "", torch: bool = False
    ) -> list[Check]:
        files = {"/etc/nv_tegra_release": jetson, "/proc/driver/nvidia/version": ""}
        if cuda:
            files["/proc/driver/nvidia/version"] = "NVRM version: Kernel Module  540.4.0  Wed"
        read = Path.read_text

        def read_text(path: Path, *arguments: Any, **options: Any) -> str:
            if str(path) not in files:
                return read(path, *arguments, **options)
            if not files[str(path)]:
                raise FileNotFoundError(path)
            return files[str(path)]

        monkeypatch.setattr(Path, "read_text", read_text)
        for module in (device, probes):
            monkeypatch.setattr(module, "driver_cuda", lambda: cuda)
        gpu = (Gpu("Orin", (8, 7), 2**33),) if cuda else ()
        monkeypatch.setattr(probes, "gpus", lambda: gpu)
        monkeypatch.setattr("platform.machine", lambda: "aarch64" if jetson else "x86_64")
        monkeypatch.setattr(probes, "importable", lambda _: False)
        monkeypatch.setattr(errors, "_has_torch", lambda: torch)

        def no_toolchain() -> None:
            raise errors.ToolchainError("no usable CUDA compiler (nvcc)", "")

        monkeypatch.setattr(toolchain, "find_toolchain", no_toolchain)
        monkeypatch.delitem(probes.AREAS, "network", raising=False)
        return doctor.collect()

    return report_of


JETPACK_6 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
JETPACK_7 = "# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic, EABI: aarch64"


def fixes(text: str) -> str:
    return text.partition("to mend it")[2]


@pytest.mark.parametrize("cuda", [(12, 6), None])
def test_jetpack_6_is_advised_what_a_device_needs(
    machine: Callable[..., list[Check]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cuda: tuple[int, int] | None,
) -> None:
    """CUDA 12 and its own TensorRT; export is the last line. None: a container without libcuda."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # a virtual environment, of its own packages
    checks = machine(cuda=cuda, jetson=JETPACK_6)
    found = by_name(checks)
    assert "JetPack 6" in found["Jetson"].found
    if cuda:
        assert found["driver"].status == "ok" and found["driver"].found == "540.4.0 (CUDA 12.6)"
    advice = fixes(printed(checks))
    assert "--system-site-packages" in (found["TensorRT"].fix or "")
    assert advice.index("[runtime-cu12]") < advice.index("to export models here")
    assert advice.rstrip().endswith("[export-no-torch]'")
    assert advice.count("export") == 2
    assert "[tensorrt" not in advice and "[rtx" not in advice and "cuda-toolkit[" not in advice
    for word in ("13", "cu13", "580"):
        assert not [check for check in checks if word in f"{check.fix} {check.found}".split()]


def test_jetpack_7_has_cuda_13(
    machine: Callable[..., list[Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    checks = machine(cuda=(13, 0), jetson=JETPACK_7)
    advice = fixes(printed(checks))
    assert "[runtime]" in advice and "cu12" not in advice
    assert by_name(checks)["TensorRT"].fix == "sudo apt-get install python3-libnvinfer"


@pytest.mark.parametrize(
    ("cuda", "twin"), [((12, 2), "-cu12"), ((12, 9), "-cu12"), ((13, 0), ""), (None, "")]
)
def test_driver_decides_between_cuda_12_and_13(
    machine: Callable[..., list[Check]], cuda: tuple[int, int] | None, twin: str
) -> None:
    found = by_name(machine(cuda=cuda))
    assert f"[runtime{twin}]" in (found["onnxruntime"].fix or "")
    assert f"[rtx{twin}]" in (found["TensorRT-RTX"].fix or "")
    compiler = found["plugin toolchain"].fix or ""
    assert "<13" in compiler if twin else "[nvcc]" in compiler
    if cuda:
        assert f"[tensorrt{twin}]" in (found["TensorRT"].fix or "")
        assert found["driver"].status == ("warn" if twin else "ok")


def test_pytorch_that_is_there_is_kept(machine: Callable[..., list[Check]]) -> None:
    found = by_name(machine(cuda=None, torch=True))
    assert "[export-no-torch]" in (found["timm"].fix or "")


def test_every_extra_that_is_named_exists(machine: Callable[..., list[Check]]) -> None:
    folder = Path(jmp_deploy.__file__).parent
    project = (folder.parent / "pyproject.toml").read_text()
    known = tomllib.loads(project)["project"]["optional-dependencies"]
    twins = [f"{extra}-cu12" for extra in errors.FOR_CUDA_12]
    extras = {*errors.FOR_CUDA_12, *twins, *errors.FROM_JETPACK}
    for source in folder.rglob("*.py"):
        extras.update(re.findall(r"install_command\(\"([\w-]+)\"\)", source.read_text()))
    for package in (*packages.PACKAGES, packages.TENSORRT, packages.TENSORRT_RTX):
        extras.add(package.extra)
    for arguments in ({"jetson": JETPACK_6}, {"torch": True}, {}):
        for check in machine(cuda=None, **arguments):
            extras.update(re.findall(r"(?:\.|jmp-deploy)\[([\w-]+)\]", check.fix or ""))
    assert "export-no-torch" in extras and extras <= set(known)


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
         "onnx_graphsurgeon", "safetensors", "tensorrt", "tensorrt_rtx",
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
        timeout=1200,
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


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), "FP16, INT8, no FP8"),
        ((8, 7), "FP16, BF16, INT8, no FP8"),
        ((11, 0), "FP16, BF16, INT8, FP8"),
    ],
)
def test_gpu_has_its_number_formats(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], words: str
) -> None:
    monkeypatch.setattr(probes, "gpus", lambda: (Gpu("Some GPU", capability, 80 * 2**30),))
    (found,) = (check.found for check in probes.AREAS["GPU"]() if check.name == "GPU")
    assert words in re.split("; ", found)
