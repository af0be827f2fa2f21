"""What a model does on the way: what its reductions decide, and the tensors between its blocks.

`watch` is the one place that looks into reductions while a model runs, for pictures, comparisons
and benchmarks alike: what it shows is what the model does, bit for bit. `trace_torch` keeps it for
a batch of images, as `backends.onnxruntime.trace_onnx` does of a portable model. What became of
each patch of an image follows from that: `owners` and `stages`.

This module is light: it needs PyTorch only where a model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.errors import ModelError
from ..core.images import join, split
from .node import KEPT, MERGED, PRUNED, TokenReduce, reduction_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from .reduction import Plan

    Note = Callable[[int, Tensor, Plan, tuple[Tensor, ...]], None]

BATCH = 8
DECIDED = ("kept", "rating", "importance", "target", "merged")
"""What `Choice` is made of, as `reduction.Plan` has it."""
GONE = 3
"""Fate of a patch in a stage beside those of `node.py`: pruned in an earlier one."""


class Block(NamedTuple):
    """The tensors of a block's residual stream: their values [B, tokens, C], or their names.

    entry: what comes in; attended: after the attention residual; reduced: what the MLP reads, the
    same as attended where the block reduces nothing; out: what leaves.
    """

    entry: Any
    attended: Any
    reduced: Any
    out: Any


@dataclass(frozen=True)
class Choice:
    """Which tokens one reduction kept, for a batch of images.

    Attributes:
        block: its block.
        name: its node's name, "blocks.3.token_reduce".
        num_prefix: P.
        selection: as in `node.TokenReduce`.
        kept: [B, K] which of the M incoming patch tokens stay, ascending.
        rating: [B, M] by which they were chosen.
        importance: [B, M].
        target: [B, M-K] of the others, ascending: the position in `kept` of the token that each
            resembles most.
        fate: [B, M-K] what becomes of them: the target where merged, -1 where pruned.
    """

    block: int
    name: str
    num_prefix: int
    selection: str
    kept: NDArray[Any]
    rating: NDArray[Any]
    importance: NDArray[Any]
    target: NDArray[Any]
    fate: NDArray[Any]

    @property
    def rest(self) -> NDArray[Any]:
        """[B, M-K] the tokens that do not stay, ascending."""
        every = np.arange(self.rating.shape[1])
        return np.stack([np.delete(every, kept) for kept in self.kept])

    def of(self, images: slice) -> Choice:
        """The same for some of the images."""
        arrays = ("kept", "rating", "importance", "target", "fate")
        return replace(self, **{name: getattr(self, name)[images] for name in arrays})


@dataclass(frozen=True)
class Trace:
    """What was seen of a backend.

    Attributes:
        backend: its name.
        choices: of every reduction in order; None where they cannot be seen.
        blocks: the tensors of every block, in float32; empty if they were not asked for.
        sizes: block -> (size, log_size) [B, P+K] after its reduction; PyTorch only.
        num_prefix: P.
    """

    backend: str
    choices: list[Choice] | None
    blocks: list[Block] = field(default_factory=list)
    sizes: dict[int, tuple[NDArray[Any], NDArray[Any]]] = field(default_factory=dict)
    num_prefix: int = 1


@dataclass(frozen=True)
class Stage:
    """One reduction of one image. Patches are counted row by row; there are M of them.

    Attributes:
        block: 0-based.
        tokens: patch tokens that come in.
        kept, merged, pruned: tokens by what becomes of them; they add up to `tokens`.
        fate: [M] uint8, GONE, KEPT, MERGED or PRUNED, by the token that the patch is in.
        importance: [M] float64, of that token; NaN where GONE.
        seat: [M] int64, as `owners` gives it: the patch at which the token sits that the patch is
            in afterwards; -1 if GONE or PRUNED. A token sits where its critical token began.
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
class Features:
    """What the patches of an image look like to a model, as colours.

    Attributes:
        dense: [M, 3] float in 0 to 1: the three principal components of the features without JMP,
            each from its 2nd to its 98th percentile over the image.
        restored: [M, 3] those with JMP, restored, in the same colours.
        cosine: [M] between the features themselves.
    """

    dense: NDArray[np.float64]
    restored: NDArray[np.float64]
    cosine: NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """One image and its stages.

    Attributes:
        name: of the file.
        pixels: [H, W, 3] uint8, as the model sees it (see `visualize.picture`).
        grid: rows and columns of patches.
        stages: in the order of the blocks.
        features: of the patches, where they were asked for.
    """

    name: str
    pixels: NDArray[np.uint8]
    grid: tuple[int, int]
    stages: tuple[Stage, ...]
    features: Features | None = None


