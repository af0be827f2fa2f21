"""Calibration images: which, how many, prepared exactly as the model wants them, and whether they
are fit for it.

The sample is drawn with a seed from all images of a folder, so that the same folder and seed give
the same model again. Duplicates and images of one colour are left out and said; too few of them, or
pixels unlike those of photographs, are warned of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import CalibrationError, ImageError, printable
from ..core.files import sha256, size_of
from ..core.images import (
    Preprocess,
    find_images,
    in_channels,
    open_image,
    preprocess,
    require_readable,
    sample_photos,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

SAMPLE = "sample"
"""In place of a folder: crops of the photos that scikit-image and scikit-learn ship."""
DEFAULT_COUNT = 256
FEW = 64
BATCH = 4
KEPT_BYTES = 320 << 20
"""Prepared images up to this size stay in memory between passes; more are decoded again."""
BLANK_STD = 1.0
"""Grey levels out of 255."""

PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's RGB pixels on [0, 1], as torchvision's and timm's transforms have them."""
MEAN_OFF, STD_OFF = 0.2, 1.6
"""A set is unlike photographs where a channel's mean is further off, or its spread by more than
this factor. The photos of scikit-image and scikit-learn differ by 0.1 and 1.2 at most; digits in
black and white by 0.4."""

OnProgress = Callable[[int, int], None]
"""(images looked at, images wanted)"""


