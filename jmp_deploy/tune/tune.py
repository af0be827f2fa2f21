"""`tune`: the schedule and tau that change a model's answers least, within a budget.

Objective: the geometric mean over unlabelled images of 1 - cosine between the model's output
(logits, or features where there is no classifier) with JMP and without. (The mean is decided by a
few images whose distance jumps from one candidate to the next: what was chosen by it was worse than
`spread` on other photos, docs/method.md.) Budget: MACs in closed form, or latency from a table
measured on the device (`jmp.latency`). The search is in `search.py`, the measuring in `measure.py`.

What was chosen on some images looks better there than it is. So a third of the files is held back
from the search and judges its answer. Only if the geometric mean is smaller there than that of
`spread`, beyond the 95 % interval (bootstrap over files), and the mean no larger, the answer is
written; else `spread` at the same budget is.

What makes it affordable: the dense model runs once, and its block inputs are kept, so that a
candidate runs only from its first reduction on; a candidate has three numbers and tau; every
measurement is written to a state file, from which `resume` goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..core.errors import ImageError, ScheduleError, WeightsError
from ..core.files import write_json
from ..core.images import drawn, find_images, load_readable
from ..core.outputs import DENSE, POOLED
from ..core.stats import bootstrap
from ..jmp import latency, schedule
from ..jmp.models import OwnModel
from . import search
from .measure import Evaluator, Meter, OnProgress, State, candidate, logs, macs_of, pairs
from .search import Found, Keeps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..jmp.models import LoadedModel

OBJECTIVES = {
    POOLED: "1 - cosine between the outputs with and without JMP",
    DENSE.name: "1 - cosine between features of a patch with and without JMP, mean over patches",
}
ALIKE = 1e-3
HELD_BACK = 3
"""One file in so many is held back."""
FEW, FEWEST = 50, 12
"""Images below which there is a warning, and an error."""


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
        output: what is to be near: "pooled", what the model gives, or "dense", every patch.
        passes: work to spend, in passes of the dense model over the images that choose.
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
    output: str = POOLED
    passes: float = 24.0
    curve: bool = False
    resume: bool = False


def tune(
    options: TuneOptions, *, on_progress: OnProgress = lambda phase, share, best: None
) -> dict[str, Any]:
    """Searches a schedule, writes it or `spread` to `options.out` and returns what was written.

    Raises:
        ScheduleError: a budget that cannot be met, a table that does not fit, bad options.
        ImageError: no images, or too few different ones to hold some back.
        ModelError, WeightsError: as `models.load_model`; or random weights that nobody asked for.
    """
    from ..jmp.models import load_model
    from ..jmp.patch import model_shape

    _check_options(options)
    on_progress("loading", 0.0, None)
    paths = drawn(find_images(options.images), options.limit, options.seed)
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
    of_patches = options.output == DENSE.name
    shape = model_shape(loaded.model)
    shape = shape.for_patches() if of_patches else shape
    problem, unit = make_problem(options, shape)
    search.check(problem, unit)
    pixels = load_readable(paths, loaded.preprocess).require()
    count = len(pixels)
    pixels = _different(pixels)
    on_progress("dense model", 0.0, None)
    evaluator = Evaluator(loaded.model, pixels, options.batch, of_patches=of_patches)
    state = State(
        options.out.with_name(options.out.name + ".state"),
        _key(loaded, shape, pixels, options),
        resume=options.resume,
    )
    choosing = range(len(pixels) - len(pixels) // HELD_BACK)
    held_back = range(len(choosing), len(pixels))
    meter = Meter(evaluator, state, choosing, held_back, options.passes, on_progress)
    found = search.search(problem, meter.measure, tau=options.tau, exhausted=meter.exhausted)
    candidates, gain = _judge(problem, meter, found, options.tau)
    shown = gain["held_back"]
    holds = shown["geometric"]["low"] > 0 and shown["mean"]["value"] >= 0
    chosen = "tuned" if holds else "spread"
    best = candidate(candidates[chosen]["steps"], shape)
    result: dict[str, Any] = {
        "model": shape.name,
        "steps": candidates[chosen]["steps"],
        "tau": candidates[chosen]["tau"],
        "selection": best.selection,
        "merge_weight": best.merge_weight,
        "last_prefix_only": best.last_prefix_only,
        "patches": shape.num_patches,
        "image_size": loaded.preprocess.height,
        "objective": OBJECTIVES[options.output],
        "chosen": chosen,
        "form": asdict(found.form),
        "candidates": candidates,
        "gain": gain,
        "dense_cost": _costs(problem.dense(), problem, shape),
        "budget": {"unit": unit, "value": problem.budget},
        "table": _about_table(options, shape),
        "weights": asdict(loaded.origin),
        "images": {
            "count": len(pixels),
            "held_back": len(held_back),
            "sha256": _digest(pixels),
        },
        "seed": options.seed,
        "measurements": {"run": meter.run, "resumed": meter.resumed},
        "warnings": _warnings(loaded, evaluator.dense, count, len(pixels)),
    }
    if options.curve:
        result["curve"] = _curve(problem, meter, found)
    write_json(options.out, result)
    state.path.unlink(missing_ok=True)
    return result


def _judge(
    problem: search.Problem, meter: Meter, found: Found, tau: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The found schedule and the plain ones on the images that chose and on those held back.

    Returns:
        For "tuned", "spread" and "paper" the steps, tau, cost, and on both parts the geometric mean
        and the mean of the distances with their intervals (None where a budget cannot be met); and
        how much smaller they are for "tuned", as shares of those for "spread".
    """
    shape, plain, paper = meter.evaluator.shape, search.plain(problem, tau), None
    if keeps := search.paper_like(problem):
        paper = (keeps, plain.tau)
    parts = {"choosing": meter.choosing, "held_back": meter.held_back}
    measured: dict[tuple[str, str], NDArray[np.float64]] = {}
    candidates: dict[str, Any] = {}
    named = {"tuned": (found.keeps, found.tau), "spread": (plain.keeps, plain.tau), "paper": paper}
    for name, entry in named.items():
        if entry is None:
            candidates[name] = None
            continue
        for part, images in parts.items():
            measured[name, part] = meter.distances(*entry, images)
        candidates[name] = {
            "steps": pairs(entry[0], shape.num_patches),
            "tau": entry[1],
            "cost": _costs(entry[0], problem, shape),
            **{part: _figures(measured[name, part]) for part in parts},
        }
    gain = {}
    for part in parts:
        before, after = measured["spread", part], measured["tuned", part]
        ratio = _interval(logs(before) - logs(after))
        gain[part] = {
            "geometric": {key: 1 - math.exp(-value) for key, value in ratio.items()},
            "mean": _interval((before - after) / (before.mean() or 1.0)),
        }
    return candidates, gain


