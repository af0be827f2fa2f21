"""What users install: the wheel and the sdist, in an environment that has nothing else.

No network is needed: the packages that the wheel asks for are linked from the running environment,
those alone, so that PyTorch and timm are really not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from jmp_deploy.jmp.schedule import published

packaging = pytest.importorskip("packaging.requirements")

REPO = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed"),
]


def needed(wanted: Distribution, extras: set[str], seen: set[str]) -> Iterator[Distribution]:
    """What a distribution asks for with these extras, and what that asks for."""
    for line in wanted.requires or ():
        requirement = packaging.Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{name}, which the wheel asks for, is not installed here")
        yield found
        yield from needed(found, set(requirement.extras), seen)


def link(found: Distribution, site: Path) -> None:
    """Makes an installed distribution importable from another folder, and found by metadata."""
    for file in found.files or ():
        source, target = Path(str(found.locate_file(file))), site / file
        if ".." in file.parts or "__pycache__" in file.parts or not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(source)


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


class Installed:
    """A virtual environment with our wheel and what it asks for with an extra."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        run(*pip, "--no-deps", "--no-index", wheel)
        (metadata,) = self.site.glob("jmp_deploy-*.dist-info")
        ours = Distribution.at(metadata)
        for found in needed(ours, {extra} if extra else set(), set()):
            link(found, self.site)
        self.folder = folder / "elsewhere"
        self.folder.mkdir()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JMP_", "PYTHON"))
        }
        self.environment["JMP_DEPLOY_CACHE"] = str(folder / "cache")

    def __call__(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.python.with_name("jmp_deploy")), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=self.environment,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
        return done

    def has(self, module: str) -> bool:
        code = f"from importlib.util import find_spec; print(find_spec({module!r}) is not None)"
        printed = run(self.python, "-c", code, cwd=self.folder, env=self.environment)
        return printed.strip() == "True"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the sdist, which therefore has all that is needed."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=REPO)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (sources,) = (path.parent for path in folder.glob("*/pyproject.toml"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    run(*build, "-w", folder, sources)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("base"), wheel, "")


@pytest.fixture(scope="module")
def runtime(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("runtime"), wheel, "runtime")


def test_base(base: Installed, built: Path) -> None:
    assert not base.has("torch") and not base.has("onnxruntime") and base.has("numpy")
    assert "build" in base("--help").stdout
    base("doctor", "--json", "doctor.json")
    assert json.loads((base.folder / "doctor.json").read_text())
    base("inspect", built, "--json", "inspect.json")
    found = json.loads((base.folder / "inspect.json").read_text())
    assert found["manifest"]["model"] and found["missing"]["onnx"] == "onnx is not installed"
    done = base("inspect", built / "model.trt.onnx", code=2)
    assert "onnx is not installed" in done.stderr and "[runtime]" in done.stderr


def test_published_schedules_come_along(wheel: Path) -> None:
    carried = set(zipfile.ZipFile(wheel).namelist())
    assert {f"jmp_deploy/schedules/{name}.json" for name in published()} <= carried


def test_base_compiles_the_plugin(base: Installed) -> None:
    """From the sources in the wheel; with the compiler and the headers of this machine."""
    from jmp_deploy.core.errors import ToolchainError
    from jmp_deploy.plugin.toolchain import find_toolchain

    try:
        tools = find_toolchain()
    except ToolchainError as error:
        pytest.skip(error.message)
    root = base.folder / "tensorrt"
    root.mkdir()
    (root / "include").symlink_to(tools.headers)
    base.environment |= {"JMP_NVCC": str(tools.nvcc), "TENSORRT_ROOT": str(root)}
    base("plugin", "build", "--arch", "80", "--json", "plugin.json")
    info = json.loads((base.folder / "plugin.json").read_text())
    assert info["architectures"] == ["80"] and Path(info["path"]).is_file()
    assert base("plugin", "path").returncode == 0


def test_a_device_runs_an_artifact(
    runtime: Installed, built: Path, photos: list[Path], tmp_path: Path
) -> None:
    assert not any(runtime.has(name) for name in ("torch", "timm", "onnxscript", "safetensors"))
    runtime("doctor")
    runtime("run", built, photos[0], "--json", "run.json")
    assert json.loads((runtime.folder / "run.json").read_text())[0]["top"]
    short = ("-b", "1", "--seconds", "1", "--num-warm-iter", "1", "--num-bench-iter", "4")
    runtime("bench", built, "--backend", "onnxruntime", "--no-energy", *short)
    for number, photo in (("281", photos[1]), ("504", photos[2])):
        (tmp_path / number).mkdir()
        shutil.copy(photo, tmp_path / number)
    runtime("validate", built, "--data", tmp_path, "--workers", "0")
    for path in (built, built / "model.trt.onnx"):
        runtime("inspect", path, "--json", "inspect.json")
        found = json.loads((runtime.folder / "inspect.json").read_text())
        assert len(found["onnx"]["reductions"]) > 0
