"""Calibration recipes: for a family of models, the method and what stays in FP16.

A recipe is a TOML file of the folder `calibration/`, in which the README has the measurement behind
each of its lines:

    models = ["vit_*_dinov2*"]      # patterns of timm names
    method = "max"                  # as for --calib-method
    equalize = 0.5                  # how much of outlier channels goes into the weights; 0: nothing
    keep_fp16 = ["fc2"]             # kinds of layers, blocks or layers; see layers.select
    [fp8]                           # what differs for --precision fp8
    keep_fp16 = []

`default.toml` serves every model that no other file names.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import CalibrationError, MissingPackageError
from ..core.paths import data_dir
from .formats import FORMATS

if TYPE_CHECKING:
    from ..core.manifest import Narrow

DEFAULT = "default"


@dataclass(frozen=True)
class Recipe:
    """How a family of models is quantized.

    Attributes:
        name: of the file, without its ending.
        models: patterns of timm names, as fnmatch has them.
        method: see `ranges.parse_method`.
        equalize: exponent of `equalize.factors`, 0 to 1; 0 leaves the weights alone.
        keep_fp16: words of `layers.select`.
    """

    name: str
    models: tuple[str, ...] = ()
    method: str = "max"
    equalize: float = 0.0
    keep_fp16: tuple[str, ...] = ()


def for_model(timm_name: str, folder: Path | None = None, *, precision: Narrow = "int8") -> Recipe:
    """The recipe of a model: the first, by file name, whose patterns fit, else the default.

    Raises:
        CalibrationError: a recipe that cannot be read.
        MissingPackageError: Python 3.10 without tomli.
    """
    folder = recipes_dir() if folder is None else folder
    found = {path.stem: read(path, precision) for path in sorted(folder.glob("*.toml"))}
    name = timm_name.split(".")[0]  # without the tag of the weights
    for recipe in found.values():
        if any(fnmatchcase(name, pattern) for pattern in recipe.models):
            return recipe
    if DEFAULT not in found:
        raise CalibrationError(
            f"no recipe for {timm_name} in {folder}, and no {DEFAULT}.toml",
            "install the package anew; the recipes come with it",
        )
    return found[DEFAULT]


def read(path: Path, precision: Narrow = "int8") -> Recipe:
    """Reads one recipe; unknown keys and wrong types are refused."""
    from .ranges import parse_method

    values = _toml(path)
    for name in FORMATS:  # a table of another format is of no concern here
        own = values.pop(name, {})
        if not isinstance(own, dict):
            raise CalibrationError(f"{path}: {name} = {own!r} is not a table", f"write [{name}]")
        values |= own if name == precision else {}
    kinds: dict[str, tuple[type, ...]] = {
        "models": (list,),
        "method": (str,),
        "equalize": (int, float),
        "keep_fp16": (list,),
    }
    for key, value in values.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            raise CalibrationError(
                f"{path}: {key} = {value!r} is not part of a recipe",
                "a recipe has models, method, equalize and keep_fp16, and of those a table [fp8]",
            )
    recipe = Recipe(
        name=path.stem,
        models=tuple(map(str, values.get("models", ()))),
        method=values.get("method", "max"),
        equalize=float(values.get("equalize", 0.0)),
        keep_fp16=tuple(map(str, values.get("keep_fp16", ()))),
    )
    parse_method(recipe.method)
    if not 0 <= recipe.equalize <= 1:
        raise CalibrationError(f"{path}: equalize = {recipe.equalize} is not between 0 and 1")
    return recipe


def recipes_dir() -> Path:
    """`calibration/` of the checkout, or what the wheel carries of it."""
    return data_dir("calibration", "_calibration")


def _toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as toml  # type: ignore[no-redef]
        except ModuleNotFoundError as error:
            raise MissingPackageError(
                "recipes are TOML, which Python 3.10 cannot read by itself",
                "python -m pip install tomli",
            ) from error
    try:
        with path.open("rb") as file:
            return toml.load(file)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
