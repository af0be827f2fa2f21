"""The machine's facts, and results as JSON, Markdown and PNG."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jmp_deploy.core.errors import JmpDeployError
from jmp_deploy.core.files import atomic_path, write_bytes, write_json

REPO = Path(__file__).resolve().parent.parent.parent


class NeedsGpuError(JmpDeployError):
    """A measurement that means nothing without a GPU."""


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: device, versions, commit, date (UTC)."""
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _output(["git", "-C", str(REPO), "rev-parse", "HEAD"]),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
    }
    for package in ("torch", "timm", "onnxruntime"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit"
    shown = _output(["nvidia-smi", query, "--format=csv,noheader"])
    names = ("gpu", "driver", "clock_now", "clock_max", "power_limit")
    values = shown.splitlines()[0].split(", ") if shown else []
    return {**facts, **dict(zip(names, values, strict=False))}


def default_output(name: str, facts: dict[str, Any]) -> Path:
    """$OUT or benchmarks/results, a file name that says what and where."""
    folder = Path(os.environ.get("OUT") or REPO / "benchmarks" / "results")
    device = facts.get("gpu") or f"cpu {facts['cpu']} {facts['cores']} cores"
    return folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"


def write(
    base: Path, result: dict[str, Any], table: str, plot: Callable[[Any, Path], None] | None = None
) -> list[Path]:
    """Writes BASE.json and BASE.md and, with `plot` and matplotlib, BASE.png; returns the paths.

    `plot(matplotlib.pyplot, path)` draws and saves.
    """
    paths = [base.parent / f"{base.name}{suffix}" for suffix in (".json", ".md", ".png")]
    write_json(paths[0], result)
    write_bytes(paths[1], (table.rstrip() + "\n").encode())
    if plot is None or find_spec("matplotlib") is None:
        if plot is not None:
            print("no plot: matplotlib is not installed", file=sys.stderr)
        return paths[:2]
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with atomic_path(paths[2]) as temporary:
        plot(plt, temporary)
    plt.close("all")
    return paths


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def heading(title: str, facts: dict[str, Any]) -> str:
    """Title and the machine in one line."""
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    parts = [device]
    parts += [f"driver {facts['driver']}"] if facts.get("driver") else []
    parts += [f"{name} {facts[name]}" for name in ("torch", "onnxruntime") if facts[name]]
    return f"# {title}\n\n{', '.join(parts)}; {facts['date']}; commit {facts['commit'][:12]}\n"


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1].strip() if found else platform.machine()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
