"""What a changed output costs, in points of accuracy, estimated without labels.

Two estimates, by what the model gives:

*Logits.* The change of an image's logits is taken for noise: its size is the root mean square, over
the classes, of how far their distance to the best class moved, and the chance that a class
overtakes the best one is that of a normal deviate larger than the margin. (Counting flips outright
would resolve 1.6 points with 64 images.) The flips in percent bound the loss from above, but most
of them are between classes that the model can hardly tell apart, of which it is right about one as
often as about the other. So the loss is what the model itself thinks of it: the confidence that it
has in the class that it leaves, less that in the one that it takes. Models that were trained with
mixed or smoothed labels have less confidence than they deserve; where its mean is below
`LEAST_CONFIDENCE`, the logits are scaled up until it is not. (Too much confidence makes the
estimate too large, which costs speed; too little would break the promise.)

*Features.* There is no classifier to ask, so the loss follows from the relative noise
r = |change| / |features less their mean over the images|, as `POINTS_PER_NOISE * r**2`. A linear
law in r**2: flips grow with r, and what each costs does as well. The constant is measured, see
calibration/README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

POINTS_PER_NOISE = 60.0
LEAST_CONFIDENCE = 0.8
"""About the accuracy of the ImageNet models that are deployed."""
MOST_SCALE = 20.0
"""As a power of two."""
SHRINKAGE = 4
"""Classes' worth of weight that the noise of the average image has in that of each."""


@dataclass(frozen=True)
class Drop:
    """What a change of the outputs costs.

    Attributes:
        points: estimated loss of accuracy, in percent.
        noise: relative noise, squared: mean square of the change over that of what tells images
            apart. Layers that are quantized together add up in it, nearly.
        flips: estimated share of images whose best class changes, percent; None without classes.
    """

    points: float
    noise: float
    flips: float | None = None


def estimate(reference: NDArray[Any], changed: NDArray[Any], *, classifies: bool) -> Drop:
    """The cost of `changed` in place of `reference`.

    Args:
        reference: [n, C], outputs of the model as it was, for n >= 2 different images.
        changed: [n, C], of the changed model for the same images.
        classifies: outputs are logits.
    """
    before, after = reference.astype(np.float64), changed.astype(np.float64)
    spread = np.square(before - before.mean(axis=0)).sum()
    noise = float(np.square(after - before).sum() / max(spread, np.finfo(np.float64).tiny))
    if not classifies or before.shape[1] < 2:
        return Drop(POINTS_PER_NOISE * noise, noise)
    flips, loss = _flips(before, after)
    return Drop(float(100 * loss.mean()), noise, float(100 * flips.mean()))


def _flips(before: NDArray[Any], after: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Per image: the chance that its best class changes, and the loss of expected accuracy."""
    rows = np.arange(len(before))
    best = before.argmax(axis=1)
    margin = before[rows, best][:, None] - before
    moved = after - before
    moved = moved[rows, best][:, None] - moved
    others = before.shape[1] - 1
    energy = np.square(moved).sum(axis=1)
    # An image of few classes says little of its own noise: the average image is asked too.
    energy = (energy + SHRINKAGE * energy.mean() / others) / (others + SHRINKAGE)
    noise = np.sqrt(energy)[:, None]
    far = np.divide(margin, noise, out=np.full_like(margin, np.inf), where=noise > 0)
    overtakes = _upper_tail(far)
    overtakes[rows, best] = 0.0
    flips = 1 - np.prod(1 - overtakes, axis=1)
    confidence = _confidence(margin)
    share = overtakes / np.maximum(overtakes.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    taken = (share * confidence).sum(axis=1)
    return flips, flips * (confidence[rows, best] - taken)


def _confidence(margin: NDArray[Any]) -> NDArray[Any]:
    """Softmax over the classes [n, C] by their distance to the best, scaled if it is too flat."""

    def softmax(power: float) -> NDArray[Any]:
        values = np.exp(-margin * 2.0**power)
        return values / values.sum(axis=1, keepdims=True)

    low, high = 0.0, MOST_SCALE
    if softmax(low).max(axis=1).mean() >= LEAST_CONFIDENCE:
        return softmax(low)
    for _ in range(40):
        middle = (low + high) / 2
        flat = softmax(middle).max(axis=1).mean() < LEAST_CONFIDENCE
        low, high = (middle, high) if flat else (low, middle)
    return softmax(high)


def _upper_tail(values: NDArray[Any]) -> NDArray[Any]:
    """Chance that a standard normal deviate is larger."""
    return np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in values.ravel()]).reshape(
        values.shape
    )
