"""`tune`: the schedule and tau that change a model's answers least, within a budget.

Objective: the mean over unlabelled images of 1 - cosine between the model's output (logits, or
features where there is no classifier) with JMP and without. Budget: MACs in closed form, or
latency from a table measured on the device (`jmp.latency`). The search is in `search.py`, the
measuring in `measure.py`.

What makes it affordable: the dense model runs once, and its block inputs are kept, so that a
candidate runs only from its first reduction on; most candidates are looked at on a quarter of the
images; every measurement is written to a state file, from which `resume` goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..core.errors import ScheduleError, WeightsError
from ..core.files import write_json
from ..core.images import find_images, load_readable
from ..jmp import latency, schedule
from ..jmp.models import OwnModel
from . import search
from .measure import Evaluator, Meter, OnProgress, State, candidate, macs_of, pairs
from .search import Keeps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..jmp.models import LoadedModel

OBJECTIVE = "mean of 1 - cosine between the outputs with and without JMP"
ALIKE = 1e-3


@dataclass(frozen=True)
class TuneOptions:
    """What `tune` is asked for; the command line's flags of the same names.

    Attributes:
        model, weights, own, img_size: as for `build`.
        images: files or folders.
        out: schedule file to write.
        gmacs, latency_ms, speedup: the budget; exactly one of them. `speedup` is over the dense
            model, in latency if there is a table, else in MACs.
        table: latency table, for `latency_ms` and `speedup`.
        table_batch: which batch size of the table; None: the smallest.
        tau: fixed threshold; None searches it.
        seed: which images are taken where there are more than `limit`; and of random weights.
        limit: most images.
        batch: images per forward.
        passes: work to spend, in passes of the dense model over the images.
        curve: measure the trade-off at other budgets too.
        resume: go on from the state file of an interrupted run.
    """

    model: str
    images: tuple[Path, ...]
    out: Path
    weights: str = "auto"
    own: OwnModel = field(default_factory=OwnModel)
    img_size: int | tuple[int, int] | None = None
    gmacs: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    table: Path | None = None
    table_batch: int | None = None
    tau: float | None = None
    seed: int = 0
    limit: int = 64
    batch: int = 16
    passes: float = 40.0
    curve: bool = False
    resume: bool = False


def tune(
    options: TuneOptions, *, on_progress: OnProgress = lambda phase, share, best: None
) -> dict[str, Any]:
    """Searches a schedule, writes it to `options.out` and returns what was written.

    Raises:
        ScheduleError: a budget that cannot be met, a table that does not fit, bad options.
        ImageError: no images.
        ModelError, WeightsError: as `models.load_model`; or random weights that nobody asked for.
    """
    from ..jmp.models import load_model
    from ..jmp.patch import model_shape

    _check_options(options)
    on_progress("loading", 0.0, None)
    paths = _choose(find_images(options.images), options.limit, options.seed)
    loaded = load_model(
        options.model,
        options.weights,
        img_size=options.img_size,
        seed=options.seed,
        own=options.own,
    )
    if loaded.origin.fallback_for:
        raise WeightsError(
            f"no weights to tune with: {loaded.origin.reason}",
            "pass --weights FILE.safetensors (with --weights random the result means nothing)",
        )
    shape = model_shape(loaded.model)
    problem, unit = make_problem(options, shape)
    search.check(problem, unit)
    pixels = load_readable(paths, loaded.preprocess).require()
    on_progress("dense model", 0.0, None)
    evaluator = Evaluator(loaded.model, pixels, options.batch)
    state = State(
        options.out.with_name(options.out.name + ".state"),
        _key(loaded, shape, pixels, options),
        resume=options.resume,
    )
    meter = Meter(evaluator, state, shape, options.passes, on_progress)
    found = search.search(
        problem, meter.measure, tau=options.tau, exhausted=lambda: meter.spent >= options.passes
    )
    best = candidate(pairs(found.keeps, shape.num_patches), shape)
    result: dict[str, Any] = {
        "model": shape.name,
        "steps": pairs(found.keeps, shape.num_patches),
        "tau": found.tau,
        "selection": best.selection,
        "merge_weight": best.merge_weight,
        "last_prefix_only": best.last_prefix_only,
        "image_size": loaded.preprocess.height,
        "objective": OBJECTIVE,
        "distance": found.distance,
        "cost": _costs(found.keeps, problem, shape),
        "dense_cost": _costs(problem.dense(), problem, shape),
        "budget": {"unit": unit, "value": problem.budget},
        "table": _about_table(options, shape),
        "plain": {
            name: None
            if entry is None
            else {
                "steps": pairs(entry[0], shape.num_patches),
                "distance": entry[1],
                "cost": _costs(entry[0], problem, shape),
            }
            for name, entry in (("paper", found.paper), ("spread", found.spread))
        },
        "weights": asdict(loaded.origin),
        "images": {"count": len(pixels), "sha256": _digest(pixels)},
        "seed": options.seed,
        "measurements": {"run": meter.run, "resumed": meter.resumed},
        "warnings": _warnings(loaded, evaluator.dense, pixels),
    }
    if options.curve:
        result["curve"] = _curve(problem, meter, found, shape)
    write_json(options.out, result)
    state.path.unlink(missing_ok=True)
    return result


def make_problem(options: TuneOptions, shape: schedule.ModelShape) -> tuple[search.Problem, str]:
    """What the search has to meet, and the unit of its cost.

    Raises:
        ScheduleError: the table cannot be used.
    """
    if options.table is not None:
        table = latency.read(options.table, shape, options.table_batch)
        grid, unit = table.good_counts(), "ms"
        cost: Callable[[Keeps], float] = table.latency
    else:
        grid, unit = tuple(range(shape.num_patches, 0, -1)), "GMACs"

        def cost(keeps: Keeps) -> float:
            return macs_of(keeps, shape) / 1e9

    dense = cost((shape.num_patches,) * shape.depth)
    if options.speedup is not None:
        budget = dense / options.speedup
    else:
        budget = float(options.gmacs or options.latency_ms or 0.0)
    last = shape.depth - (2 if shape.head_reads_prefix_only else 1)
    return search.Problem(shape.depth, grid, cost, budget, last), unit


def _curve(
    problem: search.Problem,
    meter: Meter,
    found: search.Found,
    shape: schedule.ModelShape,
) -> list[dict[str, Any]]:
    """The plain schedules and the found one's form at other budgets, all at the found tau."""
    from dataclasses import replace

    dense = problem.cost(problem.dense())
    least = problem.cost(problem.least())
    ratio = problem.budget / dense
    shares = sorted({0.85, 0.7, 0.55, 0.45} | {round(ratio, 4)}, reverse=True)
    points: list[dict[str, Any]] = []
    meter.spent, meter.passes, meter.phase = 0.0, 3 * sum(shares), "trade-off"
    for share in shares:
        at = replace(problem, budget=problem.budget if share == round(ratio, 4) else share * dense)
        if at.budget < least:
            continue
        forms = {
            "paper": search.paper_like(at),
            "spread": search.spread_like(at),
            "tuned": found.keeps if at.budget == problem.budget else search.scaled(at, found.keeps),
        }
        points.extend(
            {
                "form": form,
                "steps": pairs(keeps, shape.num_patches),
                "cost": problem.cost(keeps),
                "distance": meter.measure(keeps, found.tau, True),
            }
            for form, keeps in forms.items()
            if keeps
        )
    return points


