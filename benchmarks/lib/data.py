"""Images with an answer, out of installed packages: digits, and crops of natural photos; and those
that `scripts/fetch_photos.py` laid out.

Nothing is downloaded here. Every choice (schedule, rule, threshold) is made on the validation part;
the test part is looked at once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jmp_deploy.core.errors import ImageError, MissingPackageError
from jmp_deploy.core.images import Preprocess, find_images, open_image, preprocess

if TYPE_CHECKING:
    from collections.abc import Sequence

DIGITS_TRAIN, DIGITS_VALIDATION = 400, 197
PHOTOS = (
    ("skimage", "data", ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    ("skimage", "data", ("motorcycle_left.png", "coins.png", "brick.png", "grass.png")),
    ("skimage", "data", ("gravel.png",)),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
CROPS_PER_PHOTO = 10
FETCHED_CROPS = 4
MNIST = 303
"""Of its digits: 500 with the 197 scans of scikit-learn."""


@dataclass(frozen=True)
class Samples:
    """Images with labels.

    Attributes:
        name: for messages and cache files.
        images: RGB.
        labels: [n] int64.
        pictures: [n] int64, which picture an image is a part of; None: each is one of its own.
    """

    name: str
    images: tuple[Image.Image, ...]
    labels: NDArray[np.int64]
    pictures: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Samples:
        """The first `count` images (they are shuffled already)."""
        pictures = None if self.pictures is None else self.pictures[:count]
        return Samples(f"{self.name}-{count}", self.images[:count], self.labels[:count], pictures)


@dataclass(frozen=True)
class Task:
    """A question with reference images: `train` is only ever seen by the dense model."""

    name: str
    train: Samples
    validation: Samples
    test: Samples

    def first(self, count: int) -> Task:
        """A small task for a smoke run; its training part keeps two images of each label."""
        chosen = [
            i
            for label in np.unique(self.train.labels)
            for i in np.flatnonzero(self.train.labels == label)[:2]
        ]
        train = Samples(
            f"{self.train.name}-{len(chosen)}",
            tuple(self.train.images[i] for i in chosen),
            self.train.labels[chosen],
        )
        return Task(self.name, train, self.validation.first(count), self.test.first(count))


def digits(seed: int = 0) -> Task:
    """scikit-learn's 1,797 scans of 8 x 8 pixels: 400 train, 197 validation, 1,200 test.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    if find_spec("sklearn") is None:
        raise MissingPackageError("the digits are scikit-learn's", "pip install scikit-learn")
    from sklearn.datasets import load_digits

    scans = load_digits()
    order = np.random.default_rng(seed).permutation(len(scans.images))
    pictures = [_enlarge(scans.images[i]) for i in order]
    labels = scans.target[order].astype(np.int64)
    bounds = (0, DIGITS_TRAIN, DIGITS_TRAIN + DIGITS_VALIDATION, len(order))
    parts = [
        Samples(f"digits-{part}-s{seed}", tuple(pictures[a:b]), labels[a:b])
        for part, a, b in zip(("train", "validation", "test"), bounds, bounds[1:], strict=False)
    ]
    return Task("digits", *parts)


def photo_crops(seed: int = 0) -> Task:
    """Square crops of natural photos; the label says which photo a crop is from.

    Validation crops come from the left half of each photo and test crops from the right half, so
    that no pixel serves both. The reference crops (`train`) come from anywhere.

    Raises:
        ImageError: neither scikit-image nor scikit-learn is installed.
    """
    photos = []
    for package, folder, names in PHOTOS:
        if find_spec(package) is None:
            continue
        root = Path(str(import_module(package).__file__)).parent / folder
        photos += [open_image(root / name) for name in names if (root / name).is_file()]
    if len(photos) < 2:
        raise ImageError("no photos at hand", "pip install scikit-image scikit-learn")
    parts = []
    for number, part in enumerate(("train", "validation", "test")):
        random = np.random.default_rng((seed, number))
        crops = [
            (_random_crop(_half(photo, part), random), label)
            for label, photo in enumerate(photos)
            for _ in range(CROPS_PER_PHOTO)
        ]
        order = random.permutation(len(crops))
        labels = np.array([crops[i][1] for i in order], dtype=np.int64)
        cut = tuple(crops[i][0] for i in order)
        parts.append(Samples(f"photos-{part}-s{seed}", cut, labels, pictures=labels))
    return Task("photos", *parts)


