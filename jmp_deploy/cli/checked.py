"""Before a command uses an engine on a GPU for the first time, the engine is checked there.

`run`, `bench`, `validate` and `compare` ask here first. The result stands in the manifest from then
on. An engine that is outside of tolerance is refused by `run`, whose answers somebody would take
for the model's; `bench` and `validate`, which judge, go on, say so, and end with 1.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import backends
from ..backends import AUTO
from ..backends.engine import EngineBackend
from ..core.errors import ArtifactError, CheckError, EngineError, GpuMemoryError, JmpDeployError
from . import show

if TYPE_CHECKING:
    from ..core.artifact import Artifact
    from ..core.manifest import EngineCheck


@dataclass(frozen=True)
class Verdict:
    """Of the engines that a command is about to use.

    Attributes:
        notes: which are not checked, or not on record, a line for each.
        problems: which are outside of tolerance, with what is.
        hint: what to do about the problems.
    """

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hint: str | None = None


def check_first(
    folders: Sequence[Path], wanted: Sequence[str] = (AUTO,), *, again: bool = False
) -> Verdict:
    """Checks the engines of artifacts that are about to run here and were not checked on this GPU.

    What keeps an engine from running at all is for the command to say.

    Args:
        wanted: the command's backends.
        again: whatever is on record.
    """
    from ..core.artifact import Artifact

    artifacts = [Artifact.read(folder) for folder in folders]
    verdict = Verdict(hint=_hint(folders[0]))
    runs = _engine_runs(artifacts, wanted)
    for artifact in artifacts:
        if artifact.engine is None:
            continue
        if runs:
            check = _check(artifact, verdict, again)
            if check and not check.ok:
                verdict.problems.append(_problem(f"the engine of {artifact.folder}", check))
        elif not artifact.engine.checks:
            verdict.notes.append(_unchecked(artifact))
    return verdict


def refuse(verdict: Verdict) -> None:
    """Raises CheckError where an engine is outside of tolerance."""
    if verdict.problems:
        raise CheckError("; ".join(verdict.problems), verdict.hint)


def verdict_on(made: Artifact) -> Verdict:
    """Of the engines that were just built."""
    return Verdict(problems=[*_outside(made)], hint=_hint(made.folder))


def _engine_runs(artifacts: Sequence[Artifact], wanted: Sequence[str]) -> bool:
    for name in wanted:
        try:
            if backends.pick(artifacts, name)[0].name == EngineBackend.name:
                return True
        except EngineError:  # the command meets it too
            continue
    return False


def _check(artifact: Artifact, verdict: Verdict, again: bool) -> EngineCheck | None:
    """The check on this GPU: the one on record, or a new one, which goes there."""
    from ..compare.check import check_engine
    from ..core.device import gpus
    from ..engine.fit import locate

    assert artifact.engine is not None
    known = artifact.engine.check_on(gpus()[0].name)
    if known and not again:
        return known
    try:
        reference = artifact.reference()
    except ArtifactError as error:
        verdict.notes.append(f"{_unchecked(artifact)}: {error.message}")
        return None
    try:
        with show.Progress("engine check", transient=True):
            check = check_engine(locate(artifact.folder), artifact, reference)
    except GpuMemoryError as error:  # a smaller batch may fit all the same
        verdict.notes.append(f"{_unchecked(artifact)}: {error.message}")
        return None
    except JmpDeployError:  # it does not open: the command meets it too
        return None
    try:
        artifact.record(check)
    except ArtifactError as error:
        verdict.notes.append(
            f"the check of the engine of {artifact.folder} on {check.gpu} cannot be kept, and will "
            f"be made again: {error.message}"
        )
    return check


def _outside(made: Artifact) -> Iterator[str]:
    from ..core.artifact import QUANTIZED_ENGINES, TWIN_ENGINE

    if made.engine:
        for check in made.engine.checks:
            if not check.ok:
                yield _problem(f"the engine of {made.folder}", check)
    if (found := made.quantization) and found.speed:
        other = QUANTIZED_ENGINES[made.precision]
        name = other if found.speed.engine == "fp16" else TWIN_ENGINE
        for check in found.other_checks:
            if not check.ok:
                yield _problem(str(made.folder / name), check)


def _problem(what: str, check: EngineCheck) -> str:
    return f"{what} does not agree with PyTorch on {check.gpu}: {'; '.join(check.problems)}"


def _unchecked(artifact: Artifact) -> str:
    return f"the engine of {artifact.folder} was not checked on a GPU yet, its ONNX alone was"


def _hint(folder: Path) -> str:
    command = f"python -m jmp_deploy compare {shlex.quote(str(folder))} --debug"
    return f"the artifact is kept: `{command}` names the block"
