"""Files that are either whole or absent: write beside, then rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ArtifactError, JmpDeployError, one_line

if TYPE_CHECKING:
    import zipfile

T = TypeVar("T")
DEEPEST = 50
"""Levels of lists and objects in a JSON file; Python's recursion ends at 1000."""
MOST_JSON = 256 << 20
"""Bytes of a JSON file: the rows of a million images take half of it."""


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
            dir=target.parent, prefix=f".{target.stem[:40]}-", suffix=f".part{target.suffix}"
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


STAGING = ".staging-"
"""Prefix of the folders of `staging_dir`."""
TRIES = 8


@contextmanager
def staging_dir(folder: Path) -> Iterator[Path]:
    """A folder in `folder` for what is moved into place at the end; it goes whatever happens.

    What a process that was killed left behind goes too: a lock on each such folder tells whether
    its process is alive, for the kernel lets go of it with the process (a process number may be
    another's by then).
    """
    for path in folder.glob(f"{STAGING}*"):
        with _locked(path) as is_ours:
            if is_ours:
                shutil.rmtree(path, ignore_errors=True)
    for _ in range(TRIES):
        made = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        with _locked(made) as is_ours:
            if not (is_ours and made.is_dir()):  # another build has just swept it away
                continue
            try:
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)
            return
    raise ArtifactError(f"no folder in {folder} can be locked", "choose another folder with -o")


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the lock of a folder, within. Where there are no locks (some network
    drives) it has that of what is empty: of what it makes, and sweeps nothing else."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            can_lock = error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
            yield not can_lock and not any(folder.iterdir())
            return
        yield True
    finally:
        os.close(handle)


def write_bytes(target: Path, data: bytes) -> None:
    """Writes a whole file or none."""
    with atomic_path(target) as path:
        path.write_bytes(data)


def write_json(target: Path, value: Any) -> None:
    """Writes readable JSON, whole or not at all."""
    write_bytes(target, json_text(value).encode())


def json_text(value: Any) -> str:
    """A value as readable JSON that any reader takes and any terminal shows.

    Control characters are escaped. Bytes of a file name that are no UTF-8 become the four
    characters of "\\xff": a lone surrogate, as Python has it, is refused by other readers.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _ODD.sub(_escaped, text)


_ODD = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def size_of(path: Path) -> int:
    """Size in bytes of an ordinary file.

    Raises:
        OSError: it is not there, or is a folder, a pipe or a device: whoever opened one of those
            might wait for ever.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return found.st_size


def read_json(
    path: Path,
    kind: type[T],
    *,
    what: str,
    hint: str | None = None,
    error: type[JmpDeployError] = ArtifactError,
    most: int = MOST_JSON,
) -> T:
    """Reads a JSON file of which the form is known.

    Args:
        kind: what it has to hold: a dataclass, dict[str, list[float]] and the like. Keys that it
            does not name are passed over; `Any` takes everything.
        what: the file's name for people: "latency table".
        hint: how to come by a good one.
        error: what is raised.
        most: bytes.

    Raises:
        error: not there, not to be read, no JSON, or of another form; with the field's path.
    """
    try:
        size = size_of(path)
        content = path.read_bytes() if size <= most else b""
    except FileNotFoundError as failure:
        raise error(f"no such {what}: {path}", hint) from failure
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}", hint) from failure
    if size > most:
        raise error(f"{path} has {size} bytes: too large for a {what}", hint)
    try:
        return parse_json(content, kind)
    except ValueError as failure:
        raise error(f"{path} is not a {what}: {failure}", hint) from failure


def of_form(
    data: Any,
    kind: type[T],
    path: Path,
    *,
    what: str,
    hint: str | None = None,
    error: type[JmpDeployError] = ArtifactError,
) -> T:
    """What `read_json` read as something looser, as `kind`.

    Raises:
        error: it is of another form; with the field's path.
    """
    import msgspec

    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as failure:
        raise error(f"{path} is not a {what}: {one_line(failure)}", hint) from failure


def parse_json(content: bytes | str, kind: type[T]) -> T:
    """JSON as `kind` has it.

    Raises:
        ValueError: no JSON, nested too deep, or of another form; with the field's path.
    """
    import msgspec

    try:
        data = msgspec.json.decode(content)
        if _depth(data) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        return msgspec.convert(data, kind)
    except RecursionError as failure:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from failure
    except (msgspec.MsgspecError, ValueError) as failure:  # ValueError: thousands of digits
        raise ValueError(one_line(failure)) from failure


def _depth(value: Any) -> int:
    """Levels of lists and objects within each other; stops where they are too many."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        inner = [item.values() if isinstance(item, dict) else item for item in level
                 if isinstance(item, (dict, list))]  # fmt: skip
        level = [item for items in inner for item in items]
        depth += bool(inner)
    return depth


def read_arrays(
    path: Path,
    *,
    what: str,
    hint: str | None = None,
    error: type[JmpDeployError] = ArtifactError,
    most: int | None = None,
) -> dict[str, Any]:
    """Reads a NumPy archive: name -> array of numbers or text.

    What its members claim to be is read before any of them: a few bytes can claim to be 24 GB.

    Args:
        what, hint, error: as for `read_json`.
        most: bytes of all arrays; None, for an archive that is not compressed: the file's own.

    Raises:
        error: not there, not to be read, no archive of arrays, objects in it, or too large.
    """
    import zipfile

    import numpy as np

    try:
        size, arrays = size_of(path), {}
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > (size if most is None else most):
                raise error(f"{path} would hold {total} bytes: too large for a {what}", hint)
            for member in members:
                _refuse_claims(archive, member)
            for member in members:
                with archive.open(member) as stream:
                    name = member.filename.removesuffix(".npy")
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    except FileNotFoundError as failure:
        raise error(f"no such {what}: {path}", hint) from failure
    except JmpDeployError:
        raise
    except Exception as failure:  # a broken archive raises anything from zipfile, zlib, numpy
        reason = one_line(failure) or type(failure).__name__
        raise error(f"{path} is not a {what}: {reason}", hint) from failure
    return arrays


def _refuse_claims(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises ValueError for a member that is no array, holds objects, or less than it claims."""
    import numpy as np

    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        shape, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(stream)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds objects")
    if any(length < 0 for length in shape):
        raise ValueError(f"{member.filename} claims the shape {shape}")
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} claims the shape {shape}, which it does not hold")


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
