"""Looks at this machine for `doctor`: one generator of checks per area.

Nothing heavy is imported: versions come from the installed packages' metadata, and TensorRT, whose
import can end a process, is tried in another one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..core.device import gpus
from ..core.errors import JmpDeployError, install_command

Status = Literal["ok", "warn", "missing"]

MIN_DRIVER_CUDA13 = 580
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # TensorRT-RTX 1.7


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        area: group that it is shown in.
        name: what was looked for.
        status: "ok", "warn" (there, with a limit worth knowing) or "missing".
        found: what was found, or why not; one line.
        fix: the command that mends it, or None where nothing needs mending or no command can.
    """

    area: str
    name: str
    status: Status
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class _Package:
    """A Python package: distribution and module name, the extra that brings it, what it is for."""

    name: str
    distribution: str
    module: str
    extra: str
    optional: str = ""  # why a machine may well do without it


PACKAGES = (
    _Package("PyTorch", "torch", "torch", "export"),
    _Package("torchvision", "torchvision", "torchvision", "export"),
    _Package("timm", "timm", "timm", "export"),
    _Package("safetensors", "safetensors", "safetensors", "export"),
    _Package("onnx", "onnx", "onnx", "export"),
    _Package("onnxscript", "onnxscript", "onnxscript", "export"),
    _Package("onnx-graphsurgeon", "onnx-graphsurgeon", "onnx_graphsurgeon", "export"),
    _Package("onnxconverter-common", "onnxconverter-common", "onnxconverter_common", "export"),
    _Package("onnxruntime", "onnxruntime", "onnxruntime", "runtime"),
    _Package("polygraphy", "polygraphy", "polygraphy", "runtime"),
    _Package("cuda-bindings", "cuda-bindings", "cuda.bindings", "runtime"),
    _Package("pycuda", "pycuda", "pycuda", "pycuda", "only to hand over buffers of pycuda"),
)
EXPORT_NEEDS = tuple(package.name for package in PACKAGES if package.extra == "export")


def one_line(value: object) -> str:
    """The first line of a text or an error; empty if there is none."""
    return next(iter(str(value).strip().splitlines()), "")


