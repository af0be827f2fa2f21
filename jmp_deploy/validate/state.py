"""What outlives a run of `validate`: the state to resume from, and the results of shards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from ..core.errors import ArtifactError, CheckError
from ..core.files import atomic_path, json_text, of_form, parse_json, read_arrays, read_json
from ..core.images import UNREADABLE_LIMIT
from ..core.manifest import Count, Meta, Natural
from .score import COLUMNS, DENSE_COLUMNS, score

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
NAMED = 5
"""Missing shards that an error names."""
SAVE_EVERY = 10.0
"""Seconds between saves, or twenty times as long as the last save took, if that is more."""

DIFFERENT = {
    "artifact": "another artifact, or one that was built again",
    "against": "another dense artifact",
    "backend": "another backend",
    "data": "other images or labels (or another --limit)",
    "batch": "another --batch",
    "probe": "another probe",
    "shard": "another --shard",
    "version": "another version of jmp_deploy",
}


@dataclass
class Answers:
    """Outputs of one split so far; batches are done in order.

    Attributes:
        done: (positions in the split [b], output per model [b, ...], unreadable (position,
            reason)) for each batch.
    """

    done: list[tuple[NDArray[Any], dict[str, NDArray[Any]], tuple[tuple[int, str], ...]]] = field(
        default_factory=list
    )

    def index(self) -> NDArray[Any]:
        """Positions of the images that were read, [n] int64."""
        parts = [positions for positions, _, _ in self.done]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def outputs(self) -> dict[str, NDArray[Any]]:
        """Output per model, [n, ...]; empty before the first batch."""
        parts = [outputs for positions, outputs, _ in self.done if len(positions)]
        return {
            name: np.concatenate([outputs[name] for outputs in parts]) for name in parts[0]
        } if parts else {}  # fmt: skip

    def unreadable(self) -> list[tuple[int, str]]:
        """(position, reason) of the images that were not."""
        return [entry for _, _, entries in self.done for entry in entries]


class State:
    """Answers of all splits, kept in one file: a NumPy archive with a JSON header.

    Args:
        path: the file; it appears with the first save and goes when the run is complete. None
            keeps no state.
        identity: what makes two runs the same run.
        resume: read the file if it is there.

    Raises:
        ArtifactError: the file is broken, or of another run.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        self.identity = identity
        self.splits: dict[str, Answers] = {}
        self.resumed = 0
        self._saved = 0
        self._wait, self._last = SAVE_EVERY, time.monotonic()
        if resume and path is not None and path.exists():
            self._read(path)

    def split(self, name: str) -> Answers:
        """The answers of a split, empty at first."""
        return self.splits.setdefault(name, Answers())

    def batches(self) -> int:
        """Batches done in all splits."""
        return sum(len(answers.done) for answers in self.splits.values())

    def save_if_due(self) -> None:
        """Saves now and then: see SAVE_EVERY."""
        if time.monotonic() - self._last >= self._wait:
            self.save()

    def save(self) -> None:
        """Writes the file, whole, if anything is new."""
        if self.path is None or self.batches() == self._saved:
            return
        started = time.monotonic()
        arrays: dict[str, Any] = {}
        header: dict[str, Any] = {"format": FORMAT, "identity": self.identity, "splits": {}}
        for name, answers in self.splits.items():
            arrays[f"{name}/index"] = answers.index()
            for model, values in answers.outputs().items():
                arrays[f"{name}/outputs/{model}"] = values
            header["splits"][name] = [
                {"images": len(positions), "unreadable": unreadable}
                for positions, _, unreadable in answers.done
            ]
        with atomic_path(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, header=np.array(json_text(header)), **arrays)
        self._saved = self.batches()
        self._last = time.monotonic()
        self._wait = max(SAVE_EVERY, 20 * (self._last - started))

    def remove(self) -> None:
        """Forgets the file: the run is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        hint = "remove it, or leave out --resume to start anew"
        arrays = read_arrays(path, what="state of `validate`", hint=hint)
        try:
            header = parse_json(str(arrays.get("header")), _Header)
            identity = header.identity
            splits = {name: _unpack(name, done, arrays) for name, done in header.splits.items()}
        except ValueError as error:
            raise ArtifactError(f"{path} is not a state of `validate`: {error}", hint) from error
        if why := difference(identity, self.identity):
            raise ArtifactError(
                f"{path} is the state of another run: {why}",
                "repeat that run's options, or leave out --resume to start anew",
            )
        self.splits = splits
        self.resumed = self._saved = self.batches()


def _unpack(name: str, done: Sequence[_Done], arrays: Mapping[str, Any]) -> Answers:
    """Raises ValueError where the parts do not fit together."""
    prefix = f"{name}/outputs/"
    outputs = {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
    index = arrays.get(f"{name}/index")
    if index is None or index.ndim != 1 or index.dtype.kind != "i":
        raise ValueError(f"its positions of {name} are no list of integers")
    if any(a.ndim != 2 or a.dtype.kind not in "fi" or not a.size for a in outputs.values()):
        raise ValueError(f"its arrays of {name} are no rows of numbers")
    if any(len(values) != len(index) for values in outputs.values()):
        raise ValueError(f"its arrays of {name} are of unequal length")
    answers, start = Answers(), 0
    for entry in done:
        end = start + entry.images
        part = {model: values[start:end] for model, values in outputs.items()}
        answers.done.append((index[start:end], part if end > start else {}, entry.unreadable))
        start = end
    if start != len(index):
        raise ValueError(f"it holds {len(index)} answers of {name}, expected {start}")
    return answers


@dataclass(frozen=True)
class _Done:
    images: Natural
    unreadable: tuple[tuple[Natural, str], ...]


@dataclass(frozen=True)
class _Header:
    format: Literal[1]
    identity: dict[str, Any]
    splits: dict[str, list[_Done]]


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first way in which two runs are not the same, in words; None if they are."""
    for key, words in DIFFERENT.items():
        a, b = theirs.get(key), ours.get(key)
        if a != b:
            short = all(isinstance(value, (int, str)) and len(f"{value!r:.20}") < 20
                        for value in (a, b))  # fmt: skip
            return f"{words}: {a} there, {b} here" if short else words
    return None


