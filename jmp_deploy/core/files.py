"""Files that are either whole or absent: write beside, then rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ArtifactError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`, renamed to it on success, removed otherwise.

    Raises:
        ArtifactError: the folder cannot be written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem}-", suffix=f".part{target.suffix}"
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files that only the owner reads; an artifact has ordinary permissions.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror or error}", _hint(error, target)
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes) -> None:
    """Writes a whole file or none."""
    with atomic_path(target) as path:
        path.write_bytes(data)


def write_json(target: Path, value: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(target, (text + "\n").encode())


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def make_writable_dir(path: Path) -> None:
    """Makes a folder and proves that it can be written.

    Raises:
        ArtifactError: it cannot.
    """
    with atomic_path(path / ".writable") as probe:
        probe.touch()
    (path / ".writable").unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _hint(error: OSError, target: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk is full: free some space on the volume of {target.parent}"
    return "choose another folder with -o"


def read_text(path: Path) -> str:
    """A small file's text, or "" where it cannot be read: sysfs has errors of all kinds."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return ""


def read_number(path: Path) -> float | None:
    """A file's first word as a number, or None. Some drivers write "32760 mA"."""
    words = read_text(path).split()
    try:
        return float(words[0]) if words else None
    except ValueError:
        return None
