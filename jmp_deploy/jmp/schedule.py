"""Keep schedules: in which blocks tokens go, how many stay, and what that saves.

A schedule is data: (block, tokens kept) pairs, resolved once for a model and an image size before
anything is exported. Ways to write one (`parse`):

    paper                blocks at 1/4, 1/2 and 3/4 of the depth, keep rate 0.7 in each
    spread               the same FLOPs as `paper`, the reduction spread evenly over all blocks
                         from the third to the last but one
    spread:50            the same blocks at 50 % of the dense model's FLOPs; steps are even while
                         a fifth of the patches is left at the end, and else each block keeps the
                         same share
    3:138,6:97,9:68      explicit: patch tokens kept after block 3, 6, 9 (0-based)
    r18@2-10             18 tokens fewer in each of blocks 2 to 10
    FILE.json            {"model": "deit_small_patch16_224", "steps": [[3, 138], [6, 97]]}
    dinov2_s-62          one of those published with the package (`published`, schedules/*.json)

This module needs neither PyTorch nor timm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ..core.errors import ScheduleError
from ..core.files import read_json
from ..core.manifest import Jmp, Meta, Selection
from ..core.paths import PACKAGE

NAMES = ("paper", "spread")
DEFAULT = "spread"
FEW_BLOCKS, FEW_PATCHES = 8, 64
"""Below them a warning: timm's test_vit, 6 blocks and 36 patches, lost 8.5 points of digits."""
PUBLISHED = PACKAGE / "schedules"
MUCH = 0.75
"""Of the dense FLOPs: what takes less off is not warned of."""
_SHARE = r"spread:(\d{1,9}(?:\.\d{1,9})?)%?"
_LIST = r"\d{1,9}:-?\d{1,9}(,\d{1,9}:-?\d{1,9})*"
_CONSTANT = r"r(\d{1,9})@(\d{1,4})-(\d{1,4})"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a ViT that decide what it costs.

    Attributes:
        name: timm name.
        depth: number of blocks.
        width: C, channels of a token.
        num_prefix: class, distillation and register tokens.
        num_patches: M, patch tokens.
        attn_dim: heads times head width.
        head_dim: width of one head.
        attn_weights: weights in the linear layers of one attention (QKV, projection, gate).
        qkv_weights: those of the QKV projection alone, as far as the last block computes it for all
            tokens.
        mlp_weights: weights in the linear layers of one MLP.
        stem_macs: patch embedding, MACs per image.
        head_macs: classifier heads and what else the head does once, MACs per image.
        head_macs_per_patch: of a head that pools by attention, for each patch token.
        has_class_token: importance comes from the class token; else from all queries.
        head_reads_prefix_only: the head does not look at patch tokens after the last block.
    """

    name: str
    depth: int
    width: int
    num_prefix: int
    num_patches: int
    attn_dim: int
    head_dim: int
    attn_weights: int
    mlp_weights: int
    stem_macs: int
    head_macs: int
    has_class_token: bool
    qkv_weights: int = 0
    head_macs_per_patch: int = 0
    head_reads_prefix_only: bool = False

    def for_patches(self) -> ModelShape:
        """The same model without its head: the features of every patch are wanted."""
        return replace(self, head_macs=0, head_macs_per_patch=0, head_reads_prefix_only=False)


@dataclass(frozen=True)
class Schedule:
    """A resolved schedule.

    Attributes:
        name: for messages.
        steps: (block, patch tokens kept) in block order.
        last_prefix_only: the last block computes its attention output, projection and MLP for the
            prefix tokens alone. Nothing that the head reads changes.
        selection: how the K critical tokens are chosen (see `node.TokenReduce`).
        tau: threshold between merging and pruning, where nobody asks for another.
        merge_weight: how much of a merged token's content counts (see `node.TokenReduce`).

    What is written out (`paper`, lists, rates, constants) is the method's first form and nothing
    else, so that it costs what the literature says; `improved` turns on what was measured to be
    better, and the schedules that we choose ourselves (`spread`, `tune`) have it.
    """

    name: str
    steps: tuple[tuple[int, int], ...]
    last_prefix_only: bool = False
    selection: Selection = "importance"
    tau: float = 0.7
    merge_weight: float = 1.0


_Number = Annotated[int, Meta(ge=-(1 << 40), le=1 << 40)]


@dataclass(frozen=True)
class _File:
    steps: list[tuple[_Number, _Number]]
    model: str | None = None
    patches: int | None = None
    selection: Selection = "importance"
    last_prefix_only: bool = False
    tau: float = Schedule.tau
    merge_weight: Annotated[float, Meta(ge=0, le=1)] = Schedule.merge_weight


def improved(schedule: Schedule, shape: ModelShape) -> Schedule:
    """The same steps with all that docs/method.md found to pay.

    Selection by `distinct`, less of a merged token's content, pruning of what resembles nothing;
    and, where the head reads prefix tokens only and the last block reduces nothing, a last block
    that computes no others.
    """
    reduces_last = any(block == shape.depth - 1 for block, _ in schedule.steps)
    saves = shape.head_reads_prefix_only and not reduces_last
    return replace(
        schedule, selection="distinct", tau=0.8, merge_weight=0.4, last_prefix_only=saves
    )


def parse(spec: str, shape: ModelShape) -> Schedule:
    """Resolves a schedule written as a name, a list or a file (see the module's docstring).

    Raises:
        ScheduleError: it cannot be read or does not fit the model.
    """
    check_spelling(spec)
    if spec == "paper":
        return paper(shape)
    if spec == "spread":
        return spread(shape)
    if found := re.fullmatch(_SHARE, spec):
        return for_share(shape, float(found.group(1)) / 100)
    if re.fullmatch(_LIST, spec):
        steps = [tuple(int(n) for n in pair.split(":")) for pair in spec.split(",")]
        return resolve("list", [(block, keep) for block, keep in steps], shape)
    if found := re.fullmatch(_CONSTANT, spec):
        count, first, last = (int(group) for group in found.groups())
        return constant(count, range(first, last + 1), shape)
    return load(_path_of(spec), shape)


def published() -> list[str]:
    """The names of the schedules that come with the package."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def _path_of(spec: str) -> Path:
    """Of a published schedule by its name, or of a file."""
    return PUBLISHED / f"{spec}.json" if spec in published() else Path(spec)


def check_spelling(spec: str) -> None:
    """Refuses what no model has a schedule for, before there is a model.

    Raises:
        ScheduleError: it is no form of `parse`, or a file that cannot be read.
    """
    if spec in NAMES or any(re.fullmatch(form, spec) for form in (_SHARE, _LIST, _CONSTANT)):
        return
    path = _path_of(spec)
    if path.suffix == ".json" or os.path.isfile(path):  # noqa: PTH113 (names of any length)
        _read(path)
        return
    raise ScheduleError(
        f"unknown schedule {spec!r:.80}",
        f"use {' or '.join(NAMES)}, spread:50, a list such as 3:138,6:97,9:68, a constant such as "
        f"r18@2-10, a .json file, or one of {', '.join(published())}",
    )


def load(path: Path, shape: ModelShape) -> Schedule:
    """Reads a schedule file: {"steps": [[block, keep], ...]} and, if wanted, "model" (timm name),
    "patches" (of the image), "selection", "last_prefix_only", "tau" and "merge_weight" (see
    `Schedule`).

    Raises:
        ScheduleError: the file is missing or malformed, or was made for another model.
    """
    data = _read(path)
    model = shape.name if data.model is None else data.model
    if model != shape.name:
        raise ScheduleError(
            f"{path} is a schedule for {model:.80}, the model is {shape.name}",
            _instead(path, shape),
        )
    if data.patches not in (None, shape.num_patches):
        raise ScheduleError(
            f"{path} is a schedule for {data.patches} patches, the image has {shape.num_patches}",
            "choose the --img-size that it was made for, or make one for this size",
        )
    found = replace(
        resolve(path.stem, data.steps, shape),
        selection=data.selection,
        last_prefix_only=data.last_prefix_only,
        tau=data.tau,
        merge_weight=data.merge_weight,
    )
    check_last_prefix_only(found, shape)
    return found


def _instead(path: Path, shape: ModelShape) -> str:
    """What to do about a schedule of another model. One of the package is nobody's to change."""
    if path.parent != PUBLISHED:
        return "make one for this model, or remove the key 'model' to use it all the same"
    suits = [name for name in published() if _read(_path_of(name)).model == shape.name]
    return f"take {' or '.join([*suits, 'spread:62'])}, or search one with `tune`"


def _read(path: Path) -> _File:
    example = '{"model": "deit_small_patch16_224", "steps": [[3, 138], [6, 97], [9, 68]]}'
    return read_json(
        path,
        _File,
        what="schedule file",
        hint=f"expected the form {example}",
        error=ScheduleError,
    )


def caution(schedule: Schedule, shape: ModelShape) -> str:
    """A warning where `spread` takes its share of a model that has little to give, or ""."""
    small = shape.depth < FEW_BLOCKS or shape.num_patches < FEW_PATCHES
    spread_out = schedule.name.startswith(("spread", "even ", "rate "))
    if not (small and spread_out and macs(shape, schedule) < MUCH * macs(shape)):
        return ""
    blocks = f"{shape.depth} block{'s' * (shape.depth > 1)}"
    return (
        f"a model of {blocks} and {shape.num_patches} patches can lose several points of accuracy "
        "by this schedule: measure it with `validate --against` a --dense artifact; "
        "--schedule spread:80 takes less, and `tune` searches"
    )


def to_manifest(schedule: Schedule) -> Jmp:
    """What an artifact keeps of a schedule; how it was applied else is `Jmp`'s default."""
    return Jmp(
        schedule_name=schedule.name,
        schedule=schedule.steps,
        tau=schedule.tau,
        selection=schedule.selection,
        merge_weight=schedule.merge_weight,
        last_prefix_only=schedule.last_prefix_only,
    )


def from_manifest(jmp: Jmp) -> Schedule:
    """The schedule that an artifact was built with."""
    return Schedule(
        name=jmp.schedule_name,
        steps=jmp.schedule,
        last_prefix_only=jmp.last_prefix_only,
        selection=jmp.selection,
        tau=jmp.tau,
        merge_weight=jmp.merge_weight,
    )


def paper(shape: ModelShape) -> Schedule:
    """The published setting: keep rate 0.7 in blocks 3, 6 and 9 of 12 (quarters of the depth)."""
    # A model of one or two blocks has fewer than three places.
    blocks = list(dict.fromkeys(shape.depth * quarter // 4 for quarter in (1, 2, 3)))
    return keep_rate(0.7, blocks, shape, name="paper")


def spread(shape: ModelShape) -> Schedule:
    """The FLOPs of `paper` or just below, with equal steps in blocks 2 .. depth-2.

    Many small steps hold accuracy better than three large ones at the same cost (docs/method.md).
    The step is the smallest that reaches paper's cost.
    """
    budget = macs(shape, paper(shape))
    blocks = _spread_blocks(shape)
    for count in range(1, shape.num_patches):
        if count * len(blocks) >= shape.num_patches:
            break
        schedule = improved(constant(count, blocks, shape, name="spread"), shape)
        if macs(shape, schedule) <= budget:
            return schedule
    raise ScheduleError(
        f"{shape.name} has too few blocks or patch tokens to spread a reduction over",
        "use --schedule paper or write the schedule as a list",
    )


def _spread_blocks(shape: ModelShape) -> range:
    """Blocks 2 .. depth-2; of a model with fewer than four blocks the last but one, if any."""
    last = max(shape.depth - 2, 0)
    return range(min(2, last), last + 1)


def for_share(
    shape: ModelShape, share: float, form: str = "auto", blocks: Sequence[int] | None = None
) -> Schedule:
    """The most tokens in blocks 2 .. depth-2 (or `blocks`) for at most `share` of the dense MACs.

    Args:
        share: of `macs(shape)`, in (0, 1].
        form: "even" (equal steps), "rate" (the same share of the tokens stays in each block) or
            "auto": even as long as a fifth of the patches is left at the end, else rate: even
            steps would starve the last blocks (docs/method.md).

    Raises:
        ScheduleError: no such schedule is that cheap.
    """
    if form == "auto":
        try:
            even = for_share(shape, share, "even", blocks)
        except ScheduleError:
            return for_share(shape, share, "rate", blocks)
        if not even.steps or even.steps[-1][1] >= shape.num_patches / 5:
            return even
        return for_share(shape, share, "rate", blocks)
    budget = share * macs(shape)
    blocks = _spread_blocks(shape) if blocks is None else blocks
    # From the most tokens left at the end to the fewest: cost falls with them.
    for final in range(shape.num_patches, 0, -1) if blocks else ():
        steps = []
        for position, block in enumerate(blocks, 1):
            part = position / len(blocks)
            if form == "even":
                left = shape.num_patches - (shape.num_patches - final) * part
            else:
                left = shape.num_patches * (final / shape.num_patches) ** part
            steps.append((block, round(left)))
        schedule = improved(resolve(f"{form} {share:.0%}", steps, shape), shape)
        if macs(shape, schedule) <= budget:
            return schedule
    raise ScheduleError(
        f"no {form} reduction of {shape.name} comes down to {share:.0%} of the dense model's FLOPs",
        "ask for a larger share, or write the schedule as a list",
    )


def keep_rate(
    rate: float, blocks: Sequence[int], shape: ModelShape, name: str = "keep-rate"
) -> Schedule:
    """Keeps ceil(rate * M) of the M patch tokens that reach each of `blocks`."""
    if not 0 < rate <= 1:
        raise ScheduleError(f"keep rate {rate:g} is not in (0, 1]")
    # Binary fractions: 0.7 * 10 is 7.000000000000001 and must not round up to 8.
    return _shrink(name, blocks, shape, lambda m: math.ceil(round(rate * m, 9)))


def constant(
    count: int, blocks: Sequence[int], shape: ModelShape, name: str | None = None
) -> Schedule:
    """Takes `count` patch tokens away in each of `blocks`."""
    label = name or f"r{count}"
    return _shrink(label, blocks, shape, lambda m: m - count)


def resolve(name: str, steps: Sequence[tuple[int, int]], shape: ModelShape) -> Schedule:
    """Checks explicit steps against a model; steps that keep every token are dropped.

    Raises:
        ScheduleError: a block out of range or named twice, K < 1, K > M, or K that grows.
    """
    ordered = sorted(steps)
    left = shape.num_patches
    kept: list[tuple[int, int]] = []
    for position, (block, keep) in enumerate(ordered):
        if not 0 <= block < shape.depth:
            raise ScheduleError(
                f"schedule names block {block}, but {shape.name} has blocks 0 to {shape.depth - 1}"
            )
        if position and ordered[position - 1][0] == block:
            raise ScheduleError(f"schedule names block {block} twice")
        if keep < 1:
            raise ScheduleError(f"schedule keeps {keep} tokens in block {block}; at least 1 stays")
        if keep > left:
            what = "patch tokens of the image" if not position else "tokens kept before it"
            raise ScheduleError(
                f"schedule keeps {keep} tokens in block {block}, more than the {left} {what}",
                "the number of tokens kept can only fall from block to block",
            )
        if keep < left:
            kept.append((block, keep))
        left = keep
    return Schedule(name, tuple(kept))


def check_last_prefix_only(schedule: Schedule, shape: ModelShape) -> None:
    """Raises ScheduleError if the schedule leaves out tokens of the last block that are needed."""
    if not schedule.last_prefix_only:
        return
    if not shape.head_reads_prefix_only:
        raise ScheduleError(
            f"the head of {shape.name} reads patch tokens: its last block cannot leave them out",
            "resolve the schedule for this model",
        )
    if any(block == shape.depth - 1 for block, _ in schedule.steps):
        raise ScheduleError(
            "a schedule that computes prefix tokens alone in the last block has nothing to reduce "
            "there",
            "leave out the step of the last block",
        )


def macs(shape: ModelShape, schedule: Schedule | None = None, *, jmp_cost: bool = True) -> int:
    """Multiply-accumulates for one image, in closed form: what PyTorch's flop counter counts.

    Matrix products and convolutions only, as usual in the field: per block, with N tokens in
    attention and N' in the MLP, N * attn_weights + 2 * N^2 * attn_dim + N' * mlp_weights. A
    reduction adds its own products (class row N * attn_dim or all rows N^2 * attn_dim, and the
    similarity (M-K) * K * head_dim, with selection "distinct" M^2 * head_dim besides);
    `jmp_cost=False` leaves them out.
    """
    steps = dict(schedule.steps) if schedule else {}
    total = shape.stem_macs + shape.head_macs
    patches = shape.num_patches
    for block in range(shape.depth):
        tokens = shape.num_prefix + patches
        if schedule and schedule.last_prefix_only and block == shape.depth - 1:
            # The packed QKV projection (3 of the weights) for all tokens, the rest for P.
            total += tokens * shape.qkv_weights + 2 * shape.num_prefix * tokens * shape.attn_dim
            total += shape.num_prefix * (shape.attn_weights - shape.qkv_weights + shape.mlp_weights)
            continue
        total += tokens * shape.attn_weights + 2 * tokens**2 * shape.attn_dim
        if block in steps:
            keep = steps[block]
            if jmp_cost:
                queries = 1 if shape.has_class_token else tokens
                total += queries * tokens * shape.attn_dim
                total += (patches - keep) * keep * shape.head_dim
                if schedule and schedule.selection == "distinct":
                    total += patches**2 * shape.head_dim
            patches = keep
        total += (shape.num_prefix + patches) * shape.mlp_weights
    return total + patches * shape.head_macs_per_patch


def _shrink(
    name: str, blocks: Sequence[int], shape: ModelShape, rule: Callable[[int], int]
) -> Schedule:
    steps = []
    left = shape.num_patches
    for block in sorted(blocks):
        left = rule(left)
        steps.append((block, left))
    return resolve(name, steps, shape)
