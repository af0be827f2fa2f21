"""Measures candidates of `tune` on the model: distances from the dense one, kept and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from ..core.errors import ModelError, ScheduleError
from ..core.files import read_json, write_json
from ..core.manifest import Meta
from ..jmp import schedule
from .search import Keeps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

PREFIX_BYTES = 512 << 20
"""Memory for kept block inputs of the dense model."""
LEAST = 1e-6
"""Distance below which float32 outputs say nothing."""

OnProgress = Callable[[str, float, "float | None"], None]
"""(phase, share done, best distance so far)"""


class Evaluator:
    """Distances of candidates from the dense model, image by image.

    Args:
        model: dense, of `models.load_model`; patched for a moment, left as it was.
        pixels: [n, 3, H, W] float32.
        batch: images per forward.
        of_patches: features of every patch are what is to be near, not what the model gives.

    Attributes:
        dense: [n, C] or [n, M, C] float32, the dense model's outputs.
    """

    def __init__(
        self, model: nn.Module, pixels: NDArray[np.float32], batch: int, *, of_patches: bool = False
    ) -> None:
        import torch

        from ..jmp.dense import DenseFeatures
        from ..jmp.families import family_of

        self.model, self.batch, self.of_patches = model, batch, of_patches
        self.family = family_of(model)
        shape = self.family.shape(model)
        self.shape = shape.for_patches() if of_patches else shape
        run = DenseFeatures(model) if of_patches else model
        self.count = len(pixels)
        blocks = list(model.blocks.children())
        inputs: list[list[Any]] = [[] for _ in blocks]
        per_block = self.count * (self.shape.num_prefix + self.shape.num_patches)
        per_block *= self.shape.width * 4
        depth = max(1, min(len(blocks), PREFIX_BYTES // per_block))

        def keep(index: int) -> Callable[..., None]:
            return lambda module, arguments: inputs[index].append(arguments[0])

        hooks = [blocks[index].register_forward_pre_hook(keep(index)) for index in range(depth)]
        try:
            with torch.inference_mode():
                outputs = [
                    run(torch.from_numpy(pixels[start : start + batch]))
                    for start in range(0, self.count, batch)
                ]
        finally:
            for hook in hooks:
                hook.remove()
        self.inputs = [torch.cat(pieces) for pieces in inputs[:depth]]
        self.dense = torch.cat(outputs).float()
        if not bool(self.dense.isfinite().all()):
            raise ModelError("the dense model's output is not finite", "are the weights sound?")

    def distances(self, keeps: Keeps, tau: float, images: range) -> list[float]:
        """1 - cosine for these of the images, of patches the mean over them."""
        import torch
        from torch.nn.functional import cosine_similarity

        from ..jmp.patch import patch, unpatch

        steps = pairs(keeps, self.shape.num_patches)
        first = min([block for block, _ in steps] + [len(self.inputs) - 1])
        first = min(first, len(self.inputs) - 1)
        patch(self.model, candidate(steps, self.shape), tau=tau, restore=self.of_patches)
        try:
            found: list[float] = []
            with torch.inference_mode():
                for at in images[:: self.batch]:
                    end = min(at + self.batch, images.stop)
                    # What is dense comes from memory.
                    output = self._answer(self.inputs[first][at:end], first).double()
                    cosine = cosine_similarity(output, self.dense[at:end].double(), dim=-1)
                    by_image = (1 - cosine).clamp_min(0).reshape(end - at, -1)
                    found.extend(by_image.mean(dim=1).tolist())
        finally:
            unpatch(self.model)
        return found

    def _answer(self, entering: Tensor, first: int) -> Tensor:
        """The patched model's, from what enters one of its blocks."""
        from ..jmp.dense import DenseFeatures

        def tokens() -> Tensor:
            return self.model.blocks(entering, start=first)  # type: ignore[no-any-return, operator]

        if not self.of_patches:
            return self.family.head(self.model, tokens())
        found = DenseFeatures(self.model).of(lambda: self.model.norm(tokens()))  # type: ignore[operator]
        assert not isinstance(found, tuple)
        return found


