"""Recovers what a reduction of half the work and more costs: by learning from unlabelled images.

The dense model answers crops of the user's images; the reduced one learns to answer likewise. A
tenth of the files says when to stop and a fifth judges the end. Only if the distance there is
smaller beyond the 95 % interval (bootstrap over files), weights are written. Nothing is added to
the model: graph, engine and speed stay what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..core.errors import CheckError, ImageError, ModelError, ScheduleError, WeightsError
from ..core.files import atomic_path
from ..core.images import Preprocess, drawn, find_images
from ..core.manifest import Interval, Recovered
from ..core.stats import bootstrap
from ..jmp import schedule
from ..jmp.checkpoint import RECOVERED
from ..jmp.models import OwnModel
from .crops import Album, read

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..core.images import Picture
    from .lesson import OnProgress, Trained

OBJECTIVE = "1 - cosine between the outputs of the reduced model and of the dense one"
JUDGES, STOPS = 5, 10
"""One file in so many judges the end; one in so many says when to stop."""
FEW, FEWEST = 200, 20
"""Images below which there is a warning, and an error."""


@dataclass(frozen=True)
class RecoverOptions:
    """What `recover` is asked for; the command line's flags of the same names.

    Attributes:
        model, weights, own, img_size: as for `build`.
        images: files or folders.
        out: safetensors file to write.
        schedule, tau: as for `build`: what the weights are for.
        crops: to learn from in all.
        batch: crops in a step.
        learning_rate: the largest; None: `lesson.RATES` of `train`.
        train: "small" (norms, biases, layer scales) or "all" (matrices too, at a smaller rate: it
            measured better).
        device: "auto" (a GPU where PyTorch has one), "cpu" or "cuda".
        seed: which images are taken where there are more than `limit`, which judge; the crops.
        limit: most images.
        resume: go on from the state file of an interrupted run.
    """

    model: str
    images: tuple[Path, ...]
    out: Path
    weights: str = "auto"
    own: OwnModel = field(default_factory=OwnModel)
    img_size: int | tuple[int, int] | None = None
    schedule: str = "spread:50"
    tau: float | None = None
    crops: int = 8000
    batch: int = 16
    learning_rate: float | None = None
    train: Trained = "all"
    device: str = "auto"
    seed: int = 0
    limit: int = 500
    resume: bool = False


def recover(
    options: RecoverOptions, *, on_progress: OnProgress = lambda phase, share, best: None
) -> dict[str, Any]:
    """Trains, judges, and writes `options.out` if it is better; returns what was found.

    Raises:
        CheckError: no gain beyond the interval on the images that judge: nothing is written.
        ImageError: no images, or too few different ones.
        ScheduleError: a schedule that does not fit, or keeps every token.
        ModelError, WeightsError: as `models.load_model`; weights that nobody trained; no GPU; a
            file to write, or to resume from, that is none of ours.
    """
    from ..jmp.models import load_model, weights_digest
    from ..jmp.patch import model_shape
    from .lesson import RATES, Pupil, Recipe, State, learn

    if options.out.suffix != ".safetensors":  # by which a checkpoint is read
        raise WeightsError(f"{options.out} is to hold safetensors", "name it FILE.safetensors")
    schedule.check_spelling(options.schedule)
    device = _device(options.device)
    on_progress("loading", 0.0, None)
    paths = drawn(find_images(options.images), options.limit, options.seed)
    loaded = load_model(
        options.model,
        options.weights,
        img_size=options.img_size,
        seed=options.seed,
        own=options.own,
    )
    if loaded.origin.kind == "random":
        why = f": {loaded.origin.reason}" if loaded.origin.reason else ""
        raise WeightsError(f"no trained weights to recover{why}", "pass --weights FILE.safetensors")
    shape = model_shape(loaded.model)
    plan = schedule.parse(options.schedule, shape)
    if not plan.steps:
        raise ScheduleError("the schedule keeps every token: there is nothing to recover")
    if options.tau is not None:
        plan = replace(plan, tau=options.tau)
    on_progress("decoding", 0.0, None)
    pictures = _different(read(paths, loaded.preprocess))
    parts = _split(pictures)
    spec = loaded.preprocess
    albums = {name: Album(part, spec, options.seed) for name, part in parts.items()}
    rate = options.learning_rate or RATES[options.train]
    steps = max(1, options.crops // options.batch)
    recipe = Recipe(steps, options.batch, rate, options.train)
    pupil = Pupil(loaded.model, plan, options.train, device)
    source = weights_digest(loaded.model)
    state_path = options.out.with_name(options.out.name + ".state")
    key = _key(source, plan, pictures, spec, recipe, options.seed)
    state = State(state_path, key, resume=options.resume)
    judging = albums["judge"].whole()
    on_progress("dense model", 0.0, None)
    before = pupil.measure(judging, options.batch)
    if not np.isfinite(before).all():
        raise ModelError("the model's output is not finite", "are the weights sound?")
    looks = learn(pupil, albums["learn"], albums["stop"].whole(), recipe, state, on_progress)
    on_progress("judging", 1.0, min(value for _, value in looks))
    after = pupil.measure(judging, options.batch)
    gain = _interval(before - after)
    origin = Recovered(
        model=loaded.name,
        jmp=schedule.to_manifest(plan),
        image_size=(spec.height, spec.width),
        train=options.train,
        steps=steps,
        best_step=min(looks, key=lambda look: look[1])[0],
        batch=options.batch,
        learning_rate=rate,
        seed=options.seed,
        images=len(pictures),
        judged=len(parts["judge"]),
        images_sha256=_digest(pictures),
        weights_sha256=source,
        before=_interval(before),
        after=_interval(after),
        gain=gain,
        version=__version__,
    )
    state_path.unlink(missing_ok=True)
    if gain.low <= 0:
        raise CheckError(
            f"what was learnt does not hold on the {len(after)} images that it never saw: "
            f"1 - cosine {before.mean():.5f} -> {after.mean():.5f}, gain {gain.value:+.5f} "
            f"({gain.low:+.5f} to {gain.high:+.5f}); nothing is written",
            "take more and more varied images, or another --learning-rate",
        )
    _write(options.out, pupil.reduced.state_dict(), origin)
    return {
        **asdict(origin),
        "objective": OBJECTIVE,
        "looks": looks,
        "weights": asdict(loaded.origin),
        "warnings": _warnings(len(paths), len(pictures)),
    }


def _write(path: Path, state: dict[str, Any], origin: Recovered) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={RECOVERED: json.dumps(asdict(origin))})


def _device(asked: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ModelError("PyTorch finds no GPU", "leave out --device, or write --device cpu")
    return "cuda" if asked != "cpu" and has_gpu else "cpu"


def _different(pictures: Sequence[Picture]) -> list[Picture]:
    """The images without repetitions: what taught must not judge under another name.

    Raises:
        ImageError: too few are left.
    """
    first = {_pixels(picture): picture for picture in reversed(pictures)}
    kept = list(reversed(first.values()))
    if len(kept) < FEWEST:
        raise ImageError(
            f"{len(kept)} different image{'s' if len(kept) > 1 else ''}: `recover` takes {FEWEST} "
            "at least",
            f"name more of them, best {FEW} and above",
        )
    return kept


def _split(pictures: Sequence[Picture]) -> dict[str, tuple[Picture, ...]]:
    judges, stops = len(pictures) // JUDGES, len(pictures) // STOPS
    ends = (judges, judges + stops)
    return {
        "judge": tuple(pictures[: ends[0]]),
        "stop": tuple(pictures[ends[0] : ends[1]]),
        "learn": tuple(pictures[ends[1] :]),
    }


def _interval(values: NDArray[np.float64]) -> Interval:
    """The mean over files with its 95 % interval."""
    low, high = bootstrap(values)
    return Interval(float(values.mean()), low, high)


def _pixels(picture: Picture) -> bytes:
    array = np.ascontiguousarray(picture)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()


def _digest(pictures: Sequence[Picture]) -> str:
    """Of their pixels, not of files: another decoder may change the one and not the other."""
    return hashlib.sha256(b"".join(map(_pixels, pictures))).hexdigest()


def _key(
    source: str,
    plan: schedule.Schedule,
    pictures: Sequence[Picture],
    spec: Preprocess,
    recipe: Any,
    seed: int,
) -> str:
    """Identifies everything that the learning depends on."""
    import torch

    facts = (source, asdict(plan), _digest(pictures), asdict(spec), asdict(recipe), seed)
    text = json.dumps((*facts, __version__, torch.__version__), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _warnings(read_images: int, different: int) -> list[str]:
    found = []
    if different < read_images:
        found.append(f"{read_images} images, but only {different} different and readable ones")
    if different < FEW:
        found.append(f"only {different} images: with {FEW} and above there is more to learn from")
    return found