@contextmanager
def watch(model: nn.Module, note: Note) -> Iterator[None]:
    """While it lasts, every reduction of a patched model is told to `note`.

    The model computes the same bits as ever: each reduction is `planned_reduce`, which is all that
    `token_reduce` is, with all attributes that the model has for it.

    Args:
        model: patched; its reductions are computed by the reference, as on a CPU they always are.
        note: called with a reduction's block, its input x [B, N, C], its plan and its outputs.

    Raises:
        ModelError: something else than the reference computes the model's reductions (a CUDA
            kernel, a rule of another method), so that its decisions are not to be seen.
    """
    from .patch import REDUCES
    from .reduction import planned_reduce, token_reduce

    blocks: Any = model.blocks
    own = blocks.reduce
    device = next(model.parameters()).device.type
    if own is not token_reduce and (device != "cpu" or own not in REDUCES.values()):
        raise ModelError(
            "the decisions of this model's reductions cannot be seen: the reference does not "
            "compute them",
            'move the model to the CPU, or patch it with backend="reference"',
        )

    def reduce(
        block: int, x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
    ) -> tuple[Tensor, ...]:
        plan, reduced = planned_reduce(x, qkv, size, attributes)
        note(block, x, plan, reduced)
        return reduced

    with _reduced_by(model, reduce):
        yield


@contextmanager
def deciding(model: nn.Module, choices: Sequence[Choice]) -> Iterator[None]:
    """While it lasts, a patched model's reductions decide as another backend did.

    What still differs from that backend then is not of the choice of tokens.

    Args:
        model: patched.
        choices: of all its reductions, for the very images that it is called with.
    """
    import torch

    from .reduction import apply_plan, index_of, make_plan

    theirs = {choice.block: choice for choice in choices}

    def reduce(
        block: int, x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
    ) -> tuple[Tensor, ...]:
        choice = theirs[block]
        plan = replace(
            make_plan(qkv, size, attributes),
            kept=torch.from_numpy(choice.kept).long(),
            rest=torch.from_numpy(choice.rest).long(),
            target=torch.from_numpy(choice.target).long(),
            merged=torch.from_numpy(choice.fate >= 0),
        )
        reduced = apply_plan(x, size, plan, attributes.num_prefix, attributes.merge_weight)
        return (*reduced, index_of(plan)) if attributes.index else reduced

    with _reduced_by(model, reduce):
        yield


@contextmanager
def _reduced_by(model: nn.Module, reduce: Callable[..., tuple[Tensor, ...]]) -> Iterator[None]:
    """While it lasts, `reduce` computes the reductions, told the block of each."""
    blocks: Any = model.blocks
    own = blocks.reduce

    def find(x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce) -> Any:
        block = next(b for b, mine in blocks.reductions.items() if mine is attributes)
        return reduce(block, x, qkv, size, attributes)

    blocks.reduce = find
    try:
        yield
    finally:
        blocks.reduce = own


def trace_torch(
    model: nn.Module, images: NDArray[np.float32], *, blocks: bool = False, name: str = "torch"
) -> Trace:
    """Runs a timm ViT, patched or dense, and keeps what its blocks did. The model stays as it is.

    Args:
        images: [B, 3, H, W].
        blocks: keep the blocks' tensors too.

    Raises:
        ModelError: as `watch`.
    """
    import torch

    from .patch import JMPBlocks, model_shape

    pieces = []
    for piece in split(images, BATCH, 1):
        seen: dict[str, NDArray[Any]] = {}
        with ExitStack() as stack:
            if blocks:
                _watch_blocks(stack, model, seen)
            if isinstance(model.blocks, JMPBlocks):
                stack.enter_context(watch(model, _keeper(seen, blocks)))
            with torch.inference_mode():
                model(torch.from_numpy(piece))
        pieces.append(seen)
    seen = join(pieces, len(images))
    reductions = model.blocks.reductions if isinstance(model.blocks, JMPBlocks) else {}
    choices = [
        make_choice(block, reduction_name(block), reductions[block], seen)
        for block in sorted(reductions)
    ]
    depth = len(model.blocks) if blocks else 0
    sized = reductions if blocks else ()
    return Trace(
        backend=name,
        choices=choices,
        blocks=[_torch_block(seen, index) for index in range(depth)],
        sizes={block: (seen[f"{block}.size"], seen[f"{block}.log_size"]) for block in sized},
        num_prefix=model_shape(model).num_prefix,
    )


def make_choice(
    block: int, name: str, attributes: TokenReduce | Choice, values: Mapping[str, NDArray[Any]]
) -> Choice:
    """What a reduction decided, out of values that are named NODE.kept and so on."""
    kept, rating, importance, target, merged = (values[f"{name}.{what}"] for what in DECIDED)
    return Choice(
        block=block,
        name=name,
        num_prefix=attributes.num_prefix,
        selection=attributes.selection,
        kept=kept,
        rating=rating,
        importance=importance,
        target=target,
        fate=np.where(merged, target, -1),
    )


# --- Back to the image ---------------------------------------------------------------------------


