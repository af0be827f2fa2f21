"""Build, find and load the TensorRT plugin.

The plugin is compiled on the machine that uses it, by one nvcc command, into a cache of the user,
the first time it is needed. `JMP_DEPLOY_PLUGIN` names a prebuilt library instead. Nothing here
imports TensorRT; `load_plugin` takes the module that its caller has.

Environment: JMP_DEPLOY_CACHE (where to build), JMP_DEPLOY_PLUGIN (a library to take instead), and
what toolchain.py reads.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.device import gpus
from ..core.errors import EngineError, ToolchainError
from ..core.paths import cache_dir, data_dir
from .toolchain import (
    ARCHITECTURES,
    DEVICES,
    Toolchain,
    announce,
    check_architectures,
    compilable,
    compile_time,
    cuda_architectures,
    find_cross_toolchain,
    find_toolchain,
    known_architectures,
    newer_than_driver,
    run_nvcc,
)

__all__ = [
    "ARCHITECTURES",
    "Toolchain",
    "build_plugin",
    "cuda_architectures",
    "find_toolchain",
    "load_plugin",
    "plugin_info",
    "plugin_library",
    "sources_dir",
]

NAME = "JMPTokenReduce"
VERSIONS = ("1", "2")  # with `index` as a fourth output: 2
NAMESPACES = ("", "jmp_deploy")
LIBRARY = "libjmp_deploy_plugin.so"
SOURCES = (
    *("token_reduce_kernel.cu", "token_reduce_plugin.cpp"),
    *("tensorrt_log.cpp", "tensorrt_registry.cpp"),
)
OTHER_SOURCES = (  # what these include; part of the hash
    *(f"token_reduce_{part}.cuh" for part in ("common", "warp", "measure", "tiles", "rate")),
    *(f"token_reduce_{part}.cuh" for part in ("received", "select", "match", "merge")),
    *("token_reduce_resident.cuh", "token_reduce_reference.cuh"),
    *("token_reduce_kernel.h", "token_reduce_plugin.h", "tensorrt_log.h", "tensorrt_layout.h"),
    "exports.map",
)
WITHOUT_GPU = {"x86_64": ("75", "80"), "aarch64": ("87",)}
"""What is compiled where no GPU is: little, since nothing here runs it. An ahead-of-time builder
only asks the plugin for shapes and types, and a machine with a GPU compiles for that GPU. A library
that is carried to one all the same has machine code for 7.5 and 8.x (for Orin), and PTX of the last
for what came after."""
FLAGS = (
    *("-shared", "-std=c++17", "-O3"),
    "-cudart=static",  # loads on a machine without a driver: ahead-of-time builds
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden",
    *("-Xlinker=--version-script=exports.map", "-Xlinker=--no-undefined"),
)


# --- Where things are ----------------------------------------------------------------------------


def sources_dir() -> Path:
    """The plugin's sources: beside the package in a checkout, inside it in a wheel.

    Raises:
        ToolchainError: neither is there.
    """
    folder = data_dir("plugins", "_plugin_src")
    if (folder / SOURCES[0]).is_file():
        return folder
    raise ToolchainError(
        f"the plugin's sources are missing: no {SOURCES[0]} in {folder}", "reinstall jmp_deploy"
    )


# --- Building ------------------------------------------------------------------------------------


def build_plugin(
    archs: Sequence[str] | None = None,
    *,
    device: str | None = None,
    force: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """Compile the plugin into the cache, unless that was done before.

    Args:
        archs: GPU architectures such as "86" or "sm_86", or ("all",) for all that the compiler
            knows of ARCHITECTURES; None for what this machine needs: its GPUs, or WITHOUT_GPU.
            PTX of the highest is always added.
        device: one of DEVICES, for which is compiled instead of for this machine; its GPUs are
            then what `archs` None stands for.
        force: compile again.
        on_progress: called with one line of text before and after the compilation, with how long
            it takes; without it the line goes to stderr.

    Returns:
        Path of the library. Several processes may build at once: the file appears whole.

    Raises:
        ToolchainError: no toolchain, an unknown architecture, a compile error or no writable cache.
    """
    if device is not None:
        toolchain = find_cross_toolchain(DEVICES[device])
        archs = DEVICES[device].archs if archs is None else archs
    else:
        toolchain = find_toolchain()
        if archs is None and not force and (fitting := _find_fitting(toolchain)):
            return fitting
    chosen = check_architectures(toolchain.nvcc, _needed(toolchain) if archs is None else archs)
    library = _cached_library(toolchain, chosen)
    if library.is_file() and not force:
        return library
    say = on_progress or announce
    say(
        f"compiling the TensorRT plugin once, for {toolchain.machine}, sm_{', sm_'.join(chosen)} "
        f"(CUDA {toolchain.cuda_version}, TensorRT headers {toolchain.tensorrt_version}): "
        f"{compile_time(len(chosen))}"
    )
    start = time.monotonic()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            built = Path(folder) / LIBRARY
            _compile(toolchain, chosen, built, library.with_name("build.log"))
            info = _describe(toolchain, chosen)
            sidecar = built.with_suffix(".json")
            sidecar.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
            sidecar.replace(library.with_suffix(".json"))
            built.replace(library)
    except OSError as error:
        raise ToolchainError(
            f"cannot write the plugin's cache {library.parent}: {error.strerror or error}",
            "set JMP_DEPLOY_CACHE to a folder that you can write",
        ) from error
    say(f"compiled in {time.monotonic() - start:.0f} s: {library}")
    return library


def plugin_library(*, build: bool = True) -> Path:
    """The plugin to load: JMP_DEPLOY_PLUGIN if set, else a cached one that has machine code for
    the GPUs here, else a new build.

    Without a compiler, a library that was built earlier from the same sources on this kind of
    machine is used, if these GPUs can run it.

    Raises:
        ToolchainError: none there and `build` is False, or it cannot be built; or the file that
            JMP_DEPLOY_PLUGIN names is not this plugin, or not for this GPU.
    """
    if given := os.environ.get("JMP_DEPLOY_PLUGIN"):
        return _check_prebuilt(Path(given).expanduser().absolute())
    try:
        toolchain = find_toolchain()
    except ToolchainError:
        for library, info in _cached():
            ours = (info.get("sources"), info.get("machine")) == (_hash(), platform.machine())
            if ours and not _cannot_run(info):
                return library
        raise
    if fitting := _find_fitting(toolchain):
        return fitting
    if build:
        return build_plugin()
    here = " and ".join(f"sm_{arch}" for arch in _gpu_architectures())
    raise ToolchainError(
        f"the TensorRT plugin is not built{here and f' for {here}'}",
        "python -m jmp_deploy plugin build",
    )


def prebuilt_for(machine: str, cuda: int | None = None) -> Path | None:
    """A cached library of these sources for a kind of machine ("aarch64"), and of a major version
    of CUDA if one is named, that for the most architectures; None where none was built."""
    found = [
        library
        for library, info in _cached()
        if (info.get("sources"), info.get("machine")) == (_hash(), machine)
        and cuda in (None, int(str(info.get("cuda", "0")).split(".")[0]))
    ]
    return found[-1] if found else None


def plugin_info(path: Path) -> dict[str, Any]:
    """What is known of a library: path, sha256, bytes; for one that we built also sources (a
    hash), architectures, cuda, tensorrt_headers, machine, recipe (a hash of all that goes into it
    but the architectures), built (time, UTC).

    Raises:
        ToolchainError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ToolchainError(f"cannot read the plugin {path}: {error.strerror or error}") from error
    digest = hashlib.sha256(content).hexdigest()
    return {"path": str(path), "sha256": digest, "bytes": len(content), **_sidecar(path)}


