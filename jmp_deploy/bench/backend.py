"""What a benchmark asks of whatever runs a model, and the images that it gives it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .measure import Times

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Images = NDArray[Any]

SEED = 0


class Backend(Protocol):
    """An artifact opened for timing."""

    library: str
    """What runs it, with its version."""

    @property
    def has_graphs(self) -> bool:
        """Whether it can replay inferences as CUDA graphs."""

    def prepare(self, batch: int, cuda_graph: bool) -> Callable[[], Times]:
        """A function that runs one inference of `batch` images from host memory to host memory."""

    def close(self) -> None:
        """Gives back what it holds."""


def noise(batch: int, shape: tuple[int, ...]) -> Images:
    """Seeded normal images [batch, *shape], float32. Shapes are static: contents change no time."""
    random = np.random.default_rng(SEED)
    return random.standard_normal((batch, *shape), dtype=np.float32)
