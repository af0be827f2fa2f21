"""Class names in the order of a model's outputs, and the orders that trainers number classes in."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import ModelError, one_line

SYNSET = re.compile(r"n\d{8}\Z")
LabelOrder = Literal["lexical", "natural"]
MAX_BYTES = 64 << 20


def natural_key(name: str) -> list[Any]:
    """timm's order of class folders (`timm.utils.misc.natural_key`): numbers in a name count by
    value, upper and lower case are the same."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def lexical(names: Iterable[str]) -> list[str]:
    """torchvision's order of class folders (`ImageFolder`)."""
    return sorted(set(names))


def natural(names: Iterable[str]) -> list[str]:
    """timm's order of class folders; names that are alike to it in lexical order."""
    return sorted(lexical(names), key=natural_key)


def differing(names: Iterable[str]) -> str | None:
    """Where the two orders first differ, in words; None where they are the same."""
    names = list(names)
    for index, (first, second) in enumerate(zip(lexical(names), natural(names), strict=True)):
        if first != second:
            return f"class {index} is {first!r} by torchvision's order and {second!r} by timm's"
    return None


def read_labels(path: Path, order: LabelOrder | None = None) -> tuple[str, ...]:
    """Class names by number from what a trainer left.

    Args:
        path: a text file with a name on each line; JSON: a list, {"0": name}, {name: 0}, or a
            config with "id2label", "label_names" or "class_to_idx"; a CSV of number and name; or
            the folder of the training set, whose folders are the classes.
        order: of a folder's classes: torchvision's (lexical) or timm's (natural).

    Raises:
        ModelError: it cannot be read, or a folder's order is not known where the two differ.
    """
    hint = "expected a name on each line, JSON, a CSV of number and name, or the training folder"
    try:
        if path.is_dir():
            return _of_folder(path, order)
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path} is too large for class names", hint)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            names = of_json(json.loads(text))
        elif path.suffix.lower() == ".csv":
            names = _of_table(list(csv.reader(text.splitlines(), skipinitialspace=True)))
        else:
            names = tuple(line.strip() for line in text.splitlines() if line.strip())
    except (OSError, UnicodeError, ValueError, RecursionError, csv.Error) as error:
        raise ModelError(f"cannot read class names from {path}: {one_line(error)}", hint) from error
    if not names or not all(name and name.isprintable() for name in names):
        raise ModelError(f"{path} holds no class names, or some that cannot be printed", hint)
    return names


def of_json(value: Any) -> tuple[str, ...]:
    """Names by number from the forms that configs have them in.

    Raises:
        ValueError: none of them.
    """
    if isinstance(value, dict):
        for key in ("label_names", "id2label", "class_to_idx", "labels"):
            if key in value:
                return of_json(value[key])
        if value and all(isinstance(item, int) for item in value.values()):
            value = {str(number): name for name, number in value.items()}
        numbers = [int(key) for key in value]
        if sorted(numbers) != list(range(len(numbers))):
            raise ValueError("the class numbers are not 0, 1, 2, ...")
        value = [value[key] for key in sorted(value, key=int)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected a list of names, or names by class number")
    return tuple(value)


def _of_folder(folder: Path, order: LabelOrder | None) -> tuple[str, ...]:
    train = folder / "train"
    root = train if train.is_dir() else folder
    names = [path.name for path in root.iterdir() if path.is_dir() and path.name[0] not in "._"]
    if not names:
        raise ModelError(
            f"{root} has no class folders", "name the training set, or a file of names"
        )
    difference = differing(names)
    if difference and order is None:
        raise ModelError(
            f"the order of the classes is ambiguous: {difference}",
            "say --label-order lexical (torchvision's ImageFolder) or natural (timm's train.py)",
        )
    return tuple(natural(names) if order == "natural" else lexical(names))


def _of_table(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    cells = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    if not all(len(row) >= 2 for row in cells):
        raise ValueError("expected two columns: number and name")
    if cells and not any(cell.isdigit() for cell in cells[0][:2]):
        cells = cells[1:]  # a header
    at = 0 if all(row[0].isdigit() for row in cells) else 1
    return of_json({row[at]: row[1 - at] for row in cells})
