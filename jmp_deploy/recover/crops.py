"""Pieces of the user's images to learn from: few files, many crops of each.

Every crop follows from (seed, number) alone, so that an interrupted run goes on with the very ones
that it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import ImageError
from ..core.images import Preprocess, open_image, preprocess, require_readable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..core.images import Picture

SMALLEST = 0.3
"""Of the short side: a crop's side at least."""
LONGEST = 4 / 3
"""A crop's sides differ by this factor at most."""
COLOUR = 0.4
"""Brightness, contrast and saturation change by this share at most."""
ROOM = 2
"""Times the model's side: what the short side of a decoded photo is kept at."""


@dataclass(frozen=True)
class Album:
    """Decoded images, small enough to stay in memory.

    Attributes:
        pictures: of `core.images.open_image`.
        spec: what the model wants.
        seed: of the crops.
    """

    pictures: tuple[Picture, ...]
    spec: Preprocess
    seed: int

    def batch(self, start: int, count: int) -> NDArray[np.float32]:
        """Crops number `start` to `start + count - 1`: [count, C, H, W], as the model wants them.

        Each run of as many crops as there are pictures has every picture once.
        """
        made = []
        for number in range(start, start + count):
            round_of, at = divmod(number, len(self.pictures))
            picture = self.pictures[_order(self.seed, round_of, len(self.pictures))[at]]
            random = np.random.default_rng((self.seed, 1, number))
            made.append(preprocess(_crop(picture, random), self._squashed()))
        return np.stack(made)

    def whole(self) -> NDArray[np.float32]:
        """Every image as it is deployed: [n, C, H, W]."""
        return np.stack([preprocess(picture, self.spec) for picture in self.pictures])

    def _squashed(self) -> Preprocess:
        """The same pixels of a piece that is already cut: its sides become the model's."""
        height, width = self.spec.height, self.spec.width
        return replace(self.spec, resize=height, resize_width=width, crop_mode="squash")


def read(paths: Sequence[Path], spec: Preprocess) -> list[Picture]:
    """Decodes files once, at no more pixels than crops need; leaves out what cannot be read.

    Raises:
        ImageError: that is too much of them.
    """
    pictures, reasons = [], []
    for path in paths:
        try:
            pictures.append(_reduced(open_image(path, spec.channels), spec))
        except ImageError as error:
            reasons.append(error.message)
    require_readable(reasons, len(pictures))
    return pictures


@lru_cache(maxsize=4)
def _order(seed: int, round_of: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 0, round_of)).permutation(count)


def _reduced(picture: Picture, spec: Preprocess) -> Picture:
    """A photo scaled down to `ROOM` times what the model sees; arrays stay as they are."""
    if isinstance(picture, np.ndarray):
        return picture
    from PIL import Image

    ratio = ROOM * max(spec.height, spec.width) / min(picture.size)
    if ratio >= 1:
        return picture
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _crop(picture: Picture, random: np.random.Generator) -> Picture:
    """A piece of a picture, mirrored or not, in other light."""
    is_array = isinstance(picture, np.ndarray)
    height, width = picture.shape[:2] if is_array else (picture.height, picture.width)  # type: ignore[union-attr]
    side = min(height, width) * random.uniform(SMALLEST, 1.0)
    aspect = math.exp(random.uniform(-1, 1) * math.log(LONGEST) / 2)
    tall, broad = (
        int(min(most, max(1, round(want))))
        for most, want in ((height, side * aspect), (width, side / aspect))
    )
    top, left = (int(random.integers(0, room + 1)) for room in (height - tall, width - broad))
    mirrored = random.random() < 0.5
    if isinstance(picture, np.ndarray):
        piece = picture[top : top + tall, left : left + broad]
        return piece[:, ::-1] if mirrored else piece
    from PIL import Image, ImageEnhance

    cut = picture.crop((left, top, left + broad, top + tall))
    if mirrored:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if cut.mode == "RGB":
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            cut = enhance(cut).enhance(random.uniform(1 - COLOUR, 1 + COLOUR))
    return cut