def patch_ids(choices: Sequence[Choice], patches: int, images: int) -> list[NDArray[Any]]:
    """The image's patches that are left before the first reduction, and after each.

    Returns:
        One [B, tokens] per step: index of the patch that each patch token stands at, ascending.
    """
    found = [np.broadcast_to(np.arange(patches), (images, patches))]
    for choice in choices:
        found.append(np.take_along_axis(found[-1], choice.kept, axis=1))
    return found


def owners(choices: Sequence[Choice], patches: int, images: int) -> list[NDArray[Any]]:
    """The token that each patch of the image is in before the first reduction, and after each.

    Returns:
        One [B, patches] per step: index of the patch that the token stands at, -1 where it was
        pruned.
    """
    found = [np.broadcast_to(np.arange(patches), (images, patches))]
    rows = np.arange(images)[:, None]
    for choice, ids in zip(choices, patch_ids(choices, patches, images), strict=False):
        stays = np.take_along_axis(ids, choice.kept, axis=1)
        into = np.take_along_axis(stays, np.maximum(choice.fate, 0), axis=1)
        # One place more, at index -1, for patches that were pruned before.
        becomes = np.full((images, patches + 1), -1)
        becomes[rows, stays] = stays
        becomes[rows, np.take_along_axis(ids, choice.rest, axis=1)] = np.where(
            choice.fate < 0, -1, into
        )
        found.append(np.take_along_axis(becomes, found[-1], axis=1))
    return found


def stages(choices: Sequence[Choice]) -> list[tuple[Stage, ...]]:
    """What became of the patches of each image, reduction by reduction; of at least one."""
    images, patches = choices[0].rating.shape
    ids = patch_ids(choices, patches, images)
    seats = owners(choices, patches, images)
    by_step = [
        [_stage(choice, image, ids[step], seats[step], seats[step + 1]) for image in range(images)]
        for step, choice in enumerate(choices)
    ]
    return list(zip(*by_step, strict=True))


def _stage(
    choice: Choice, image: int, ids: NDArray[Any], before: NDArray[Any], after: NDArray[Any]
) -> Stage:
    """One image's stage; `ids` where the tokens stand that come in, and the owners around it."""
    at, seat = ids[image], before[image]
    kept, into = choice.kept[image], choice.fate[image]
    rest = np.delete(np.arange(len(at)), kept)
    merged = into >= 0
    fate_of = np.full(len(at), KEPT, np.uint8)
    fate_of[rest] = np.where(merged, MERGED, PRUNED)
    alive = seat >= 0
    token = np.searchsorted(at, np.where(alive, seat, at[0]))  # that each patch is in
    moves = zip(at[rest[merged]].tolist(), at[kept[into[merged]]].tolist(), strict=True)
    return Stage(
        block=choice.block,
        tokens=len(at),
        kept=len(kept),
        merged=int(merged.sum()),
        pruned=int((~merged).sum()),
        fate=np.where(alive, fate_of[token], GONE).astype(np.uint8),
        importance=np.where(alive, choice.importance[image].astype(np.float64)[token], np.nan),
        seat=after[image],
        moves=tuple(moves),
    )


# --- PyTorch's inner tensors ---------------------------------------------------------------------


def _keeper(seen: dict[str, NDArray[Any]], tensors: bool) -> Note:
    """Notes into `seen` what reductions decide and, with `tensors`, what they take and give."""

    def note(block: int, x: Tensor, plan: Plan, reduced: tuple[Tensor, ...]) -> None:
        name = reduction_name(block)
        notes = {f"{name}.{what}": getattr(plan, what) for what in DECIDED}
        if tensors:
            notes[f"{block}.attended"] = x
            notes[f"{block}.size"], notes[f"{block}.log_size"] = reduced[1:3]
        seen.update({key: value.numpy().copy() for key, value in notes.items()})

    return note


def _watch_blocks(stack: ExitStack, model: nn.Module, seen: dict[str, NDArray[Any]]) -> None:
    """Keeps what enters both norms of every block, and what leaves the last one."""
    from .families import family_of

    family = family_of(model)

    def keep(key: str, value: Any) -> None:
        seen[key] = value.detach().float().cpu().numpy().copy()

    def before(key: str) -> Any:
        return lambda module, inputs: keep(key, inputs[0])

    children = list(model.blocks.children())
    for index, block in enumerate(children):
        for norm, what in zip(family.norms(block), ("entry", "reduced"), strict=True):
            stack.callback(norm.register_forward_pre_hook(before(f"{index}.{what}")).remove)
    # What leaves the last block; the blocks themselves are not always called as one.
    stack.callback(model.norm.register_forward_pre_hook(before(f"{len(children)}.entry")).remove)


def _torch_block(seen: Mapping[str, NDArray[Any]], index: int) -> Block:
    reduced = seen[f"{index}.reduced"]
    return Block(
        entry=seen[f"{index}.entry"],
        attended=seen.get(f"{index}.attended", reduced),
        reduced=reduced,
        out=seen[f"{index + 1}.entry"],
    )
