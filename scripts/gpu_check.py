"""The work of gpu_check.sh, which sets up its environment. Prints a table last, writes JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
PLUGINS = REPO / "plugins"
sys.path[:0] = [str(REPO / "tests"), str(PLUGINS / "tests")]

import oracle  # noqa: E402
from kernel_cases import assert_matches, attributes, random_case  # noqa: E402
from kernel_library import DTYPES, KernelLibrary, make_params, read_outputs, write_case  # noqa: E402

KERNEL = PLUGINS / "token_reduce_kernel.cu"
DRIVER = PLUGINS / "tests" / "host_driver.cpp"
DEIT_S = {"num_keep": 138, "num_heads": 6, "head_dim": 64, "scale": 0.125, "tau": 0.0}
DEIT_S_SHAPE = {"tokens": 197, "channels": 384, "parts": 3}
BATCHES = (1, 8, 64, 256)
LAUNCHES = 20  # in one CUDA graph, so that the CPU's launch overhead is not in the time
SAMPLES = 30
SANITIZERS = {
    "memcheck": ["--leak-check", "full"],
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}


def main() -> int:
    facts = machine()
    print(f"gpu_check: {facts['gpu']}, driver {facts['driver']}, CUDA {facts['cuda']}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library, driver = build(folder)
        tests = run_tests(folder, library)
        sanitizers = run_sanitizers(folder, driver)
        timings = time_kernel(library)
    report = {**facts, "tests": tests, "sanitizers": sanitizers, "timings": timings}
    report["ok"] = tests["failed"] == 0 and tests["passed"] > 0
    report["ok"] = report["ok"] and all(s["result"] == "ok" for s in sanitizers)
    path = write_report(report)
    print_table(report)
    print(f"written: {path}")
    return 0 if report["ok"] else 1


def machine() -> dict[str, Any]:
    query = "--query-gpu=name,driver_version,compute_cap"
    shown = output(["nvidia-smi", query, "--format=csv,noheader"]).splitlines()[0]
    gpu, driver, capability = (part.strip() for part in shown.split(","))
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output(["nvcc", "--version"]))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=REPO, check=False
    )
    return {
        "gpu": gpu,
        "driver": driver,
        "compute_capability": capability,
        "cuda": version[1] if version else "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
    }


def build(folder: Path) -> tuple[Path, Path]:
    """Shared library and standalone driver for the GPU that is here."""
    library, driver = folder / "kernel.so", folder / "driver"
    common = ["nvcc", "-std=c++17", "-arch=native", "-lineinfo", "-Werror", "all-warnings"]
    shared = ["-O3", "-shared", "-Xcompiler", "-fPIC", str(KERNEL), "-o", str(library)]
    subprocess.run([*common, *shared], check=True)
    subprocess.run([*common, "-O3", str(KERNEL), str(DRIVER), "-o", str(driver)], check=True)
    return library, driver


def run_tests(folder: Path, library: Path) -> dict[str, int]:
    """The tests marked gpu. The repository's pytest options need plugins that may be missing."""
    junit = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts="]
    command += ["-p", "no:cacheprovider", f"--junitxml={junit}", "tests/gpu"]
    environment = os.environ | {"JMP_KERNEL_LIBRARY": str(library)}
    subprocess.run(command, cwd=REPO, env=environment, check=False)
    if not junit.is_file():
        return {"passed": 0, "failed": 1, "skipped": 0}
    suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
    count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    skipped = count["skipped"]
    return {"passed": count["tests"] - failed - skipped, "failed": failed, "skipped": skipped}


def run_sanitizers(folder: Path, driver: Path) -> list[dict[str, Any]]:
    """compute-sanitizer over the driver; and one planted overflow that memcheck must report."""
    tool = shutil.which("compute-sanitizer")
    rows: list[dict[str, Any]] = []
    for dtype in (np.float32, np.float16):
        for importance in (oracle.CLASS_ROW, oracle.RECEIVED):
            attrs = attributes(num_keep=37, granularity=oracle.SAMPLE, importance=importance)
            attrs |= {"tau": -1.0, "head_dim": 33}
            case = random_case(1, attrs, batch=3, tokens=75, channels=131, dtype=dtype)
            path, out = folder / "case", folder / "out"
            write_case(path, *case, **attrs)
            label = f"{np.dtype(dtype).name}, importance {importance}"
            for check, options in SANITIZERS.items():
                if tool is None:
                    rows.append({"check": check, "case": label, "result": "not installed"})
                    continue
                command = [tool, "--tool", check, "--error-exitcode", "9", *options]
                done = subprocess.run(
                    [*command, str(driver), str(path), str(out)], capture_output=True, text=True
                )
                if done.returncode == 0:
                    result = judge(out, case, attrs)
                else:
                    result = "FAILED"
                    print(done.stdout[-4000:], done.stderr[-2000:])
                rows.append({"check": check, "case": label, "result": result})
    if tool is not None:
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
        done = subprocess.run(
            [*command, str(driver), str(path), str(out), "y"], capture_output=True, text=True
        )
        noticed = done.returncode == 9 and "Invalid __global__ write" in done.stdout
        result = "ok" if noticed else "FAILED: a planted overflow was not reported"
        rows.append({"check": "memcheck bites", "case": "y one element short", "result": result})
    return rows


