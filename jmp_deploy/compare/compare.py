"""PyTorch, ONNX Runtime and the engine side by side, on the same images.

Polygraphy's runners and its Comparator.run run them; what is compared and how is ours
(measures.py): Comparator.compare_accuracy judges tensors element by element, and a ViT
whose tokens may change places in a near tie is judged by the cosine of its answer for each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import backends
from ..backends.base import Opened, Outputs
from ..core import interrupt, ort
from ..core.artifact import Artifact, Reference
from ..core.errors import ArtifactError, ImageError, JmpDeployError, engine_errors
from ..core.images import (
    INPUT,
    UNREADABLE_HINT,
    UNREADABLE_LIMIT,
    Preprocess,
    join,
    load_readable,
    split,
    spread,
)
from .measures import TABLE, TOLERANCES, Pair, coarser, measure

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT = 64
BATCH = 8


@dataclass(frozen=True)
class Photos:
    """Input: images [B, 3, H, W], their names, and files that could not be read: (path, why)."""

    images: NDArray[np.float32]
    names: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...] = ()


def compare_artifact(
    folder: Path,
    *,
    backends: Sequence[str] | None = None,
    images: Sequence[Path] = (),
    limit: int = LIMIT,
    weights: str | None = None,
    min_cosine: float | None = None,
    max_abs: float | None = None,
    debug: bool = False,
) -> dict[str, Any]:
    """Runs an artifact's backends on the same images and compares each with the first.

    Args:
        folder: the artifact.
        backends: of `backends.NAMES`; None takes all that can run here.
        images: files; none means the artifact's reference images.
        limit: files to use at most, spread evenly over those given.
        weights: where PyTorch takes the weights from, if not from where the build did.
        min_cosine, max_abs: tolerances in place of the precision's own (measures.TABLE).
        debug: look at every block of each pair outside tolerance, or of the first pair.

    Returns:
        {"ok", "precision", "tolerance", "images", "unreadable", "random_weights", "backends",
        "skipped": {backend: reason}, "notes", "pairs", "reductions", "reductions_skipped", "debug",
        "debug_skipped", "runtime_ms": {backend: per image}}. pairs are those of
        measures.Pair; reductions is reductions.report's, with "alike": such pairs of PyTorch with
        the other's choices, where choices differ; debug is a list of debug.conclusion's; where one
        is None, its _skipped says why.

    Raises:
        JmpDeployError: fewer than two backends can run, or one that was asked for cannot; no image
            can be read.
    """
    artifact = Artifact.read(folder)
    ort.quiet_polygraphy()
    precision = artifact.precision
    photos, reference = _input(artifact, images, limit)
    chosen, skipped = _open(artifact, backends, weights, reference)
    pairs, times, outputs = run_and_pair(
        [opened.runner for opened in chosen],
        photos.images,
        artifact.batch,
        {opened.name: opened.backend.precision(artifact) for opened in chosen},
        min_cosine=min_cosine,
        max_abs=max_abs,
        near_ties=artifact.jmp is not None,
    )
    usual = TOLERANCES[precision] if min_cosine is None else min_cosine
    tried = len(photos.names) + len(photos.unreadable)
    readable = len(photos.unreadable) <= UNREADABLE_LIMIT * tried
    result: dict[str, Any] = {
        "ok": readable and all(pair.ok for pair in pairs),
        "precision": precision,
        "tolerance": {
            "cosine": usual,
            "worst": TABLE[precision].least(near_ties=artifact.jmp is not None)
            if min_cosine is None
            else usual,
            "max_abs": max_abs,
            "source": TABLE[precision].source if min_cosine is None else "--min-cosine",
        },
        "images": len(photos.names),
        "unreadable": [{"image": path, "reason": why} for path, why in photos.unreadable],
        "random_weights": artifact.is_random,
        "backends": [opened.name for opened in chosen],
        "skipped": skipped,
        "notes": [opened.note for opened in chosen if opened.note],
        "pairs": [_as_dict(pair, photos.names) for pair in pairs],
        "runtime_ms": times,
    }
    result["reductions"], result["reductions_skipped"] = _reductions(
        artifact, chosen, photos, outputs
    )
    result["debug"], result["debug_skipped"] = None, "not asked for (--debug)"
    if debug:
        result["debug"], result["debug_skipped"] = _debug(
            artifact, chosen, pairs, photos.images, min_cosine
        )
    return result


def run_and_pair(
    runners: Sequence[Any],
    images: NDArray[np.float32],
    profile: tuple[int, ...],
    precisions: Mapping[str, str],
    *,
    min_cosine: float | None = None,
    max_abs: float | None = None,
    near_ties: bool = True,
) -> tuple[list[Pair], dict[str, float], dict[str, Outputs]]:
    """Runs every runner on every image and pairs each runner with the first.

    Args:
        runners, images: Polygraphy's runners, and [B, 3, H, W].
        profile: (min, opt, max) batch.
        precisions: by runner's name, what it computes with.
        min_cosine, max_abs, near_ties: as for `measures.measure`.

    Returns:
        The pairs; per runner the time of one image in ms (whole batches, first one included: an
        orientation, not a benchmark); and per runner its outputs by name, [B, ...].

    Raises:
        EngineError: whatever goes wrong in Polygraphy or in what it runs.
    """
    from polygraphy.comparator import Comparator

    least, _, most = profile
    size = max(least, min(most, BATCH))
    feed = [{INPUT: piece} for piece in split(images, size, least)]
    with engine_errors("the backends cannot be run"):
        by_name = dict(Comparator.run(list(runners), data_loader=feed).items())
    interrupt.check()
    outputs = {name: Outputs(join(parts, len(images))) for name, parts in by_name.items()}
    first = runners[0].name
    pairs = [
        measure(
            first,
            runner.name,
            output,
            ours,
            outputs[runner.name][output],
            coarser(precisions[first], precisions[runner.name]),
            min_cosine=min_cosine,
            max_abs=max_abs,
            near_ties=near_ties,
        )
        for runner in runners[1:]
        for output, ours in outputs[first].items()
    ]
    times = {
        name: 1000 * sum(iteration.runtime for iteration in iterations) / len(images)
        for name, iterations in by_name.items()
    }
    return pairs, times, outputs


def load_photos(paths: Sequence[Path], spec: Preprocess, limit: int) -> Photos:
    """Decodes at most `limit` files, spread evenly; those that cannot be read are listed.

    Raises:
        ImageError: none can be read.
    """
    tried = spread(paths, limit)
    batch = load_readable(tried, spec, on_image=interrupt.check)
    unreadable = tuple((str(tried[position]), why) for position, why in batch.unreadable)
    if not batch.kept:
        why = unreadable[0][1]
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise ImageError(f"no image can be read: {why}{more}", UNREADABLE_HINT)
    return Photos(batch.images, tuple(str(tried[k]) for k in batch.kept), unreadable)


def _input(
    artifact: Artifact, images: Sequence[Path], limit: int
) -> tuple[Photos, Reference | None]:
    """What the backends see, and the reference where that is its images."""
    if images:
        return load_photos(images, artifact.preprocess, limit), None
    reference = artifact.reference()
    return Photos(reference.images, tuple(map(str, reference.names))), reference


def _open(
    artifact: Artifact,
    wanted: Sequence[str] | None,
    weights: str | None,
    reference: Reference | None,
) -> tuple[list[Opened], dict[str, str]]:
    """The backends that can run, and why the others cannot."""
    chosen, skipped = [], {}
    for name in wanted or backends.NAMES:
        backend = backends.get(name)
        try:
            if backend.file:  # PyTorch's outputs travel with the artifact: they may stand in
                backends.pick([artifact], name)
            chosen.append(backend.open(artifact, weights=weights, reference=reference))
        except JmpDeployError as error:
            if wanted:
                raise
            skipped[name] = error.message.removeprefix(f"{name}: ")
    if len(chosen) < 2:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        raise ArtifactError(
            f"nothing to compare: {len(chosen)} backend can run here ({reasons})",
            "run `python -m jmp_deploy doctor` to see what is missing",
        )
    return chosen, skipped


def _reductions(
    artifact: Artifact,
    chosen: Sequence[Opened],
    photos: Photos,
    outputs: Mapping[str, Outputs],
) -> tuple[dict[str, Any] | None, str | None]:
    """(report, None), or (None, why there is none).

    The portable model runs a second time for it, with its choices as further outputs: what is
    compared above is the file as it is deployed.
    """
    if artifact.jmp is None:
        return None, "the model is dense"
    seen = [opened for opened in chosen if opened.watch and opened.backend.shows_choices]
    if len(seen) < 2:
        return None, (
            "kept tokens can be seen in PyTorch and ONNX Runtime, and not both take part (an "
            "engine's stay inside the plugin; stored outputs hold none)"
        )
    from . import reductions

    first, second = sorted(seen, key=lambda opened: backends.NAMES.index(opened.name))[:2]
    assert first.watch and second.watch
    precision = second.backend.precision(artifact)
    try:
        theirs = second.watch(photos.images)
        report = reductions.report(first.watch(photos.images), theirs, precision)
        report["alike"] = []
        if report["first"] is not None and first.replay is not None:
            replayed = first.replay(photos.images, theirs.choices or ())
            report["alike"] = [
                _as_dict(
                    measure(
                        *(first.name, second.name, name),
                        *(values, outputs[second.name][name]),
                        precision,
                        near_ties=False,
                    ),
                    photos.names,
                )
                for name, values in replayed.items()
            ]
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except JmpDeployError as error:
        return None, error.message
    return report, None


def _debug(
    artifact: Artifact,
    chosen: Sequence[Opened],
    pairs: Sequence[Pair],
    images: NDArray[np.float32],
    min_cosine: float | None,
) -> tuple[list[dict[str, Any]] | None, str | None]:
    """(conclusions, None), or (None, why there are none): the pairs outside, else the first."""
    from .debug import examine

    outside = [pair for pair in pairs if not pair.ok] or pairs[:1]
    wanted = dict.fromkeys((pair.a, pair.b) for pair in outside)
    by_name = {opened.name: opened for opened in chosen}
    try:
        found = [examine(artifact, by_name[a], by_name[b], images, min_cosine) for a, b in wanted]
    except ModuleNotFoundError as error:
        return None, f"blocks cannot be looked at without {error.name}"
    except JmpDeployError as error:
        return None, error.message
    return found, None


def _as_dict(pair: Pair, names: Sequence[str]) -> dict[str, Any]:
    worst = names[pair.worst] if pair.worst is not None else None
    return {**vars(pair), "problems": list(pair.problems), "worst_image": worst}
