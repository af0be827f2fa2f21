"""Images in, classes or features out, on whatever this machine can run an artifact with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import Artifact
from ..core.errors import ArtifactError, ImageError, NonFiniteError
from ..core.files import atomic_path
from ..core.images import UNREADABLE_LIMIT, Preprocess, find_images, load_readable
from ..core.outputs import TOPK, Output, output_named
from ..engine.runtime import Engine, require_finite
from . import AUTO, pick
from .base import Infer
from .engine import EngineBackend

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 256
"""Images decoded at a time: a folder of any size fits into memory."""


@dataclass(frozen=True)
class Predictions:
    """What came out.

    Attributes:
        records: {"image", "top": [{"index", "label", "score"}]}, score a softmax probability, or
            {"image", "features": [...]}; of further outputs such records under their names.
        outputs: what they show.
        backend: what ran.
        reason: why that.
        skipped: {"image", "error"} of files that could not be read.
    """

    records: list[dict[str, Any]]
    outputs: tuple[Output, ...]
    backend: str
    reason: str
    skipped: list[dict[str, str]]

    @property
    def ok(self) -> bool:
        """Whether few enough images were unreadable."""
        return len(self.skipped) <= UNREADABLE_LIMIT * (len(self.records) + len(self.skipped))


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        backend: AUTO or one of `DEPLOYED`.
        batch: images per inference at most, below the engine's own limit.
        cuda_graph: replay CUDA graphs.
        use_manifest: False runs an engine of which nothing is known.
        allow_random: run random weights too.
    """

    backend: str = AUTO
    batch: int | None = None
    cuda_graph: bool = True
    use_manifest: bool = True
    allow_random: bool = False


def predict(
    path: Path,
    images: Sequence[Path],
    options: Options | None = None,
    *,
    topk: int = TOPK,
    save: Path | None = None,
) -> Predictions:
    """Runs an artifact, or an engine without a manifest, on images.

    Args:
        path: the artifact's folder; without a manifest also a plan.
        images: files or folders.
        topk: classes per image.
        save: a .npz file to write: `images`, their names, and what came out of the model under its
            name, a row per image.

    Raises:
        ArtifactError: random weights, or a broken artifact.
        ImageError: no images, or none that can be read.
        NonFiniteError: NaN or infinity in an output.
        EngineError: nothing can run it here.
    """
    options = options or Options()
    found = Artifact.read(path) if options.use_manifest else None
    if found and found.is_random and not options.allow_random:
        raise ArtifactError(
            f"{path} has random weights: its answers mean nothing",
            "build it with real weights (--weights FILE), or pass --allow-random",
        )
    paths = find_images(images)
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    rows: dict[str, list[NDArray[Any]]] = {}
    with _open(path, found, options) as (infer, spec, outputs, backend, reason):
        names = found.class_names if found else None
        scored = {"multi_label": found.multi_label} if found else {}
        for start in range(0, len(paths), CHUNK):
            piece, batch = _decode(paths[start : start + CHUNK], spec, skipped)
            values = _run_finite(infer, outputs, batch, piece)
            for index, image in enumerate(piece):
                answers = [
                    output.answer(values[output.name][index], names, topk, **scored)
                    for output in outputs
                ]
                further = zip((output.name for output in outputs[1:]), answers[1:], strict=True)
                records.append({"image": str(image), **answers[0], **dict(further)})
            if save is not None and len(piece):
                for output in outputs:
                    rows.setdefault(output.name, []).append(np.array(values[output.name]))
    if not records:
        raise ImageError(skipped[0]["error"], f"{len(skipped)} images, none of them readable")
    if save is not None:
        with atomic_path(save) as temporary, temporary.open("wb") as file:
            came: Any = {name: np.concatenate(pieces) for name, pieces in rows.items()}
            np.savez_compressed(file, images=[record["image"] for record in records], **came)
    return Predictions(records, outputs, backend, reason, skipped)


@contextmanager
def _open(
    path: Path, found: Artifact | None, options: Options
) -> Iterator[tuple[Infer, Preprocess, tuple[Output, ...], str, str]]:
    """(images to outputs, preprocessing, what they are, backend, reason)."""
    if found is None:
        with Engine(
            path, use_manifest=False, cuda_graph=options.cuda_graph, max_batch=options.batch
        ) as engine:
            outputs = tuple(output_named(tensor.name) for tensor in engine.outputs)
            reason = "without a manifest"
            yield engine.infer, _assumed(engine), outputs, EngineBackend.name, reason
        return
    backend, reason = pick([found], options.backend)
    outputs = tuple(map(output_named, found.model.outputs))
    with backend.running(found, max_batch=options.batch, cuda_graph=options.cuda_graph) as infer:
        yield infer, found.preprocess, outputs, backend.name, reason


def _assumed(engine: Engine) -> Preprocess:
    """Preprocessing where no manifest says it: what timm does for most ViTs."""
    _, height, width = engine.inputs[0].shape
    warnings.warn(
        "no manifest says how images are prepared: bicubic, crop 0.9 and ImageNet's mean and "
        "standard deviation are assumed",
        RuntimeWarning,
        stacklevel=2,
    )
    return Preprocess(
        height=height,
        width=width,
        resize=int(height / 0.9),
        interpolation="bicubic",
        crop_mode="center",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def _decode(
    paths: Sequence[Path], spec: Preprocess, skipped: list[dict[str, str]]
) -> tuple[list[Path], NDArray[np.float32]]:
    """The images that can be read, as [B, 3, H, W]; the others go to `skipped`."""
    batch = load_readable(paths, spec)
    skipped += [{"image": str(paths[k]), "error": why} for k, why in batch.unreadable]
    return [paths[k] for k in batch.kept], batch.images


def _run_finite(
    infer: Infer, outputs: Sequence[Output], batch: NDArray[np.float32], paths: Sequence[Path]
) -> dict[str, NDArray[Any]]:
    if not len(batch):
        return {}
    try:
        found = infer(batch)
        values = {output.name: found[output.name] for output in outputs}
        require_finite(values)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"the output for {paths[error.row]} is not finite: {error.message}", error.hint
        ) from error
    return values
