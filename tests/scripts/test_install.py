"""Installation: constraints.txt, pyproject.toml and the scripts say the same; a device finds wheels
of all that it asks for. Only the latter needs the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10.13", "3.11.7", "3.12.1", "3.13.0")
TESTED = ("export", "rtx", "nvcc", "runtime", "plot", "dev")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ROOT / "constraints.txt"


def environment(python: str, machine: str) -> dict[str, str]:
    return {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
    }


def applies(requirement: Requirement, env: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(env)


def pins(env: dict[str, str]) -> dict[str, Version]:
    """The version that constraints.txt has of each package there; one, or the file is wrong."""
    found: dict[str, Version] = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)  # a path, an address or an option is none
        assert pin.url is None and not pin.extras, line
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        if applies(pin, env):
            assert pin.name not in found, f"{pin.name} twice with {env}"
            found[pin.name] = Version(specifier.version)
    return found


def direct(extras: tuple[str, ...], env: dict[str, str]) -> list[Requirement]:
    """What pyproject.toml asks for there, extras of our own resolved."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            found += direct(tuple(requirement.extras), env)
        elif applies(requirement, env):
            found.append(requirement)
    return found


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_all_that_is_asked_for(python: str, machine: str) -> None:
    env = environment(python, machine)
    pinned = pins(env)
    for requirement in direct(TESTED, env):
        assert requirement.name in pinned, f"{requirement} has no pin: renew constraints.txt"
        assert requirement.specifier.contains(pinned[requirement.name]), str(requirement)
    # what torch needs of CUDA and what compiles the plugin come from one toolkit
    toolkit = pinned["cuda-toolkit"].release[:2]
    assert toolkit == pinned["nvidia-cuda-nvcc"].release[:2]
    assert toolkit == pinned["nvidia-cuda-runtime"].release[:2]


def test_constraints_say_where_nothing_comes_from() -> None:
    assert not re.search(r"[/@\\]|(^|\s)-", re.sub("#.*", "", CONSTRAINTS.read_text()))


def test_every_supported_python_is_looked_at() -> None:
    label = "Programming Language :: Python :: 3."
    minors = [line.removeprefix(label) for line in PROJECT["classifiers"] if label in line]
    assert minors == [python.split(".")[1] for python in PYTHONS]


def test_no_extra_resolves_pytorch_and_the_compiler_against_each_other() -> None:
    """pip takes the newest toolkit first, and then an older torch that goes with it."""
    env = environment("3.11.7", "x86_64")
    for extra in PROJECT["optional-dependencies"]:
        names = {requirement.name for requirement in direct((extra,), env)}
        assert not names >= {"torch", "cuda-toolkit"}, extra
        assert ("torch" in names) == ("torchvision" in names), extra


def test_own_torch_is_not_asked_for() -> None:
    env = environment("3.10.13", "aarch64")
    bare = {requirement.name for requirement in direct(("export-no-torch",), env)}
    full = {requirement.name for requirement in direct(("export",), env)}
    assert full - bare == {"torch", "torchvision"}


def test_cuda_12_extras_ask_for_no_cuda_13() -> None:
    env = environment("3.10.13", "x86_64")
    for extra in ("tensorrt", "rtx", "runtime"):
        twelve = direct((f"{extra}-cu12",), env)
        assert not [name for name in map(str, twelve) if "cu13" in name]
        for requirement in twelve:
            if requirement.name == "cuda-bindings":
                assert not requirement.specifier.contains("13.0.0")
        assert {r.name.replace("cu12", "cu13") for r in twelve} == {
            r.name for r in direct((extra,), env)
        }


@pytest.mark.parametrize(
    ("python", "extra"),
    [("3.10", "runtime-cu12"), ("3.10", "runtime"), ("3.12", "runtime"), ("3.13", "runtime")],
)
def test_a_jetson_finds_wheels_of_all_that_it_asks_for(python: str, extra: str) -> None:
    """As install.sh of a bundle has pip look for them: the newest that go together, no compiler.
    JetPack 6 has Python 3.10, CUDA 12 and the glibc of Ubuntu 22.04, JetPack 7 has 3.12."""
    try:
        from uv import find_uv_bin
    except ImportError:
        pytest.skip("uv is not installed")
    target = ["--python-platform", "aarch64-manylinux_2_35", "--python-version", python]
    command = [find_uv_bin(), "pip", "compile", "--quiet", "--only-binary", ":all:", *target]
    done = subprocess.run(
        [*command, "--extra", extra, ROOT / "pyproject.toml"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"UV_HTTP_RETRIES": "1"},
    )
    if "error sending request" in done.stderr:
        pytest.skip("no network: uv cannot ask for packages")
    assert done.returncode == 0, done.stderr
    found = {line.partition("==")[0] for line in done.stdout.splitlines() if "==" in line}
    asked = direct((extra,), environment(f"{python}.0", "aarch64"))
    assert found >= {requirement.name for requirement in asked}


def test_scripts_install_the_tested_extras() -> None:
    for name in ("quickstart.sh", "test.sh"):
        (extras,) = re.findall(r"^jmp_env (\S+)$", (ROOT / "scripts" / name).read_text(), re.M)
        assert set(extras.split(",")) <= set(TESTED)


def try_imports(python: Path, extras: str) -> subprocess.CompletedProcess[str]:
    command = [python, ROOT / "scripts" / "try_imports.py", extras]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture
def misfit(tmp_path: Path) -> Path:
    """The python of an environment in which torchvision does not fit torch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name, version in (("numpy", "2.4.6"), ("torch", "2.13.0+cpu"), ("torchvision", "0.29.1")):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("")
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            + ("Requires-Dist: torch>=2.14.0\n" if name == "torchvision" else "")
        )
    why = "operator torchvision::nms does not exist"
    (site / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({why!r})")
    return tmp_path / "venv" / "bin" / "python"


def test_misfit_is_named_with_its_cure(misfit: Path) -> None:
    done = try_imports(misfit, "export,dev")
    assert done.returncode == 2
    error, cure = done.stderr.splitlines()
    assert "torchvision 0.29.1 beside torch 2.13.0+cpu" in error
    assert "operator torchvision::nms does not exist" in error
    assert cure.startswith("  mend it: ") and "rm -r" in cure


def test_import_that_ends_the_process_is_named(misfit: Path) -> None:
    (site,) = (misfit.parents[1] / "lib").glob("python*/site-packages")
    (site / "torch" / "__init__.py").write_text("import os; os.abort()")
    done = try_imports(misfit, "export")
    assert done.returncode == 2
    assert "cannot import torch" in done.stderr and "ended with code -6" in done.stderr


def test_environment_without_misfit_passes() -> None:
    done = try_imports(Path(sys.executable), "export")
    assert (done.returncode, done.stderr) == (0, "")