@dataclass
class CalibrationImages:
    """A checked sample of images; `batches` gives them prepared.

    Attributes:
        names: of the images, in the order of the sample.
        digests: sha256 of each file (of the decoded pixels, for crops of the sample photos).
        source: the folder, or "sample".
        seed: of the draw.
        spec: how they are prepared.
        warnings: what was noticed, in sentences.
        mean, std: per channel, of the prepared pixels put back on [0, 1].
    """

    names: tuple[str, ...]
    digests: tuple[str, ...]
    source: str
    seed: int
    spec: Preprocess
    warnings: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _load: Callable[[int], NDArray[Any]] = field(repr=False)
    _kept: NDArray[Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def demonstration(self) -> bool:
        """Whether these are the photos of `--calib sample`, of which nothing can be promised."""
        return self.source == SAMPLE

    def batches(
        self, size: int = BATCH, *, stop: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """Prepared images (the first `stop`), [B, 3, H, W] float32, in the order of the sample."""
        last = len(self) if stop is None else min(stop, len(self))
        for start in range(0, last, size):
            end = min(start + size, last)
            if self._kept is not None:
                yield self._kept[start:end]
            else:
                yield np.stack([self._load(index) for index in range(start, end)])

    def first(self, count: int) -> NDArray[np.float32]:
        """The first `count` images, [min(count, n), 3, H, W]; they are in random order already."""
        count = min(count, len(self))
        if self._kept is not None:
            return self._kept[:count]
        return np.stack([self._load(index) for index in range(count)])

    def to_manifest(self) -> dict[str, Any]:
        """What of it goes into caches and manifests."""
        digest = hashlib.sha256("\n".join(self.digests).encode()).hexdigest()
        return {
            "count": len(self),
            "sha256": digest,
            "source": self.source,
            "seed": self.seed,
            "demonstration": self.demonstration,
            "mean": [round(value, 4) for value in self.mean],
            "std": [round(value, 4) for value in self.std],
            "warnings": list(self.warnings),
        }


def gather(
    source: str | Path,
    spec: Preprocess,
    *,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> CalibrationImages:
    """Draws and checks a sample.

    Args:
        source: folder (searched recursively) or file of images, or "sample".
        spec: the model's preprocessing.
        count: images wanted; fewer are taken where there are fewer.
        seed: of the draw.

    Raises:
        CalibrationError: no image that can be used.
        ImageError: more than one image in a hundred cannot be read.
    """
    items = _sample_items(count, seed) if str(source) == SAMPLE else _file_items(source, seed)
    names: list[str] = []
    digests: dict[str, int] = {}
    chosen: list[_Item] = []
    pixels: list[NDArray[Any]] | None = []
    statistics = _Statistics(spec)
    blank = doubles = 0
    unreadable: list[str] = []
    for item in items:
        if len(chosen) == count:
            break
        try:
            digest = item.digest()
            if digest in digests:
                doubles += 1
                continue
            image = item.open(spec.channels)
            prepared = preprocess(image, spec)
        except ImageError as error:
            unreadable.append(f"{item.name}: {error.message}")
            continue
        values = np.asarray(image)
        if np.max(values.astype(np.float32).std(axis=(0, 1))) < BLANK_STD / (
            1 if values.dtype == np.uint8 else 255
        ):
            blank += 1
            continue
        digests[digest] = len(chosen)
        chosen.append(item)
        names.append(item.name)
        statistics.add(prepared)
        if pixels is not None:
            pixels.append(prepared)
            if len(pixels) * prepared.nbytes > KEPT_BYTES:
                pixels = None
        on_progress(len(chosen), count)
    require_readable(unreadable, len(chosen) + blank + doubles)
    if not chosen:
        raise CalibrationError(
            f"no usable image in {source}: {doubles} are duplicates, {blank} of one colour",
            "name a folder of images like those that the model will see",
        )
    on_progress(count, count)
    warnings = _warnings(len(chosen), count, doubles, blank, unreadable)
    return CalibrationImages(
        names=tuple(names),
        digests=tuple(digests),
        source=str(source),
        seed=seed,
        spec=spec,
        warnings=(*warnings, *statistics.warnings()),
        mean=tuple(statistics.mean()),
        std=tuple(statistics.std()),
        _load=lambda index: preprocess(chosen[index].open(spec.channels), spec),
        _kept=np.stack(pixels) if pixels is not None else None,
    )


@dataclass(frozen=True)
class _Item:
    """An image that may be drawn: a file, or a crop of a sample photo."""

    name: str
    path: Path | None = None
    crop: tuple[Image.Image, tuple[int, int, int, int]] | None = None

    def digest(self) -> str:
        if self.crop is None:
            assert self.path is not None
            try:
                size_of(self.path)
                return sha256(self.path)
            except OSError as error:
                raise ImageError(f"cannot read {self.path}: {error.strerror}") from error
        return hashlib.sha256(self.crop[0].crop(self.crop[1]).tobytes()).hexdigest()

    def open(self, channels: int = 3) -> Image.Image | NDArray[np.float32]:
        if self.crop is not None:
            photo, box = self.crop
            return in_channels(photo.crop(box), channels)
        assert self.path is not None
        return open_image(self.path, channels)


def find(source: str | Path) -> list[Path]:
    """The images of a folder that a sample may be drawn from.

    Raises:
        CalibrationError: there are none.
    """
    try:
        return find_images([source])
    except ImageError as error:
        raise CalibrationError(
            f"nothing to calibrate with: {error.message}",
            "name a folder of images with --calib DIR; a few hundred like those that the model "
            "will see",
        ) from error


def _file_items(source: str | Path, seed: int) -> Iterator[_Item]:
    paths = find(source)
    # Sorted by find_images, so the draw depends on the folder's content and the seed alone.
    for index in np.random.default_rng(seed).permutation(len(paths)):
        yield _Item(str(paths[index]), path=paths[index])


def _sample_items(count: int, seed: int) -> Iterator[_Item]:
    """Square crops of every size and place, so that a handful of photos shows some variety."""
    photos = sample_photos()
    random = np.random.default_rng(seed)
    for index in range(2 * count):
        name, photo = photos[index % len(photos)]
        side = int(random.uniform(0.3, 1.0) * min(photo.size))
        left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        yield _Item(f"{name}{list(box)}", crop=(photo, box))


class _Statistics:
    """Mean and spread of pixels, on [0, 1] whatever the model's normalisation."""

    def __init__(self, spec: Preprocess) -> None:
        self.spec = spec
        self.count = 0
        self.sums = np.zeros((2, spec.channels))

    def add(self, prepared: NDArray[Any]) -> None:
        mean, std = (np.asarray(v)[:, None] for v in (self.spec.mean, self.spec.std))
        values = prepared.reshape(len(mean), -1).astype(np.float64) * std + mean
        self.sums += np.stack([values.sum(axis=1), (values**2).sum(axis=1)])
        self.count += values.shape[1]

    def mean(self) -> list[float]:
        return [float(value) for value in self.sums[0] / self.count]

    def std(self) -> list[float]:
        variance = self.sums[1] / self.count - (self.sums[0] / self.count) ** 2
        return [float(value) for value in np.sqrt(np.maximum(variance, 0))]

    def warnings(self) -> list[str]:
        if self.spec.channels != len(PHOTO_MEAN):
            return []
        mean, std = np.array(self.mean()), np.array(self.std())
        ratio = std / PHOTO_STD
        off = np.abs(mean - PHOTO_MEAN) > MEAN_OFF
        odd = (ratio > STD_OFF) | (ratio < 1 / STD_OFF)
        if not (off.any() or odd.any()):
            return []
        return [
            "the images are unlike photographs: mean "
            + ", ".join(f"{value:.2f}" for value in mean)
            + ", spread "
            + ", ".join(f"{value:.2f}" for value in std)
            + " (ImageNet: 0.49, 0.46, 0.41 and 0.23, 0.22, 0.23); right only if the model will "
            "see such images"
        ]


def _warnings(
    found: int, wanted: int, doubles: int, blank: int, unreadable: Sequence[str]
) -> list[str]:
    warnings = []
    if found < FEW:
        warnings.append(
            f"only {found} image{'s' if found != 1 else ''}: ranges of fewer than {FEW} depend on "
            "which ones they are"
        )
    elif found < wanted:
        warnings.append(f"{found} images, {wanted} were asked for")
    if doubles:
        warnings.append(f"{doubles} duplicate{'s' if doubles != 1 else ''} left out")
    if blank:
        warnings.append(f"{blank} image{'s' if blank != 1 else ''} of one colour left out")
    if unreadable:
        words = f"{len(unreadable)} that cannot be read left out: {unreadable[0]}"
        warnings.append(printable(words).replace("\n", " "))
    return warnings