def unreadable_record(entries: Sequence[dict[str, str]], images: int) -> dict[str, Any]:
    """{"count", "share", "files"} of the images that were skipped, of `images` in all."""
    share = len(entries) / images if images else 0.0
    return {"count": len(entries), "share": share, "files": list(entries)}


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Puts the partial results of all shards of one run together.

    Args:
        paths: results of `validate --shard i/n --json FILE`, in any order.

    Returns:
        The result that the run would have had without --shard, and {"shards": [...]}.

    Raises:
        ArtifactError: a file that is no partial result, shards of different runs, one twice, or
            one missing.
    """
    parts = [(path, _read_part(path)) for path in paths]
    first_path, first = parts[0]
    count = first["shard"]["of"]
    owners: dict[int, Path] = {}
    for path, part in parts:
        shard = part["shard"]
        if why := difference(shard["identity"], first["shard"]["identity"]):
            raise ArtifactError(
                f"{path} is a shard of another run than {first_path}: {why}",
                "run all shards with the same options on the same data",
            )
        if shard["of"] != count:
            raise ArtifactError(
                f"{path} is one of {shard['of']} shards, {first_path} one of {count}",
                "run all shards with the same n of --shard i/n",
            )
        if shard["index"] in owners:
            raise ArtifactError(
                f"{path} and {owners[shard['index']]} are both shard {shard['index']}/{count}",
                "name each shard once",
            )
        owners[shard["index"]] = path
    if lacking := count - len(owners):
        first_missing = (index for index in range(1, count + 1) if index not in owners)
        named = [f"{index}/{count}" for index in islice(first_missing, NAMED)]
        more = f" and {lacking - NAMED} more" if lacking > NAMED else ""
        raise ArtifactError(
            f"not all shards are there: {', '.join(named)}{more}", "name the results of all shards"
        )
    return _put_together([part for _, part in sorted(parts, key=lambda p: p[1]["shard"]["index"])])


def _put_together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = parts[0]
    rows = {
        name: np.concatenate(
            [np.asarray(part["shard"]["rows"][name], dtype=np.int64) for part in parts]
        )
        for name in first["shard"]["rows"]
    }
    order = np.argsort(rows["index"], kind="stable")
    rows = {name: column[order] for name, column in rows.items()}
    skipped = [tuple(entry) for part in parts for entry in part["shard"]["unreadable"]]
    seen = sorted([*rows["index"].tolist(), *(position for position, _, _ in skipped)])
    if len(seen) != first["images"] or seen != list(range(len(seen))):
        raise ArtifactError(
            f"the shards hold {len(set(seen))} of {first['images']} images"
            + (", some of them twice" if len(set(seen)) != len(seen) else ""),
            "run the shards again",
        )
    if not len(rows["index"]):
        raise CheckError(f"none of the {len(skipped)} images can be read: {skipped[0][2]}")
    files = [{"image": image, "reason": why} for _, image, why in sorted(skipped)]
    record = unreadable_record(files, first["images"])
    timings = [part["throughput"] for part in parts]
    result = {
        **first,
        **score(rows),
        "ok": record["share"] <= UNREADABLE_LIMIT and all(part["train_ok"] for part in parts),
        "train_ok": all(part["train_ok"] for part in parts),
        "notes": list(dict.fromkeys(note for part in parts for note in part["notes"])),
        "unreadable": record,
        "shard": None,
        "throughput": None,
        "shards": [
            {"index": part["shard"]["index"], "n": part["n"], "device": part["device"], **timing}
            for part, timing in zip(parts, timings, strict=True)
        ],
    }
    devices = sorted({part["device"] for part in parts})
    result["device"] = ", ".join(devices)
    return result


@dataclass(frozen=True)
class _Unreadable:
    count: Natural
    share: float
    files: list[dict[str, str]]


@dataclass(frozen=True)
class _Probe:
    kind: Literal["logistic", "ridge"]
    train_images: Natural
    neighbours: Count
    unreadable: _Unreadable


@dataclass(frozen=True)
class _Speed:
    model: float | None
    dense: float | None
    end_to_end: float | None
    waiting_share: float | None


@dataclass(frozen=True)
class _Shard:
    index: Count
    of: Count
    identity: dict[str, Any]
    rows: dict[str, list[Annotated[int, Meta(ge=-1, le=1 << 40)]]]
    unreadable: list[tuple[Natural, str, str]]


@dataclass(frozen=True)
class _Part:
    """What `merge` and the tables read of a shard's result."""

    shard: _Shard
    n: Natural
    images: Count
    artifact: str
    model: str
    precision: str
    against: str | None
    data: str
    labels: str
    backend: str
    device: str
    train_ok: bool
    throughput: _Speed
    notes: list[str]
    probe: _Probe | None
    backend_reason: str = ""


def _read_part(path: Path) -> dict[str, Any]:
    about: dict[str, Any] = {
        "what": "partial result of `validate`",
        "hint": "make one with `validate DIR --data DIR --shard i/n --json FILE`",
    }
    part = read_json(path, dict[str, Any], **about)
    found = of_form(part, _Part, path, **about)
    shard, rows = found.shard, found.shard.rows
    lengths = {len(column) for column in rows.values()}
    columns = {*COLUMNS, *(DENSE_COLUMNS if found.against else ())}
    whole = shard.index <= shard.of and lengths == {found.n} and columns <= {*rows}
    if found.probe:
        whole &= "knn" in rows
    if not whole:
        raise ArtifactError(f"{path} is damaged: its numbers do not fit together")
    return part
