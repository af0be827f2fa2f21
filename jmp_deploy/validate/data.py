"""Labelled images for validation: class folders (ImageFolder) or a CSV of labels."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import Artifact
from ..core.classes import SYNSET, differing
from ..core.errors import ImageError
from ..core.files import size_of
from ..core.images import folders_in, images_below, suffixes

SPLITS = ("train", "val", "validation", "test")
HEADERS = ("file", "filename", "file_name", "image", "path", "name", "image_id", "imageid")
NAMED = 5
"""Offenders that an error names."""

Listing = list[tuple[str, str]]
"""(path below the data folder with forward slashes, name of the class)."""


@dataclass(frozen=True)
class Sample:
    """One image: path below the root (forward slashes), size in bytes, class number."""

    path: str
    size: int
    label: int


@dataclass(frozen=True)
class Dataset:
    """Labelled images in a fixed order.

    Attributes:
        root: folder that the paths start from.
        samples: sorted by path.
        names: class names by number, as far as known.
        rule: how names became class numbers, in words.
    """

    root: Path
    samples: tuple[Sample, ...]
    names: tuple[str, ...]
    rule: str

    def digest(self) -> str:
        """Hash of paths, sizes and labels: two machines with the same data get the same."""
        whole = hashlib.sha256()
        for sample in self.samples:
            line = f"{sample.path}\0{sample.size}\0{sample.label}\n"
            whole.update(line.encode("utf-8", "surrogateescape"))
        return whole.hexdigest()

    def labels(self) -> Any:
        """Class numbers, [n] int64."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)

    def first(self, limit: int | None) -> Dataset:
        """A random subset that depends on nothing but the number of images, in the same order."""
        if limit is None or limit >= len(self.samples):
            return self
        chosen = np.random.default_rng(0).permutation(len(self.samples))[:limit]
        kept = tuple(self.samples[index] for index in sorted(chosen))
        return Dataset(self.root, kept, self.names, self.rule)


@dataclass(frozen=True)
class ClassOrder:
    """What is known of a classifier's outputs.

    Attributes:
        count: number of classes.
        names: descriptions by class number, or None.
        synsets: WordNet ids by class number, or None.
    """

    count: int
    names: Sequence[str] | None = None
    synsets: Sequence[str] | None = None

    @classmethod
    def of(cls, artifact: Artifact, count: int) -> ClassOrder:
        """From an artifact."""
        return cls(count, artifact.class_names, artifact.synsets)


def for_classifier(root: Path, table: Path | None, order: ClassOrder) -> Dataset:
    """Images with the class numbers of a model that has a classifier.

    Args:
        root: folder of class folders; where it holds splits (train/, val/), val is taken.
        table: CSV of labels, or None to take the class folders' names.
        order: the model's classes.

    Raises:
        ImageError: no images, or classes that the model does not have.
    """
    listing = _read_table(table, root) if table else _class_folders(_split(root, "val") or root)
    base = root if table else _split(root, "val") or root
    names = sorted({name for _, name in listing})
    numbers, rule = _class_numbers(names, order, folders=table is None)
    known = tuple(order.names or (str(index) for index in range(order.count)))
    return Dataset(base, _samples(base, listing, numbers), known, rule)


