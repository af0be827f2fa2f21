"""Accuracy of an artifact on labelled images, and what JMP costs of it against the dense model.

Images are cut into batches in a fixed order; a shard takes every n-th batch. So a resumed run, and
the shards of a run put together, compute the same batches as an uninterrupted run and give the
same figures, whatever the number of worker processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..backends import AUTO, pick
from ..backends.base import Backend
from ..core import interrupt
from ..core.errors import ArtifactError, CheckError, ImageError, NonFiniteError
from ..core.images import UNREADABLE_LIMIT
from . import probe as validate_probe
from .artifacts import DENSE, MODEL, Subject, device_name, load_subjects, notes_on
from .data import ClassOrder, Dataset, for_classifier, for_features
from .loader import batches, default_workers
from .score import TOP, answers, score, top_classes
from .state import Answers, State, unreadable_record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

OnProgress = Callable[[str, int, int], None]
"""(split, images done, images in all)."""

NAMED = 3
"""Images that an error names."""


@dataclass(frozen=True)
class ValidateOptions:
    """What `validate` is asked for; the command line's flags of the same names.

    Attributes:
        folder: the artifact.
        data: folder of images.
        labels: CSV of labels, or None where class folders say it.
        against: dense artifact, or None.
        backend: AUTO or one of `backends.DEPLOYED`, for both artifacts.
        batch: images per inference, or None for what the engine is tuned for.
        workers: processes that decode, 0 for none, or None for one per CPU.
        limit, train_limit: images of the val and train split to use, or None for all.
        shard: (i, n): the i-th of n parts, from 1.
        state: file to resume from; None keeps no state.
        resume: go on where the state ends.
        probe: "auto", "logistic" or "ridge", for a model without a classifier head.
        allow_random: validate random weights too.
    """

    folder: Path
    data: Path
    labels: Path | None = None
    against: Path | None = None
    backend: str = AUTO
    batch: int | None = None
    workers: int | None = None
    limit: int | None = None
    train_limit: int | None = None
    shard: tuple[int, int] | None = None
    state: Path | None = None
    resume: bool = False
    probe: str = "auto"
    allow_random: bool = False


def validate(
    options: ValidateOptions, *, on_progress: OnProgress = lambda split, done, total: None
) -> dict[str, Any]:
    """Validates an artifact.

    Returns:
        What `score.score` returns, and {"ok" (false if more than 1 % of the images are
        unreadable), "images" (in the data set), "unreadable", "backend", "throughput", "probe",
        "notes", ...}; with `shard`, {"shard": {"index", "of", "identity", "rows", "unreadable"}}
        for `state.merge`.

    Raises:
        NonFiniteError: an output is NaN or infinite (exit code 1).
        CheckError: no image can be read (exit code 1).
        ImageError: no such data, or labels that do not fit the model.
        ArtifactError: random weights, artifacts that cannot be compared, a state of another run.
        EngineError: nothing can run the artifact here.
        KeyboardInterrupt: what was measured is in the state file.
    """
    subjects = load_subjects(options.folder, options.against, options.allow_random)
    data = _datasets(options, subjects)
    backend, reason = pick([subject.artifact for subject in subjects], options.backend)
    size = options.batch or subjects[0].artifact.batch[1]
    kind = validate_probe.pick_kind(options.probe) if data.train else None
    identity = {
        "version": __version__,
        "artifact": subjects[0].file_sha256(backend),
        "against": subjects[1].file_sha256(backend) if options.against else None,
        "backend": backend.name,
        "data": [split.digest() for split in (data.train, data.val) if split],
        "batch": size,
        "probe": kind,
    }
    groups = _shard(_groups(len(data.val.samples), size), options.shard)
    shard = list(options.shard) if options.shard else None
    state = State(options.state, {**identity, "shard": shard}, resume=options.resume)
    workers = default_workers() if options.workers is None else options.workers
    run = _Run(state, workers, on_progress)
    with ExitStack() as stack:
        for subject in subjects:
            subject.runner = stack.enter_context(backend.open(subject.artifact).runner)
        try:
            if data.train:  # without --against, the artifact itself is dense: see `_datasets`
                run.split(
                    "train", data.train, _groups(len(data.train.samples), size), [subjects[-1]]
                )
            run.split("val", data.val, groups, subjects)
        except BaseException:
            state.save()
            raise
    result = _result(options, backend, subjects, data, run, groups, kind)
    result["backend_reason"] = reason
    if shard:
        result["shard"].update(index=shard[0], of=shard[1], identity=identity)
    state.remove()
    return result


@dataclass(frozen=True)
class _Data:
    """The images to judge by, and the train split where a probe is to be fitted."""

    val: Dataset
    train: Dataset | None


def _datasets(options: ValidateOptions, subjects: Sequence[Subject]) -> _Data:
    model = subjects[0].artifact
    if subjects[0].output.classifies:
        order = ClassOrder.of(model, int(model.reference().output.shape[1]))
        val = for_classifier(options.data, options.labels, order)
        return _Data(val.first(options.limit), None)
    if len(subjects) < 2 and model.jmp:
        raise ArtifactError(
            f"{model.folder} has no classifier head: it is judged by a probe on the features of "
            "the dense model, and no dense artifact was named",
            "name one with --against DIR (made with `build MODEL --dense`)",
        )
    train, val = for_features(options.data, options.labels)
    train = train.first(options.train_limit)
    if len({sample.label for sample in train.samples}) < 2:
        raise ImageError(
            f"--train-limit {options.train_limit} leaves one class for the probe to learn"
        )
    return _Data(val.first(options.limit), train)


def _groups(count: int, size: int) -> list[Array]:
    """Positions in each batch of `size` images."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def _shard(groups: list[Array], shard: tuple[int, int] | None) -> list[Array]:
    """Every n-th batch, from the i-th."""
    if shard is None:
        return groups
    index, count = shard
    if count > len(groups):
        raise ImageError(
            f"{count} shards of {len(groups)} batches: some would be empty",
            f"use at most {len(groups)} shards, or a smaller --batch",
        )
    return groups[index - 1 :: count]


