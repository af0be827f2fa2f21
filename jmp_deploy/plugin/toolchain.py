"""Find what compiles the plugin: nvcc, the host compiler, the TensorRT headers.

Environment: JMP_NVCC (which nvcc), CUDA_HOME, CUDA_PATH, CXX (host compiler), JMP_AARCH64_CUDA (a
folder with the CUDA runtime of aarch64, to compile for a Jetson), TENSORRT_ROOT (root
of a TensorRT installation). A value that names the tool itself (JMP_NVCC, TENSORRT_ROOT) must be
right; the others are places to look in.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ..core.device import cpu_count, driver_cuda
from ..core.errors import ToolchainError, install_command, say

# Those of a release; plugins/CMakeLists.txt has the same list. 87 is Orin, 100 B200, 110 Thor.
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "110", "120")
ALL = "all"  # stands for ARCHITECTURES where architectures are named
COMPILE_SECONDS = 900  # two desktop cores take seconds; past this the compiler hangs
# Processor seconds of a compilation: the host's part, and that of each architecture. Measured with
# CUDA 13.0 on an x86-64 for 1, 2, 3 and 9 architectures.
HOST_WORK, ARCHITECTURE_WORK = 4.0, 10.0
OLDEST_CUDA = (12, 2)
OLDEST_TENSORRT = (10, 0)

CROSS_CXX, CROSS_APT = "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"
AARCH64_TARGETS = ("aarch64-linux", "sbsa-linux")
# By major version of CUDA, where to get them: the wheels of CUDA 12 have neither nvcc nor a static
# runtime (looked into: 12.6 and 12.9).
NVCC_OF = {
    12: "of NVIDIA's toolkit or Debian's nvidia-cuda-toolkit: the wheels of CUDA 12 have none",
    13: "such as that of `pip install 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*'`",
}
RUNTIME_OF = {
    12: "set JMP_AARCH64_CUDA to a folder with it and libcudadevrt.a: copied from the device's "
    "/usr/local/cuda/targets/aarch64-linux/lib, of NVIDIA's cuda-cross-aarch64, or of Debian's "
    "nvidia-cuda-dev for arm64 (dpkg -x)",
    13: "python -m pip download --no-deps --only-binary=:all: --platform manylinux2014_aarch64 "
    "'nvidia-cuda-runtime=={}.*', unzip the wheel, and set JMP_AARCH64_CUDA to that folder",
}

INSTALL_HEADERS = (
    "pip install kernel-lens (its wheel has them), or apt install libnvinfer-headers-dev, "
    "or set TENSORRT_ROOT"
)


@dataclass(frozen=True)
class Toolchain:
    """What compiles the plugin here.

    Attributes:
        nvcc: the CUDA compiler, proven to run.
        cuda_version: its release and build, "13.2.86".
        cxx: the host compiler that nvcc calls.
        headers: the folder of NvInfer.h.
        tensorrt_version: of those headers, "10.14.1".
        machine: that the library is for, as `platform.machine` calls it.
        options: that nvcc needs to compile for another machine than this.
    """

    nvcc: Path
    cuda_version: str
    cxx: Path
    headers: Path
    tensorrt_version: str
    machine: str = platform.machine()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A Jetson that a library can be compiled for on a workstation.

    Attributes:
        title: what it runs.
        archs: its GPUs.
        cuda: major version of the CUDA that its driver takes.
    """

    title: str
    archs: tuple[str, ...]
    cuda: int


DEVICES = {
    "thor": Device("JetPack 7 (Thor; Orin from 7.2 on)", ("87", "110"), 13),
    # the runtime of CUDA 13, which the library carries, does not start on JetPack 6's driver
    "orin": Device("JetPack 6 (Orin)", ("87",), 12),
}


def find_toolchain() -> Toolchain:
    """Find nvcc, the host compiler and the TensorRT headers.

    Raises:
        ToolchainError: one is missing, too old or does not run; the hint says how to get it.
    """
    nvcc, cuda_version = find_nvcc()
    headers, tensorrt_version = _find_headers()
    return Toolchain(nvcc, cuda_version, find_cxx(), headers, tensorrt_version)


