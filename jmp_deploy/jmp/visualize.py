"""What became of every patch of a photo: the reductions of a model, traced back to the image.

`trace` runs a patched model and follows its tokens; `visualize` loads, traces, and writes pictures
(`visualize_draw`) and a page (`visualize_page`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import Artifact
from ..core.errors import ArtifactError, ScheduleError
from ..core.files import atomic_path, write_bytes
from ..core.images import SUFFIXES, Preprocess, find_images, open_image, preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

GONE, KEPT, MERGED, PRUNED = range(4)
"""Fate of a patch in a stage; GONE: pruned in an earlier one."""


@dataclass(frozen=True)
class Stage:
    """One reduction of one image. Patches are counted row by row; there are M of them.

    Attributes:
        block: 0-based.
        tokens: patch tokens that come in.
        kept, merged, pruned: tokens by what becomes of them; they add up to `tokens`.
        fate: [M] uint8, GONE, KEPT, MERGED or PRUNED, by the token that the patch is in.
        importance: [M] float64, of that token; NaN where GONE.
        seat: [M] int64, the patch at which the token sits that the patch is in afterwards; -1 if
            GONE or PRUNED. A token sits where its critical token began.
        moves: (from, to) patches: seats of the merged tokens and of their targets.
    """

    block: int
    tokens: int
    kept: int
    merged: int
    pruned: int
    fate: NDArray[np.uint8]
    importance: NDArray[np.float64]
    seat: NDArray[np.int64]
    moves: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Picture:
    """One image and its stages.

    Attributes:
        name: of the file.
        pixels: [H, W, 3] uint8, as the model sees it.
        grid: rows and columns of patches.
        stages: in the order of the blocks.
    """

    name: str
    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class VisualizeOptions:
    """What `visualize` is asked for; the command line's flags of the same names.

    Attributes:
        source: model name, or artifact folder.
        images: files or folders.
        out: a folder for pictures and page, or one file: .png (one image, or `contact`) or .html.
        weights, schedule, tau, granularity, img_size, seed: as for `build`; with an artifact only
            `weights`, the rest is what it was built with. tau None: the schedule's.
        contact: one contact sheet in place of a picture for each image.
    """

    source: str
    images: tuple[Path, ...]
    out: Path = Path("pictures")
    weights: str | None = None
    schedule: str | None = None
    tau: float | None = None
    granularity: str | None = None
    img_size: int | None = None
    seed: int = 0
    contact: bool = False


def visualize(options: VisualizeOptions) -> dict[str, Any]:
    """Draws; returns what was drawn: {"files", "model", "schedule", "tau", "images": [...]}.

    Raises:
        ArtifactError: an artifact that is dense or broken, an output that cannot be written.
        ImageError, ModelError, ScheduleError, WeightsError: as the names say.
    """
    from . import draw, visualize_page

    paths = find_images(options.images)
    kind = options.out.suffix.lower()
    if kind in (".pdf", ".svg", *SUFFIXES) and kind != ".png":
        raise ArtifactError(f"cannot draw a {kind} file", "-o DIR, -o FILE.png or -o FILE.html")
    if kind == ".png" and len(paths) > 1 and not options.contact:
        raise ArtifactError(
            f"{len(paths)} images do not go into one picture",
            "add --batch for a contact sheet, or name a folder with -o",
        )
    model, spec, about = _load(options)
    pictures = [picture(model, path, spec) for path in paths]
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
        write_bytes(page, visualize_page.page(pictures, caption).encode())
        files.append(page)
    return {
        "files": [str(path) for path in files],
        **about,
        "images": [_numbers(item) for item in pictures],
    }


def picture(model: nn.Module, path: Path, spec: Preprocess) -> Picture:
    """One image file through a patched model."""
    from .families import family_of

    image = preprocess(open_image(path), spec)
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    seen = np.clip((image * std + mean) * 255, 0, 255).round().astype(np.uint8)
    stages = trace(model, image[None])[0]
    rows, columns = family_of(model).patch_embed(model).grid_size
    return Picture(path.name, seen.transpose(1, 2, 0), (rows, columns), stages)


def trace(model: nn.Module, images: NDArray[np.float32]) -> list[tuple[Stage, ...]]:
    """The stages of each image.

    Args:
        model: patched.
        images: [B, 3, H, W].
    """
    import torch

    from .patch import model_shape
    from .reduction import Plan, apply_plan, make_plan

    plans: list[Plan] = []

    def reduce(x: Any, qkv: Any, size: Any, attributes: Any) -> Any:
        plan = make_plan(qkv, size, attributes)
        plans.append(plan)
        return apply_plan(x, size, plan, attributes.num_prefix)

    blocks = model.blocks
    before = blocks.reduce
    blocks.reduce = reduce
    try:
        with torch.inference_mode():
            model(torch.from_numpy(images))
    finally:
        blocks.reduce = before
    numbers = sorted(blocks.reductions)
    patches = model_shape(model).num_patches
    return [_follow(plans, numbers, sample, patches) for sample in range(len(images))]


def _follow(plans: Sequence[Any], blocks: Sequence[int], sample: int, patches: int) -> Any:
    """Stages of one sample: `token` says which token of the sequence each patch is in, or -1."""
    token = np.arange(patches)
    seats = np.arange(patches)  # of each token
    stages = []
    for block, plan in zip(blocks, plans, strict=True):
        kept, rest, target, merged, importance = (
            getattr(plan, name)[sample].cpu().numpy()
            for name in ("kept", "rest", "target", "merged", "importance")
        )
        count = len(seats)
        fate_of = np.full(count, KEPT, np.uint8)
        fate_of[rest] = np.where(merged, MERGED, PRUNED)
        after = np.full(count, -1)
        after[kept] = np.arange(len(kept))
        after[rest[merged]] = target[merged]
        alive = token >= 0
        fate = np.where(alive, fate_of[token], GONE).astype(np.uint8)
        weight = np.where(alive, importance[token].astype(np.float64), np.nan)
        moves = zip(seats[rest[merged]], seats[kept[target[merged]]], strict=True)
        token = np.asarray(np.where(alive, after[token], -1))
        seats = seats[kept]
        stages.append(
            Stage(
                block=block,
                tokens=count,
                kept=len(kept),
                merged=int(merged.sum()),
                pruned=int((~merged).sum()),
                fate=fate,
                importance=weight,
                seat=np.where(token >= 0, seats[token], -1),
                moves=tuple((int(a), int(b)) for a, b in moves),
            )
        )
    return tuple(stages)


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
    given = ("schedule", "tau", "granularity", "img_size")
    if any(getattr(options, name) is not None for name in given):
        raise ScheduleError(
            "an artifact has its own schedule, tau, granularity and image size",
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
        options.source, options.weights or "auto", img_size=options.img_size, seed=options.seed
    )
    spec = options.schedule or schedule.DEFAULT
    resolved = schedule.parse(spec, model_shape(loaded.model))
    if not resolved.steps:
        raise ScheduleError("the schedule keeps every token: there is nothing to draw")
    tau = resolved.tau if options.tau is None else options.tau
    patch(loaded.model, resolved, tau=tau, granularity=options.granularity or "token")
    about = {
        "model": loaded.name,
        "schedule": resolved.name,
        "tau": tau,
        "weights": asdict(loaded.origin),
    }
    return loaded.model, loaded.preprocess, about


def _numbers(item: Picture) -> dict[str, Any]:
    names = ("block", "tokens", "kept", "merged", "pruned")
    return {
        "image": item.name,
        "stages": [{name: getattr(stage, name) for name in names} for stage in item.stages],
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