def _figures(distances: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    geometric = _interval(logs(distances))
    return {
        "geometric": {key: math.exp(value) for key, value in geometric.items()},
        "mean": _interval(distances),
    }


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    """The mean over files with its 95 % interval."""
    low, high = bootstrap(values)
    return {"value": float(values.mean()), "low": low, "high": high}


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
    return search.Problem(shape.depth, grid, cost, budget), unit


def _curve(problem: search.Problem, meter: Meter, found: Found) -> list[dict[str, Any]]:
    """The plain schedules and the found form at other budgets, on the images held back."""
    dense, least = problem.cost(problem.dense()), problem.cost(problem.least())
    shares = sorted({0.85, 0.7, 0.55, 0.45, problem.budget / dense}, reverse=True)
    points: list[dict[str, Any]] = []
    for done, share in enumerate(shares):
        at = replace(problem, budget=share * dense)
        if at.budget < least:
            continue
        meter.on_progress("trade-off", done / len(shares), None)
        forms = {
            "paper": search.paper_like(at),
            "spread": search.fit(at, search.spread(at)),
            "tuned": search.fit(at, found.form),
        }
        points.extend(
            {
                "form": form,
                "steps": pairs(keeps, problem.grid[0]),
                "cost": problem.cost(keeps),
                "distance": math.exp(
                    logs(meter.distances(keeps, found.tau, meter.held_back)).mean()
                ),
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


def _different(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The images without repetitions: what chose must not judge under another name.

    Raises:
        ImageError: too few are left.
    """
    first: dict[bytes, int] = {}
    for at, image in enumerate(pixels):
        first.setdefault(hashlib.sha256(image.tobytes()).digest(), at)
    kept = list(first.values())
    if len(kept) < FEWEST:
        raise ImageError(
            f"{len(kept)} different image{'s' if len(kept) > 1 else ''}: `tune` takes {FEWEST} at "
            "least, a third of which judges what the others chose",
            f"name more of them, best {FEW} photos and above",
        )
    return pixels[kept]


def _warnings(loaded: LoadedModel, dense: Any, count: int, different: int) -> list[str]:
    from torch.nn.functional import cosine_similarity

    found = []
    if loaded.origin.kind == "random":
        found.append("random weights: this schedule means nothing for a trained model")
    if different < count:
        found.append(f"{count} images, but only {different} different ones, each taken once")
    if different < FEW:
        found.append(
            f"only {different} images: below {FEW} photos a schedule says little about others"
        )
    spread = 1 - float(cosine_similarity(dense, dense.mean(0, keepdim=True), dim=-1).min())
    if spread < ALIKE:
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
    facts = (asdict(shape), options.seed, options.batch, options.output, versions, _digest(pixels))
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
