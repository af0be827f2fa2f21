"""The plugin's build, its cache and its errors; and the library in a real plugin registry.

Nothing here needs a GPU. What touches TensorRT runs in a process of its own: a crash there is a
failed test, not a dead pytest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jmp_deploy.core.device import Gpu
from jmp_deploy.core.errors import EngineError, ToolchainError
from jmp_deploy.core.paths import cache_dir
from jmp_deploy.jmp import kernel
from jmp_deploy.plugin import library as plugin
from jmp_deploy.plugin import toolchain

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = ("JMP_NVCC", "CUDA_HOME", "CUDA_PATH", "CXX", "TENSORRT_ROOT")


@pytest.fixture(autouse=True)
def no_prebuilt_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JMP_DEPLOY_PLUGIN", raising=False)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is found where; the real build may use what this machine's user set."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def library() -> Path:
    """The real plugin, from the user's own cache: compiled once, not once per run."""
    try:
        plugin.find_toolchain()
    except ToolchainError as error:
        pytest.skip(f"no toolchain for the plugin: {error.message}")
    return plugin.build_plugin()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JMP_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- Stand-ins -----------------------------------------------------------------------------------

NVCC_SCRIPT = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.4, V{version}";;
  --dryrun) ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_90a\\n';;
  *) echo "$@" >> {count}
     while [ $# -gt 1 ]; do shift; done
     {action};;
esac
"""


def fake_nvcc(
    folder: Path, action: str = 'printf "built" > "$1"', version: str = "12.4.99"
) -> Path:
    """An nvcc that notes its compilations in FOLDER/count and runs `action` on the output."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    count = folder / "count"
    path.write_text(NVCC_SCRIPT.format(version=version, count=count, action=action))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def compilations(nvcc: Path) -> int:
    count = nvcc.with_name("count")
    return len(count.read_text().splitlines()) if count.exists() else 0


def headers(root: Path, text: str) -> Path:
    include = root / "include"
    include.mkdir(parents=True)
    (include / "NvInfer.h").touch()
    (include / "NvInferVersion.h").write_text(text)
    return root


def version_text(major: int, minor: int, patch: int) -> str:
    return "".join(
        f"#define NV_TENSORRT_{name} {value} //!< a comment\n"
        for name, value in (("MAJOR", major), ("MINOR", minor), ("PATCH", patch))
    )


@pytest.fixture
def fake_tools(
    tmp_path: Path, cache: Path, clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A toolchain that is found at once and compiles in no time, and no GPU; returns its nvcc."""
    have_gpus(monkeypatch)
    nvcc = fake_nvcc(tmp_path / "cuda")
    monkeypatch.setenv("JMP_NVCC", str(nvcc))
    root = headers(tmp_path / "tensorrt", version_text(10, 3, 0))
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    return nvcc


def have_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    gpus = tuple(Gpu("a GPU", capability, 8 << 30) for capability in capabilities)
    monkeypatch.setattr(plugin, "gpus", lambda: gpus)


# --- The driver ----------------------------------------------------------------------------------


def test_a_compiler_newer_than_the_driver_is_passed_over(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA 13 compiles has CUDA 13's runtime linked in: it fails in its first launch there."""
    newer = fake_nvcc(tmp_path / "newer", version="13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(newer.parent.parent))
    for served, refused in (((12, 6), True), ((13, 0), False), (None, False)):
        monkeypatch.setattr(toolchain, "driver_cuda", lambda served=served: served)
        monkeypatch.setenv("JMP_NVCC", str(newer))
        if not refused:
            assert toolchain.find_nvcc() == (newer, "13.0.88")
            continue
        with pytest.raises(ToolchainError, match=r"CUDA 13\.0\.88, the driver serves CUDA 12\.6"):
            toolchain.find_nvcc()
        monkeypatch.setenv("JMP_NVCC", str(fake_tools))
        assert toolchain.find_nvcc() == (fake_tools, "12.4.99")


def test_a_library_of_a_newer_cuda_than_the_driver_is_refused(
    fake_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plugin.build_plugin()
    monkeypatch.setattr(toolchain, "driver_cuda", lambda: (12, 6))
    machine = {"x86_64": 62, "aarch64": 183}[plugin.platform.machine()]
    made.write_bytes(b"\x7fELF".ljust(18, b"\0") + bytes([machine, 0]) + b"\0getCreators\0")
    monkeypatch.setenv("JMP_DEPLOY_PLUGIN", str(made))
    assert plugin.plugin_library() == made
    sidecar = made.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace("12.4.99", "13.0.88"))
    with pytest.raises(ToolchainError, match=r"compiled by CUDA 13\.0\.88, the driver serves"):
        plugin.plugin_library()


# --- The real build ------------------------------------------------------------------------------


def test_the_library_exports_two_symbols_and_needs_no_driver(library: Path) -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in shown.stdout.splitlines()}
    assert names == {"getCreators", "setLoggerFinder"}
    needed = subprocess.run(
        ["ldd", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert not {word for word in ("libcuda", "libnvinfer", "not found") if word in needed}


def test_info_says_what_the_library_is(library: Path) -> None:
    info = plugin.plugin_info(library)
    tools = plugin.find_toolchain()
    assert info["sha256"] and info["bytes"] == library.stat().st_size
    assert set(plugin._gpu_architectures()) <= set(info["architectures"])
    assert (info["cuda"], info["tensorrt_headers"]) == (tools.cuda_version, tools.tensorrt_version)
    assert library == plugin.plugin_library(build=False)


def test_a_compile_error_is_one_message_and_a_log(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "sources"
    shutil.copytree(plugin.sources_dir(), broken, ignore=shutil.ignore_patterns("tests", "build*"))
    with (broken / "token_reduce_kernel.cu").open("a") as file:
        file.write("\nint broken = no_such_name;\n")
    monkeypatch.setattr(plugin, "sources_dir", lambda: broken)
    with pytest.raises(ToolchainError, match=r"no_such_name") as caught:
        plugin.build_plugin(["80"])
    log = Path((caught.value.hint or "").split()[-1])
    assert "no_such_name" in log.read_text() and "-gencode" in log.read_text()
    assert not list(cache.rglob("*.so")) and not list(cache.rglob(".build-*"))


# --- The cache -----------------------------------------------------------------------------------


def test_built_once_then_found(fake_tools: Path, cache: Path) -> None:
    lines: list[str] = []
    first = plugin.build_plugin(on_progress=lines.append)
    assert cache in first.parents and first.read_text() == "built"
    assert "sm_75, sm_80 " in lines[0] and "about" in lines[0] and str(first) in lines[-1]
    assert plugin.build_plugin(on_progress=lines.append) == plugin.plugin_library() == first
    assert compilations(fake_tools) == 1 and len(lines) == 2
    plugin.build_plugin(force=True)
    assert compilations(fake_tools) == 2
    everything = plugin.build_plugin(["all"])
    assert plugin.plugin_info(everything)["architectures"] == ["75", "80", "86", "90"]


def test_the_key_follows_sources_architectures_and_versions(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {plugin.build_plugin(["75"]), plugin.build_plugin(["sm_86"])}
    assert plugin.build_plugin(["86", "sm_86"]) in paths  # the same list
    root = headers(tmp_path / "other", version_text(10, 13, 2))
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    paths.add(plugin.build_plugin())
    monkeypatch.setenv("JMP_NVCC", str(fake_nvcc(tmp_path / "cuda2", version="12.4.100")))
    paths.add(plugin.build_plugin())
    changed = tmp_path / "sources"
    shutil.copytree(plugin.sources_dir(), changed, ignore=shutil.ignore_patterns("tests"))
    with (changed / "token_reduce_plugin.h").open("a") as file:
        file.write("// a change\n")
    monkeypatch.setattr(plugin, "sources_dir", lambda: changed)
    paths.add(plugin.build_plugin())
    assert len(paths) == 5


def test_every_included_file_is_part_of_the_key() -> None:
    folder = plugin.sources_dir()
    included, todo = set(plugin.SOURCES), list(plugin.SOURCES)
    while todo:
        text = (folder / todo.pop()).read_text()
        found = set(re.findall(r'^#include "([^"/]+)"', text, re.MULTILINE)) - included
        included |= found
        todo += found
    assert included == {*plugin.SOURCES, *plugin.OTHER_SOURCES} - {"exports.map"}


def test_concurrent_builds_agree(fake_tools: Path, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: plugin.build_plugin(), range(4)))
    assert len(paths) == 1 and paths.pop().read_text() == "built"
    assert not list(cache.rglob(".build-*"))


def test_a_failed_build_leaves_the_old_library(
    fake_tools: Path, tmp_path: Path, cache: Path
) -> None:
    library = plugin.build_plugin()
    fake_nvcc(fake_tools.parent, action='printf "half" > "$1"; echo "x.cu: error: bad"; exit 1')
    with pytest.raises(ToolchainError, match=r"x\.cu: error: bad"):
        plugin.build_plugin(force=True)
    assert library.read_text() == "built"


def test_an_unwritable_cache_is_named(fake_tools: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(ToolchainError, match=str(cache)) as caught:
        plugin.build_plugin()
    assert "JMP_DEPLOY_CACHE" in (caught.value.hint or "")


def test_unknown_architectures_are_refused(fake_tools: Path) -> None:
    for archs in (["99"], ["sm_90", "volta"], []):
        with pytest.raises(ToolchainError, match="architecture") as caught:
            plugin.build_plugin(archs)
        assert "75, 80, 86, 90" in (caught.value.hint or "")


def test_without_a_compiler_an_earlier_build_is_used(
    fake_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = plugin.build_plugin()
    monkeypatch.setenv("JMP_NVCC", "/no/such/nvcc")
    assert plugin.plugin_library(build=False) == library
    monkeypatch.setattr(plugin, "_hash", lambda: "other sources")
    with pytest.raises(ToolchainError, match="/no/such/nvcc"):
        plugin.plugin_library()


def test_not_built_and_not_allowed_to(fake_tools: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        plugin.plugin_library(build=False)
    assert caught.value.hint == "python -m jmp_deploy plugin build"
    assert compilations(fake_tools) == 0


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JMP_DEPLOY_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("JMP_DEPLOY_CACHE")
    assert cache_dir() == Path("/b/jmp_deploy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/c/.cache/jmp_deploy")


# --- Which architectures -------------------------------------------------------------------------


def test_each_gpu_gets_a_library_with_its_machine_code(
    fake_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built without a GPU, or for another, would fail at the first inference."""
    without = plugin.plugin_library()
    have_gpus(monkeypatch, (9, 0))
    with pytest.raises(ToolchainError, match="not built for sm_90"):
        plugin.plugin_library(build=False)
    hopper = plugin.plugin_library()
    assert plugin.plugin_info(hopper)["architectures"] == ["90"] and hopper != without
    assert plugin.plugin_library() == plugin.build_plugin() == hopper
    have_gpus(monkeypatch, (9, 0), (8, 6), (8, 6))
    both = plugin.plugin_library()
    assert plugin.plugin_info(both)["architectures"] == ["86", "90"]
    have_gpus(monkeypatch, (9, 0))
    assert plugin.plugin_library() == hopper  # not the larger one
    have_gpus(monkeypatch, (8, 6))
    assert plugin.plugin_library() == both
    have_gpus(monkeypatch)
    assert plugin.plugin_library() in (without, hopper)
    assert compilations(fake_tools) == 3


def test_a_release_serves_every_gpu(fake_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = plugin.build_plugin(["all"])
    for capability in ((7, 5), (8, 0), (8, 6), (9, 0), (12, 1)):  # the last by PTX
        have_gpus(monkeypatch, capability)
        assert plugin.plugin_library() == everything
    have_gpus(monkeypatch, (8, 9))  # for this compiler, PTX of 8.6
    assert plugin.plugin_info(plugin.plugin_library())["architectures"] == ["86"]
    have_gpus(monkeypatch, (7, 0))
    with pytest.raises(ToolchainError, match=r"does not compile for this GPU \(sm_70\)"):
        plugin.plugin_library()


def test_without_a_compiler_only_what_the_gpu_can_run(
    fake_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = plugin.build_plugin(["80", "90"])
    monkeypatch.setenv("JMP_NVCC", "/no/such/nvcc")
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        have_gpus(monkeypatch, capability)
        assert plugin.plugin_library() == library
    for capability in ((7, 5), (8, 7)):  # machine code of 8.0 does not run on Orin
        have_gpus(monkeypatch, capability)
        with pytest.raises(ToolchainError, match="/no/such/nvcc"):
            plugin.plugin_library()


def test_a_prebuilt_library_of_another_gpu_is_refused(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "prebuilt.so"
    shutil.copy(library, copy)
    copy.with_suffix(".json").write_text(json.dumps({"architectures": ["80", "90"]}))
    monkeypatch.setenv("JMP_DEPLOY_PLUGIN", str(copy))
    have_gpus(monkeypatch, (7, 5))
    with pytest.raises(ToolchainError, match=r"is for sm_80, sm_90, the GPU here is sm_75"):
        plugin.plugin_library()
    have_gpus(monkeypatch, (8, 9))
    assert plugin.plugin_library() == copy


def test_a_long_compilation_is_announced_on_stderr(
    fake_tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin.plugin_library()
    captured = capsys.readouterr()
    assert re.search(r"sm_75, sm_80 .*: about \d+ s on \d+ core", captured.err)
    assert captured.out == ""


# --- A prebuilt library --------------------------------------------------------------------------


def test_a_prebuilt_library_is_taken(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "prebuilt.so"
    shutil.copy(library, copy)
    monkeypatch.setenv("JMP_DEPLOY_PLUGIN", str(copy))
    assert plugin.plugin_library(build=False) == copy
    assert plugin.plugin_info(copy)["sha256"] == plugin.plugin_info(library)["sha256"]


@pytest.mark.parametrize("content", [None, b"text", b"\x7fELF" + bytes(100)])
def test_a_wrong_prebuilt_library_is_refused(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wrong.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("JMP_DEPLOY_PLUGIN", str(path))
    with pytest.raises(ToolchainError, match=r"JMP_DEPLOY_PLUGIN.*wrong\.so"):
        plugin.plugin_library()


def test_a_prebuilt_library_of_another_machine_is_refused(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(library.read_bytes())
    content[18:20] = (183 if content[18] == 62 else 62).to_bytes(2, "little")
    path = tmp_path / "other.so"
    path.write_bytes(content)
    monkeypatch.setenv("JMP_DEPLOY_PLUGIN", str(path))
    with pytest.raises(ToolchainError, match=r"is for (aarch64|x86_64), this machine is"):
        plugin.plugin_library()


# --- Finding the toolchain -----------------------------------------------------------------------


def wheels_nvccs() -> list[Path]:
    """Compilers of the cuda-toolkit wheels."""
    spec = find_spec("nvidia")
    folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    return [nvcc for folder in folders for nvcc in folder.glob("cu*/bin/nvcc")]


def test_no_nvcc(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: iter(()))
    with pytest.raises(ToolchainError, match="nvcc") as caught:
        plugin.find_toolchain()
    assert "pip install" in (caught.value.hint or "")


def test_a_given_nvcc_must_work(
    clean_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JMP_NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(ToolchainError, match=r"JMP_NVCC.*does not run"):
        plugin.find_toolchain()
    fake_nvcc(tmp_path, version="11.8.89")
    with pytest.raises(ToolchainError, match=r"CUDA 11\.8\.89, expected 12\.2"):
        plugin.find_toolchain()


def test_an_nvcc_that_does_not_run_is_passed_over(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "bin"
    broken.mkdir(parents=True)
    (broken / "nvcc").write_text("not a program")
    (broken / "nvcc").chmod(0o755)
    monkeypatch.delenv("JMP_NVCC")
    monkeypatch.setenv("CUDA_HOME", str(broken.parent))
    good = fake_nvcc(tmp_path / "good" / "bin")
    monkeypatch.setenv("CUDA_PATH", str(good.parent.parent))
    assert plugin.find_toolchain().nvcc == good


def test_the_wheels_nvcc_is_found_without_any_other(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = wheels_nvccs()
    if not wheels:
        pytest.skip("the cuda-toolkit[nvcc] wheels are not installed")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: "/bin/sh")  # the host compiler
    real_glob = Path.glob
    monkeypatch.setattr(
        Path, "glob", lambda p, pattern: [] if str(p) == "/usr/local" else real_glob(p, pattern)
    )
    monkeypatch.setattr(
        toolchain, "_nvcc_version", lambda nvcc: "13.0.1" if nvcc in wheels else ("no",)
    )
    assert plugin.find_toolchain().nvcc in wheels


@pytest.fixture
def wheels_nvcc(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiler of the cuda-toolkit wheels, the only one in use: another CUDA on this machine,
    which stands first elsewhere, hides what is wrong with it."""
    found = wheels_nvccs()
    if not found:
        pytest.skip("the cuda-toolkit[nvcc] wheels are not installed")
    for name in (*ENVIRONMENT, "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JMP_NVCC", str(found[0]))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return found[0]


def test_every_compilation_is_told_where_the_cuda_runtime_lies(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(tmp_path / "nvidia" / "cu13" / "bin")
    runtime = tmp_path / "nvidia" / "cu13" / "lib"
    runtime.mkdir()
    (runtime / "libcudart_static.a").touch()
    link = tmp_path / "nvcc"
    link.symlink_to(nvcc)
    monkeypatch.setenv("JMP_NVCC", str(link))
    plugin.build_plugin()
    kernel.kernel_library("86")
    commands = nvcc.with_name("count").read_text().splitlines()
    assert len(commands) == 2 and all(f"-L{runtime}" in line.split() for line in commands)


def test_the_wheels_nvcc_links(wheels_nvcc: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.cu").write_text("__global__ void f() {}\nvoid g() { f<<<1, 1>>>(); }\n")
    options = ["-shared", "-cudart=static", "-Xcompiler=-fPIC", "empty.cu", "-o", "empty.so"]
    toolchain.run_nvcc(wheels_nvcc, options, tmp_path, tmp_path / "log", "an empty kernel")
    assert (tmp_path / "empty.so").is_file()


@pytest.mark.slow
def test_the_wheels_nvcc_makes_the_plugin_and_the_kernel(
    wheels_nvcc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(monkeypatch, (8, 6))
    for library in (plugin.plugin_library(), kernel.kernel_library("86")):
        assert library.is_file() and cache in library.parents


def test_no_host_compiler(fake_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    with pytest.raises(ToolchainError, match="g\\+\\+") as caught:
        plugin.find_toolchain()
    assert "apt install g++" in (caught.value.hint or "")


def test_a_wrong_tensorrt_root_is_no_silent_fallback(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "nothing"))
    with pytest.raises(ToolchainError, match=r"nothing/include/NvInfer\.h does not exist"):
        plugin.find_toolchain()


def test_no_headers(fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_ROOT")
    monkeypatch.setattr(toolchain, "_header_candidates", lambda: iter([tmp_path]))
    with pytest.raises(ToolchainError, match=r"NvInfer\.h not found") as caught:
        plugin.find_toolchain()
    assert "pip install kernel-lens" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (version_text(10, 0, 1), "10.0.1"),
        (
            "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n"
            "#define TRT_PATCH_ENTERPRISE 0\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"
            "#  define NV_TENSORRT_MINOR (TRT_MINOR_ENTERPRISE) //!< minor\n"
            "#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE\n",
            "11.1.0",
        ),
        (version_text(8, 6, 1), None),
        (
            "#define NV_TENSORRT_MAJOR NV_TENSORRT_MINOR\n"
            "#define NV_TENSORRT_MINOR NV_TENSORRT_MAJOR\n",
            None,
        ),
        ("", None),
    ],
)
def test_header_versions(
    text: str, expected: str | None, fake_tools: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    root = headers(tmp_path / "candidate", text)
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    if expected is not None:
        assert plugin.find_toolchain().tensorrt_version == expected
        return
    with pytest.raises(ToolchainError, match=r"candidate/include/NvInferVersion\.h"):
        plugin.find_toolchain()


def test_old_system_headers_are_passed_over(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORRT_ROOT")
    old = headers(tmp_path / "old", version_text(8, 6, 1)) / "include"
    new = headers(tmp_path / "new", version_text(10, 3, 0)) / "include"
    monkeypatch.setattr(toolchain, "_header_candidates", lambda: iter([old, new]))
    assert plugin.find_toolchain().headers == new
    monkeypatch.setattr(toolchain, "_header_candidates", lambda: iter([old]))
    with pytest.raises(ToolchainError, match=r"TensorRT 8\.6\.1, expected 10\.0 or newer"):
        plugin.find_toolchain()


# --- In a real registry --------------------------------------------------------------------------

REGISTRY_SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import tensorrt_rtx as trt
from jmp_deploy.plugin.library import load_plugin

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message):
        self.lines.append(f"{severity}: {message}")

log = Log()
builder = trt.Builder(log)  # gives the plugin its logger
library = Path(sys.argv[1])
load_plugin(trt, library)
load_plugin(trt, library)  # once per process: nothing happens
about_us = [line for line in log.lines if "ERROR" in line and "driver" not in line]
assert not about_us, about_us  # a clean log: no search for what is not there yet

TYPE = trt.PluginFieldType
KINDS = {"i": (np.int32, TYPE.INT32), "l": (np.int64, TYPE.INT64),
         "f": (np.float32, TYPE.FLOAT32), "d": (np.float64, TYPE.FLOAT64)}
results = []
for namespace, fields in json.loads(sys.argv[2]):
    creator = trt.get_plugin_registry().get_creator("JMPTokenReduce", "1", namespace)
    keep, made = [], []
    for name, kind, value in fields:
        dtype, code = KINDS[kind]
        keep.append(np.array(value, dtype).reshape(-1))
        made.append(trt.PluginField(name, keep[-1], code))
    log.lines.clear()
    collection = trt.PluginFieldCollection(made)
    made_plugin = creator.create_plugin("a_layer", collection, trt.TensorRTPhase.BUILD)
    results.append({"made": made_plugin is not None, "log": "\\n".join(log.lines),
                    "fields": [f.name for f in creator.field_names]})
print("RESULT" + json.dumps(results))
"""

GOOD: list[list[Any]] = [
    ["num_prefix", "i", 1],
    ["num_keep", "i", 138],
    ["num_heads", "i", 6],
    ["head_dim", "i", 64],
    ["scale", "f", 0.125],
    ["tau", "f", 0.7],
    ["merge_weight", "f", 0.5],
    ["granularity", "i", 0],
    ["importance", "i", 0],
    ["proportional", "i", 1],
    ["selection", "i", 1],
]


def changed(name: str, *new: Any) -> list[list[Any]]:
    """GOOD with one field replaced by [name, *new], or left out."""
    replacement = [[name, *new]] if new else []
    return [f for field in GOOD for f in (replacement if field[0] == name else [field])]


BAD: dict[str, tuple[list[list[Any]], list[str]]] = {
    "unknown": ([*GOOD, ["colour", "i", 1]], ["colour", "num_prefix"]),
    "missing": (changed("tau"), ["tau", "missing"]),
    "twice": ([*GOOD, GOOD[0]], ["num_prefix", "twice"]),
    "none": ([], ["num_prefix", "missing"]),
    "negative": (changed("num_keep", "i", -1), ["num_keep", "-1", ">= 1"]),
    "range": (changed("granularity", "i", 2), ["granularity", "2"]),
    "no class token": (changed("num_prefix", "i", 0), ["importance", "num_prefix"]),
    "float for int": (changed("num_heads", "f", 6.0), ["num_heads", "integer"]),
    "int for float": (changed("scale", "i", 1), ["scale", "float"]),
    "zero scale": (changed("scale", "f", 0.0), ["scale", "0"]),
    "nan": (changed("tau", "f", float("nan")), ["tau", "NaN"]),
    "64 bits": (changed("num_keep", "l", 2**40), ["num_keep", str(2**40)]),
    "double": (changed("scale", "d", 1e300), ["scale", "float32"]),
    "two values": (changed("num_keep", "i", [1, 2]), ["num_keep", "one number", "2"]),
}


def in_registry(library: Path, requests: list[Any]) -> list[dict[str, Any]]:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    done = subprocess.run(
        [sys.executable, "-c", REGISTRY_SCRIPT, str(library), json.dumps(requests)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=REPO,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout.split("RESULT")[-1])


def test_both_namespaces_create_the_plugin(library: Path) -> None:
    wide = [[n, {"i": "l", "f": "d"}[kind], value] for n, kind, value in GOOD]
    for made in in_registry(library, [["", GOOD], ["jmp_deploy", GOOD], ["", wide]]):
        assert made["made"] and "JMPTokenReduce" not in made["log"]
        assert made["fields"] == [name for name, _, _ in GOOD]


def test_bad_attributes_are_named_in_the_log(library: Path) -> None:
    requests = [[ns, fields] for fields, _ in BAD.values() for ns in ("", "jmp_deploy")]
    results = iter(in_registry(library, requests))
    for case, (_, words) in BAD.items():
        for result in (next(results), next(results)):
            assert not result["made"], case
            lines = [line for line in result["log"].splitlines() if "JMPTokenReduce: " in line]
            assert len(lines) == 1, (case, result["log"])
            assert all(word in lines[0] for word in ["a_layer", *words]), (case, lines[0])


ONNX_SCRIPT = """
import json, sys
from pathlib import Path
import tensorrt_rtx as trt
from jmp_deploy.plugin.library import load_plugin

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message):
        self.lines.append(message)

log = Log()
load_plugin(trt, Path(sys.argv[1]))
results = []
for model in sys.argv[2:]:
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    result = {"parsed": parser.parse(Path(model).read_bytes()), "built": False}
    if result["parsed"]:
        result["shapes"] = [list(network.get_output(i).shape) for i in range(network.num_outputs)]
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            shape = network.get_input(i).shape
            if -1 in shape:
                bounds = [[b if d == -1 else d for d in shape] for b in (1, 4, 8)]
                profile.set_shape(network.get_input(i).name, *bounds)
        config.add_optimization_profile(profile)
        result["built"] = builder.build_serialized_network(network, config) is not None
    result["log"] = [line for line in log.lines if "JMPTokenReduce: " in line]
    results.append(result)
print("RESULT" + json.dumps(results))
"""


def onnx_model(
    path: Path,
    *,
    tokens: int = 197,
    width: int = 1152,
    size_tokens: int = 197,
    size_batch: int | str = 1,
    types: str = "fff",
    domain: str = "jmp_deploy",
    namespace: str | None = None,
    version: str = "1",
) -> Path:
    """One node with inputs x, qkv, size; types f (float32), h (float16), b (bfloat16) or i (int32)
    each."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    codes = {
        "f": onnx.TensorProto.FLOAT,
        "h": onnx.TensorProto.FLOAT16,
        "b": onnx.TensorProto.BFLOAT16,
        "i": onnx.TensorProto.INT32,
    }
    shapes = [["batch", tokens, 384], ["batch", tokens, width], [size_batch, size_tokens]]
    inputs = [
        helper.make_tensor_value_info(name, codes[code], shape)
        for name, code, shape in zip(("x", "qkv", "size"), types, shapes, strict=True)
    ]
    names = ["y", "out_size", "log_size", *(["index"] if version == "2" else [])]
    outputs = [
        helper.make_tensor_value_info(name, codes["i" if name == "index" else types[0]], None)
        for name in names
    ]
    attributes: dict[str, Any] = {name: value for name, _, value in GOOD}
    attributes["plugin_version"] = version
    if namespace is not None:
        attributes["plugin_namespace"] = namespace
    given = ["x", "qkv", "size"]
    node = helper.make_node(
        "JMPTokenReduce", given, names, name="reduce_3", domain=domain, **attributes
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("jmp_deploy", 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def build_onnx(library: Path, folder: Path, models: list[Path]) -> list[dict[str, Any]]:
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tensorrt_rtx is not installed")
    # The parser opens the unversioned name, which the wheel lacks.
    real = next(Path(spec.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*"))
    (folder / "libtensorrt_rtx.so").symlink_to(real)
    done = subprocess.run(
        [sys.executable, "-c", ONNX_SCRIPT, str(library), *map(str, models)],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=REPO,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout.split("RESULT")[-1])


def test_real_builder_takes_it_in_every_form(library: Path, tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [
        {},
        {"types": "hhh", "size_batch": "batch"},
        {"types": "bbb"},
        {"width": 768},  # q and k alone
        {"namespace": ""},
        {"namespace": "jmp_deploy"},
        {"version": "2"},
        {"version": "2", "types": "hhh", "namespace": "jmp_deploy"},
    ]
    models = [onnx_model(tmp_path / f"{i}.onnx", **form) for i, form in enumerate(forms)]
    for form, result in zip(forms, build_onnx(library, tmp_path, models), strict=True):
        assert result["built"] and not result["log"], (form, result)
        index = [[-1, 196]] if form.get("version") == "2" else []
        assert result["shapes"] == [[-1, 139, 384], [-1, 139], [-1, 139], *index]


def test_wrong_shapes_and_types_are_explained(library: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], list[str]]] = [
        ({"tokens": 100, "size_tokens": 100}, ["1 + 138", "100"]),
        ({"width": 700}, ["qkv", "768", "700"]),
        ({"size_tokens": 196}, ["[1, 196]", "197"]),
        ({"size_batch": 3}, ["size", "3"]),
        ({"types": "hhf"}, ["float16, float16, float32"]),
        ({"types": "fif"}, ["all in float32, all in float16 or all in bfloat16"]),
    ]
    models = [onnx_model(tmp_path / f"{i}.onnx", **form) for i, (form, _) in enumerate(wrong)]
    results = build_onnx(library, tmp_path, models)
    for (form, words), result in zip(wrong, results, strict=True):
        assert not result["built"], form
        assert any(all(word in line for word in words) for line in result["log"]), (form, result)


@dataclass(frozen=True)
class Creator:
    plugin_namespace: str
    name: str = "JMPTokenReduce"
    plugin_version: str = "1"


class Registry:
    """A stand-in for the registry of a TensorRT module, and for the module."""

    __name__ = "tensorrt_stand_in"
    __version__ = "10.0"

    def __init__(self, *registered: str) -> None:
        self.all_creators = [Creator("", name="AnotherPlugin")]
        self.would_register = registered
        self.versions = ["1", "2"]
        self.loads = 0

    def get_plugin_registry(self) -> Registry:
        return self

    def load_library(self, path: str) -> None:
        self.loads += 1
        self.all_creators += [
            Creator(namespace, plugin_version=version)
            for namespace in self.would_register
            for version in self.versions
        ]


def test_load_checks_what_was_registered(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_loaded", {})
    with pytest.raises(EngineError, match=r'namespace "jmp_deploy"'):
        plugin.load_plugin(Registry(""), library)
    old = Registry("", "jmp_deploy")
    old.versions.pop()
    with pytest.raises(EngineError, match="version 2"):
        plugin.load_plugin(old, library)
    with pytest.raises(EngineError, match="does not exist"):
        plugin.load_plugin(Registry("", "jmp_deploy"), tmp_path / "none.so")
    good = Registry("", "jmp_deploy")
    plugin.load_plugin(good, library)
    plugin.load_plugin(good, library)
    assert good.loads == 1
    with pytest.raises(EngineError, match="already holds"):
        plugin.load_plugin(good, tmp_path / "other.so")


# --- Through CMake -------------------------------------------------------------------------------


@pytest.mark.slow
def test_cmake_builds_it_without_a_warning(library: Path, tmp_path: Path) -> None:
    """With the compiler of the wheels where that is installed: the harder one (no lib64). Not in
    a folder with a space, where it does not find its own parts unless `plugin build` calls it."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    tools = plugin.find_toolchain()
    wheels = [nvcc for nvcc in wheels_nvccs() if " " not in str(nvcc)]
    nvcc = (wheels or [tools.nvcc])[0]
    configure = [
        *(cmake, "-S", str(plugin.sources_dir()), "-B", str(tmp_path)),
        *("-DJMP_WERROR=ON", "-DJMP_BUILD_HOST_TESTS=ON"),
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=87-real",  # scripts/test.sh compiles for more
        f"-DTENSORRT_INCLUDE_DIR={tools.headers}",
    ]
    for command in (configure, [cmake, "--build", str(tmp_path), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    assert (tmp_path / "libjmp_deploy_plugin.so").is_file()
    assert (tmp_path / "jmp_host_driver").is_file()


# --- For a Jetson --------------------------------------------------------------------------------


def test_a_library_for_a_jetson_needs_its_cuda_compiler_and_runtime(
    fake_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain.platform, "machine", lambda: "x86_64")
    with pytest.raises(ToolchainError, match="needs the compiler of CUDA 13") as caught:
        plugin.build_plugin(device="thor")
    assert "JMP_NVCC" in (caught.value.hint or "")
    tools = tmp_path / "tools"
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "CROSS_CXX", "some-aarch64-g++")
    with pytest.raises(ToolchainError, match=r"no some-aarch64-g\+\+") as caught:
        plugin.build_plugin(device="orin")
    assert "apt install" in (caught.value.hint or "")
    tools.mkdir()
    (tools / "some-aarch64-g++").touch(mode=0o755)
    runtime = tmp_path / "runtime" / "nvidia" / "lib"
    runtime.mkdir(parents=True)
    monkeypatch.setenv("JMP_AARCH64_CUDA", str(tmp_path / "runtime"))
    archive = runtime / "libcudart_static.a"
    for machine in (b"\x3e\0", b"\xb7\0"):  # of x86-64, which is the wheel that pip takes here
        with pytest.raises(ToolchainError, match="no CUDA runtime of aarch64") as caught:
            plugin.build_plugin(device="orin")
        hint = caught.value.hint or ""
        assert "JMP_AARCH64_CUDA" in hint and "pip" not in hint  # CUDA 12's wheel has no such file
        archive.write_bytes(b"!<arch>\n\x7fELF" + bytes(14) + machine)
    library = plugin.build_plugin(["86"], device="orin")
    assert plugin.plugin_info(library)["machine"] == "aarch64"
    assert f"-L{runtime}" in fake_tools.with_name("count").read_text().split()
    # Neither is what this machine loads, even where nothing else is there.
    assert plugin.build_plugin() != library
    monkeypatch.setenv("JMP_NVCC", "/no/such/nvcc")
    assert plugin.plugin_library() != library
