"""The work of gpu_check.sh, which sets up its environment. Prints a table last, writes JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
PLUGINS = REPO / "plugins"
sys.path[:0] = [str(REPO / "tests"), str(PLUGINS / "tests")]

import oracle  # noqa: E402
from kernel_cases import assert_matches, attributes, random_case  # noqa: E402
from kernel_library import read_outputs, write_case  # noqa: E402

KERNEL = PLUGINS / "token_reduce_kernel.cu"
DRIVER = PLUGINS / "tests" / "host_driver.cpp"
# The tuned kernels take heads of a multiple of 8 columns; odd ones go to the plain kernels.
SANITIZED: dict[str, dict[str, Any]] = {
    "plain, class row": {"importance": oracle.CLASS_ROW, "head_dim": 33},
    "plain, attention received": {"importance": oracle.RECEIVED, "head_dim": 33},
    "tuned, by importance": {"selection": oracle.IMPORTANCE, "head_dim": 32},
    "tuned, distinct": {"selection": oracle.DISTINCT, "head_dim": 64},
    "tuned, attention received": {"importance": oracle.RECEIVED, "head_dim": 72},
}
# They watch what memory and power the GPU has, which others' tests change.
ALONE = ("test_bench_gpu.py", "test_runtime_gpu.py")
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
        print("gpu_check: tests", flush=True)
        tests = run_tests(folder, library)
        print("gpu_check: compute-sanitizer", flush=True)
        sanitizers = run_sanitizers(folder, driver)
        print("gpu_check: benchmarks", flush=True)
        benchmarks = run_benchmarks(full="--full" in sys.argv[1:])
    report = {**facts, "tests": tests, "sanitizers": sanitizers, "benchmarks": benchmarks}
    report["ok"] = tests["failed"] == 0 and tests["passed"] > 0
    report["ok"] = report["ok"] and all(s["result"] == "ok" for s in sanitizers)
    report["ok"] = report["ok"] and all(b["exit_code"] == 0 for b in benchmarks.values())
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
    common = ["nvcc", "-std=c++17", "-O3", "-arch=native", "-lineinfo", "-Werror", "all-warnings"]
    shared = ["-shared", "-Xcompiler", "-fPIC", str(KERNEL), "-o", str(library)]
    commands = [[*common, *shared], [*common, str(KERNEL), str(DRIVER), "-o", str(driver)]]
    # and the library that the PyTorch operator compiles for itself, into the cache
    major, minor = machine()["compute_capability"].split(".")
    warm = f"from jmp_deploy.jmp.kernel import kernel_library as f; f('{major}{minor}')"
    commands.append([sys.executable, "-c", warm])
    running = [subprocess.Popen(command, cwd=REPO) for command in commands]
    for process, command in zip(running, commands, strict=True):
        if process.wait() != 0:
            raise SystemExit(f"gpu_check: failed: {' '.join(command)}")
    return library, driver


def run_tests(folder: Path, library: Path) -> dict[str, int]:
    """The tests marked gpu: those of the kernel side by side, then those that watch the memory."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") is not None else []
    kernel = sorted(str(path) for path in (REPO / "tests/gpu").glob("test_*.py"))
    alone = [path for path in kernel if Path(path).name in ALONE]
    kernel = [path for path in kernel if path not in alone]
    for name, options in (("kernel", [*workers, *kernel]), ("alone", alone)):
        # The repository's pytest options need plugins that may be missing.
        junit = folder / f"{name}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts="]
        command += ["-p", "no:cacheprovider", f"--junitxml={junit}", *options]
        environment = os.environ | {"JMP_KERNEL_LIBRARY": str(library)}
        subprocess.run(command, cwd=REPO, env=environment, check=False)
        if not junit.is_file():
            counts["failed"] += 1
            continue
        suite = next(ElementTree.parse(junit).getroot().iter("testsuite"))
        found = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        failed = found["failures"] + found["errors"]
        counts["failed"] += failed
        counts["skipped"] += found["skipped"]
        counts["passed"] += found["tests"] - failed - found["skipped"]
    return counts