def for_features(root: Path, table: Path | None) -> tuple[Dataset, Dataset]:
    """The train and val split for a probe on features; classes are numbered by sorted name.

    Args:
        root: folder that holds train/ and val/, each with class folders.
        table: CSV of labels whose paths start with train/ or val/, or None.

    Raises:
        ImageError: a split is missing or empty, fewer than two classes, or classes of val that
            train does not have.
    """
    if table is None:
        bases = [_split(root, name) for name in ("train", "val")]
        if bases[0] is None or bases[1] is None:
            raise ImageError(
                f"{root} has no train/ and val/: a model without a classifier head is judged by a "
                "probe, which is fitted on a train split",
                "expected DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE",
            )
        found = [(base, _class_folders(base)) for base in bases if base is not None]
    else:
        listing = _read_table(table, root)
        found = [
            (root, [row for row in listing if row[0].split("/")[0] in names])
            for names in (("train",), ("val", "validation"))
        ]
        for (_, rows), name in zip(found, ("train", "val"), strict=True):
            if not rows:
                raise ImageError(f"{table} names no image below {name}/")
    (_, train), (_, val) = found
    names = sorted({name for _, name in train})
    if len(names) < 2:
        raise ImageError(f"the train split has {len(names)} class, a probe needs at least 2")
    strangers = sorted({name for _, name in val} - set(names))
    if strangers:
        raise ImageError(
            f"the train split has no images of {_some(strangers)}, which the val split has"
        )
    numbers = {name: index for index, name in enumerate(names)}
    rule = f"{len(names)} classes of the train split"
    splits = [
        Dataset(base, _samples(base, rows, numbers), tuple(names), rule) for base, rows in found
    ]
    return splits[0], splits[1]


def _split(root: Path, wanted: str) -> Path | None:
    """The folder of a split, where `root` holds splits and not classes; None where it does not."""
    if not root.is_dir():
        raise ImageError(f"no such folder: {root}", "expected --data DIR with DIR/CLASS/IMAGE")
    folders = {path.name for path in folders_in(root)}
    held_out = {"val", "validation"} & folders
    if not held_out or not ("train" in folders or folders <= set(SPLITS)):
        return None
    for name in (wanted, "validation") if wanted == "val" else (wanted,):
        if name in folders:
            return root / name
    return None


def _class_folders(root: Path) -> Listing:
    """Every image below each folder of `root`, at any depth; that folder's name is its class."""
    folders = folders_in(root)
    listing = [
        (path.relative_to(root).as_posix(), folder.name)
        for folder, paths in zip(folders, images_below(folders), strict=True)
        for path in paths
    ]
    if not listing:
        loose = any(path.suffix.lower() in suffixes() for path in root.iterdir())
        why = "its images lie in no class folder" if loose else "no images in class folders"
        raise ImageError(
            f"{root} holds no labelled images: {why}",
            "expected DIR/CLASS/IMAGE, or a CSV of labels: --labels FILE.csv",
        )
    return sorted(listing)


def _read_table(table: Path, root: Path) -> Listing:
    """Rows of file and label, separated by a comma, a tab or blanks; a header line is skipped."""
    if not root.is_dir():
        raise ImageError(f"no such folder: {root}")
    hint = "expected a text file with lines such as folder/photo.jpg,3"
    try:
        size_of(table)
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(file, table))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{table} cannot be read as a table of labels: {reason}", hint) from error
    if rows and rows[0][0].lower() in HEADERS and not _is_file(root, rows[0][0]):
        rows = rows[1:]
    if not rows:
        raise ImageError(f"{table} holds no labels", "expected lines such as folder/photo.jpg,3")
    seen: dict[str, str] = {}
    for name, label in rows:
        path = name if _is_file(root, name) else _with_suffix(root, name)
        if seen.setdefault(path, label) != label:
            raise ImageError(f"{table} gives {path} two labels: {seen[path]} and {label}")
    missing = [path for path in seen if not _is_file(root, path)]
    if missing:
        raise ImageError(
            f"{len(missing)} of {len(seen)} files that {table} names are not in {root}: "
            f"{_some(missing)}",
            "its paths start at --data",
        )
    return sorted(seen.items())


def _is_file(root: Path, name: str) -> bool:
    """Path.is_file raises for a name that is too long, before Python 3.14."""
    return os.path.isfile(root / name)  # noqa: PTH113


def _with_suffix(root: Path, name: str) -> str:
    """The file that a table names without its ending; the name itself where there is none."""
    for suffix in suffixes():
        for ending in (suffix, suffix.upper()):
            if _is_file(root, name + ending):
                return name + ending
    return name


