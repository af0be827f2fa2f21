"""Photos in, model input out: decoding and preprocessing with Pillow and numpy alone.

The same arithmetic as timm's evaluation transform (Pillow's resize, centre crop, scale to [0, 1],
normalise), so a device without PyTorch feeds an engine exactly what PyTorch would.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .errors import ImageError, ModelError, one_line, printable
from .files import size_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    Picture = Image.Image | NDArray[np.float32]

FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "TGA", "QOI"),
    *("MPO", "HEIF"),
)
"""Pillow's names of what is taken for an image, as far as the installed Pillow decodes it. Not
EPS, for which it would start another program."""
KINDS = 5
"""Suffixes of files left out that a warning names."""
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
ARRAYS = ".npy"
"""Files of images with any number of channels; taken like the others."""
CROP_MODES = ("center", "squash")
MAX_CHANNELS = 512
INPUT = "images"
"""Name of the one input that every exported model has, [B, C, H, W] float32."""
MAX_SIDE = 1 << 14
MAX_SCALED = 1 << 16
"""Pixels of a photo's long side after scaling: a line of one pixel's width would fill the memory.
"""
UNREADABLE_LIMIT = 0.01
"""Share of unreadable images above which a command has failed: what is left is another data set."""
UNREADABLE_HINT = (
    "remove or replace them, or save them anew as JPEG or PNG; up to one image in a hundred is "
    "passed over"
)


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images; kept in the manifest.

    Attributes:
        height, width: model input in pixels.
        resize: edge in pixels that the shorter side is scaled to before the crop (mode
            "center"), or that both sides are squashed to (mode "squash").
        resize_width: the same of the width, where the input is not square and `resize` is the
            height's.
        interpolation: Pillow's filter name.
        crop_mode: "center" or "squash".
        mean, std: per channel, on [0, 1]; three are RGB, one is grey, others are channels of .npy
            arrays.
        folded: the (mean, std) that the model itself applies (`build --fold-normalization`); None
            where it does not.
    """

    height: int
    width: int
    resize: int
    interpolation: str
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_width: int | None = None
    folded: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        sizes = (self.height, self.width, self.resize, self.resize_width or 1)
        if not all(1 <= size <= MAX_SIDE for size in sizes):
            raise ValueError(f"images of {sizes} pixels")
        if self.interpolation not in FILTERS or self.crop_mode not in CROP_MODES:
            raise ValueError(f"{self.interpolation!r} with crop mode {self.crop_mode!r} is unknown")
        if not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"a standard deviation of {self.std}")
        if len(self.mean) != len(self.std) or not 1 <= len(self.mean) <= MAX_CHANNELS:
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")

    @property
    def channels(self) -> int:
        """Of an image."""
        return len(self.mean)

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> Preprocess:
        """From `timm.data.resolve_model_data_config`.

        Raises:
            ModelError: a setting that this module does not reproduce.
        """
        channels, height, width = config["input_size"]
        mode = config.get("crop_mode") or "center"
        interpolation = config.get("interpolation") or "bicubic"
        mean, std = (tuple(map(float, config[name])) for name in ("mean", "std"))
        if mode not in CROP_MODES:
            raise ModelError(
                f"cannot reproduce the model's preprocessing: crop mode {mode!r}",
                f"{' and '.join(CROP_MODES)} are supported",
            )
        if {len(mean), len(std)} != {channels}:
            raise ModelError(
                f"the model takes {channels} channel{'s' * (channels > 1)}, but its mean has "
                f"{len(mean)} and its standard deviation {len(std)} values",
                "say them for pixels on [0, 1], e.g. "
                f"--mean {','.join(['0.5'] * channels)} --std {','.join(['0.25'] * channels)}",
            )
        if interpolation == "random":
            interpolation = "bilinear"
        # timm: floor(img_size / crop_pct)
        share = config.get("crop_pct") or 0.875
        try:
            return cls(
                height=height,
                width=width,
                resize=int(height / share),
                interpolation=interpolation,
                crop_mode=mode,
                mean=mean,
                std=std,
                resize_width=None if height == width else int(width / share),
            )
        except ValueError as error:
            raise ModelError(
                f"cannot reproduce the model's preprocessing: {error}",
                f"--interpolation takes {', '.join(FILTERS)}; --crop-pct a share such as 0.9",
            ) from error