@dataclass
class _Clock:
    """Seconds and images by what they were spent on; the first batch, which warms up, is left out.

    Where one batch was all, it counts.
    """

    spent: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def add(self, name: str, seconds: float, images: int) -> None:
        """Counts a batch."""
        self.spent.setdefault(name, []).append((seconds, images))

    def total(self, name: str) -> tuple[float, int]:
        """(seconds, images)."""
        entries = self.spent.get(name, [])
        entries = entries[1:] or entries
        return sum(seconds for seconds, _ in entries), sum(images for _, images in entries)

    def rates(self, workers: int) -> dict[str, Any]:
        """Images per second of each model alone and of the whole, in this process, and the share
        of time in which the models waited for images; null where nothing was measured."""
        found: dict[str, Any] = {"unit": "images/s", "workers": workers}
        for name in (MODEL, DENSE, "end_to_end"):
            seconds, images = self.total(name)
            found[name] = images / seconds if seconds > 0 else None
        seconds, found["images"] = self.total("end_to_end")
        waited, _ = self.total("waiting")
        found["waiting_share"] = waited / seconds if seconds > 0 else None
        return found


class _Run:
    """Images through models, batch by batch, into the state."""

    def __init__(self, state: State, workers: int, on_progress: OnProgress) -> None:
        self.state = state
        self.workers = workers
        self.on_progress = on_progress
        self.clock = _Clock()

    def split(
        self, name: str, data: Dataset, groups: Sequence[Array], subjects: Sequence[Subject]
    ) -> None:
        """Answers what is not answered yet; keeps best classes, or features, of each image."""
        kept = self.state.split(name)
        self._refuse_unlike(kept, groups, subjects)
        total = sum(map(len, groups))
        done = sum(map(len, groups[: len(kept.done)]))
        self.on_progress(name, done, total)
        todo = groups[len(kept.done) :]
        paths = [[data.root / data.samples[i].path for i in group] for group in todo]
        with closing(batches(paths, subjects[0].artifact.preprocess, self.workers)) as loaded:
            for group in todo:
                interrupt.check()
                started = time.perf_counter()
                batch = next(loaded)
                waited = time.perf_counter() - started
                positions = group[list(batch.kept)]
                outputs = {}
                if len(positions):
                    names = [data.samples[i].path for i in positions]
                    outputs = {s.name: self._answer(s, batch.images, names) for s in subjects}
                skipped = tuple((int(group[place]), why) for place, why in batch.unreadable)
                # one step, so that Ctrl-C leaves no half of a batch
                kept.done.append((positions, outputs, skipped))
                if name == "val":
                    self.clock.add("waiting", waited, len(group))
                    self.clock.add("end_to_end", time.perf_counter() - started, len(group))
                self.state.save_if_due()
                done += len(group)
                self.on_progress(name, done, total)

    def _refuse_unlike(
        self, kept: Answers, groups: Sequence[Array], subjects: Sequence[Subject]
    ) -> None:
        """Raises ArtifactError where a state holds answers to something else than these batches."""
        names, widths = {subject.name for subject in subjects}, set()
        fits = len(kept.done) <= len(groups)
        for group, (positions, outputs, unreadable) in zip(groups, kept.done, strict=False):
            here = sorted([*positions.tolist(), *(position for position, _ in unreadable)])
            fits &= here == group.tolist() and ({*outputs} == names or not len(positions))
            widths |= {values.shape[1:] for values in outputs.values()}
        for subject in subjects if kept.done else ():
            width = subject.artifact.reference().output.shape[1]
            expected = min(TOP, width) if subject.output.classifies else width
            fits &= widths <= {(expected,)}
        if not fits:
            raise ArtifactError(
                f"{self.state.path} is damaged: its answers are not to the images of this run",
                "remove it, or leave out --resume to start anew",
            )

    def _answer(self, subject: Subject, images: Array, names: Sequence[str]) -> Array:
        started = time.perf_counter()
        values = subject.answer(images)
        self.clock.add(subject.name, time.perf_counter() - started, len(images))
        bad = [path for path, row in zip(names, values, strict=True) if not np.isfinite(row).all()]
        if bad:
            folder = subject.artifact.folder
            more = f" and {len(bad) - NAMED} more of this batch" if len(bad) > NAMED else ""
            raise NonFiniteError(
                f"the {subject.output.name} of {folder} ({subject.runner.name}) are not finite "
                f"for {', '.join(bad[:NAMED])}{more}",
                f"run `python -m jmp_deploy compare {folder}` to see which backend fails",
            )
        return top_classes(values) if subject.output.classifies else values.astype(np.float32)