def find_cross_toolchain(device: Device) -> Toolchain:
    """What compiles for a Jetson here: on aarch64 the usual, elsewhere a cross compiler and the
    CUDA runtime of aarch64, looked for in JMP_AARCH64_CUDA and beside nvcc.

    Raises:
        ToolchainError: something is missing, or nvcc is of a CUDA that the device does not run.
    """
    found = find_toolchain()
    if _numbers(found.cuda_version)[0] != device.cuda:
        raise ToolchainError(
            f"{device.title} needs the compiler of CUDA {device.cuda}, "
            f"{found.nvcc} is of {found.cuda_version}",
            f"set JMP_NVCC to an nvcc of CUDA {device.cuda}, {NVCC_OF[device.cuda]}",
        )
    if platform.machine() == "aarch64":
        return found
    cxx = shutil.which(CROSS_CXX)
    if cxx is None:
        raise ToolchainError(f"no {CROSS_CXX}: it links for the device", f"apt install {CROSS_APT}")
    root = _cuda_root(found.nvcc)
    given = os.environ.get("JMP_AARCH64_CUDA")
    folders = [Path(given)] if given else [root / "targets" / name for name in AARCH64_TARGETS]
    libraries = [
        library.parent
        for folder in folders
        for library in sorted(folder.glob("**/libcudart_static.a"))
        if _is_aarch64(library)
    ]
    if not libraries:
        where = " or ".join(map(str, folders))
        raise ToolchainError(
            f"no CUDA runtime of aarch64: no libcudart_static.a for it below {where}",
            RUNTIME_OF[device.cuda].format(".".join(found.cuda_version.split(".")[:2])),
        )
    # A toolkit of one target has its headers there alone; those of both are the same.
    includes = f"-I{root / 'include'}"
    options = ("-ccbin", cxx, includes, f"-L{libraries[0]}")
    return replace(found, cxx=Path(cxx), machine="aarch64", options=options)


def find_nvcc() -> tuple[Path, str]:
    """The CUDA compiler, proven to run, and its version, "13.2.86"; for who needs no headers.

    Raises:
        ToolchainError: none works, or JMP_NVCC names one that does not.
    """
    if given := os.environ.get("JMP_NVCC"):
        version = _nvcc_version(Path(given))
        if isinstance(version, str):
            return Path(given), version
        raise ToolchainError(f"JMP_NVCC: {version[0]}", "correct or unset JMP_NVCC")
    rejected = []
    seen = set()
    for nvcc in _nvcc_candidates():
        if nvcc in seen or not nvcc.is_file():
            continue
        seen.add(nvcc)
        version = _nvcc_version(nvcc)
        if isinstance(version, str):
            return nvcc, version
        rejected.append(version[0])
    found = "; ".join(rejected) if rejected else "none found"
    raise ToolchainError(f"no usable CUDA compiler (nvcc): {found}", _nvcc_hint())


def cuda_architectures(nvcc: Path) -> list[str]:
    """The default architectures that this nvcc knows, ascending, such as ["75", ..., "120"]."""
    known = known_architectures(nvcc)
    return [arch for arch in ARCHITECTURES if arch in known]


# --- nvcc and the host compiler ------------------------------------------------------------------


def _nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield Path(root) / "bin" / "nvcc"
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    roots = Path("/usr/local").glob("cuda*")
    yield from sorted((root / "bin" / "nvcc" for root in roots), key=_version_in_name, reverse=True)
    for package in _package_dirs("nvidia"):  # the cuda-toolkit wheels
        yield from sorted(package.glob("cu*/bin/nvcc"), key=_version_in_name, reverse=True)


