"""A wheel of this very package, for a device that has no checkout.

Written here and not by hatchling, because an installed jmp_deploy has neither its sources nor a
build backend; what goes in is what `pyproject.toml` puts into a wheel.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from .. import __version__
from ..core.errors import ArtifactError
from ..core.paths import PACKAGE, data_dir
from ..plugin.library import sources_dir

INSIDE = ("_plugin_src", "_calibration")
"""Folders of a wheel within the package, which a checkout has beside it."""


def write_wheel(folder: Path) -> Path:
    """Writes jmp_deploy-VERSION-py3-none-any.whl into a folder and returns its path.

    Raises:
        ArtifactError: this package runs without having been installed.
    """
    try:
        found = distribution("jmp-deploy")
    except PackageNotFoundError as error:
        raise ArtifactError(
            "jmp_deploy is not installed here, so it cannot make a wheel of itself",
            "pip install -e . in its checkout, or leave it out with --no-wheel",
        ) from error
    info = f"jmp_deploy-{__version__}.dist-info"
    wheel = "Wheel-Version: 1.0\nGenerator: jmp_deploy\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    texts = {"WHEEL": wheel, "METADATA": found.read_text("METADATA") or ""}
    texts["entry_points.txt"] = found.read_text("entry_points.txt") or ""
    path = folder / f"jmp_deploy-{__version__}-py3-none-any.whl"
    records = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [
            *((name, source.read_bytes()) for name, source in _sources()),
            *((f"{info}/{name}", text.encode()) for name, text in texts.items()),
        ]:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            records.append(f"{name},sha256={digest.decode()},{len(content)}\n")
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        record = f"{info}/RECORD"
        archive.writestr(zipfile.ZipInfo(record), "".join([*records, f"{record},,\n"]))
    return path


def _sources() -> Iterator[tuple[str, Path]]:
    """(name in the wheel, file), in order."""
    calibration = data_dir("calibration", "_calibration")
    folders = [(PACKAGE, "jmp_deploy"), (sources_dir(), f"jmp_deploy/{INSIDE[0]}")]
    for root, name in [*folders, (calibration, f"jmp_deploy/{INSIDE[1]}")]:
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            skipped = {"__pycache__", "tests", *(INSIDE if root == PACKAGE else ())}
            if path.is_file() and not skipped & {*parts} and not parts[0].startswith("build"):
                yield "/".join((name, *parts)), path