def _check_options(options: TuneOptions) -> None:
    budgets = [options.gmacs, options.latency_ms, options.speedup]
    given = [value for value in budgets if value is not None]
    if len(given) != 1:
        raise ScheduleError(
            "name one budget", "--gmacs 3.0, or --speedup 1.5, or --latency-ms 5 --on table.json"
        )
    if not 0 < given[0] < float("inf"):
        raise ScheduleError(f"a budget of {given[0]:g} is not valid", "it must be above 0")
    if options.latency_ms is not None and options.table is None:
        raise ScheduleError(
            "--latency-ms needs a table of the device", "add --on table.json (bench --table)"
        )
    if options.gmacs is not None and options.table is not None:
        raise ScheduleError(
            "--on goes with --latency-ms or --speedup, not with --gmacs", "leave one of them out"
        )
    if options.table_batch is not None and options.table is None:
        raise ScheduleError("--on-batch is of the table of --on", "add --on table.json")


def _choose(paths: Sequence[Path], limit: int, seed: int) -> list[Path]:
    """At most `limit` of the images, whichever the seed says, in an order that mixes folders."""
    order = np.random.default_rng(seed).permutation(len(paths))
    return [paths[index] for index in order[:limit]]


def _warnings(loaded: LoadedModel, dense: Any, pixels: NDArray[np.float32]) -> list[str]:
    from torch.nn.functional import cosine_similarity

    found = []
    if loaded.origin.kind == "random":
        found.append("random weights: this schedule means nothing for a trained model")
    different = len({image.tobytes() for image in pixels})
    if different < len(pixels):
        found.append(f"{len(pixels)} images, but only {different} different ones")
    if len(pixels) < 16:
        found.append(f"only {len(pixels)} images: the schedule may fit them and no others")
    spread = 1 - float(cosine_similarity(dense, dense.mean(0, keepdim=True), dim=1).min())
    if len(pixels) > 1 and spread < ALIKE:
        found.append(
            "the images are all alike to the model: take images as varied as those it will see"
        )
    return found


def _key(
    loaded: LoadedModel,
    shape: schedule.ModelShape,
    pixels: NDArray[np.float32],
    options: TuneOptions,
) -> str:
    """Identifies everything that a measurement depends on."""
    import torch

    digest = hashlib.sha256()
    versions = (__version__, torch.__version__)
    facts = (asdict(shape), options.seed, options.batch, versions, _digest(pixels))
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in loaded.model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def _digest(pixels: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _costs(keeps: Keeps, problem: search.Problem, shape: schedule.ModelShape) -> dict[str, float]:
    """In the budget's unit, and in GMACs always."""
    return {"value": problem.cost(keeps), "gmacs": macs_of(keeps, shape) / 1e9}


def _about_table(options: TuneOptions, shape: schedule.ModelShape) -> dict[str, Any] | None:
    if options.table is None:
        return None
    table = latency.read(options.table, shape, options.table_batch)
    return {"file": str(options.table), "device": table.device, "batch": table.batch}