def judge(out: Path, case: tuple[np.ndarray, ...], attrs: dict[str, Any]) -> str:
    """Whether the driver also computed the right thing."""
    x, qkv, size = case
    got = read_outputs(out, x, attrs["num_prefix"] + attrs["num_keep"])
    try:
        tolerance = 1e-5 if x.dtype == np.float32 else 1e-3
        assert_matches(got, (x, qkv, size), attrs, tolerance=tolerance)
    except AssertionError as error:
        return f"FAILED: wrong result: {str(error).strip().splitlines()[0]}"
    return "ok"


# --- Timings -------------------------------------------------------------------------------------


def time_kernel(library_path: Path) -> list[dict[str, Any]]:
    """DeiT-S, block 3 (197 tokens, 138 of 196 kept), against copying as many bytes."""
    import torch

    library = KernelLibrary(library_path)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rows = []
    for dtype in (np.float16, np.float32):
        for batch in BATCHES:
            attrs = attributes(**DEIT_S)
            case = random_case(1, attrs, batch=batch, broadcast=True, dtype=dtype, **DEIT_S_SHAPE)
            moved = bytes_moved(case[0], attrs)
            # Several sets of buffers, taken in turns; small ones stay in the second level cache
            # all the same, for the copy as for the reduction.
            sets = max(1, min(LAUNCHES, 2 * cache // moved + 1))
            ours = measure(reduction_calls(library, case, attrs, sets))
            floor = measure(copy_calls(moved, sets))
            rows.append(
                {
                    "dtype": np.dtype(dtype).name,
                    "batch": batch,
                    "microseconds": round(ours, 2),
                    "megabytes": round(moved / 1e6, 3),
                    "copy_microseconds": round(floor, 2),
                    "ratio_to_copy": round(ours / floor, 2),
                    "cache": "cold" if sets * moved > cache else "warm",
                }
            )
    return rows


def bytes_moved(x: np.ndarray, attrs: dict[str, Any]) -> int:
    """Least traffic: x, the keys and one query row read once, the outputs written once."""
    batch, tokens, channels = x.shape
    inner = attrs["num_heads"] * attrs["head_dim"]
    places = attrs["num_prefix"] + attrs["num_keep"]
    read = batch * (tokens * (channels + inner) + inner) + tokens
    return (read + batch * places * (channels + 2)) * x.dtype.itemsize


def reduction_calls(
    library: KernelLibrary, case: tuple[np.ndarray, ...], attrs: dict[str, Any], sets: int
) -> list[Any]:
    import torch

    x, qkv, size = case
    params = make_params(x, qkv, size, DTYPES[x.dtype], **attrs)
    places = params.num_prefix + params.num_keep
    workspace = torch.empty(library.workspace_bytes(params), dtype=torch.uint8, device="cuda")
    calls = []
    for _ in range(sets):
        inputs = [torch.from_numpy(array).cuda() for array in case]
        outputs = [
            torch.empty(shape, dtype=inputs[0].dtype, device="cuda")
            for shape in ((len(x), places, x.shape[2]), (len(x), places), (len(x), places))
        ]

        calls.append(partial(reduce_on_stream, library, params, [*inputs, *outputs], workspace))
    return calls


def reduce_on_stream(
    library: KernelLibrary, params: Any, tensors: list[Any], workspace: Any
) -> None:
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    pointers = [tensor.data_ptr() for tensor in tensors]
    library.launch(params, *pointers, None, workspace.data_ptr(), stream=stream)


def copy_calls(moved: int, sets: int) -> list[Any]:
    import torch

    half = max(moved // 2, 1)  # a copy reads it once and writes it once
    calls = []
    for _ in range(sets):
        pair = [torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2)]
        calls.append(partial(pair[0].copy_, pair[1]))
    return calls


def measure(calls: list[Any]) -> float:
    """Median microseconds of one call, over graphs of LAUNCHES calls that take turns."""
    import torch

    for call in calls:  # modules are loaded before the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            calls[i % len(calls)]()
    for _ in range(5):
        graph.replay()
    times = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / LAUNCHES)
    return statistics.median(times)


# --- Report --------------------------------------------------------------------------------------


def write_report(report: dict[str, Any]) -> Path:
    folder = Path(os.environ.get("OUT") or REPO / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", report["gpu"]).strip("-").lower()
    path = folder / f"gpu_check_{name}.json"
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['gpu']}, driver {report['driver']}, CUDA {report['cuda']}")
    print("DeiT-S block 3 (197 -> 139 tokens), per call, second level cache warm or cold\n")
    print("dtype     batch    reduction      moved         copy   ratio  cache")
    for row in report["timings"]:
        print(
            f"{row['dtype']:8} {row['batch']:6} {row['microseconds']:9.1f} us "
            f"{row['megabytes']:6.2f} MB {row['copy_microseconds']:8.1f} us "
            f"{row['ratio_to_copy']:6.1f}x {row['cache']}"
        )
    tests = report["tests"]
    print(
        f"\ntests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    )
    for check in dict.fromkeys(row["check"] for row in report["sanitizers"]):
        results = [row["result"] for row in report["sanitizers"] if row["check"] == check]
        bad = sorted({result for result in results if result != "ok"})
        print(f"{check}: {', '.join(bad) if bad else f'ok ({len(results)} runs)'}")
    print("all good" if report["ok"] else "NOT all good")


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