def _output(command: Sequence[str], timeout: float = 15.0) -> str | None:
    """What a command prints, or None if it is absent, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# --- machine -------------------------------------------------------------------------------------


def _machine() -> Iterator[Check]:
    area = "machine"
    here = ".".join(map(str, sys.version_info[:3]))
    tested = (3, 10) <= sys.version_info[:2] <= (3, 13)
    found = f"{here}, {sys.executable}" + ("" if tested else "; 3.10 to 3.13 are supported")
    yield Check(area, "Python", "ok" if tested else "warn", found)
    system = f"{platform.system()} {platform.machine()}, {_distribution()}"
    yield Check(area, "system", "ok" if platform.system() == "Linux" else "warn", system)
    yield from _jetpack()
    yield Check(area, "processor", "ok", f"{os.cpu_count()} cores")
    memory = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    if memory:
        free = int(memory[1]) / 2**20
        enough = free >= 4
        note = "" if enough else "; exporting and building want 4 GB: close something, or add swap"
        yield Check(area, "memory", "ok" if enough else "warn", f"{free:.1f} GB free{note}")
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    note = "" if disk >= 2 else "; an artifact takes up to 1 GB"
    yield Check(area, "disk", "ok" if disk >= 2 else "warn", f"{disk:.1f} GB free here{note}")


def _jetson() -> bool:
    return Path("/etc/nv_tegra_release").exists()


def _distribution() -> str:
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read("/etc/os-release"), re.MULTILINE)
    return name[1] if name else platform.release()


def _jetpack() -> Iterator[Check]:
    release = re.search(r"R(\d+)[^,]*, REVISION: ([\d.]+)", _read("/etc/nv_tegra_release"))
    board = _read("/proc/device-tree/model")
    if not release:
        if "jetson" in board.lower():
            yield Check("machine", "Jetson", "warn", f"{board}, without /etc/nv_tegra_release")
        return
    linux = (int(release[1]), *_version(release[2]))
    found = f"{board or 'Jetson'}, Jetson Linux {release[1]}.{release[2]}"
    if linux < (36, 4):
        found += ": JetPack before 6.1; its TensorRT (8.x) knows no IPluginV3"
        yield Check("machine", "Jetson", "warn", f"{found}. Flash JetPack 6.1 or newer")
    else:
        yield Check("machine", "Jetson", "ok", f"{found} (JetPack {'6' if linux < (38,) else '7'})")


# --- GPU -----------------------------------------------------------------------------------------


def _gpu() -> Iterator[Check]:
    for gpu in gpus():
        major, minor = gpu.compute_capability
        found = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory / 2**30:.0f} GB"
        if gpu.compute_capability < (7, 5):
            yield Check("GPU", "GPU", "warn", f"{found}; the plugin is made for 7.5 and newer")
            continue
        if gpu.compute_capability not in RTX_CAPABILITIES:
            found += f"; TensorRT-RTX: does not build for {major}.{minor}"
        yield Check("GPU", "GPU", "ok", found)
    driver = re.search(r"Module.*?\s(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version"))
    if driver:
        old = _version(driver[1]) < (MIN_DRIVER_CUDA13,)
        note = f"; pip's PyTorch and TensorRT-RTX (CUDA 13) want {MIN_DRIVER_CUDA13}" if old else ""
        yield Check("GPU", "driver", "warn" if old else "ok", driver[1] + note)
    if gpus():
        return
    found = "none found: no engine can run here"
    if driver:
        found = "the kernel driver is loaded, but libcuda lists no GPU (in a container: start it "
        found += "with --gpus all)"
    yield Check("GPU", "GPU", "missing", found)


# --- packages ------------------------------------------------------------------------------------


def _packages() -> Iterator[Check]:
    for package in PACKAGES:
        version = _installed(package)
        if version is None:
            note = f"not installed (optional: {package.optional})" if package.optional else ""
            fix = None if package.optional else install_command(package.extra)
            found = note or "not installed"
            yield Check("packages", package.name, "missing", found, fix)
            continue
        problem, fix = _known_problem(package, version)
        status: Status = "warn" if problem else "ok"
        yield Check(
            "packages", package.name, status, "; ".join(filter(None, (version, problem))), fix
        )


def _installed(package: _Package) -> str | None:
    """The version; "version unknown" for a module without metadata; None if not importable."""
    if not _importable(package.module):
        return None
    names = [package.distribution]
    if package.distribution == "onnxruntime":
        names += ["onnxruntime-gpu"]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def _known_problem(package: _Package, version: str) -> tuple[str, str | None]:
    """(what is known to be wrong with this version here, the command against it)."""
    number = _version(version)
    if package.name == "PyTorch" and number and number < (2, 8):
        return "the exporter needs 2.8 or newer", "python -m pip install 'torch>=2.8' torchvision"
    if package.name == "torchvision":
        torch = _installed(PACKAGES[0]) or ""
        if torch.endswith("+cpu") and not version.endswith("+cpu"):
            problem = f"a CUDA build beside PyTorch {torch}: its import fails, and timm's with it"
            return problem, "python -m pip install --force-reinstall torch torchvision"
    if package.name == "onnxruntime":
        both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _has_metadata(name)]
        if len(both) == 2:
            fix = "python -m pip uninstall -y onnxruntime onnxruntime-gpu && python -m pip install "
            return "onnxruntime and onnxruntime-gpu overwrite each other", fix + "onnxruntime"
        if number and number < (1, 30):
            upgrade = sys.version_info >= (3, 11)
            note = "" if upgrade else ", which wants Python 3.11 or newer"
            fix = "python -m pip install 'onnxruntime>=1.30'" if upgrade else ""
            return f"INT8 calibration wants 1.30 or newer{note}", fix or None
    return "", None


def _importable(module: str) -> bool:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # the parent package is absent, or half removed
        return False
    # tensorrt-stubs leaves a folder `tensorrt` without code, which Python takes for a namespace
    return spec is not None and spec.origin is not None


def _has_metadata(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# --- TensorRT ------------------------------------------------------------------------------------


def _tensorrt() -> Iterator[Check]:
    yield _tensorrt_flavour("TensorRT", "tensorrt")
    yield _tensorrt_flavour("TensorRT-RTX", "tensorrt_rtx")


def _tensorrt_flavour(name: str, module: str) -> Check:
    area, rtx = "TensorRT", module == "tensorrt_rtx"
    fix: str | None = install_command("rtx" if rtx else "tensorrt")
    if not _importable(module):
        found = "not installed"
        if rtx and platform.machine() != "x86_64":
            found, fix = "not installed; pip has it for x86-64 only", None
        elif not rtx and _jetson():
            found = "not visible to this Python; JetPack's is the system's: make the virtual "
            found += "environment with --system-site-packages"
            fix = "sudo apt-get install python3-libnvinfer"
        elif not rtx and not gpus():
            found, fix = "not installed; of no use here: it builds and runs on its GPU only", None
        return Check(area, name, "missing", found, fix)
    version, trouble = _imported_version(module)
    if version is None:
        return Check(area, name, "warn", f"installed, but cannot be imported: {trouble}", fix)
    if not rtx and _version(version) < (10,):
        found = f"{version}: before 10.0, without IPluginV3"
        return Check(area, name, "warn", found, None if _jetson() else fix)
    return Check(area, name, "ok", version)


def _imported_version(module: str) -> tuple[str | None, str]:
    """(version, "") or (None, reason). In a process of its own, which may crash or hang."""
    code = f"import {module} as m; m.Logger; print(m.__version__)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, one_line(error)
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip().splitlines()[-1], ""
    lines = done.stderr.strip().splitlines()
    return None, lines[-1] if lines else f"the process ended with code {done.returncode}"


# --- plugin --------------------------------------------------------------------------------------


def _plugin() -> Iterator[Check]:
    yield _host_compiler()
    yield from _toolchain()
    yield from _cache()


def _host_compiler() -> Check:
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        printed = _output([*shlex.split(name), "--version"])
        if printed is not None:
            return Check("plugin", "C++ compiler", "ok", one_line(printed))
    fix = "sudo apt-get install g++"
    return Check("plugin", "C++ compiler", "missing", "no g++, c++ or clang++ works", fix)


def _toolchain() -> Iterator[Check]:
    """nvcc and the TensorRT headers, as the plugin's own build would find them."""
    from ..plugin.toolchain import find_toolchain

    try:
        found = find_toolchain()
    except JmpDeployError as error:
        fix = install_command("rtx")
        if _jetson():
            fix = "sudo apt-get install cuda-toolkit libnvinfer-headers-dev"
        yield Check("plugin", "plugin toolchain", "missing", error.message, fix)
        return
    text = f"nvcc {found.cuda_version} ({found.nvcc}), headers of TensorRT {found.tensorrt_version}"
    yield Check("plugin", "plugin toolchain", "ok", f"{text} ({found.headers})")


