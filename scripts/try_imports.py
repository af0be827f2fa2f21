#!/usr/bin/env python3
"""Imports what the scripts installed, so that a misfit shows here and not in the middle of a build.

    .venv/bin/python scripts/try_imports.py export,rtx

Its argument: extras, or torch for that and torchvision alone.
Exit code 2 and two lines, what does not fit and its cure, if one import fails.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jmp_deploy.core.packages import PACKAGES, PAIR, TENSORRT_RTX, Package, try_imports

WITH_EXPORT = ("onnxruntime", "polygraphy")


def wanted(extras: list[str]) -> list[Package]:
    """What these extras of ours bring that can be imported here."""
    if extras == ["torch"]:
        return [package for package in PACKAGES if package.module in PAIR]
    found = [
        package
        for package in PACKAGES
        if not package.optional
        and (package.extra in extras or ("export" in extras and package.module in WITH_EXPORT))
    ]
    if "rtx" in extras and platform.machine() in ("aarch64", "x86_64"):
        found.append(TENSORRT_RTX)
    return found


def cure(package: Package) -> str:
    """What to do about a package that cannot be imported."""
    kept = "true" in _setting("include-system-site-packages")
    if kept and package.module in (*PAIR, "timm"):
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
    packages = wanted(sys.argv[1].split(","))
    trials = try_imports(packages)
    for package in packages:
        if trouble := trials[package.name].trouble:
            named = trouble.startswith("cannot import")
            what = trouble if named else f"cannot import {package.module}: {trouble}"
            print(f"error: {what}\n  mend it: {cure(package)}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
