"""Features of a model, dense or with a rule of token reduction in it, and what they cost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.lib.command import weights_facts
from benchmarks.lib.data import Samples, batch
from benchmarks.lib.methods import Method
from benchmarks.lib.rules import Rule
from jmp_deploy.core.files import atomic_path
from jmp_deploy.core.outputs import output_of
from jmp_deploy.jmp.families import family_of, written_out_attention
from jmp_deploy.jmp.models import LoadedModel
from jmp_deploy.jmp.patch import JMPBlocks, patch, unpatch
from jmp_deploy.jmp.reduction import Plan
from jmp_deploy.jmp.schedule import ModelShape, Schedule, improved, macs, resolve
from jmp_deploy.jmp.trace import watch

BATCH = 50


STEM = 2  # blocks in front of the first reduction of most schedules, computed once for all of them


@contextmanager
def reduced(
    loaded: LoadedModel, schedule: Schedule, method: Method, *, restore: bool = False
) -> Iterator[Rule | None]:
    """The model with `method` in the blocks of `schedule`; dense again on leaving.

    `restore`: as for `patch`.
    """
    rule = method.make_rule()
    steps = method.scheduled(schedule)
    patch(loaded.model, steps, tau=method.tau, proportional=method.proportional, restore=restore)
    try:
        if rule is not None:
            loaded.model.blocks.reduce = rule
        yield rule
    finally:
        unpatch(loaded.model)


class Features:
    """Features of one model, computed once and kept in a folder.

    Args:
        loaded: the model; patched and dense again around each call.
        cache: folder of .npy files whose names stand for weights, images and method; or None.
    """

    def __init__(self, loaded: LoadedModel, cache: Path | None) -> None:
        self.loaded = loaded
        self.cache = cache
        self._stems: dict[str, Tensor] = {}
        origin = weights_facts(loaded.origin)
        self._model_key = repr((loaded.name, sorted(origin.items()), loaded.preprocess))

    def dense(self, samples: Samples) -> NDArray[Any]:
        """What the dense model's head gets, [n, C]."""
        return self._kept("dense", samples, lambda: self._extract(samples))

    def reduced(self, samples: Samples, schedule: Schedule, method: Method) -> NDArray[Any]:
        """What the head gets with `method` in the model, [n, C]."""

        def compute() -> NDArray[Any]:
            with reduced(self.loaded, schedule, method):
                return self._extract(samples)

        return self._kept(f"{method}{method.scheduled(schedule)}", samples, compute)

    def logits(self, features: NDArray[Any]) -> NDArray[Any] | None:
        """[n, C] -> [n, classes] by the model's own classifier; None if it has none."""
        if not output_of(self.loaded.model).classifies:
            return None
        with torch.inference_mode():
            return self.loaded.model.head(torch.from_numpy(features).float()).double().numpy()

    def _extract(self, samples: Samples) -> NDArray[Any]:
        model = self.loaded.model
        blocks = model.blocks
        family = family_of(model)
        first = min(getattr(blocks, "reductions", {}) or {len(blocks): None})
        stems = self._stem(samples) if first >= STEM else None
        rest = partial(blocks if isinstance(blocks, JMPBlocks) else self._dense, start=STEM)
        rows = []
        with torch.inference_mode():
            for start in range(0, len(samples), BATCH):
                if stems is None:
                    tokens = blocks(family.embed(model, self._images(samples, start)))
                else:
                    tokens = rest(stems[start : start + BATCH])
                rows.append(family.head(model, tokens, pre_logits=True).double().numpy())
        return np.concatenate(rows)

    def _stem(self, samples: Samples) -> Tensor:
        """Tokens behind the first blocks, [n, N, C]."""
        if samples.name not in self._stems:
            model, parts = self.loaded.model, []
            family = family_of(model)
            with torch.inference_mode():
                for start in range(0, len(samples), BATCH):
                    x = family.embed(model, self._images(samples, start))
                    parts.append(self._dense(x, stop=STEM))
            self._stems[samples.name] = torch.cat(parts)
        return self._stems[samples.name]

    def _dense(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens through the model's own blocks start..stop-1, which reduce nothing."""
        model = self.loaded.model
        family = family_of(model)
        rotary = family.rotary(model)
        for index, block in list(enumerate(model.blocks.children()))[start:stop]:
            x = family.run(block, x, None, rotary and rotary.rows(index))
        return x

    def _images(self, samples: Samples, start: int) -> Tensor:
        images = batch(samples.images[start : start + BATCH], self.loaded.preprocess)
        return torch.from_numpy(images)

    def _kept(
        self, what: str, samples: Samples, compute: Callable[[], NDArray[Any]]
    ) -> NDArray[Any]:
        if self.cache is None:
            return compute()
        digest = hashlib.sha256((self._model_key + what + _code()).encode())
        for image in samples.images:
            digest.update(image.tobytes())
        path = self.cache / f"{samples.name}-{digest.hexdigest()[:20]}.npy"
        if path.is_file():
            return np.load(path)
        features = compute()
        with atomic_path(path) as temporary:
            np.save(temporary, features)
        return features


def shares(
    loaded: LoadedModel, samples: Samples, schedule: Schedule, method: Method
) -> list[dict[str, float]]:
    """For each reduction: block, tokens kept, and percent of the leaving tokens merged / pruned."""
    counts: dict[int, list[float]] = {}

    def count(block: int, x: Tensor, plan: Plan, outputs: tuple[Tensor, ...]) -> None:
        merged = counts.setdefault(block, [0.0, 0.0, 1.0])
        merged[0] += float(plan.merged.sum())
        merged[1] += plan.merged.numel()
        merged[2] = min(merged[2], float(plan.similarity.min()))

    model = loaded.model
    with reduced(loaded, schedule, method), watch(model, count), torch.inference_mode():
        for start in range(0, len(samples), BATCH):
            images = batch(samples.images[start : start + BATCH], loaded.preprocess)
            model(torch.from_numpy(images))
    return [
        {
            "block": block,
            "keep": keep,
            "merged_percent": 100 * counts[block][0] / counts[block][1],
            "pruned_percent": 100 - 100 * counts[block][0] / counts[block][1],
            "lowest_similarity": counts[block][2],
        }
        for block, keep in schedule.steps
    ]


def counted_macs(model: nn.Module) -> int:
    """MACs for one image, by PyTorch's flop counter: every matrix product that is really run."""
    from torch.utils.flop_counter import FlopCounterMode

    size = family_of(model).patch_embed(model).img_size
    with (
        written_out_attention(model),
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
    ):
        model(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


def own_schedule(shape: ModelShape, method: Method, share: float) -> Schedule | None:
    """The form in which the method was published, at this cost; None if it has none or cannot."""
    if method.own == "all":
        blocks = range(shape.depth - 1)
    elif method.own == "thirds":
        blocks = [shape.depth * quarter // 4 for quarter in (1, 2, 3)]
    else:
        return None
    budget = share * macs(shape)
    for permille in range(999, 9, -1):
        steps, left = [], float(shape.num_patches)
        for position, block in enumerate(blocks, 1):
            if method.own == "all":
                left = shape.num_patches * (1 - (1 - permille / 1000) * position / len(blocks))
            else:
                left *= permille / 1000
            steps.append((block, max(1, round(left))))
        schedule = improved(resolve(f"own {share:.0%}", steps, shape), shape)
        if macs(shape, schedule) <= budget:
            return schedule
    return None


def _code() -> str:
    """A hash of what computes features, so that a changed rule is computed again."""
    here = Path(__file__).parent
    package = Path(str(import_module("jmp_deploy").__file__)).parent
    names = ("reduction.py", "patch.py", "families/vit.py")
    files = [here / "rules.py", here / "data.py", *(package / "jmp" / name for name in names)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