def _cache() -> Iterator[Check]:
    from ..core.paths import cache_dir
    from ..plugin.library import plugin_library

    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror or error}"
        yield Check(
            "plugin", "cache", "missing", found, "export JMP_DEPLOY_CACHE=/some/writable/dir"
        )
        return
    yield Check("plugin", "cache", "ok", str(folder))
    try:
        library = plugin_library(build=False)
    except JmpDeployError as error:
        fix = "python -m jmp_deploy plugin build"
        yield Check("plugin", "plugin library", "missing", error.message, fix)
    else:
        yield Check("plugin", "plugin library", "ok", str(library))


# --- network -------------------------------------------------------------------------------------


def _hub() -> Iterator[Check]:
    """Whether timm could fetch pretrained weights."""
    area, name = "network", "model hub"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check(area, name, "warn", "not asked: HF_HUB_OFFLINE is set; its cache is used")
        return
    if not _importable("huggingface_hub"):
        yield Check(
            area, name, "missing", "huggingface_hub is not installed", install_command("export")
        )
        return
    from urllib.request import Request, urlopen

    from huggingface_hub import constants

    answers: list[str] = []

    def ask() -> None:
        try:
            request = Request(constants.ENDPOINT, method="HEAD")
            with urlopen(request, timeout=2.0) as answer:
                answers.append("reachable" if answer.status < 400 else f"HTTP {answer.status}")
        except Exception as error:  # whatever the network, a proxy or a certificate may do
            reason = one_line(getattr(error, "reason", error)) or type(error).__name__
            answers.append(f"not reachable ({reason})")

    # A thread, because the look-up of a name has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2.5)
    found = answers[0] if answers else "not reachable (no answer within 2 s)"
    if found != "reachable":
        found += "; pretrained weights: from its cache, or --weights FILE"
    yield Check(area, name, "ok" if found == "reachable" else "warn", found)


AREAS: dict[str, Callable[[], Iterator[Check]]] = {
    "machine": _machine,
    "GPU": _gpu,
    "packages": _packages,
    "TensorRT": _tensorrt,
    "plugin": _plugin,
    "network": _hub,
}
"""Area -> the checks of it, in the order of the report. A probe may raise; `collect` catches."""