def as_picture(image: NDArray[Any], given: Preprocess) -> Image.Image:
    """A model's input [C, H, W], of one or three channels, as a picture again."""
    from PIL import Image

    pixels = np.asarray(image, np.float64).transpose(1, 2, 0) * given.std + given.mean
    levels = np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def open_image(path: Path | str, channels: int = 3) -> Picture:
    """Decodes a file, upright (EXIF orientation applied), first frame only.

    Args:
        path: of an image; or of a numpy array .npy, [H, W] or [H, W, C]: uint8, uint16, or floats
            on [0, 1].
        channels: 3 for RGB, 1 for grey; any other number only from arrays, and from images of as
            many bands (RGBA, CMYK).

    Returns:
        An 8-bit image of Pillow; of an array, and of 16-bit grey for one channel, float32
        [H, W, C] on [0, 1].

    Raises:
        ImageError: not readable as an image, or of another number of channels.
    """
    from PIL import Image, ImageOps

    if Path(path).suffix.lower() == ARRAYS:
        return _open_array(Path(path), channels)
    try:
        size_of(Path(path))
        with Image.open(path, formats=formats()) as image:
            upright = ImageOps.exif_transpose(image)
            return _with_channels(upright, channels, str(path))
    except FileNotFoundError as error:
        raise ImageError(f"no such image: {path}") from error
    except Exception as error:  # on a broken file decoders raise anything (struct.error, ...)
        reason = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
        raise ImageError(f"cannot read {path} as an image: {reason}", UNREADABLE_HINT) from error


def preprocess(image: Picture, spec: Preprocess) -> NDArray[np.float32]:
    """One image of `open_image` to [C, H, W] float32, as timm's evaluation transform does.

    Raises:
        ImageError: it is so narrow that scaling it would take gigabytes.
    """
    from PIL import Image

    if isinstance(image, Image.Image) and len(image.getbands()) != spec.channels:
        image = _with_channels(image, spec.channels, "the image")
    resample = Image.Resampling[spec.interpolation.upper()]
    if isinstance(image, Image.Image):
        resized = image.resize(size, resample) if (size := _resized(image.size, spec)) else image
        pixels = np.asarray(resized, dtype=np.uint8)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
    else:  # Pillow resizes one channel of floats at a time
        size = _resized((image.shape[1], image.shape[0]), spec)
        bands = [Image.fromarray(image[..., band]) for band in range(image.shape[2])]
        pixels = np.stack(
            [np.asarray(band.resize(size, resample) if size else band) for band in bands], -1
        )
    pixels = _center_crop(pixels, spec.height, spec.width)
    top = np.float32(255 if pixels.dtype == np.uint8 else 1)
    mean, std = (np.asarray(values, dtype=np.float32) for values in (spec.mean, spec.std))
    normal = (pixels.astype(np.float32) / top - mean) / std
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def _resized(size: tuple[int, int], spec: Preprocess) -> tuple[int, int] | None:
    """(width, height) that an image of `size` is scaled to before the crop; None: it is not."""
    width, height = size
    target_h, target_w = spec.resize, spec.resize_width or spec.resize
    if spec.crop_mode == "squash":
        return target_w, target_h
    if spec.resize_width is None:
        short, long = min(width, height), max(width, height)
        # torchvision's Resize: the long side is truncated, not rounded
        scaled = max(1, int(spec.resize * long / short))
        found = (spec.resize, scaled) if width <= height else (scaled, spec.resize)
    else:  # timm's ResizeKeepRatio
        ratio = min(height / target_h, width / target_w)
        found = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    if max(found) > MAX_SCALED:
        raise ImageError(f"{width}x{height} pixels are too narrow to be scaled")
    return None if found == size else found


def read_image(path: Path | str, spec: Preprocess) -> NDArray[np.float32]:
    """Decodes and preprocesses a file to [C, H, W] float32.

    Raises:
        ImageError: not readable as an image.
    """
    image = open_image(path, spec.channels)
    try:
        return preprocess(image, spec)
    except ImageError as error:
        raise ImageError(f"cannot use {path}: {error.message}", UNREADABLE_HINT) from error


def load_batch(paths: Sequence[Path | str], spec: Preprocess) -> NDArray[np.float32]:
    """Decodes and preprocesses files to [B, C, H, W] float32.

    Raises:
        ImageError: one of them cannot be read.
    """
    return np.stack([read_image(path, spec) for path in paths])


@dataclass(frozen=True)
class Batch:
    """The readable ones of some images.

    Attributes:
        images: [b, C, H, W] float32.
        kept: for each of them its position in what was asked for.
        unreadable: (position, reason) of the others.
    """

    images: NDArray[Any]
    kept: tuple[int, ...]
    unreadable: tuple[tuple[int, str], ...]

    def require(self) -> NDArray[Any]:
        """The images; more than `UNREADABLE_LIMIT` of them unreadable are an ImageError."""
        require_readable([why for _, why in self.unreadable], len(self.kept))
        return self.images


