"""The artifacts that `validate` asks: which backend runs them, and whether they can be compared."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import ENGINE, PORTABLE, Artifact
from ..core.device import gpus
from ..core.errors import ArtifactError, EngineError
from ..core.outputs import Output, output_named
from ..engine.backends import infer, pick_backend

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL, DENSE = "model", "dense"


@dataclass
class Subject:
    """An artifact that answers.

    Attributes:
        name: MODEL for the one that is validated, DENSE for what it is compared with.
        artifact: which one.
        backend: "engine" or "onnxruntime", once chosen.
        runner: an active Polygraphy runner, once opened.
    """

    name: str
    artifact: Artifact
    backend: str = ""
    runner: Any = field(default=None, repr=False)

    @property
    def output(self) -> Output:
        """What it gives."""
        return output_named(self.artifact.model.output)

    def file_sha256(self) -> str:
        """Hash of the file that runs, by the manifest; whether it is true is seen on opening."""
        return self.artifact.files[ENGINE if self.backend == "engine" else PORTABLE].sha256

    def answer(self, images: NDArray[Any]) -> NDArray[Any]:
        """[b, 3, H, W] float32 -> [b, classes or channels]."""
        return np.asarray(infer(self.runner, images, self.artifact.batch)[self.output.name])


def load_subjects(folder: Path, against: Path | None, allow_random: bool) -> list[Subject]:
    """The artifact, and the dense one if named.

    Raises:
        ArtifactError: broken artifacts, random weights, or two that answer different questions.
    """
    named = [(MODEL, folder)] + ([(DENSE, against)] if against else [])
    subjects = [Subject(name, Artifact.read(path)) for name, path in named]
    for subject in subjects:
        if subject.artifact.is_random and not allow_random:
            raise ArtifactError(
                f"{subject.artifact.folder} has random weights: its accuracy means nothing",
                "build it with real weights (--weights FILE), or pass --allow-random",
            )
    if against:
        _refuse_unlike(*(subject.artifact for subject in subjects))
    return subjects


def notes_on(subjects: Sequence[Subject]) -> list[str]:
    """What a reader of the figures has to know."""
    notes = [
        f"{subject.artifact.folder} has RANDOM WEIGHTS: its accuracy means nothing"
        for subject in subjects
        if subject.artifact.is_random
    ]
    if len(subjects) < 2:
        return notes
    model, dense = (subject.artifact for subject in subjects)
    if dense.jmp:
        notes.append(f"{dense.folder} is not dense: it has JMP in it too")
    if model.weights.identity != dense.weights.identity:
        notes.append("the two artifacts were built from different weights")
    ours, theirs = (subject.artifact.precision_of(subject.backend) for subject in subjects)
    if ours != theirs:
        notes.append(f"{ours.upper()} is compared with {theirs.upper()}")
    return notes


def pick_backends(subjects: Sequence[Subject], wanted: str) -> str:
    """Chooses one backend for all, so that a difference is the model's; returns why this one.

    Raises:
        EngineError: none can run all of them here.
    """
    model = subjects[0]
    chosen, reason = pick_backend(model.artifact, wanted)
    for subject in subjects[1:]:
        try:
            pick_backend(subject.artifact, chosen)
        except EngineError as error:
            folder = subject.artifact.folder
            if wanted != "auto" or chosen == "onnxruntime":
                raise EngineError(f"{folder}: {error.message}", error.hint) from error
            chosen, reason = "onnxruntime", f"{folder} has no engine that runs here"
            pick_backend(model.artifact, chosen)
            pick_backend(subject.artifact, chosen)
    for subject in subjects:
        subject.backend = chosen
    return reason


def device_name(backend: str) -> str:
    """What a backend runs on here, in words."""
    if backend == "engine" and gpus():
        return gpus()[0].name
    return f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} threads)"


def _refuse_unlike(model: Artifact, dense: Artifact) -> None:
    pairs = [
        ("model", model.model.name, dense.model.name),
        ("output", model.model.output, dense.model.output),
        ("preprocessing", model.preprocess, dense.preprocess),
    ]
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise ArtifactError(
                f"{dense.folder} is no baseline of {model.folder}: its {what} is {theirs}, "
                f"expected {ours}",
                f"build one with `python -m jmp_deploy build {model.model.name} "
                "--dense`, with the same weights and image size",
            )
