"""Every name of TensorRT and of cuda-bindings that we use exists, in versions that CI cannot run.

TensorRT cannot be installed where this runs. What NVIDIA's own bindings of many versions have was
looked up by `scripts/bindings_check.py` and is kept in a table; the type stubs (PyPI:
tensorrt-stubs, 10.13) can be installed, and TensorRT-RTX is real. What one of them lacks must stand
in `trt_differences.py`.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jmp_deploy.core.errors import ToolchainError
from jmp_deploy.core.paths import PACKAGE
from jmp_deploy.engine import api, cuda
from jmp_deploy.engine.loading import _mapped
from jmp_deploy.plugin.toolchain import find_cxx
from tests.engine.tensorrt_names import (
    SEAM,
    TABLE,
    Stubs,
    our_names,
    repaired,
    stub_files,
    used_names,
    wrong,
)
from tests.engine.trt_differences import DIFFERENCES, lacks
from tests.fakes.cuda import FakeCuda, Status

STUBS_VERSION = "10.13.0"


@pytest.fixture(scope="module")
def stubs() -> Stubs:
    found = stub_files()
    if found is None:
        pytest.skip("tensorrt-stubs is not installed: TensorRT's names are not checked")
    return Stubs(
        repaired(found["tensorrt_bindings/tensorrt.pyi"].read_text("utf-8"))
        + "\n"
        + repaired(
            found["tensorrt_bindings/__init__.pyi"]
            .read_text("utf-8")
            .replace("from __future__ import annotations", "")
        )
    )


@pytest.fixture(scope="module")
def rtx():
    if not api.installed("rtx"):
        pytest.skip("TensorRT-RTX is not installed: its names are not checked")
    return api.load("rtx")


def rtx_has(rtx, name: str) -> bool:
    found = rtx
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_the_walk_sees_what_we_use():
    """A walk that saw nothing would pass everything."""
    names = our_names()
    assert {
        "Runtime",
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_execution_context",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.device_memory",
        "INetworkDefinition.num_layers",
        "ILayer.get_output",
        "ITensor.shape",
        "EngineInspector.get_engine_information",
        "IPluginRegistry.load_library",
        "IPluginCreatorV3One.plugin_namespace",
        "IRuntimeConfig.cuda_graph_strategy",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "ILogger.Severity.ERROR",
        "LayerType.PLUGIN_V3",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "get_plugin_registry",
        "nptype",
    } <= names
    assert len(names) > 60


def test_the_table_of_nvidia_s_bindings_is_of_the_names_that_we_use():
    """A new name is looked up in all versions: `scripts/bindings_check.py --write`."""
    table = json.loads(TABLE.read_text("utf-8"))
    assert set(table["names"]) == our_names()
    assert {"10.0.1", "10.3.0", "10.13.0"} <= set(table["versions"])
    assert any(version.startswith("11.") for version in table["versions"])


@pytest.mark.parametrize("version", json.loads(TABLE.read_text("utf-8"))["versions"])
def test_nvidia_s_bindings_have_every_name(version):
    table = json.loads(TABLE.read_text("utf-8"))["names"]
    assert wrong(table, lambda name: version in table[name], "tensorrt", version) == []


def test_a_misspelt_name_is_not_in_the_table():
    names = used_names(SEAM.read_text("utf-8") + PLANTED, api.OBJECT_NAMES)
    table = json.loads(TABLE.read_text("utf-8"))["names"]
    assert {"IExecutionContext.execute_async_v4", "TensorIOModes"} < names - set(table)


def test_tensorrt_s_stubs_have_every_name(stubs):
    assert wrong(our_names(), stubs.has, "tensorrt", STUBS_VERSION) == []


def test_tensorrt_rtx_has_every_name(rtx):
    assert wrong(our_names(), lambda name: rtx_has(rtx, name), "rtx", rtx.__version__) == []


def test_the_seam_works_on_the_real_tensorrt_rtx(rtx, tmp_path):
    """As far as that goes without a GPU: logger, runtime, validity, what the network says."""
    words: list[str] = []
    logger = api.make_logger(rtx, words.append)
    runtime = api.make_runtime(rtx, logger)
    assert api.invalidity(rtx, runtime, b"no plan" * 20) == "malformed engine"
    assert api.deserialize(runtime, b"no plan" * 20) is None
    path = tmp_path / "no.plan"
    path.write_bytes(b"no plan" * 20)
    with _mapped(path) as plan:  # as plans are read
        assert api.invalidity(rtx, runtime, plan) == "malformed engine"
        assert api.deserialize(runtime, plan) is None
    assert words and any("Serialization" in line or "CUDA" in line for line in words)
    assert api.captures_itself(rtx) and api.strongly_typed(rtx)
    assert (8, 6) in api.compute_capabilities(rtx)
    assert rtx.nptype(rtx.DataType.FLOAT) is np.float32
    assert int(rtx.TensorIOMode.INPUT) != int(rtx.TensorIOMode.OUTPUT)


PLANTED = """
def planted(trt: Any, engine: tensorrt.ICudaEngine) -> None:
    context: tensorrt.IExecutionContext = engine.create_execution_contexts()
    context.execute_async_v4(0)
    mode = trt.TensorIOModes
    mode.INPUT
    if trt.TensorIOMode.INPUTS:
        runtime_config.set_runtime_caches()