def _rows(file: Iterable[str], table: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if "," in line:
            cells = next(csv.reader([line], skipinitialspace=True))
        else:  # ImageNet's own lists: "ILSVRC2012_val_00000001.JPEG 65"
            cells = line.split("\t") if "\t" in line else line.rsplit(None, 1)
        cells = [cell.strip() for cell in cells]
        if len(cells) < 2 or not cells[0] or not cells[1]:
            raise ImageError(
                f"{table}, line {number}: {line.strip()!r:.80} is not a file and a label",
                "expected lines such as folder/photo.jpg,3",
            )
        # Kaggle's LOC_val_solution.csv has boxes behind the synset: "n03995372 85 1 499 272 ..."
        word = cells[1].split()[0]
        yield Path(cells[0]).as_posix(), word if SYNSET.match(word) else cells[1]


def _class_numbers(
    names: Sequence[str], order: ClassOrder, *, folders: bool
) -> tuple[dict[str, int], str]:
    """Names of classes to the model's class numbers, and the rule by which.

    Synsets and integers are taken at their word; then the model's own class names; then, for
    folders, their sorted order if there are exactly as many as the model has classes.
    """
    if order.names and set(names) <= set(order.names):
        exact = {name: index for index, name in enumerate(order.names)}
        if len(exact) == len(order.names):
            return {name: exact[name] for name in names}, "the model's class names"
    if all(SYNSET.match(name) for name in names):
        return _synset_numbers(names, order), "ImageNet synsets"
    if all(name.isascii() and name.isdigit() and len(name) < 10 for name in names):
        strangers = [name for name in names if int(name) >= order.count]
        _refuse(strangers, order, "class numbers")
        return {name: int(name) for name in names}, "class numbers"
    known = _spellings(order.names or ())
    strangers = [name for name in names if _plain(name) not in known]
    if order.names and not strangers:
        return {name: known[_plain(name)] for name in names}, "the model's class names"
    if folders and len(names) == order.count:
        if difference := differing(names):
            raise ImageError(
                f"the order of the classes is ambiguous: {difference}",
                "build the artifact with its class names (build --labels), or rename the folders "
                "to class numbers, or give --labels FILE.csv",
            )
        return {name: index for index, name in enumerate(names)}, "sorted folder names"
    _refuse(strangers if order.names else names, order, "classes")
    raise AssertionError("unreachable: some name was refused")


def _synset_numbers(names: Sequence[str], order: ClassOrder) -> dict[str, int]:
    synsets = order.synsets
    if synsets is None and len(names) == order.count:
        synsets = names  # ImageNet-1k numbers its classes in the order of their sorted synsets
    if synsets is None:
        raise ImageError(
            f"{len(names)} ImageNet synsets, but nothing says which of the model's {order.count} "
            "classes they are",
            "give class numbers: --labels FILE.csv"
            if order.count != 1000
            else "build the artifact again with this version, which stores the synsets",
        )
    numbers = {name: index for index, name in enumerate(synsets)}
    _refuse([name for name in names if name not in numbers], order, "synsets")
    return {name: numbers[name] for name in names}


def _refuse(strangers: Sequence[str], order: ClassOrder, what: str) -> None:
    if strangers:
        raise ImageError(
            f"{len(strangers)} {what} that the model with {order.count} classes does not have: "
            f"{_some(strangers)}",
            "name the folders (or labels) by class number from 0, ImageNet synset or class name",
        )


def _spellings(names: Sequence[str]) -> dict[str, int]:
    """Class names, whole ("tench, Tinca tinca") or the first synonym, where only one class has it.

    ImageNet has two cranes and two maillots: such names are no one's.
    """
    found: dict[str, set[int]] = {}
    for index, name in enumerate(names):
        for spelling in {_plain(name), _plain(name.split(",")[0])}:
            found.setdefault(spelling, set()).add(index)
    return {spelling: owners.pop() for spelling, owners in found.items() if len(owners) == 1}


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _samples(root: Path, listing: Listing, numbers: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(Sample(path, _size(root / path), numbers[name]) for path, name in listing)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a link to nowhere: unreadable when its turn comes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
