#!/usr/bin/env python3
"""Imports what the scripts installed, so that a misfit shows here and not in the middle of a build.

    .venv/bin/python scripts/try_imports.py export,rtx

Its argument: extras, or torch for that and torchvision alone.
Exit code 2 and two lines, what does not fit and its cure, if one import fails.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In this order, for the first that fails is the one to mend: timm imports torchvision, that torch.
MODULES = {
    "torch": ("torch", "torchvision"),
    "export": ("numpy", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime"),
    "rtx": ("tensorrt_rtx",) if platform.machine() == "x86_64" else (),
    "runtime": ("onnxruntime", "cuda.bindings"),
}
DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx-cu13", "cuda.bindings": "cuda-bindings"}
PAIR = ("torch", "torchvision")
SECONDS = 300  # the first import from a cold disk takes a minute on a small machine

# One process for all, and not this one: an import may end it. It says what it is about to import.
CODE = """
import importlib, sys
for name in sys.argv[1:]:
    print(name, flush=True)
    importlib.import_module(name)
print("done", flush=True)
"""


def version(module: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def failure(modules: list[str]) -> tuple[str, str] | None:
    """(module that cannot be imported, why), or None."""
    command = [sys.executable, "-c", CODE, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        shown = error.stdout or b""
        reached = (shown.decode() if isinstance(shown, bytes) else shown).split()
        return (reached[-1] if reached else modules[0]), f"not done within {SECONDS} s"
    reached = [line for line in done.stdout.splitlines() if line in (*modules, "done")]
    if reached[-1:] == ["done"] and done.returncode == 0:
        return None
    why = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
    return (reached[-1] if reached else modules[0]), why[-1]


def cure(module: str) -> str:
    """What to do about a module that cannot be imported."""
    kept = "true" in _setting("include-system-site-packages")
    if kept and module in (*PAIR, "timm"):
        return (
            "install torch and torchvision together, from one index, for "
            f"{_setting('home')}/python; "
            f"or without JMP_SYSTEM_SITE: rm -r {sys.prefix}"
        )
    return f"rm -r {sys.prefix}, and run this again; pip's settings (pip config list) may be why"


def _setting(key: str) -> str:
    lines = (Path(sys.prefix) / "pyvenv.cfg").read_text().splitlines()
    return next((line.split("=", 1)[1].strip() for line in lines if line.startswith(key)), "")


def main() -> int:
    modules = [name for extra in sys.argv[1].split(",") for name in MODULES.get(extra, ())]
    found = failure(list(dict.fromkeys(modules)))
    if found is None:
        return 0
    module, why = found
    # In torchvision or timm it is the pair that does not fit, whatever the message says.
    names = PAIR if module in (*PAIR, "timm") else (module,)
    beside = " beside ".join(f"{name} {version(name)}" for name in reversed(names))
    print(f"error: cannot import {module} ({beside}): {why}", file=sys.stderr)
    print(f"  mend it: {cure(module)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