def _result(
    options: ValidateOptions,
    backend: Backend,
    subjects: Sequence[Subject],
    data: _Data,
    run: _Run,
    groups: Sequence[Array],
    kind: str | None,
) -> dict[str, Any]:
    val = run.state.split("val")
    outputs, positions = val.outputs(), val.index()
    skipped = [(i, data.val.samples[i].path, why) for i, why in val.unreadable()]
    if not outputs:
        raise CheckError(f"none of the {len(skipped)} images can be read: {skipped[0][2]}")
    labels = data.val.labels()[positions]
    probe = None
    neighbours: dict[str, Array] = {}
    train_ok = True
    if data.train and kind:
        fitted, probe = _fit(run, data.train, kind)
        train_ok = probe["unreadable"]["share"] <= UNREADABLE_LIMIT
        wide = {name: features.astype(np.float64) for name, features in outputs.items()}
        neighbours = {name: fitted.neighbours(features) for name, features in wide.items()}
        outputs = {name: top_classes(fitted.scores(features)) for name, features in wide.items()}
    rows = answers(positions, labels, outputs[MODEL], outputs.get(DENSE))
    for name, found in neighbours.items():
        rows["knn" if name == MODEL else "dense_knn"] = found.astype(np.int64)
    files = [{"image": path, "reason": why} for _, path, why in skipped]
    record = unreadable_record(files, sum(map(len, groups)))
    model = subjects[0]
    part = {
        "rows": {name: column.tolist() for name, column in rows.items()},
        "unreadable": [list(entry) for entry in skipped],
    }
    return {
        # of a shard's few images one may be more than 1 %: `merge` judges the whole
        "ok": (record["share"] <= UNREADABLE_LIMIT or options.shard is not None) and train_ok,
        "train_ok": train_ok,
        **score(rows),
        "artifact": str(options.folder),
        "against": str(options.against) if options.against else None,
        "model": model.artifact.model.name,
        "precision": backend.precision(model.artifact),
        "data": str(options.data),
        "images": len(data.val.samples),
        "labels": data.val.rule,
        "batch": max(map(len, groups)),
        "backend": backend.name,
        "device": device_name(backend),
        "probe": probe,
        "unreadable": record,
        "notes": notes_on(subjects, backend),
        "throughput": run.clock.rates(run.workers),
        "resumed_batches": run.state.resumed,
        "shard": part if options.shard else None,
    }


def _fit(run: _Run, train: Dataset, kind: str) -> tuple[validate_probe.Probe, dict[str, Any]]:
    """Fits the probe to the dense features of the train split; returns it and what to say of it."""
    kept = run.state.split("train")
    labels = train.labels()[kept.index()]
    if len(np.unique(labels)) < 2:
        raise CheckError(
            "the images of the train split that can be read are of fewer than 2 classes"
        )
    (features,) = kept.outputs().values()
    files = [{"image": train.samples[i].path, "reason": why} for i, why in kept.unreadable()]
    probe = validate_probe.fit(kind, features.astype(np.float64), labels)
    return probe, {
        "kind": kind,
        "train_images": len(labels),
        "classes": len(train.names),
        "neighbours": validate_probe.NEIGHBOURS,
        "unreadable": unreadable_record(files, len(train.samples)),
    }
