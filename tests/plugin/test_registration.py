"""The creators reach TensorRT's registry however the library is loaded: by loadLibrary, or by
dlopen alone, which is all that Triton, DeepStream and others do.

TensorRT itself is a stand-in here (tests/fakes/tensorrt_registry.cpp), compiled with real headers,
so that the vtable is TensorRT's own: those at hand (10.14), and those of
JMP_TENSORRT_HEADERS/*/include. What was tried stands in plugins/README.md. TensorRT-RTX is real,
and so are NVIDIA's lean runtimes of TensorRT 10 and 11.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from jmp_deploy.core.errors import ToolchainError
from jmp_deploy.engine.builder import worker_environment
from jmp_deploy.plugin import library as plugin
from jmp_deploy.plugin import toolchain

REPO = Path(__file__).resolve().parents[2]
BOTH = "".join(f"JMPTokenReduce/{v}/{space} " for v in (1, 2) for space in ("", "jmp_deploy"))
"""Both versions in both namespaces."""


def header_sets() -> list[Path]:
    """Folders of NvInfer.h: the toolchain's, and those of JMP_TENSORRT_HEADERS/*/include."""
    found = []
    with suppress(ToolchainError):
        found.append(plugin.find_toolchain().headers)
    if more := os.environ.get("JMP_TENSORRT_HEADERS"):
        found += sorted(Path(more).glob("*/include"))
    return found


@pytest.fixture(scope="module")
def nvcc() -> list[str]:
    """It calls g++ with CUDA's own headers; no CUDA is compiled here."""
    try:
        found, _ = toolchain.find_nvcc()
    except ToolchainError as error:
        pytest.skip(error.message)
    warnings = "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror,-fvisibility=hidden"
    return [*toolchain.nvcc_command(found), "-std=c++17", "-cudart=none", "-shared", warnings]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel for the CPU, which is all that a library needs that is never run."""
    target = tmp_path_factory.mktemp("kernel") / "kernel.o"
    source = plugin.sources_dir() / "token_reduce_kernel.cu"
    options = ("-std=c++17", "-fPIC", "-DJMP_CUDA_ON_HOST", "-c", "-x", "c++")
    compile_with("g++", *options, source, "-o", target)
    return target


def compile_with(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=header_sets(), ids=lambda path: path.parent.name)
def pair(
    request: pytest.FixtureRequest,
    kernel: Path,
    nvcc: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a stand-in for TensorRT, the plugin, both of the same headers, and a stand-in
    of a version that nobody knows."""
    folder = tmp_path_factory.mktemp("pair")
    include = ("-isystem", request.param)
    major = toolchain.headers_version(request.param).split(".")[0]
    fake = Path(__file__).parents[1] / "fakes" / "tensorrt_registry.cpp"
    for name, says in ((f"libnvinfer.so.{major}", major), ("libunknown.so", "12")):
        define = (f"-DFAKE_MAJOR={says}", f"-Xlinker=-soname,{name}", "-w")
        compile_with(*nvcc, *define, *include, fake, "-o", folder / name)
    sources = [plugin.sources_dir() / name for name in plugin.SOURCES if name.endswith(".cpp")]
    exports = folder / "exports.map"  # nvcc cuts a path at its spaces
    exports.symlink_to(plugin.sources_dir() / exports.name)
    script = f"-Xlinker=--version-script={exports}"
    compile_with(*nvcc, script, *include, *sources, kernel, "-o", folder / "plugin.so")
    (folder / "tensorrt.so").symlink_to(f"libnvinfer.so.{major}")
    return folder


PRELUDE = """
import ctypes, _ctypes, sys
folder = sys.argv[1]
def open_library(name):
    return ctypes.CDLL(f"{folder}/{name}")
def names(tensorrt):
    tensorrt.fake_names.restype = ctypes.c_char_p
    return tensorrt.fake_names().decode()
def load_library(tensorrt):
    return tensorrt.fake_load_library(f"{folder}/plugin.so".encode())
"""