def load_readable(
    paths: Sequence[Path | str],
    spec: Preprocess,
    *,
    on_image: Callable[[], None] = lambda: None,
) -> Batch:
    """Decodes and preprocesses files. One that cannot be read is no error.

    Args:
        on_image: called before each.
    """
    images, kept, unreadable = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow on odd EXIF data and large photos
        for position, path in enumerate(paths):
            on_image()
            try:
                images.append(read_image(path, spec))
                kept.append(position)
            except ImageError as error:
                unreadable.append((position, error.message))
    shape = (0, spec.channels, spec.height, spec.width)
    stacked = np.stack(images) if images else np.zeros(shape, dtype=np.float32)
    return Batch(stacked, tuple(kept), tuple(unreadable))


def require_readable(reasons: Sequence[str], readable: int) -> None:
    """Raises ImageError where too many images cannot be read, or none can.

    Args:
        reasons: why, for each that cannot.
        readable: how many can.
    """
    total = len(reasons) + readable
    if reasons and (not readable or len(reasons) > UNREADABLE_LIMIT * total):
        raise ImageError(
            f"{len(reasons)} of {total} images cannot be read: {reasons[0]}", UNREADABLE_HINT
        )


def split(images: NDArray[np.float32], size: int, least: int) -> list[NDArray[np.float32]]:
    """Batches of at most `size` images; a last one below `least` is padded with its last image."""
    pieces = [images[start : start + size] for start in range(0, len(images), size)]
    missing = least - len(pieces[-1])
    if missing > 0:
        pieces[-1] = np.concatenate([pieces[-1], np.repeat(pieces[-1][-1:], missing, axis=0)])
    return pieces


def join(parts: Sequence[Mapping[str, Any]], count: int) -> dict[str, NDArray[Any]]:
    """The outputs of `split` batches as one, without the padding: name -> [count, ...]."""
    return {
        name: np.concatenate([np.asarray(part[name]) for part in parts])[:count]
        for name in parts[0]
    }


def find_images(paths: Iterable[Path | str]) -> list[Path]:
    """Expands files and folders (searched recursively, sorted) to image files.

    A file that is named is taken whatever it is called; in folders, see `images_below`.

    Raises:
        ImageError: a path does not exist, or no image is found.
    """
    given = [Path(path) for path in paths]
    found: list[Path] = []
    for path in given:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            if isinstance(error, PermissionError):
                raise ImageError(f"cannot read {path}: {error.strerror}") from error
            raise ImageError(f"no such image or folder: {path}") from error
        found += images_below([path])[0] if is_folder else [path]
    if not found:
        names = ", ".join(str(path) for path in given)
        raise ImageError(f"no images in {names}", f"looked for {' '.join(suffixes())}")
    return found


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, evenly over the whole."""
    count = min(most, len(paths))
    return [paths[index * len(paths) // count] for index in range(count)]


def drawn(paths: Sequence[Path], most: int, seed: int) -> list[Path]:
    """At most so many of them, whichever the seed says, in an order that mixes folders."""
    order = np.random.default_rng(seed).permutation(len(paths))
    return [paths[index] for index in order[:most]]


def images_below(folders: Sequence[Path]) -> list[list[Path]]:
    """For each folder the image files in it and in those below, sorted; one rule for all commands.

    Links to folders are followed, of which subsets of ImageNet are often made, but none in a
    circle. Hidden files and folders (.cache, macOS's ._photo.jpg and __MACOSX) are passed over; so
    is what has another suffix than `suffixes`, and that is said in a RuntimeWarning.

    Raises:
        ImageError: a folder cannot be listed.
    """
    others: Counter[str] = Counter()
    found = [sorted(_walk(folder, others)) for folder in folders]
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(KINDS))
        total = others.total()
        where = folders[0] if len(folders) == 1 else folders[0].parent
        warnings.warn(
            f"{total} file{'s' if total > 1 else ''} in {where} left out, as no image by name: "
            f"{kinds}{' and others' if len(others) > KINDS else ''}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _walk(folder: Path, others: Counter[str]) -> Iterator[Path]:
    """The image files below a folder; `others` counts the rest by suffix."""

    def refuse(error: OSError) -> None:  # os.walk would pass over the folder without a word
        raise _unlisted(error) from error

    seen = set()
    for base, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            suffix = Path(name).suffix.lower()
            if is_hidden(name):
                others["hidden"] += 1
            elif suffix in suffixes():
                yield Path(base, name)
            else:
                others[suffix or "without a suffix"] += 1


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted.

    Raises:
        ImageError: it cannot be listed.
    """
    try:
        return sorted(
            path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)
        )
    except OSError as error:
        raise _unlisted(error) from error