def serving_words(library: Path | None) -> str:
    """In one line, how serving stacks load the plugin; None: the library is yet to be built."""
    path = str(library) if library else "what `python -m jmp_deploy plugin build` makes"
    return (
        f"dlopen registers it: {path} (Triton: --backend-config=tensorrt,plugins=; nvinfer: "
        "custom-lib-path=; others: docs/serving.md)"
    )


# --- Loading -------------------------------------------------------------------------------------

_loaded: dict[str, Path] = {}  # name of the TensorRT module -> library that it holds


def load_plugin(trt: Any, path: Path) -> None:
    """Load the library into the registry of `trt` (tensorrt or tensorrt_rtx), once per process.

    Raises:
        EngineError: it cannot be loaded, or does not register our creators.
    """
    path = path.absolute()
    held = _loaded.get(trt.__name__)
    if held == path:
        return
    if held is not None:
        raise EngineError(
            f"{trt.__name__} already holds the plugin {held}; it cannot load {path} as well",
            "use one plugin per process",
        )
    if not path.is_file():
        raise EngineError(
            f"the TensorRT plugin {path} does not exist", "python -m jmp_deploy plugin build"
        )
    registry = trt.get_plugin_registry()
    if _missing_creators(registry):
        try:
            registry.load_library(str(path))
        except Exception as error:  # the bindings raise types of their own
            raise EngineError(f"{trt.__name__} cannot load the plugin {path}: {error}") from error
    missing = _missing_creators(registry)
    if missing:
        names = " and ".join(f'{version} in the namespace "{space}"' for version, space in missing)
        raise EngineError(
            f"{trt.__name__} {trt.__version__} loaded {path}, but {NAME} is not registered: "
            f"version {names}",
            "python -m jmp_deploy plugin build --force; TensorRT's log above may say more",
        )
    _loaded[trt.__name__] = path


def _missing_creators(registry: Any) -> list[tuple[str, str]]:
    """(version, namespace), read off the list: `get_creator` logs an error for each that is not
    there."""
    ours = {
        (creator.plugin_version, creator.plugin_namespace)
        for creator in registry.all_creators
        if creator.name == NAME
    }
    return [each for each in itertools.product(VERSIONS, NAMESPACES) if each not in ours]


# --- Which library fits the GPUs here ------------------------------------------------------------


def _gpu_architectures() -> list[str]:
    """Of the GPUs here, such as ["86"]; empty without one."""
    return sorted({"{}{}".format(*gpu.compute_capability) for gpu in gpus()}, key=int)