def run(folder: Path, script: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_opening_the_library_is_enough(pair: Path) -> None:
    """Triton, Isaac ROS, ONNX Runtime, DeepStream; and again after it was closed."""
    printed = run(
        pair,
        """
trt = open_library("tensorrt.so")
for _ in range(2):
    plugin = open_library("plugin.so")
    print(names(trt))
    _ctypes.dlclose(plugin._handle)
    print(names(trt) or "none")
plugin = open_library("plugin.so")  # the end of the process finds it registered
""",
    )
    assert printed == [BOTH, "none", BOTH, "none"]


def test_a_plugin_that_comes_first_finds_its_tensorrt(pair: Path) -> None:
    """Polygraphy's command line opens plugins before TensorRT."""
    script = 'plugin = open_library("plugin.so"); print(names(open_library("tensorrt.so")))'
    assert run(pair, script, LD_LIBRARY_PATH=str(pair)) == [BOTH]


def test_load_library_works_alone_and_after_an_opening(pair: Path) -> None:
    alone = 'trt = open_library("tensorrt.so"); print(load_library(trt)); print(names(trt))'
    assert run(pair, alone) == ["1", BOTH]
    later = alone.replace("print", 'plugin = open_library("plugin.so"); print', 1)
    assert run(pair, later) == ["1", BOTH]
    before = alone + '; plugin = open_library("plugin.so"); print(names(trt))'
    assert run(pair, before) == ["1", BOTH, BOTH]


def test_two_kinds_of_tensorrt_in_one_process(pair: Path) -> None:
    """One is known and gets the creators; the other's vtable is not, so it is not called."""
    printed = run(
        pair,
        """
trt, unknown = open_library("tensorrt.so"), open_library("libunknown.so")
plugin = open_library("plugin.so")
print(names(trt)); print(names(unknown) or "none")
""",
    )
    assert printed[:2] == [BOTH, "none"] and len(printed) == 3
    assert "unknown version" in printed[2] and "loadLibrary" in printed[2]


REAL = """
import _ctypes, ctypes, importlib, sys
library, module, first = sys.argv[1:]
if first == "tensorrt":
    trt = importlib.import_module(module)
plugin = ctypes.CDLL(library)
trt = importlib.import_module(module)
registry = trt.get_plugin_registry()
found = lambda: [c.plugin_version + c.plugin_namespace for c in registry.all_creators
                 if c.name == "JMPTokenReduce"]
print(found())
handle = registry.load_library(library)
print(handle is not None, found())
registry.deregister_library(handle)
_ctypes.dlclose(plugin._handle)
print(found())
"""


def real_tensorrt(kind: str) -> tuple[str, dict[str, str]]:
    """A TensorRT whose registry is its own: (module, environment of its process). NVIDIA's lean
    runtimes are in wheels, which scripts/test.sh unpacks; TensorRT itself is not."""
    if kind == "rtx":
        if find_spec("tensorrt_rtx") is None:
            pytest.skip("tensorrt_rtx is not installed")
        return "tensorrt_rtx", worker_environment("rtx")
    folders = sorted((REPO / "build" / "lean").glob(f"{kind}.*[0-9]"))
    if not folders:
        pytest.skip(f"no lean runtime of TensorRT {kind} in build/lean: scripts/test.sh gets it")
    path = {"LD_LIBRARY_PATH": str(folders[-1] / "tensorrt_lean_libs")}
    return "tensorrt_lean_bindings", os.environ | path | {"PYTHONPATH": str(folders[-1])}


@pytest.mark.parametrize("first", ["plugin", "tensorrt"])
@pytest.mark.parametrize("kind", ["rtx", "10", "11"])
def test_a_real_tensorrt_takes_what_was_only_opened(kind: str, first: str) -> None:
    module, environment = real_tensorrt(kind)
    try:
        library = plugin.plugin_library()
    except ToolchainError as error:
        pytest.skip(error.message)
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(library), module, first],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    both = "['1', '1jmp_deploy', '2', '2jmp_deploy']"
    assert done.stdout.splitlines() == [both, f"True {both}", "[]"]
    assert "IPluginRegistry" not in done.stderr


def test_polygraphys_command_line_shows_the_network(built: Path, tmp_path: Path) -> None:
    """Users of Polygraphy, and all who open plugins as it does: ctypes.CDLL and no more."""
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    # Polygraphy 0.53 asks the module `tensorrt` for a constant though it uses TensorRT-RTX.
    shim = "import sys\nimport tensorrt_rtx\nsys.modules[__name__] = tensorrt_rtx\n"
    (tmp_path / "tensorrt.py").write_text(shim)
    main = "from polygraphy.tools._main import main; raise SystemExit(main())"
    flags = ["--display-as=trt", "--plugins", str(plugin.plugin_library())]
    done = subprocess.run(
        [sys.executable, "-c", main, "inspect", "model", str(built / "model.trt.onnx"), *flags],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env=worker_environment("rtx") | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Unnamed Network" in done.stdout and "Layer(s)" in done.stdout
