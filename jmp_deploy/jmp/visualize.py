"""What became of every patch of a photo: the reductions of a model, traced back to the image.

Loads a model, traces it (trace.py), and writes pictures and a page (draw.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import Artifact
from ..core.errors import ArtifactError, ScheduleError
from ..core.files import atomic_path, write_bytes
from ..core.images import Preprocess, find_images, label, read_image, suffixes
from .models import OwnModel
from .trace import Features, Picture, stages, trace_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn


@dataclass(frozen=True)
class VisualizeOptions:
    """What `visualize` is asked for; the command line's flags of the same names.

    Attributes:
        source: model name, or artifact folder.
        images: files or folders.
        out: a folder for pictures and page, or one file: .png (one image, or `contact`) or .html.
        weights, own, schedule, tau, granularity, img_size, seed: as for `build`; with an artifact
            only `weights`, the rest is what it was built with. tau None: the schedule's.
        contact: one contact sheet in place of a picture for each image.
        features: draw the features of the patches too, without JMP and with it.
    """

    source: str
    images: tuple[Path, ...]
    out: Path = Path("pictures")
    weights: str | None = None
    own: OwnModel = field(default_factory=OwnModel)
    schedule: str | None = None
    tau: float | None = None
    granularity: str | None = None
    img_size: int | tuple[int, int] | None = None
    seed: int = 0
    contact: bool = False
    features: bool = False


def visualize(options: VisualizeOptions) -> dict[str, Any]:
    """Draws; returns what was drawn: {"files", "model", "schedule", "tau", "images": [...]}.

    Raises:
        ArtifactError: an artifact that is dense or broken, an output that cannot be written.
        ImageError, ModelError, ScheduleError, WeightsError: as the names say.
    """
    from . import draw

    paths = find_images(options.images)
    kind = options.out.suffix.lower()
    if kind in (".pdf", ".svg", *suffixes()) and kind != ".png":
        raise ArtifactError(f"cannot draw a {kind} file", "-o DIR, -o FILE.png or -o FILE.html")
    if kind == ".png" and len(paths) > 1 and not options.contact:
        raise ArtifactError(
            f"{len(paths)} images do not go into one picture",
            "add --batch for a contact sheet, or name a folder with -o",
        )
    model, spec, about = _load(options)
    pictures = [picture(model, path, spec, features=options.features) for path in paths]
    first = next(iter(model.blocks.reductions.values()))
    # A picture outlives what the terminal said.
    note = " WITH RANDOM WEIGHTS" if about["weights"]["kind"] == "random" else ""
    caption = draw.Caption(
        about["model"] + note, about["schedule"], about["tau"], first.importance, first.selection
    )
    files: list[Path] = []
    if kind != ".html":
        single = options.out if kind == ".png" else None
        if options.contact:
            sheet = single or options.out / "contact.png"
            _save(sheet, draw.contact_sheet(pictures, caption))
            files.append(sheet)
        else:
            for item, name in zip(pictures, _names(pictures), strict=True):
                target = single or options.out / f"{name}.png"
                _save(target, draw.sheet(item, caption))
                files.append(target)
    if kind != ".png":
        page = options.out if kind == ".html" else options.out / "index.html"
        write_bytes(page, draw.page(pictures, caption).encode())
        files.append(page)
    return {
        "files": [str(path) for path in files],
        **about,
        "images": [_numbers(item) for item in pictures],
    }


def picture(model: nn.Module, path: Path, spec: Preprocess, *, features: bool = False) -> Picture:
    """One image file through a patched model; of many channels the first three are shown, of fewer
    the first as grey. With `features` it was patched with `restore`."""
    from .families import family_of

    image = read_image(path, spec)
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    seen = np.clip((image * std + mean) * 255, 0, 255).round().astype(np.uint8)
    seen = seen[:3] if len(seen) > 2 else seen[[0, 0, 0]]
    (found,) = stages(trace_torch(model, image[None]).choices or ())
    rows, columns = family_of(model).patch_embed(model).grid_size
    shown = _features(model, image[None]) if features else None
    return Picture(label(path), seen.transpose(1, 2, 0), (rows, columns), found, shown)


def _features(model: nn.Module, image: NDArray[np.float32]) -> Features:
    """Of one image [1, C, H, W]."""
    import torch

    from .dense import DenseFeatures
    from .patch import without_jmp

    given = torch.from_numpy(image)
    with torch.inference_mode():
        restored = DenseFeatures(model)(given)[0].double().numpy()
        with without_jmp(model):
            dense = DenseFeatures(model)(given)[0].double().numpy()
    mean = dense.mean(axis=0)
    _, _, axes = np.linalg.svd(dense - mean, full_matrices=False)
    axes = axes[:3] * np.sign(axes[:3].sum(axis=1, keepdims=True))  # either sign would do
    low, high = np.percentile((dense - mean) @ axes.T, [2, 98], axis=0)

    def colours(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(((values - mean) @ axes.T - low) / np.maximum(high - low, 1e-12), 0, 1)

    lengths = np.linalg.norm(dense, axis=1) * np.linalg.norm(restored, axis=1)
    cosine = (dense * restored).sum(axis=1) / np.maximum(lengths, 1e-12)
    return Features(colours(dense), colours(restored), cosine)


def _load(options: VisualizeOptions) -> tuple[nn.Module, Preprocess, dict[str, Any]]:
    from ..core import artifact

    folder = Path(options.source)
    if folder.is_dir() or (folder / artifact.FILE).exists():
        return _load_artifact(options, folder)
    return _load_model(options)


def _load_artifact(
    options: VisualizeOptions, folder: Path
) -> tuple[nn.Module, Preprocess, dict[str, Any]]:
    from .models import restore_model

    found = Artifact.read(folder)
    if found.jmp is None:
        raise ArtifactError(
            f"{folder} was built without JMP: there is nothing to draw",
            "name an artifact with JMP, or a model",
        )
    if options.features and not found.model.restores:
        raise ArtifactError(
            f"{folder} was built for pooled outputs, and its model restores no patches",
            f"build it with --output dense, or name the model: visualize {found.model.name} ... "
            "--features",
        )
    given = ("schedule", "tau", "granularity", "img_size")
    if options.own != OwnModel() or any(getattr(options, name) is not None for name in given):
        raise ScheduleError(
            "an artifact has its own schedule, tau, granularity, image size and model",
            f"leave those out, or name the model: visualize {found.model.name} ...",
        )
    about = {
        "model": found.model.name,
        "schedule": found.jmp.schedule_name,
        "tau": found.jmp.tau,
        "weights": asdict(found.weights),
    }
    return restore_model(found, options.weights), found.preprocess, about


def _load_model(options: VisualizeOptions) -> tuple[nn.Module, Preprocess, dict[str, Any]]:
    from . import schedule
    from .models import load_model
    from .patch import model_shape, patch

    loaded = load_model(
        options.source,
        options.weights or "auto",
        img_size=options.img_size,
        seed=options.seed,
        own=options.own,
    )
    spec = options.schedule or schedule.DEFAULT
    shape = model_shape(loaded.model)
    resolved = schedule.parse(spec, shape.for_patches() if options.features else shape)
    if not resolved.steps:
        raise ScheduleError("the schedule keeps every token: there is nothing to draw")
    tau = resolved.tau if options.tau is None else options.tau
    patch(
        loaded.model,
        resolved,
        tau=tau,
        granularity=options.granularity or "token",
        restore=options.features,
    )
    about = {
        "model": loaded.name,
        "schedule": resolved.name,
        "tau": tau,
        "weights": asdict(loaded.origin),
    }
    return loaded.model, loaded.preprocess, about


def _numbers(item: Picture) -> dict[str, Any]:
    names = ("block", "tokens", "kept", "merged", "pruned")
    seen = item.features
    cosine = {"mean": float(seen.cosine.mean()), "min": float(seen.cosine.min())} if seen else None
    return {
        "image": item.name,
        "stages": [{name: getattr(stage, name) for name in names} for stage in item.stages],
        "features": cosine,
    }


def _names(pictures: Sequence[Picture]) -> list[str]:
    """File names without suffix, none twice."""
    taken: set[str] = set()
    names = []
    for item in pictures:
        stem = Path(item.name).stem
        name, number = stem, 2
        while name.lower() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def _save(target: Path, image: Any) -> None:
    with atomic_path(target) as temporary:
        image.save(temporary, format="PNG", optimize=True)