def is_hidden(name: str) -> bool:
    """.cache, macOS's ._photo.jpg and the like."""
    return name.startswith(".") or name == "__MACOSX"


def _unlisted(error: OSError) -> ImageError:
    return ImageError(f"cannot list the images in {error.filename}: {error.strerror or error}")


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow decodes."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def suffixes() -> tuple[str, ...]:
    """By which image files are found in folders, lower case: those of `formats`, and arrays."""
    from PIL import Image

    known = formats()
    images = (s for s, name in Image.registered_extensions().items() if name in known)
    return tuple(sorted([*images, ARRAYS]))


def label(path: Path) -> str:
    """An image file's name for pictures, pages and manifests: printable, in one line."""
    return printable(path.name).replace("\n", " ")


def sample_photos() -> list[tuple[str, Image.Image]]:
    """The natural photos that scikit-image and scikit-learn ship: (name, RGB image).

    Used where the user names no images. Nothing is downloaded.

    Raises:
        ImageError: neither package is installed.
    """
    photos: list[tuple[str, Image.Image]] = []
    for package, folder, names in (
        ("skimage", "data", ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")),
        ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ):
        if find_spec(package) is None:
            continue
        root = Path(str(import_module(package).__file__)).parent / folder
        found = [root / name for name in names if (root / name).is_file()]
        photos.extend((path.stem, cast("Image.Image", open_image(path))) for path in found)
    if not photos:
        raise ImageError(
            "no sample photos at hand",
            "name some with --images DIR, or pip install scikit-image scikit-learn",
        )
    return photos


def in_channels(image: Image.Image, channels: int) -> Picture:
    """An RGB sample photo for a model of any number of channels: grey, or its own ones in turn."""
    if channels in (1, 3):
        return _with_channels(image, channels, "a sample photo")
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return pixels[..., [band % 3 for band in range(channels)]]


def _open_array(path: Path, channels: int) -> NDArray[np.float32]:
    try:
        size_of(path)
        # mapped: a head that claims more than the file holds is refused before memory is taken
        found = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except FileNotFoundError as error:
        raise ImageError(f"no such image: {path}") from error
    except (OSError, ValueError, MemoryError, EOFError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise ImageError(f"cannot read {path} as an array: {reason}") from error
    values = found[..., None] if found.ndim == 2 else found
    if values.ndim != 3 or values.shape[2] != channels or not values.size:
        raise ImageError(
            f"{path} is an array {list(found.shape)}, the model takes [H, W, {channels}]"
        )
    if values.dtype in (np.uint8, np.uint16):
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise ImageError(
            f"{path} holds {values.dtype}: expected uint8, uint16, or floats on [0, 1]"
        )
    return values.astype(np.float32)


def _with_channels(image: Image.Image, channels: int, name: str) -> Picture:
    if channels == 3:
        return _to_rgb(image)
    if channels == 1:
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            values = np.asarray(image, dtype=np.float32)
            return np.clip(values / np.float32(_top(image.mode, values)), 0, 1)[..., None]
        return image.convert("L")
    if len(image.getbands()) != channels:
        raise ImageError(
            f"{name} has {len(image.getbands())} channels, the model takes {channels}",
            f"give arrays [H, W, {channels}] as .npy files",
        )
    return image


def _top(mode: str, values: NDArray[np.float32]) -> float:
    """The value of white in 16-bit and float images."""
    return 65535.0 if mode != "F" or np.max(values, initial=0.0) > 1 else 1.0


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # convert("RGB") would clip 16-bit values at 255
        values = np.asarray(image, dtype=np.float32)
        grey = np.clip(values * (255.0 / _top(image.mode, values)), 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    return image.convert("RGB")


def _center_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """As torchvision's CenterCrop: pads with zeros where the image is too small."""
    missing_h, missing_w = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    if missing_h or missing_w:
        top, left = missing_h // 2, missing_w // 2
        pad = ((top, missing_h - top), (left, missing_w - left), (0, 0))
        pixels = np.pad(pixels, pad)
    top = round((pixels.shape[0] - height) / 2.0)
    left = round((pixels.shape[1] - width) / 2.0)
    return pixels[top : top + height, left : left + width]
