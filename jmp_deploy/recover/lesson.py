"""The reduced model learns from the dense one: gradients, early stopping, a state to go on from.

Blocks before the first reduction are the same in both and computed once. Which tokens stay is
decided as ever, without a gradient; what becomes of them is plain PyTorch (`jmp/reduction.py`).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..core.errors import CheckError, WeightsError, one_line
from ..core.files import atomic_path
from ..jmp.families import family_of
from ..jmp.patch import patch
from ..jmp.schedule import Schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from .crops import Album

Trained = Literal["small", "all"]
"""What learns: norms, biases and layer scales; or the matrices too."""
LOOKS = 16
"""How often the images that stop the run are looked at."""
WARMUP = 0.1
"""Share of the run in which the step grows."""
BETAS = (0.9, 0.99)
"""Of Adam. A run has some hundreds of steps: the second moment has to keep up."""
FLOOR = 1e-3
"""Added to a distance before its logarithm, by which each image counts by its own measure: else a
few hard ones would be all that is learnt from."""
RATES: dict[Trained, float] = {"small": 3e-4, "all": 3e-6}
"""The largest learning rate, where none is asked for: what the study of docs/method.md chose."""

OnProgress = Callable[[str, float, "float | None"], None]
"""(phase, share done, geometric mean of the distances on the images that stop the run, at best)"""


@dataclass(frozen=True)
class Recipe:
    """How it learns.

    Attributes:
        steps: of Adam.
        batch: crops in each.
        rate: largest learning rate; it rises, and falls as a cosine.
        train: see `Trained`.
    """

    steps: int
    batch: int
    rate: float
    train: Trained

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, which counts from 0."""
        rising = (step + 1) / max(1.0, WARMUP * self.steps)
        return self.rate * min(1.0, rising, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


class Pupil:
    """The dense model and its reduced copy.

    Args:
        model: dense, as `models.load_model` gives it; it stays as it is.
        schedule: of the copy.
        train: see `Trained`.
        device: of PyTorch.

    Attributes:
        trained: name -> parameter of the copy that learns: of the blocks from the first with a
            reduction on, and of the norm behind them. The head stays: it is what both answer with.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, train: Trained, device: str) -> None:
        self.device = torch.device(device)
        self.family = family_of(model)
        self.first = schedule.steps[0][0]
        self.dense = copy.deepcopy(model).to(self.device)
        self.reduced = copy.deepcopy(model).to(self.device)
        # The kernels have no gradient.
        patch(self.reduced, schedule, backend="reference")
        self.trained: dict[str, Tensor] = {}
        for name, parameter in self.reduced.named_parameters():
            learns = self._learns(name) and (train == "all" or parameter.ndim == 1)
            if learns:
                self.trained[name] = parameter.requires_grad_(True)

    def _learns(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) >= self.first
        return part in ("norm", "fc_norm")

    def distances(self, images: NDArray[np.float32]) -> Tensor:
        """1 - cosine between the outputs of both, [n]; the dense one's without a gradient."""
        with torch.no_grad():
            entering = self.family.embed(self.dense, torch.from_numpy(images).to(self.device))
            rotary = self.family.rotary(self.dense)
            tokens = entering
            for index, block in enumerate(self.dense.blocks.children()):
                if index == self.first:
                    entering = tokens
                tokens = self.family.run(block, tokens, None, rotary and rotary.rows(index))
            wanted = self.family.head(self.dense, tokens)
        found = self.family.head(self.reduced, self.reduced.blocks(entering, start=self.first))
        return 1 - torch.nn.functional.cosine_similarity(found, wanted, dim=1)

    def measure(self, images: NDArray[np.float32], batch: int) -> NDArray[np.float64]:
        """The distances of many images, [n]."""
        with torch.inference_mode():
            parts = [
                self.distances(images[at : at + batch]).double().cpu()
                for at in range(0, len(images), batch)
            ]
        return torch.cat(parts).clamp_min(0).numpy()

    def copy_of(self) -> dict[str, Tensor]:
        """What was learnt so far."""
        return {name: value.detach().clone() for name, value in self.trained.items()}

    def take(self, values: dict[str, Tensor]) -> None:
        """Puts in what was learnt."""
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(value)


def learn(
    pupil: Pupil,
    album: Album,
    stopping: NDArray[np.float32],
    recipe: Recipe,
    state: State,
    on_progress: OnProgress,
) -> list[tuple[int, float]]:
    """Trains the pupil and leaves in it what was best on the images that stop the run.

    Args:
        album: what it learns from.
        stopping: [n, C, H, W], looked at `LOOKS` times.
        state: where an interrupted run ended; kept up to date.

    Returns:
        (step, what `middle` says of `stopping`), from step 0, which has learnt nothing.

    Raises:
        CheckError: the distance is no number any more.
    """
    names = list(pupil.trained)
    adam = torch.optim.Adam(pupil.trained.values(), lr=recipe.rate, betas=BETAS)
    every = max(1, recipe.steps // LOOKS)
    looks, best = state.load(pupil, adam)
    if not looks:
        looks, best = [(0, middle(pupil.measure(stopping, recipe.batch)))], pupil.copy_of()
    for step in range(looks[-1][0], recipe.steps):
        on_progress("learning", step / recipe.steps, min(value for _, value in looks))
        for group in adam.param_groups:
            group["lr"] = recipe.rate_at(step)
        distances = pupil.distances(album.batch(step * recipe.batch, recipe.batch))
        loss = (distances.clamp_min(0) + FLOOR).log().mean()
        if not bool(loss.isfinite()):
            raise CheckError(
                f"the reduced model answers no numbers any more after {step} steps",
                "name a smaller --learning-rate",
            )
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if (step + 1) % every and step + 1 < recipe.steps:
            continue
        value = middle(pupil.measure(stopping, recipe.batch))
        if value < min(before for _, before in looks):
            best = pupil.copy_of()
        looks.append((step + 1, value))
        state.save(names, pupil, adam, looks, best)
    pupil.take(best)
    return looks


def middle(distances: NDArray[np.float64]) -> float:
    """The mean of what is learnt by, as a distance: near the geometric mean of the larger ones."""
    return math.exp(float(np.log(distances + FLOOR).mean())) - FLOOR


class State:
    """What an interrupted run has learnt, on disk: a safetensors file.

    Args:
        path: of the file.
        key: identifies everything that the run depends on.
        resume: go on from it, if it is there.
    """

    def __init__(self, path: Path, key: str, *, resume: bool) -> None:
        self.path, self.key, self.resume = path, key, resume

    def load(
        self, pupil: Pupil, adam: torch.optim.Adam
    ) -> tuple[list[tuple[int, float]], dict[str, Tensor]]:
        """Puts the state into both; returns the looks and the best, nothing where there is none.

        Raises:
            WeightsError: it is of another run, or no such file.
        """
        if not self.resume or not self.path.exists():
            return [], {}
        from safetensors import safe_open

        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            key, looks = str(about["key"]), [(int(a), float(b)) for a, b in about["looks"]]
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
            for name, tensor in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = tensor
        except Exception as error:  # a broken file raises anything
            raise WeightsError(
                f"{self.path} is no state of `recover`: {one_line(error) or type(error).__name__}",
                "remove it, or leave out --resume",
            ) from error
        shapes = {name: value.shape for name, value in pupil.trained.items()}
        same = all({n: v.shape for n, v in part.items()} == shapes for part in parts.values())
        if key != self.key or not same or not looks:
            raise WeightsError(
                f"{self.path} is of a run with another model, weights, images, schedule or recipe",
                "repeat that run's options, or leave out --resume to start anew",
            )
        pupil.take(parts["now"])
        for name, value in pupil.trained.items():
            adam.state[value] = {
                "step": torch.tensor(float(looks[-1][0])),
                "exp_avg": parts["first"][name].to(value.device),
                "exp_avg_sq": parts["second"][name].to(value.device),
            }
        return looks, {n: v.to(pupil.device) for n, v in parts["best"].items()}

    def save(
        self,
        names: list[str],
        pupil: Pupil,
        adam: torch.optim.Adam,
        looks: list[tuple[int, float]],
        best: dict[str, Tensor],
    ) -> None:
        """Writes it, whole or not at all."""
        from safetensors.torch import save_file

        values: dict[str, Any] = {}
        for name in names:
            moments = adam.state[pupil.trained[name]]
            parts = (pupil.trained[name], moments["exp_avg"], moments["exp_avg_sq"], best[name])
            for part, value in zip(PARTS, parts, strict=True):
                values[f"{part}/{name}"] = value.detach().cpu().contiguous()
        about = {"run": json.dumps({"key": self.key, "looks": looks})}
        with atomic_path(self.path) as temporary:
            save_file(values, temporary, metadata=about)


PARTS = ("now", "first", "second", "best")
"""Of a state's tensors: the parameters, Adam's two moments, and the best parameters."""
