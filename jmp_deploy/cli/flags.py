"""What several commands' flags share: their types, and the way from flags to options.

A flag's `dest` is the name of a field of the command's options class (or of a parameter of the
function that does the work), with the prefix "quantize." or the like for a class within. A flag
that is not given leaves no trace, so that a default stands in the options class alone. What a
handler reads itself has a default here.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..backends import AUTO, AUTO_HELP, DEPLOYED

if TYPE_CHECKING:
    from ..jmp.models import OwnModel

T = TypeVar("T")
PLOTS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
MOST_PIXELS = 4096
"""Of an image's side: 65536 tokens of 16 pixels, whose attention alone would take 100 GB."""
Handler = Callable[[argparse.Namespace], int]


def add_command(
    commands: Any, handler: Handler, name: str, summary: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """A subcommand with what all of them have: --json, examples, its handler in `handler`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  python -m jmp_deploy {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --force would be --force-int8
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument(
        "--json",
        type=_json,
        default=None,
        metavar="FILE",
        help="write the result as JSON too; - for standard output",
    )
    return parser


def fill(make: Callable[..., T], given: argparse.Namespace, prefix: str = "", **own: Any) -> T:
    """Calls an options class or a function with the flags that are named as its parameters are.

    Args:
        given: what was parsed.
        prefix: of those flags' `dest`.
        own: parameters that the handler makes itself.
    """
    flags = {
        name: tuple(value) if isinstance(value, list) else value
        for name in signature(make).parameters
        if (value := getattr(given, prefix + name, None)) is not None
    }
    return make(**{**flags, **own})


# --- flags of several commands -------------------------------------------------------------------


def add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="artifact folder made by `build`")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="deit_s, dinov2_s, ...; any timm name; hf-hub:OWNER/NAME; local-dir:FOLDER",
    )


def add_images(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--images", type=Path, nargs="+", metavar="PATH", help=what)


def add_img_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--img-size",
        type=size,
        metavar="PIXELS|H,W",
        help="(the file's, the folder's or the model's own)",
    )


def add_weights(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--weights", metavar="auto|pretrained|random|PATH", help=f"as for build (auto{more})"
    )
    add_img_size(parser)


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of these flags ended"
    )


def add_own_model(parser: argparse.ArgumentParser) -> None:
    """What the file of one's own model does not say; `fill(OwnModel, given, "own.")`."""
    group = parser.add_argument_group(
        "your own model", "What neither its file nor the timm name says, or says wrongly."
    )
    group.add_argument(
        "--weights-key",
        dest="own.weights_key",
        metavar="KEY",
        help="which state of a file that holds several, e.g. state_dict (averaged weights, EMA, "
        "where there are any)",
    )
    group.add_argument(
        "--model-kwargs",
        dest="own.kwargs",
        type=assignments,
        nargs="+",
        metavar="NAME=VALUE",
        help="arguments of timm.create_model, e.g. global_pool=avg reg_tokens=4 (by the weights' "
        "shapes)",
    )
    group.add_argument("--mean", dest="own.mean", type=decimals, metavar="R,G,B", help="on [0, 1]")
    group.add_argument("--std", dest="own.std", type=decimals, metavar="R,G,B", help="on [0, 1]")
    group.add_argument(
        "--crop-pct",
        dest="own.crop_pct",
        type=share,
        metavar="SHARE",
        help="centre crop, of the resized image's edge",
    )
    group.add_argument(
        "--interpolation", dest="own.interpolation", metavar="FILTER", help="Pillow's"
    )
    group.add_argument(
        "--labels",
        dest="own.labels",
        metavar="FILE|DIR|imagenet",
        help="class names by number: text, JSON, CSV, or the folder of the training set",
    )
    group.add_argument(
        "--label-order",
        dest="own.label_order",
        choices=("lexical", "natural"),
        help="of a training folder: torchvision's or timm's (asked for where they differ)",
    )
    group.add_argument(
        "--multi-label",
        dest="own.multi_label",
        action="store_true",
        help="each class is a question of its own: scores are sigmoids",
    )
    group.add_argument(
        "--from",
        dest="own.function",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a function of your Python that returns the model; MODEL is then its name alone",
    )


def own_model(given: argparse.Namespace) -> OwnModel:
    """What the flags of `add_own_model` say."""
    from ..jmp.models import OwnModel

    kwargs = dict(getattr(given, "own.kwargs", None) or ())
    return fill(OwnModel, given, "own.", kwargs=kwargs)


def own_words(given: argparse.Namespace) -> list[str]:
    """The flags of `add_own_model` and the image size as they were given, for another command."""
    parser = argparse.ArgumentParser(add_help=False)
    add_own_model(parser)
    add_img_size(parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(given, action.dest, None)
        if value is None:
            continue
        words.append(action.option_strings[-1])
        if action.type is assignments:
            words += [f"{name}={setting}" for name, setting in value]
        elif value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return words


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=(AUTO, *DEPLOYED),
        help=AUTO_HELP,
    )


# --- types ---------------------------------------------------------------------------------------


MOST = (1 << 31) - 1


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of a whole number within limits."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number") from error
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}")
        return number

    return parse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(1)(text)


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """The type of a number within limits; `above` leaves the lower one out."""

    def parse(text: str) -> float:
        value = decimal(text)
        if not least <= value <= most or (above and value == least):
            low = f"above {least:g}" if above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"must be {low} and at most {most:g}")
        return value

    return parse


tau = number(-100, 100)
"""The type of a threshold of similarity."""
seed = whole(0, (1 << 63) - 1)
"""The type of a seed, as PyTorch, NumPy and the manifest take it."""


def new_file(text: str) -> Path:
    """A file to write: what cannot be written is said before the work, not after it."""
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder, not a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}: {folder} is no folder to write in")
    return path


def new_plot(text: str) -> Path:
    """A picture that matplotlib writes."""
    if Path(text).suffix.lower() not in PLOTS:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PLOTS)}")
    return new_file(text)


def new_pictures(text: str) -> Path:
    """A folder to write pictures into, or one file."""
    path = Path(text)
    if path.suffix.lower() in (".png", ".html"):
        return new_file(text)
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    new_file(str(path / "index.html"))
    return path


def _json(text: str) -> str:
    return text if text == "-" else str(new_file(text))


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers, with commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 3,6,9") from error


def decimal(text: str, what: str = "a number") -> float:
    """A number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error


def decimals(text: str) -> tuple[float, ...]:
    """Numbers, with commas."""
    return tuple(decimal(part) for part in text.split(","))


def share(text: str) -> float:
    """A number above 0, at most 1."""
    number = decimal(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return number


def size(text: str) -> int | tuple[int, int]:
    """Pixels of a square, or height and width."""
    sides = tuple(whole(1, MOST_PIXELS)(part) for part in text.split(","))
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither PIXELS nor H,W")
    return sides[0] if len(sides) == 1 or sides[0] == sides[1] else (sides[0], sides[1])


def assignments(text: str) -> tuple[str, Any]:
    """NAME=VALUE, as timm's --model-kwargs takes it: a Python literal, or a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return name, value


def words(text: str) -> tuple[str, ...]:
    """Words, with commas."""
    return tuple(text.split(","))


def words_of(*known: str) -> Callable[[str], tuple[str, ...]]:
    """The type of words, with commas, that are among those known."""

    def parse(text: str) -> tuple[str, ...]:
        for word in words(text):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return words(text)

    return parse