@dataclass(frozen=True)
class _Kept:
    key: str
    known: dict[str, list[Annotated[float, Meta(ge=0, le=2.001)]]]


class State:
    """Measurements on disk: candidate and images -> their distances."""

    def __init__(self, path: Path, key: str, *, resume: bool) -> None:
        self.path, self.key = path, key
        self.known: dict[str, list[float]] = {}
        if not resume or not path.exists():
            return
        hint = "remove it, or leave out --resume"
        found = read_json(path, _Kept, what="state of `tune`", hint=hint, error=ScheduleError)
        if found.key != key:
            raise ScheduleError(
                f"{path} is of a run with another model, weights, images, seed or batch",
                "repeat that run's options, or leave out --resume to start anew",
            )
        self.known = found.known

    def save(self) -> None:
        write_json(self.path, {"key": self.key, "known": self.known})


class Meter:
    """Measures candidates, with memory and a count of the work.

    Work is counted as if nothing had been resumed, so that a resumed search ends where the
    uninterrupted one would have.

    Args:
        choosing: which of the evaluator's images the search sees.
        held_back: those that it does not.
        passes: work to spend, in passes of the dense model over the images that choose.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        state: State,
        choosing: range,
        held_back: range,
        passes: float,
        on_progress: OnProgress,
    ) -> None:
        self.evaluator, self.state = evaluator, state
        self.choosing, self.held_back = choosing, held_back
        self.passes, self.on_progress = passes, on_progress
        self.seen: dict[str, NDArray[np.float64]] = {}
        self.spent = 0.0
        self.run = self.resumed = 0
        self.best: float | None = None

    def exhausted(self) -> bool:
        """Whether the work is spent."""
        return self.spent >= self.passes

    def measure(self, keeps: Keeps, tau: float) -> float:
        """See `search.Measure`."""
        value = math.exp(logs(self.distances(keeps, tau, self.choosing)).mean())
        self.best = value if self.best is None else min(self.best, value)
        self.on_progress("searching", min(1.0, self.spent / self.passes), self.best)
        return value

    def distances(self, keeps: Keeps, tau: float, images: range) -> NDArray[np.float64]:
        """Of each of these images, measured once."""
        name = f"{images.start}-{images.stop} {','.join(map(str, keeps))} {tau!r}"
        if name not in self.seen:
            if len(self.state.known.get(name, ())) == len(images):
                self.resumed += 1
            else:
                self.state.known[name] = self.evaluator.distances(keeps, tau, images)
                self.state.save()
                self.run += 1
            shape = self.evaluator.shape
            share = macs_of(keeps, shape) / schedule.macs(shape)
            self.spent += share * len(images) / len(self.choosing)
            self.seen[name] = np.array(self.state.known[name])
        return self.seen[name]


def logs(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithms, whose mean is that of the geometric mean."""
    return np.log(np.maximum(distances, LEAST))


def macs_of(keeps: Keeps, shape: schedule.ModelShape) -> int:
    """MACs per image of a candidate; of the dense model as timm runs it, if nothing is reduced."""
    steps = pairs(keeps, shape.num_patches)
    return schedule.macs(shape, candidate(steps, shape) if steps else None)


def candidate(steps: Sequence[tuple[int, int]], shape: schedule.ModelShape) -> schedule.Schedule:
    """Steps under search, with all that is measured to pay."""
    return schedule.improved(schedule.resolve("candidate", steps, shape), shape)


def pairs(keeps: Sequence[int], patches: int) -> list[tuple[int, int]]:
    """Counts after each block to the steps of a schedule."""
    before = [patches, *keeps]
    return [(block, keep) for block, keep in enumerate(keeps) if keep < before[block]]