def fetched(folder: Path, part: str, seed: int = 0) -> list[Samples]:
    """What `scripts/fetch_photos.py` laid out: crops of photos, and digits of two kinds.

    `labels` say which photo a crop is from; of a digit they are its number among the digits, for
    each is a picture of its own.

    Raises:
        ImageError: the folder is not such a one.
    """
    if not (folder / part).is_dir() or not (folder / "mnist.npz").is_file():
        raise ImageError(f"no photos in {folder}", f"python scripts/fetch_photos.py {folder}")
    number = ("validation", "test").index(part)
    random = np.random.default_rng((seed, number))
    crops = [
        (_random_crop(open_image(path), random), label)
        for label, path in enumerate(find_images([folder / part]))
        for _ in range(FETCHED_CROPS)
    ]
    scans = getattr(digits(seed), part).first(DIGITS_VALIDATION)
    with np.load(folder / "mnist.npz") as kept:
        order = np.random.default_rng(seed).permutation(len(kept["images"]))
        written = [
            _enlarge(kept["images"][i].astype(np.float64) * (16 / 255))
            for i in order[number * MNIST : (number + 1) * MNIST]
        ]
    return [
        Samples(
            f"photos-fetched-{part}-s{seed}",
            tuple(crop for crop, _ in crops),
            np.array([label for _, label in crops], dtype=np.int64),
        ),
        Samples(f"digits-{part}-s{seed}", scans.images, np.arange(len(scans))),
        Samples(f"mnist-{part}-s{seed}", tuple(written), np.arange(MNIST)),
    ]


def image_folder(folder: Path, seed: int = 0, limit: int | None = None) -> Task:
    """DIR/CLASS/IMAGE as in ImageNet: a quarter train, a quarter validation, half test.

    For a model with a classifier of its own the labels are the position of CLASS in sorted order.

    Raises:
        ImageError: no such folder, fewer than two classes, or fewer than eight images.
    """
    classes = (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if (folder.is_dir()) else []
    )
    if len(classes) < 2:
        raise ImageError(
            f"{folder} holds {len(classes)} class folders, expected at least 2",
            "expected DIR/CLASS/IMAGE, one folder for each class",
        )
    # An empty class folder is no reason to refuse the rest.
    files = [
        (path, label)
        for label, name in enumerate(classes)
        if any((folder / name).iterdir())
        for path in find_images([folder / name])
    ]
    order = np.random.default_rng(seed).permutation(len(files))[:limit]
    if len(order) < 8:
        raise ImageError(f"{folder} holds {len(order)} images, expected at least 8")
    quarter = len(order) // 4
    parts = []
    for part, a, b in (
        ("train", 0, quarter),
        ("validation", quarter, 2 * quarter),
        ("test", 2 * quarter, len(order)),
    ):
        chosen = [files[i] for i in order[a:b]]
        parts.append(
            Samples(
                f"{folder.name}-{part}-s{seed}",
                tuple(open_image(path) for path, _ in chosen),
                np.array([label for _, label in chosen], dtype=np.int64),
            )
        )
    return Task(folder.name, *parts)


def batch(images: Sequence[Image.Image], spec: Preprocess) -> NDArray[np.float32]:
    """[n, 3, H, W] float32, as the model wants it."""
    return np.stack([preprocess(image, spec) for image in images])


def _enlarge(scan: NDArray[np.float64]) -> Image.Image:
    grey = (scan * (255 / 16)).round().astype(np.uint8)
    picture = Image.fromarray(grey).resize((224, 224), Image.Resampling.BICUBIC)
    # A margin of nothing: evaluation transforms cut off the border that they resize for.
    return picture.convert("RGB")


def _half(photo: Image.Image, part: str) -> Image.Image:
    width, height = photo.size
    boxes = {
        "train": (0, 0, width, height),
        "validation": (0, 0, width // 2, height),
        "test": (width // 2, 0, width, height),
    }
    return photo.crop(boxes[part])


def _random_crop(photo: Image.Image, random: np.random.Generator) -> Image.Image:
    side = int(min(photo.size) * random.uniform(0.5, 1.0))
    left = int(random.integers(0, photo.width - side + 1))
    top = int(random.integers(0, photo.height - side + 1))
    crop = photo.crop((left, top, left + side, top + side))
    return crop.resize((256, 256), Image.Resampling.BICUBIC)
