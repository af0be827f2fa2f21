"""Looks at this machine for `doctor`: one generator of checks per area.

Nothing heavy is imported here: what is installed is tried in processes of its own (`packages`).
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Literal

from ..core.device import FP8_FROM, driver_cuda, gpus, jetson_linux, needs_cuda_12
from ..core.errors import JmpDeployError, ToolchainError, install_command, one_line
from ..core.files import read_text
from ..core.packages import (
    PACKAGES,
    PAIR,
    TENSORRT,
    TENSORRT_RTX,
    Package,
    Trial,
    cure,
    importable,
    installed_version,
    try_imports,
    unmet,
)
from ..engine.known_faults import warnings

Status = Literal["ok", "warn", "missing", "unfit"]

MIN_DRIVER_CUDA13 = 580
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # TensorRT-RTX 1.7


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        area: group that it is shown in.
        name: what was looked for.
        status: "ok", "warn" (there, with a limit worth knowing), "missing", or "unfit" (there, and
            cannot be used).
        found: what was found, or why not; one line.
        fix: the command that mends it, or None where nothing needs mending or no command can.
    """

    area: str
    name: str
    status: Status
    found: str
    fix: str | None = None


EXPORT_NEEDS = tuple(package.name for package in PACKAGES if package.extra == "export")


