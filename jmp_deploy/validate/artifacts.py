"""The artifacts that `validate` asks: which backend runs them, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import Backend, infer
from ..core.artifact import Artifact
from ..core.device import cpu_count
from ..core.errors import ArtifactError
from ..core.outputs import Dense as Patches
from ..core.outputs import Output, output_named

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL, DENSE = "model", "dense"


@dataclass
class Subject:
    """An artifact that answers.

    Attributes:
        name: MODEL for the one that is validated, DENSE for what it is compared with.
        artifact: which one.
        runner: an active Polygraphy runner, once opened.
    """

    name: str
    artifact: Artifact
    runner: Any = field(default=None, repr=False)

    @property
    def output(self) -> Output:
        """What it gives."""
        return output_named(self.artifact.model.output)

    def file_sha256(self, backend: Backend) -> str:
        """Hash of the file that runs, by the manifest; whether it is true is seen on opening."""
        assert backend.file is not None
        return self.artifact.entry(backend.file).sha256

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
        if isinstance(subject.output, Patches):
            raise ArtifactError(
                f"{subject.artifact.folder} gives features of patches alone, and labels are for "
                "one answer per image",
                "build it with --output pooled beside them (--output pooled,dense): `validate` "
                "judges what the model gives then; `compare` judges all",
            )
    for subject in subjects:
        if subject.artifact.is_random and not allow_random:
            raise ArtifactError(
                f"{subject.artifact.folder} has random weights: its accuracy means nothing",
                "build it with real weights (--weights FILE), or pass --allow-random",
            )
    if against:
        _refuse_unlike(*(subject.artifact for subject in subjects))
    return subjects


def notes_on(subjects: Sequence[Subject], backend: Backend) -> list[str]:
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
    ours, theirs = (backend.precision(subject.artifact) for subject in subjects)
    if ours != theirs:
        notes.append(f"{ours.upper()} is compared with {theirs.upper()}")
    return notes


def device_name(backend: Backend) -> str:
    """What a backend runs on here, in words."""
    return backend.gpu() or f"{backend.device()}, {cpu_count()} threads"


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
