"""Where our own files lie: in a checkout, in a wheel, in the cache."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder `jmp_deploy` of modules."""

IMPORT_ROOT = PACKAGE.parent
"""What has to stand on PYTHONPATH for this very package to be imported; in a checkout its root."""


def checkout() -> Path | None:
    """Root of the checkout that this package runs from, or None where it was installed."""
    return IMPORT_ROOT if (IMPORT_ROOT / "pyproject.toml").is_file() else None


def data_dir(name: str, inside: str) -> Path:
    """A top-level folder of the checkout, or what the wheel carries of it.

    Args:
        name: of the folder in a checkout, beside the package.
        inside: of the folder in a wheel, within the package (pyproject.toml says which).
    """
    installed = PACKAGE / inside
    return installed if installed.is_dir() else IMPORT_ROOT / name


def cache_dir() -> Path:
    """JMP_DEPLOY_CACHE, else XDG_CACHE_HOME/jmp_deploy, else ~/.cache/jmp_deploy. Not created."""
    if given := os.environ.get("JMP_DEPLOY_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jmp_deploy"