def _output(command: Sequence[str], timeout: float = 15.0) -> str | None:
    """What a command prints, or None if it is absent, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


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
    memory = re.search(r"MemAvailable:\s+(\d+) kB", read_text(Path("/proc/meminfo")))
    if memory:
        free = int(memory[1]) / 2**20
        enough = free >= 4
        note = "" if enough else "; exporting and building want 4 GB: close something, or add swap"
        yield Check(area, "memory", "ok" if enough else "warn", f"{free:.1f} GB free{note}")
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    note = "" if disk >= 2 else "; an artifact takes up to 1 GB"
    yield Check(area, "disk", "ok" if disk >= 2 else "warn", f"{disk:.1f} GB free here{note}")


def _distribution() -> str:
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', read_text(Path("/etc/os-release")), re.MULTILINE)
    return name[1] if name else platform.release()


def _jetpack() -> Iterator[Check]:
    board, linux = read_text(Path("/proc/device-tree/model")), jetson_linux()
    if not linux:
        if linux is not None or "jetson" in board.lower():
            found = f"{board}, without a release in /etc/nv_tegra_release"
            yield Check("machine", "Jetson", "warn", found)
        return
    found = f"{board or 'Jetson'}, Jetson Linux {'.'.join(map(str, linux))}"
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
        formats = [("BF16", (8, 0)), ("FP8", FP8_FROM)]
        has = [name for name, first in formats if gpu.compute_capability >= first]
        lacks = "" if "FP8" in has else ", no FP8"
        found += f"; FP16, {', '.join([*has[:1], 'INT8', *has[1:]])}{lacks}"
        if gpu.compute_capability not in RTX_CAPABILITIES:
            found += f"; TensorRT-RTX: does not build for {major}.{minor}"
        yield Check("GPU", "GPU", "ok", found)
    driver = re.search(r"Module.*?\s(\d+\.[\d.]+)", read_text(Path("/proc/driver/nvidia/version")))
    served = driver_cuda()
    if driver or served:
        found = driver[1] if driver else "version unknown"
        found += " (CUDA {}.{})".format(*served) if served else ""
        old = needs_cuda_12() and jetson_linux() is None  # JetPack's are made for each other
        note = f"; PyTorch and TensorRT of CUDA 13 want {MIN_DRIVER_CUDA13}" if old else ""
        yield Check("GPU", "driver", "warn" if old else "ok", found + note)
    if gpus():
        return
    found = "none found: no engine can run here"
    if driver:
        found = "the kernel driver is loaded, but libcuda lists no GPU (in a container: start it "
        found += "with --gpus all)"
    yield Check("GPU", "GPU", "missing", found)


# --- packages ------------------------------------------------------------------------------------


def _packages() -> Iterator[Check]:
    trials = try_imports([package for package in PACKAGES if importable(package.module)])
    for package in PACKAGES:
        area, name = "packages", package.name
        if name not in trials:
            yield _missing(package)
            continue
        version = _version_of(package) or trials[name].version or "version unknown"
        if trials[name].trouble:
            yield _unfit(area, package, trials[name])
            continue
        status, problem, fix = _known_problem(package, version)
        yield Check(area, name, status, "; ".join(filter(None, (version, problem))), fix)


def _missing(package: Package) -> Check:
    found, fix = "not installed", install_command(package.extra)
    if package.optional:
        return Check("packages", package.name, "missing", f"{found} (optional: {package.optional})")
    if package.module in PAIR and jetson_linux() is not None:
        found += "; NVIDIA has torch and torchvision for each JetPack"
    return Check("packages", package.name, "missing", found, fix)


def _unfit(area: str, package: Package, trial: Trial) -> Check:
    version = _version_of(package) or "there"
    found = trial.trouble if version in trial.trouble else f"{version}; {trial.trouble}"
    return Check(area, package.name, "unfit", found, trial.fix)


def _version_of(package: Package) -> str | None:
    return next(filter(None, map(installed_version, package.distributions)), None)


def _known_problem(package: Package, version: str) -> tuple[Status, str, str | None]:
    """What is known to be wrong with a version that can be imported, and the command against it."""
    number = _version(version)
    if package.name == "PyTorch" and number and number < (2, 8):
        return "unfit", "the exporter needs 2.8 or newer", cure("torch")
    installed = [name for name in package.distributions if installed_version(name)]
    if len(installed) > 1:
        fix = f"python -m pip uninstall -y {' '.join(installed)} && python -m pip install "
        return "warn", f"{' and '.join(installed)} overwrite each other", fix + installed[0]
    for name in installed:
        if wanted := unmet(name):
            return "warn", f"it asks for {', '.join(wanted)}", cure(name)
    if package.name == "onnxruntime" and number and number < (1, 30):
        upgrade = sys.version_info >= (3, 11)
        note = "" if upgrade else ", which wants Python 3.11 or newer"
        fix = "python -m pip install 'onnxruntime>=1.30'" if upgrade else ""
        return "warn", f"INT8 calibration wants 1.30 or newer{note}", fix or None
    return "ok", "", None


# --- TensorRT ------------------------------------------------------------------------------------


def _tensorrt() -> Iterator[Check]:
    both = (TENSORRT, TENSORRT_RTX)
    trials = try_imports([package for package in both if importable(package.module)])
    for package in both:
        area, name, rtx = "TensorRT", package.name, package is TENSORRT_RTX
        fix: str | None = install_command(package.extra)
        if name not in trials:
            found = "not installed"
            if rtx and jetson_linux() is not None:
                found, fix = f"{found}; of no use here: it knows no GPU of a Jetson", None
            elif rtx and platform.machine() not in ("aarch64", "x86_64"):
                found, fix = f"{found}; pip has it for x86-64 and aarch64", None
            elif not rtx and jetson_linux() is not None:
                found = "not visible to this Python; JetPack's is the system's: make the virtual "
                found += "environment with --system-site-packages"
                if sys.prefix != sys.base_prefix and not _sees_system():
                    fix = "python3 -m venv --system-site-packages .venv && . .venv/bin/activate"
            elif not rtx and not gpus():
                found, fix = (
                    "not installed; of no use here: it builds and runs on its GPU only",
                    None,
                )
            yield Check(area, name, "missing", found, fix)
            continue
        version = trials[name].version
        if trials[name].trouble:
            yield _unfit(area, package, trials[name])
        elif not rtx and _version(version) < (10,):
            # a Jetson's comes with its JetPack, see there
            found = f"{version}: before 10.0, without IPluginV3"
            yield Check(area, name, "unfit", found, None if jetson_linux() is not None else fix)
        else:
            here = ["sm_{}{}".format(*gpu.compute_capability) for gpu in gpus()]
            known = warnings("rtx" if rtx else "tensorrt", version, here)
            notes = "; ".join([version, *(text.partition(": ")[2] for text in known)])
            yield Check(area, name, "warn" if known else "ok", notes)


def _sees_system() -> bool:
    setting = r"^include-system-site-packages\s*=\s*true"
    return bool(
        re.search(
            setting, read_text(Path(f"{sys.prefix}/pyvenv.cfg")), re.MULTILINE | re.IGNORECASE
        )
    )


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
    except ToolchainError as error:
        fix = install_command("nvcc")
        if "NvInfer" in error.message:  # the wheels of TensorRT-RTX's extra have the headers
            jetson = jetson_linux() is not None
            fix = (
                "sudo apt-get install libnvinfer-headers-dev" if jetson else install_command("rtx")
            )
        yield Check("plugin", "plugin toolchain", "missing", error.message, fix)
        return
    text = f"nvcc {found.cuda_version} ({found.nvcc}), headers of TensorRT {found.tensorrt_version}"
    yield Check("plugin", "plugin toolchain", "ok", f"{text} ({found.headers})")


def _cache() -> Iterator[Check]:
    from ..core.paths import cache_dir
    from ..plugin.library import plugin_library, serving_words

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
        yield Check("plugin", "serving stacks", "ok", serving_words(library))


# --- network -------------------------------------------------------------------------------------


def _hub() -> Iterator[Check]:
    """Whether timm could fetch pretrained weights."""
    area, name = "network", "model hub"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check(area, name, "warn", "not asked: HF_HUB_OFFLINE is set; its cache is used")
        return
    if not importable("huggingface_hub"):
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