def run_sanitizers(folder: Path, driver: Path) -> list[dict[str, Any]]:
    """compute-sanitizer over the driver; and one planted overflow that memcheck must report."""
    tool = shutil.which("compute-sanitizer")
    jobs = []
    for number, (dtype, name) in enumerate(
        (dtype, name) for dtype in (np.float32, np.float16) for name in SANITIZED
    ):
        attrs = attributes(num_keep=37, granularity=oracle.SAMPLE, tau=-1.0, **SANITIZED[name])
        channels = 136 if name.startswith("tuned") else 131
        case = random_case(1, attrs, batch=3, tokens=75, channels=channels, dtype=dtype)
        path = folder / f"case{number}"
        write_case(path, *case, **attrs)
        run = [str(driver), "tuned" if name.startswith("tuned") else "plain", str(path)]
        jobs += [
            (run, f"{np.dtype(dtype).name}, {name}", check, case, attrs) for check in SANITIZERS
        ]
    if tool is None:
        return [{"check": j[2], "case": j[1], "result": "not installed"} for j in jobs]

    def sanitize(job: tuple[Any, ...]) -> dict[str, Any]:
        run, label, check, case, attrs = job
        out = Path(f"{run[-1]}-{check}.out")
        command = [tool, "--tool", check, "--error-exitcode", "9", *SANITIZERS[check]]
        done = subprocess.run([*command, *run, str(out)], capture_output=True, text=True)
        result = judge(out, case, attrs) if done.returncode == 0 else "FAILED"
        if done.returncode != 0:
            print(f"{check}, {label}:", done.stdout[-4000:], done.stderr[-2000:])
        return {"check": check, "case": label, "result": result}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        rows = list(threads.map(sanitize, jobs))
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    bitten = [*jobs[-1][0], str(folder / "bitten.out"), "y"]
    done = subprocess.run([*command, *bitten], capture_output=True, text=True)
    noticed = done.returncode == 9 and "Invalid __global__ write" in done.stdout
    result = "ok" if noticed else "FAILED: a planted overflow was not reported"
    rows.append({"check": "memcheck bites", "case": "y one element short", "result": result})
    return rows


def judge(out: Path, case: tuple[np.ndarray, ...], attrs: dict[str, Any]) -> str:
    """Whether the driver also computed the right thing."""
    x, qkv, size = case
    got = read_outputs(out, x, attrs)
    try:
        tolerance = 1e-5 if x.dtype == np.float32 else 1e-3
        assert_matches(got, (x, qkv, size), attrs, tolerance=tolerance)
    except AssertionError as error:
        return f"FAILED: wrong result: {str(error).strip().splitlines()[0]}"
    return "ok"


# --- Benchmarks ----------------------------------------------------------------------------------


def run_benchmarks(*, full: bool) -> dict[str, Any]:
    """benchmarks/kernel.py and benchmarks/endtoend.py; what they wrote, or why they did not.

    Their JSON, Markdown and PNG files go where the report goes.
    """
    kernel: list[str] = []
    endtoend: list[str] = []
    if not full:  # two minutes instead of most of an hour
        kernel = ["--models", "deit_s,dinov2_s,siglip_b,dinov2_s@518", "--selections", "distinct"]
        kernel += ["--compile", "none", "--seconds", "1", "--limit", "60"]
        endtoend = ["--seconds", "4", "--sessions", "2"]
    found = {}
    for name, options in (("kernel", kernel), ("endtoend", endtoend)):
        command = [sys.executable, str(REPO / "benchmarks" / f"{name}.py"), *options]
        base = results_folder() / f"{name}-{slug(machine()['gpu'])}"
        done = subprocess.run([*command, "-o", str(base)], cwd=REPO, check=False)
        written = base.parent / f"{base.name}.json"
        found[name] = {"exit_code": done.returncode, "json": written.name}
        if done.returncode == 0:
            print((base.parent / f"{base.name}.md").read_text(encoding="utf-8"))
    return found


# --- Report --------------------------------------------------------------------------------------


def results_folder() -> Path:
    folder = Path(os.environ.get("OUT") or REPO / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def write_report(report: dict[str, Any]) -> Path:
    path = results_folder() / f"gpu_check_{slug(report['gpu'])}.json"
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['gpu']}, driver {report['driver']}, CUDA {report['cuda']}")
    tests = report["tests"]
    print(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
    for check in dict.fromkeys(row["check"] for row in report["sanitizers"]):
        results = [row["result"] for row in report["sanitizers"] if row["check"] == check]
        bad = sorted({result for result in results if result != "ok"})
        print(f"{check}: {', '.join(bad) if bad else f'ok ({len(results)} runs)'}")
    for name, benchmark in report["benchmarks"].items():
        code = benchmark["exit_code"]
        print(
            f"benchmark {name}: {benchmark['json'] if code == 0 else f'FAILED (exit code {code})'}"
        )
    print("all good" if report["ok"] else "NOT all good")


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