def _version_in_name(nvcc: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", nvcc.parent.parent.name)]


def _nvcc_version(nvcc: Path) -> str | tuple[str]:
    """The version of an nvcc that works, or (what is wrong with it,)."""
    try:
        text = _output([str(nvcc), "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        return (f"{nvcc} does not run ({_reason(error)})",)
    match = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if match is None:
        return (f"{nvcc} does not tell its version",)
    version = match[1]
    if _numbers(version) < OLDEST_CUDA:
        return (f"{nvcc} is of CUDA {version}, expected {_dotted(OLDEST_CUDA)} or newer",)
    if newer := newer_than_driver(version):
        return (f"{nvcc} is of {newer}",)
    # A wheel of nvcc alone lacks what it compiles against.
    root = nvcc.parent.parent
    if root.parent.name == "nvidia" and not (root / "lib" / "libcudart_static.a").is_file():
        return (f"{nvcc} has no CUDA runtime beside it (libcudart_static.a)",)
    return version


def newer_than_driver(cuda_version: str) -> str | None:
    """What keeps code of this CUDA ("13.0.88") from running here, as far as the driver goes, or
    None: its runtime, which is linked in, starts on no driver of an earlier major version."""
    served, major = driver_cuda(), re.match(r"\d+", cuda_version)
    if served is None or major is None or int(major[0]) <= served[0]:
        return None
    return f"CUDA {cuda_version}, the driver serves CUDA {_dotted(served)}"


def known_architectures(nvcc: Path) -> set[str]:
    """Every architecture that this nvcc compiles for, such as {"75", ...}.

    Raises:
        ToolchainError: it does not run.
    """
    try:
        return set(re.findall(r"sm_(\d+)\b", _output([str(nvcc), "--list-gpu-code"])))
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"{nvcc} does not run ({_reason(error)})", _nvcc_hint()) from error


def compilable(arch: str, known: set[str]) -> str:
    """What to compile for a GPU: `arch`, or where no compiler is new enough the newest before it,
    whose PTX the driver compiles.

    Args:
        arch: compute capability of the GPU such as "90".
        known: `known_architectures` of the compiler.

    Raises:
        ToolchainError: the GPU is older than all of them.
    """
    older = [int(other) for other in known if int(other) <= int(arch)]
    if not older:
        raise ToolchainError(
            f"the CUDA compiler does not compile for this GPU (sm_{arch})",
            f"it knows {', '.join(sorted(known, key=int))}; set CUDA_HOME to an older CUDA",
        )
    return str(max(older))


def check_architectures(nvcc: Path, archs: Sequence[str]) -> list[str]:
    """`archs` ("86", "sm_86", or ALL) as numbers, ascending, each once.

    Raises:
        ToolchainError: this nvcc does not know one of them.
    """
    if list(archs) == [ALL]:
        return cuda_architectures(nvcc)
    known = known_architectures(nvcc)
    chosen = {arch.lower().removeprefix("sm_").removeprefix("compute_") for arch in archs}
    unknown = sorted(chosen - known)
    if unknown or not chosen:
        raise ToolchainError(
            f"unknown GPU architecture {', '.join(unknown) or '(none given)'} for {nvcc}",
            f"it knows {', '.join(sorted(known, key=int))}, or {ALL} for those of a release",
        )
    return sorted(chosen, key=int)


def find_cxx() -> Path:
    """The host compiler: CXX, else g++ or c++ on PATH.

    Raises:
        ToolchainError: there is none.
    """
    wanted = os.environ.get("CXX", "").split()
    for name in ([wanted[-1]] if wanted else []) + ["g++", "c++"]:
        if path := shutil.which(name):
            return Path(path)
    raise ToolchainError("no C++ compiler: g++ not found", "apt install g++ (or set CXX)")


def announce(line: str) -> None:
    """Tells of a compilation, which makes a command take long: on stderr, results go to stdout."""
    say(line)


def compile_time(architectures: int) -> str:
    """How long a compilation takes here, in words, before it starts."""
    cores = cpu_count()
    rounds = -(-architectures // cores)
    seconds = HOST_WORK + ARCHITECTURE_WORK * rounds
    noun = "core that is" if cores == 1 else "cores that are"
    return f"about {5 * round(seconds / 5)} s on {cores} {noun} free, more on a small board"


def _cuda_root(nvcc: Path) -> Path:
    """The folder of a CUDA, by its compiler: nvcc on PATH may be a script."""
    try:
        done = subprocess.run(
            [str(nvcc), "--dryrun", "-x", "cu", os.devnull, "-c"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"{nvcc} does not run ({_reason(error)})", _nvcc_hint()) from error
    here = re.search(r"^#\$ _HERE_=(.+)$", done.stderr, re.MULTILINE)
    return (Path(here[1]) if here else nvcc.resolve().parent).parent


def _is_aarch64(archive: Path) -> bool:
    """Whether the first object of a static library is of that machine."""
    with archive.open("rb") as file:
        head = file.read(1 << 20)
    at = head.find(b"\x7fELF")
    return at >= 0 and head[at + 18 : at + 20] == b"\xb7\0"


def nvcc_command(nvcc: Path) -> list[str]:
    """nvcc with what every call needs: the folder of its own CUDA runtime, and CXX.

    The cuda-toolkit wheels keep libraries in lib, but their nvcc.profile names lib64: without this
    nothing links. plugins/CMakeLists.txt does the same.
    """
    folder = nvcc.resolve().parent.parent / "lib"
    libraries = [f"-L{folder}"] if (folder / "libcudart_static.a").is_file() else []
    host = ["-ccbin", str(find_cxx())] if os.environ.get("CXX") else []
    return [str(nvcc), *libraries, *host]


def run_nvcc(
    nvcc: Path,
    options: Sequence[str],
    folder: Path,
    log: Path,
    what: str,
    cross: Sequence[str] = (),
) -> None:
    """Compiles; everything that nvcc says goes to `log`.

    Args:
        nvcc: the compiler.
        options: sources and options; `nvcc_command`'s come first.
        folder: to run it in.
        what: is compiled, for the message: "the plugin".
        cross: options of a toolchain for another machine, in place of this machine's.

    Raises:
        ToolchainError: with its first errors; or it does not end.
    """
    first = [str(nvcc), *cross] if cross else nvcc_command(nvcc)
    command = [*first, f"--threads={cpu_count()}", *options]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMPILE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"nvcc did not end within {COMPILE_SECONDS} s") from error
    log.write_text(" ".join(command) + "\n\n" + done.stdout, encoding="utf-8")
    if done.returncode != 0:
        telling = re.compile("error|fatal|cannot find|undefined reference", re.IGNORECASE)
        lines = [line for line in done.stdout.splitlines() if telling.search(line)]
        shown = "\n".join((lines or done.stdout.splitlines()[-3:])[:3])
        raise ToolchainError(f"{what} does not compile:\n{shown}", f"full log: {log}")


def find_disassembler(nvcc: Path) -> Path | None:
    """cuobjdump: beside this nvcc, on PATH, or in a package that carries one (Triton); or None.

    It calls nvdisasm, which must lie beside it.
    """
    folders = [nvcc.parent]
    if on_path := shutil.which("cuobjdump"):
        folders.append(Path(on_path).resolve().parent)
    folders += sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    for package in _package_dirs("nvidia"):
        folders += sorted(package.glob("cu*/bin"), reverse=True)
    folders += [package / "backends/nvidia/bin" for package in _package_dirs("triton")]
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return folder / "cuobjdump"
    return None


# --- TensorRT headers ----------------------------------------------------------------------------


def _find_headers() -> tuple[Path, str]:
    if root := os.environ.get("TENSORRT_ROOT"):
        for folder in (Path(root) / "include", Path(root)):
            if (folder / "NvInfer.h").is_file():
                return folder, headers_version(folder)
        raise ToolchainError(
            f"TENSORRT_ROOT is {root}, but {Path(root) / 'include' / 'NvInfer.h'} does not exist",
            "set TENSORRT_ROOT to the folder that holds include/NvInfer.h, or unset it",
        )
    too_old: ToolchainError | None = None
    for folder in _header_candidates():
        if (folder / "NvInfer.h").is_file():
            try:
                return folder, headers_version(folder)
            except ToolchainError as error:
                too_old = too_old or error
    raise too_old or ToolchainError("no TensorRT headers: NvInfer.h not found", INSTALL_HEADERS)


def _header_candidates() -> Iterator[Path]:
    yield Path(f"/usr/include/{platform.machine()}-linux-gnu")
    yield Path("/usr/include")
    yield Path("/usr/local/tensorrt/include")
    for package in _package_dirs("kernel_lens"):
        yield package / "include" / "tensorrt"


def headers_version(folder: Path) -> str:
    """Version of the headers in `folder`, "10.14.1"; raises for one too old or unreadable."""
    file = folder / "NvInferVersion.h"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ToolchainError(
            f"{file}: {error.strerror}, expected beside NvInfer.h", INSTALL_HEADERS
        ) from error
    macros = dict(
        re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+\(?(\w+)\)?", text, re.MULTILINE)
    )
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = f"NV_TENSORRT_{part}"
        for _ in range(len(macros)):  # defined through other macros since 10.8; ends on a cycle
            value = macros.get(value, value)
        if not value.isdigit():
            raise ToolchainError(f"{file}: no number for NV_TENSORRT_{part}", INSTALL_HEADERS)
        parts.append(int(value))
    if tuple(parts) < OLDEST_TENSORRT:
        raise ToolchainError(
            f"{file}: TensorRT {_dotted(parts)}, expected {_dotted(OLDEST_TENSORRT)} or newer",
            INSTALL_HEADERS,
        )
    return _dotted(parts)


def _nvcc_hint() -> str:
    return f"{install_command('nvcc')} (or set CUDA_HOME, or JMP_NVCC)"


# --- Small things --------------------------------------------------------------------------------


def _package_dirs(name: str) -> list[Path]:
    """Folders of an installed package, without importing it."""
    spec = find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(str(number) for number in numbers)
