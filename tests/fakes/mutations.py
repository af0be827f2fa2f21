"""Files as nobody should write them: what is whole, spoiled in one place at a time.

A mutation is a name and the bytes of a file. All are made by code from a file that is good, so that
a format that changes brings its own faults along.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

DEEP = 10_000
ESCAPE = "\x1b]0;owned\x07"
"""Sets the title of a terminal that prints it."""
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 40, 10**400, 1e308, float("nan"), float("inf"), 0.5),
    *("", "x", ESCAPE, "\udcff", "../../etc/passwd", "/etc/passwd", "a" * 5000),
    *([], {}, [None], {"x": 1}, [[]]),
)
"""What stands in the place of a value."""

Mutation = tuple[str, bytes]


def of_json(data: Any, first: int = 2) -> Iterator[Mutation]:
    """Every mutation of a JSON document; of a list the first elements are spoiled."""
    for path in _paths(data, first):
        where = ".".join(map(str, path)) or "(all)"
        if path:
            yield f"{where} is gone", _dumps(_changed(data, path, remove=True))
        for value in STRANGE:
            yield f"{where} = {value!r:.40}", _dumps(_changed(data, path, value))
        yield f"{where} is deep", _dumps(_changed(data, path, "@@")).replace(b'"@@"', _deep())
    yield from of_bytes(_dumps(data))
    yield "deep objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP
    yield "byte order mark", b"\xef\xbb\xbf" + _dumps(data)


def of_bytes(content: bytes) -> Iterator[Mutation]:
    """Every mutation of a file of which nothing is known."""
    for share in (0, 1, 2, 3):
        yield f"cut at {share}/4", content[: len(content) * share // 4]
    yield "junk", np.random.default_rng(0).bytes(2000)
    yield "zeros", bytes(2000)
    yield "junk behind", content + b"\x00\xff\xfe"
    yield "junk within", content[: len(content) // 2] + b"\xff\x00" + content[len(content) // 2 :]
    yield "deep lists", _deep()
    yield "no text", b"\xff\xfe\x00"
    yield "a pickle", b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R."


def of_npz(arrays: dict[str, Any]) -> Iterator[Mutation]:
    """Every mutation of an archive of arrays."""
    whole = npz(arrays)
    yield from of_bytes(whole)
    for name, array in arrays.items():
        yield f"{name} is gone", npz({key: arrays[key] for key in arrays if key != name})
        changes = {
            "objects": np.array([{}, 1], dtype=object),
            "text": np.full(array.shape, "x"),
            "complex": np.ones(array.shape, np.complex64),
            "a number": np.float32(1),
            "empty": np.zeros((0, *array.shape[1:]), array.dtype),
            "flat": array.reshape(-1)[:3],
            "one axis more": array[None],
            "short": array[:1] if array.ndim else array,
            "control characters": np.full(array.shape, ESCAPE),
        }
        if array.dtype.kind == "f":
            changes["nan"] = np.full(array.shape, np.nan, array.dtype)
        if array.dtype.kind in "iu":
            changes["huge"] = np.full(array.shape, 1 << 60, np.int64)
            changes["negative"] = np.full(array.shape, -5, np.int64)
        for what, value in changes.items():
            yield f"{name} is {what}", npz({**arrays, name: value})
        for shape in ((1 << 33,), (1 << 62, 1 << 62), (-1,)):
            yield f"{name} claims {shape}", npz(arrays, {name: claim(shape)})
        yield f"{name} is no array", npz(arrays, {name: b"\x93NUMPY\x01"})
    yield "a bomb", npz(arrays, {next(iter(arrays)): claim((1 << 28,)) + bytes(1 << 28)})
    yield "no header", _zip({"x.txt": b"x"})


def of_lines(content: str) -> Iterator[Mutation]:
    """Every mutation of a table of labels."""
    yield from of_bytes(content.encode())
    lines = content.splitlines()
    for what in (
        *("", ",", "a", "a,b,c", '"', '"a', "../../etc/passwd,1", "/etc/passwd,1", f"{ESCAPE},1"),
        *("0/00000.png,-1", "0/00000.png,1e9", "0/00000.png,99999999999999999999", "\0,1"),
        *("0/00000.png,\u0663", "0/00000.png,nan", f"0/00000.png,{ESCAPE}", "x" * 200_000),
        *(f"{'a/' * 3000}b.png,1", "0/00000.png," + "9" * 5000, "0/00000.png\t1\t2", "~,1"),
    ):
        yield f"line {what!r:.40}", "\n".join([what, *lines[1:]]).encode()
        yield f"line more {what!r:.40}", "\n".join([*lines, what]).encode()


def npz(arrays: dict[str, Any], raw: dict[str, bytes] | None = None) -> bytes:
    """An archive of arrays; `raw` are bytes in place of a member's."""
    members = {}
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=True)
        members[f"{name}.npy"] = stream.getvalue()
    return _zip({**members, **{f"{name}.npy": content for name, content in (raw or {}).items()}})


def claim(shape: tuple[int, ...]) -> bytes:
    """The head of an array of float32 of a shape, without its values."""
    stream = io.BytesIO()
    head = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(stream, head)
    return stream.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _deep() -> bytes:
    return b"[" * DEEP + b"]" * DEEP


def _dumps(data: Any) -> bytes:
    return json.dumps(data).encode()


def _paths(data: Any, first: int) -> Iterator[tuple[Any, ...]]:
    yield ()
    items: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        items = [*data.items()]
    elif isinstance(data, list):
        items = [*enumerate(data[:first])]
    for key, value in items:
        for path in _paths(value, first):
            yield (key, *path)


def _changed(data: Any, path: tuple[Any, ...], value: Any = None, *, remove: bool = False) -> Any:
    if not path:
        return value
    made = copy.deepcopy(data)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made