"""


def test_misspelt_names_are_found(stubs, rtx):
    names = used_names(SEAM.read_text("utf-8") + PLANTED, api.OBJECT_NAMES)
    misspelt = [
        "ICudaEngine.create_execution_contexts: not there",
        "IExecutionContext.execute_async_v4: not there",
        "IRuntimeConfig.set_runtime_caches: not there",
        "TensorIOMode.INPUTS: not there",
        "TensorIOModes.INPUT: not there",
        "TensorIOModes: not there",
    ]
    assert wrong(names, stubs.has, "tensorrt", STUBS_VERSION) == sorted(misspelt)
    has = lambda name: rtx_has(rtx, name)  # noqa: E731
    assert wrong(names, has, "rtx", rtx.__version__) == sorted(misspelt)


def test_nobody_else_talks_to_tensorrt():
    """Objects of TensorRT do not leave the seam: elsewhere the walk would not see them."""
    pattern = re.compile(
        r"\btrt\.(?!engine\b|onnx\b|__version__|__name__)\w|\btensorrt(_rtx)?\.[A-Z]"
    )
    for path in sorted(PACKAGE.rglob("*.py")):
        if path in (SEAM, PACKAGE / "plugin" / "library.py"):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        code = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        found = [text for text in code if pattern.search(text) and "'" not in text]
        assert found == [], path.name


def test_every_difference_is_used_and_explained():
    names = our_names()
    for difference in DIFFERENCES:
        assert difference.name in names, f"{difference.name} is not used any more"
        assert len(difference.reason) > 20 and difference.lacking


@pytest.mark.parametrize(
    ("name", "flavour", "version", "expected"),
    [
        ("ICudaEngine.device_memory_size", "tensorrt", "10.3.0", False),
        ("ICudaEngine.device_memory_size", "tensorrt", "11.1.0.5", True),
        ("ICudaEngine.device_memory_size_v2", "tensorrt", "10.0.1", True),
        ("ICudaEngine.device_memory_size_v2", "tensorrt", "10.1.0", False),
        ("ComputeCapability", "tensorrt", "11.4.1", True),
        ("ComputeCapability", "rtx", "1.7.1", False),
        ("Runtime", "tensorrt", "10.0.0", False),
    ],
)
def test_versions_of_differences(name, flavour, version, expected):
    assert lacks(name, flavour, version) == expected


def mypy_complaints(folder: Path) -> list[str]:
    """What mypy says of `jmp_deploy/engine/api.py` there; the stubs' own faults are theirs."""
    environment = {**os.environ, "MYPYPATH": str(folder / "stubs")}
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--no-incremental"]
    options += ["--check-untyped-defs", "--no-error-summary", "--python-version=3.10"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "jmp_deploy/engine/api.py"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )
    assert "stubs/" in done.stdout, "mypy did not read the stubs: " + done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return [line for line in lines if line.startswith("jmp_deploy/") and "error:" in line]