def _needed(toolchain: Toolchain) -> list[str]:
    """What to compile for on this machine."""
    known = known_architectures(toolchain.nvcc)
    if here := _gpu_architectures():
        return sorted({compilable(arch, known) for arch in here}, key=int)
    usual = WITHOUT_GPU.get(platform.machine(), WITHOUT_GPU["x86_64"])
    return [arch for arch in usual if arch in known] or [min(known, key=int)]


def _find_fitting(toolchain: Toolchain) -> Path | None:
    """A cached library that this toolchain would make, with all that the GPUs here need. Without
    a GPU any is as good as another."""
    known = known_architectures(toolchain.nvcc)
    wanted = [(arch, compilable(arch, known)) for arch in _gpu_architectures()]
    recipe = _recipe(toolchain)
    for library, info in _cached():
        if info.get("recipe") != recipe:
            continue
        made_for = info["architectures"]
        # PTX, which a GPU newer than the compiler needs, is that of the last.
        if all(best in (made_for if best == arch else made_for[-1:]) for arch, best in wanted):
            return library
    return None


def _cannot_run(info: dict[str, Any]) -> str | None:
    """Why a library cannot run here; None where it can, or nothing is known of it."""
    if newer := newer_than_driver(str(info.get("cuda", ""))):
        return f"was compiled by {newer}"
    made_for = [int(arch) for arch in info.get("architectures", ())]
    for arch in map(int, _gpu_architectures() if made_for else ()):
        # Machine code runs on later GPUs of its generation, but for Orin: there only its own.
        same = {made for made in made_for if made // 10 == arch // 10 and made <= arch}
        related = {made for made in same if made == arch or 87 not in (made, arch)}
        if not related and arch < made_for[-1]:  # neither machine code nor PTX
            return (
                f"is for {', '.join(f'sm_{made}' for made in made_for)}, the GPU here is sm_{arch}"
            )
    return None


def _cached() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Libraries in the cache and their sidecars; those for fewer architectures first."""
    found = [(path, _sidecar(path)) for path in cache_dir().glob(f"plugins/*/{LIBRARY}")]
    yield from sorted(found, key=lambda each: (len(each[1].get("architectures", ())), each[0]))


def _sidecar(library: Path) -> dict[str, Any]:
    """What was written beside a library when it was built; empty if that is gone or damaged."""
    try:
        info = json.loads(library.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


# --- The build itself ----------------------------------------------------------------------------


def _gencodes(archs: Sequence[str]) -> list[str]:
    """Machine code for each, and PTX of the highest for what comes after it."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def _compile(toolchain: Toolchain, archs: Sequence[str], output: Path, log: Path) -> None:
    options = [*FLAGS, *_gencodes(archs), "-isystem", str(toolchain.headers), *SOURCES]
    options += ["-o", str(output)]
    run_nvcc(toolchain.nvcc, options, sources_dir(), log, "the plugin", toolchain.options)


def _cached_library(toolchain: Toolchain, archs: Sequence[str]) -> Path:
    return cache_dir() / "plugins" / _key(_recipe(toolchain), *_gencodes(archs)) / LIBRARY


def _recipe(toolchain: Toolchain) -> str:
    """Hash of all that goes into a library but the architectures."""
    versions = (toolchain.cuda_version, toolchain.tensorrt_version, str(toolchain.cxx))
    return _key(_hash(), *FLAGS, toolchain.machine, *versions)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _hash() -> str:
    """sha256 of the sources, names and contents."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *OTHER_SOURCES):
        content = (sources_dir() / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _describe(toolchain: Toolchain, archs: Sequence[str]) -> dict[str, Any]:
    return {
        "sources": _hash(),
        "architectures": list(archs),
        "cuda": toolchain.cuda_version,
        "tensorrt_headers": toolchain.tensorrt_version,
        "machine": toolchain.machine,
        "recipe": _recipe(toolchain),
        "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _check_prebuilt(path: Path) -> Path:
    hint = "set JMP_DEPLOY_PLUGIN to a library from `plugin build`, or unset it"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ToolchainError(f"JMP_DEPLOY_PLUGIN: {path}: {error.strerror}", hint) from error
    if content[:4] != b"\x7fELF" or b"\0getCreators\0" not in content:
        raise ToolchainError(
            f"JMP_DEPLOY_PLUGIN: {path} is not a TensorRT plugin: expected a shared library (ELF) "
            "that exports getCreators",
            hint,
        )
    machines = {"x86_64": 62, "aarch64": 183}  # e_machine of the ELF header
    found = int.from_bytes(content[18:20], "little")
    if found != machines.get(platform.machine(), found):
        name = {number: name for name, number in machines.items()}.get(found, str(found))
        raise ToolchainError(
            f"JMP_DEPLOY_PLUGIN: {path} is for {name}, this machine is {platform.machine()}", hint
        )
    if reason := _cannot_run(_sidecar(path)):
        raise ToolchainError(f"JMP_DEPLOY_PLUGIN: {path} {reason}", hint)
    return path
