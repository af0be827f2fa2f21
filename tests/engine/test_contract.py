"""Every name of TensorRT and of cuda-bindings that we use exists, in versions that CI cannot run.

TensorRT cannot be installed where this runs. What NVIDIA's own bindings of many versions have was
looked up by `scripts/bindings_check.py` and is kept in a table; the type stubs (PyPI:
tensorrt-stubs, 10.13) can be installed, and TensorRT-RTX is real. What one of them lacks must stand
in `trt_differences.py`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jmp_deploy.core.paths import PACKAGE
from jmp_deploy.engine import api, cuda
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
from tests.fakes.cuda import FakeCuda

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


def test_the_seam_works_on_the_real_tensorrt_rtx(rtx):
    """As far as that goes without a GPU: logger, runtime, validity, what the network says."""
    words: list[str] = []
    logger = api.make_logger(rtx, words.append)
    runtime = api.make_runtime(rtx, logger)
    assert api.invalidity(rtx, runtime, b"no plan" * 20) == "malformed engine"
    assert api.deserialize(runtime, b"no plan" * 20) is None
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
    seam.write_text(SEAM.read_text("utf-8"), encoding="utf-8")
    assert mypy_complaints(tmp_path) == []
    seam.write_text(seam.read_text("utf-8").replace(".set_tensor_address(", ".set_adress("))
    (complaint,) = mypy_complaints(tmp_path)
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
        elif re.fullmatch(r"self\._(runtime|driver)\.cu\w*(?<!_t)", text):
            calls.setdefault(text.rsplit(".", 1)[1], set()).add(len(node.args))
    return calls


def cuda_values(source: str) -> set[str]:
    """Dotted names of constants, enums and types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            match = re.fullmatch(r"(?:self\._runtime|self\._driver|attributes)\.([\w.]+)", text)
            if match:
                prefix = "cudaDeviceAttr." if text.startswith("attributes") else ""
                found.add(prefix + match[1])
    return found


def arity(function) -> int:
    """Parameters, as the first line of a docstring of cuda-bindings gives them."""
    inside = re.search(r"\((.*)\)", (function.__doc__ or "").splitlines()[0])[1]
    return len([part for part in inside.split(",") if part.strip()])


def cuda_wrong(source: str, runtime, driver) -> list[str]:
    found = []
    for name, counts in cuda_calls(source).items():
        function = getattr(runtime if name.startswith("cuda") else driver, name, None)
        if function is None:
            found.append(f"{name}: not there")
        elif counts != {arity(function)}:
            found.append(f"{name}: takes {arity(function)} arguments, given {sorted(counts)}")
    for name in cuda_values(source):
        where = driver if name.startswith(("cu", "CU")) and not name.startswith("cuda") else runtime
        for part in name.split("."):
            where = getattr(where, part, None)
        if where is None:
            found.append(f"{name}: not there")
    return sorted(found)


def test_cuda_bindings_has_every_function_and_constant():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings: not checked")
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings: not checked")
    source = Path(cuda.__file__).read_text("utf-8")
    assert len(cuda_calls(source)) > 20 and len(cuda_values(source)) > 10
    assert cuda_wrong(source, runtime, driver) == []
    planted = (
        source.replace('"cudaMalloc"', '"cudaMallocs"')
        .replace('"cudaGetDevice")', '"cudaGetDevice", 1)')
        .replace("cudaMemcpyDefault", "cudaMemcpyAnyhow")
    )
    assert cuda_wrong(planted, runtime, driver) == [
        "cudaGetDevice: takes 0 arguments, given [1]",
        "cudaMallocs: not there",
        "cudaMemcpyKind.cudaMemcpyAnyhow: not there",
    ]


def test_the_fake_driver_has_functions_that_exist_with_their_arguments():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings: not checked")
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings: not checked")
    fake = FakeCuda()
    names = [n for n in dir(fake) if n.startswith(("cuda", "cuCtx", "cuInit"))]
    assert len(names) > 20
    for name in names:
        real = getattr(runtime if name.startswith("cuda") else driver, name)
        assert arity(real) == getattr(fake, name).__code__.co_argcount - 1, name
    assert fake.runtime.cudaHostAllocDefault == runtime.cudaHostAllocDefault
    assert fake.runtime.cudaEventDisableTiming == runtime.cudaEventDisableTiming
    assert fake.runtime.cudaStreamNonBlocking == runtime.cudaStreamNonBlocking
    for name in fake.runtime.cudaError_t.__members__:
        assert int(fake.runtime.cudaError_t[name]) == int(getattr(runtime.cudaError_t, name))