@pytest.mark.slow
def test_mypy_passes_against_the_stubs_and_finds_a_misspelt_name(stubs, tmp_path):
    pytest.importorskip("mypy")
    for name, path in stub_files().items():
        target = tmp_path / "stubs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(repaired(path.read_text("utf-8")), encoding="utf-8")
    package = tmp_path / "jmp_deploy"
    for name in ("__init__.py", "core/__init__.py", "core/errors.py", "core/paths.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text((PACKAGE / name).read_text("utf-8"), encoding="utf-8")
    seam = package / "engine" / "api.py"
    seam.parent.mkdir()
    seam.with_name("__init__.py").touch()
    misspelt = SEAM.read_text("utf-8").replace(".set_tensor_address(", ".set_adress(")
    seam.write_text(misspelt, encoding="utf-8")
    (complaint,) = mypy_complaints(tmp_path)  # and no other
    assert '"IExecutionContext" has no attribute "set_adress"' in complaint


# --- cuda-bindings ------------------------------------------------------------------------------


def cuda_calls(source: str) -> dict[str, set[int]]:
    """Function of CUDA -> numbers of arguments that we pass."""
    calls: dict[str, set[int]] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        if text == "self._call" and isinstance(node.args[0], ast.Constant):
            calls.setdefault(node.args[0].value, set()).add(len(node.args) - 1)
        elif re.fullmatch(r"self\._driver\.cu\w*", text):
            calls.setdefault(text.rsplit(".", 1)[1], set()).add(len(node.args))
    return calls


def cuda_values(source: str) -> set[str]:
    """Dotted names of constants, enums and types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            match = re.fullmatch(r"(?:self\._driver|attributes)\.([\w.]+)", text)
            if match:
                prefix = "CUdevice_attribute." if text.startswith("attributes") else ""
                found.add(prefix + match[1])
    return found


def arity(function) -> int:
    """Parameters, as the first line of a docstring of cuda-bindings gives them."""
    inside = re.search(r"\((.*)\)", (function.__doc__ or "").splitlines()[0])[1]
    return len([part for part in inside.split(",") if part.strip()])


def cuda_wrong(source: str, driver) -> list[str]:
    found = []
    for name, counts in cuda_calls(source).items():
        function = getattr(driver, name, None)
        if function is None:
            found.append(f"{name}: not there")
        elif counts != {arity(function)}:
            found.append(f"{name}: takes {arity(function)} arguments, given {sorted(counts)}")
    for name in cuda_values(source):
        where = driver
        for part in name.split("."):
            where = getattr(where, part, None)
        if where is None:
            found.append(f"{name}: not there")
    return sorted(found)


@pytest.fixture(scope="module")
def driver():
    return pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings: not checked")


def test_cuda_bindings_has_every_function_and_constant(driver):
    source = Path(cuda.__file__).read_text("utf-8")
    assert len(cuda_calls(source)) > 25 and len(cuda_values(source)) > 10
    assert cuda_wrong(source, driver) == []
    planted = (
        source.replace('"cuMemAlloc"', '"cuMemAllocs"')
        .replace('"cuCtxGetDevice")', '"cuCtxGetDevice", 1)')
        .replace("CU_STREAM_NON_BLOCKING", "CU_STREAM_ANYHOW")
    )
    assert cuda_wrong(planted, driver) == [
        "CUstream_flags.CU_STREAM_ANYHOW: not there",
        "cuCtxGetDevice: takes 0 arguments, given [1]",
        "cuMemAllocs: not there",
    ]


def test_the_fake_driver_has_functions_that_exist_with_their_arguments(driver):
    fake = FakeCuda()
    values = vars(fake.driver)
    names = [name for name in values if re.match("cu[A-Z]", name)]
    assert len(names) > 25
    for name in names:
        given = len(inspect.signature(values[name]).parameters)
        assert arity(getattr(driver, name)) == given, name
    for group, constants in values.items():
        if isinstance(constants, SimpleNamespace):
            for name, value in vars(constants).items():
                assert int(getattr(getattr(driver, group), name)) == value, name
    for status in Status:
        assert int(getattr(driver.CUresult, status.name)) == status


LIBCUDA = r"""
#include <stdio.h>
#include <string.h>
typedef unsigned long W;
#define SAY(...) (printf(__VA_ARGS__), fflush(stdout), 0)
static int gives(const char* name, W* out, W value) { *out = value; return SAY("%s\n", name); }
static int cuInit(unsigned f) { return SAY("cuInit %u\n", f); }
static int cuCtxGetCurrent(W* c) { *c = 0; return 0; }
static int cuDeviceGet(int* d, int n) { *d = n; return SAY("cuDeviceGet %d\n", n); }
static int cuDevicePrimaryCtxRetain(W* c, int d) { return gives("retain", c, 0xC0DE + d); }
static int cuCtxPushCurrent(W c) { return SAY("push %lx\n", c); }
static int cuCtxPopCurrent(W* c) { return gives("pop", c, 0xC0DE); }
static int cuCtxGetDevice(int* d) { *d = 1; return 0; }
static int cuDeviceGetAttribute(int* v, int a, int d) { *v = a - 68; return 0; }
static int cuDeviceGetName(char* s, int n, int d) { strncpy(s, "Orin", n); return 0; }
static int cuMemGetInfo(W* f, W* t) { *f = 5; *t = 7; return 0; }
static int cuPointerGetAttribute(void* v, int a, W p) { *(int*)v = 1; return p == 9 ? 1 : 0; }
static int cuMemAlloc(W* p, W n) { *p = 256 * n; return n > 99 ? 2 : 0; }
static int cuMemFree(W p) { return SAY("free %lu\n", p); }
static int cuMemHostAlloc(W* p, W n, unsigned f) { *p = n; return SAY("pinned %lu %u\n", n, f); }
static int cuMemFreeHost(W p) { return SAY("free pinned %lu\n", p); }
static int cuMemcpyAsync(W t, W s, W n, W q) { return SAY("copy %lu %lu %lu %lu\n", t, s, n, q); }
static int cuStreamCreate(W* s, unsigned f) { *s = 77; return SAY("stream %u\n", f); }
static int cuStreamDestroy(W s) { return SAY("end stream %lu\n", s); }
static int cuStreamSynchronize(W s) { return SAY("synchronize %lu\n", s); }
static int cuStreamGetId(W s, W* id) { *id = 100 + s; return 0; }
static int cuStreamIsCapturing(W s, int* v) { *v = s == 78; return 0; }
static int cuStreamWaitEvent(W s, W e, unsigned f) { return SAY("wait %lu %lu\n", s, e); }
static int cuStreamBeginCapture(W s, int m) { return SAY("capture %lu %d\n", s, m); }
static int cuStreamEndCapture(W s, W* g) { return gives("end capture", g, 55); }
static int cuEventCreate(W* e, unsigned f) { *e = 88; return SAY("event %u\n", f); }
static int cuEventRecord(W e, W s) { return SAY("record %lu %lu\n", e, s); }
static int cuEventSynchronize(W e) { return SAY("reach %lu\n", e); }
static int cuEventElapsedTime(float* ms, W a, W b) { *ms = 1.5; return 0; }
static int cuEventDestroy(W e) { return SAY("end event %lu\n", e); }
static int cuGraphInstantiateWithFlags(W* x, W g, unsigned long long f) { *x = g + 1; return 0; }
static int cuGraphDestroy(W g) { return SAY("end graph %lu\n", g); }
static int cuGraphExecDestroy(W g) { return SAY("end executable %lu\n", g); }
static int cuGraphLaunch(W g, W s) { return s == 79 ? 719 : SAY("launch %lu %lu\n", g, s); }
#define F(n) if (!strcmp(name, #n)) { *out = (void*)n; return 0; }
/* As a driver answers: what came after its version of CUDA it does not have. */
int cuGetProcAddress_v2(const char* name, void** out, int version, W flags, int* status) {
  *out = 0;
  if (version > VERSION) return 500;
  FUNCTIONS
  return 500;
}
"""

USE = """
from jmp_deploy.core.errors import EngineError, GpuMemoryError
from jmp_deploy.engine.cuda import open_cuda

cuda = open_cuda(1)
with cuda.current():
    stream, event, timer = cuda.stream_create(), cuda.event_create(), cuda.timer_create()
    device, pinned = cuda.malloc(3), cuda.malloc_host(4)
    facts = [cuda.device, cuda.compute_capability(), cuda.device_name(), cuda.free_memory()]
    facts += [cuda.device_of(8), cuda.device_of(9), cuda.elapsed_ms(event, event)]
    facts += [cuda.is_capturing(stream), cuda.is_capturing(78), cuda.stream_id(stream)]
    cuda.copy(device, pinned, 5, stream)
    cuda.begin_capture(stream)
    graph = cuda.end_capture(stream)
    cuda.graph_launch(graph, stream)
    cuda.graph_launcher(graph, 6)()
    for call in (lambda: cuda.malloc(100), cuda.graph_launcher(graph, 79)):
        try:
            call()
        except EngineError as error:
            facts.append((type(error).__name__, error.message))
    cuda.event_record(event, stream)
    cuda.wait_event(stream, event)
    cuda.event_synchronize(event)
    cuda.stream_synchronize(stream)
    cuda.graph_destroy(graph)
    cuda.event_destroy(event)
    cuda.free_host(pinned)
    cuda.free(device)
    cuda.stream_destroy(stream)
print(facts)
"""


OLDEST = {"12": 12060, "13": 13000}
"""The oldest driver's CUDA for each cuda-bindings: JetPack 6's 12.6, 13.0."""


def test_cuda_bindings_takes_our_calls_to_the_oldest_driver(driver, tmp_path):
    """A libcuda that has what came until then behind the real cuda-bindings: names, integers for
    handles, results and errors."""
    oldest = OLDEST[metadata.version("cuda-bindings").split(".")[0]]
    try:
        compiler = find_cxx()
    except ToolchainError as error:
        pytest.skip(error.message)
    names = re.findall(r"^static int (cu\w+)", LIBCUDA, re.MULTILINE)
    source = tmp_path / "libcuda.cpp"
    table = "\n  ".join(f"F({name})" for name in names)
    text = LIBCUDA.replace("FUNCTIONS", table).replace("VERSION", str(oldest))
    text = text.replace("int cuGetProc", 'extern "C" int cuGetProc')
    source.write_text(text, encoding="utf-8")
    library = tmp_path / "libcuda.so.1"
    build = [str(compiler), "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run([*build, "-o", str(library)], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(tmp_path),
            "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *calls, facts = done.stdout.splitlines()
    assert ast.literal_eval(facts) == [
        *(1, (7, 8), "Orin", 5, 1, None, 1.5, False, True, 177),
        ("GpuMemoryError", "cuMemAlloc: out of memory"),
        ("EngineError", "cuGraphLaunch failed: CUDA_ERROR_LAUNCH_FAILED"),
    ]
    assert calls == [
        *("cuInit 0", "cuDeviceGet 1", "retain", "push c0df", "pop", "push c0df"),
        *("stream 1", "event 2", "event 0", "pinned 4 0", "copy 768 4 5 77"),
        *("capture 77 1", "end capture", "end graph 55", "launch 56 77", "launch 56 6"),
        *("record 88 77", "wait 77 88", "reach 88", "synchronize 77", "end executable 56"),
        *("end event 88", "free pinned 4", "free 768", "end stream 77", "pop"),
    ]
