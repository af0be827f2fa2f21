"""Latency of a ViT's blocks over the number of tokens, as measured on a device, and what follows.

Latency is a staircase: on most devices 196 tokens cost as much as 192 or more than 224. A table
says where the steps are, so that a schedule keeps the most tokens for its time. The file
(`bench --table` writes one; any program may):

    {
      "format": "jmp_deploy.latency/1",
      "model": "deit_small_patch16_224",    timm name; "depth", "num_prefix", "num_patches" as in
      "depth": 12,                          schedule.ModelShape
      "num_prefix": 1,
      "num_patches": 196,
      "device": "Jetson Orin Nano, MAXN",   free text, as are further keys
      "other_ms": {"1": 0.41, "8": 1.3},    per batch: everything outside the blocks
      "rows": [
        {"batch": 8, "tokens": 197,         tokens of the sequence, prefix included
         "attn_ms": 0.31,                   norm, attention, residual with that many tokens
         "mlp_ms": 0.42,                    norm, MLP, residual with that many tokens
         "reduce_ms": 0.02}                 optional (0): a reduction that many tokens come into
      ]
    }

A block costs attn_ms of what comes in, plus reduce_ms where it reduces, plus mlp_ms of what
stays. (Where the head reads prefix tokens only, the last block's MLP runs for those alone: it is
counted with the fewest tokens measured.) Needs neither PyTorch nor timm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..core.errors import ScheduleError
from ..core.files import read_json
from ..core.manifest import Count, Meta, Natural
from .schedule import ModelShape

FORMAT = "jmp_deploy.latency/1"
PLATEAU = 0.01
"""Two token counts within 1 % of each other's latency are on one step of the staircase."""

_HINT = "the format is in the docstring of jmp_deploy/jmp/latency.py"


Ms = Annotated[float, Meta(ge=0, le=1e9)]


@dataclass(frozen=True)
class _Row:
    batch: Count
    tokens: Count
    attn_ms: Ms
    mlp_ms: Ms
    reduce_ms: Ms = 0.0


@dataclass(frozen=True)
class _File:
    format: Literal["jmp_deploy.latency/1"]
    model: str
    depth: Count
    num_prefix: Natural
    num_patches: Count
    other_ms: dict[str, Ms]
    rows: Annotated[list[_Row], Meta(min_length=1)]
    device: str = "unnamed device"


@dataclass(frozen=True)
class LatencyTable:
    """One batch size of a table.

    Attributes:
        device: as the file names it.
        batch: images per inference.
        num_prefix, num_patches: of the model.
        other_ms: everything outside the blocks.
        rows: tokens (prefix included) -> (attn_ms, mlp_ms, reduce_ms).
        short_last_block: the last block's MLP runs for the prefix tokens alone.
    """

    device: str
    batch: int
    num_prefix: int
    num_patches: int
    other_ms: float
    rows: dict[int, tuple[float, float, float]]
    short_last_block: bool = False

    def good_counts(self) -> tuple[int, ...]:
        """Patch token counts worth keeping, falling from M: no larger count is as fast.

        Of a step of the staircase that is its right edge; a count that a larger one undercuts is
        left out altogether.
        """
        good: list[int] = []
        fastest = math.inf
        for tokens in sorted(self.rows, reverse=True):
            patches = tokens - self.num_prefix
            if patches > self.num_patches or patches < 1:
                continue
            attention, mlp, _ = self.rows[tokens]
            if attention + mlp < fastest * (1 - PLATEAU):
                good.append(patches)
                fastest = attention + mlp
        return tuple(good)

    def latency(self, keeps: Sequence[int]) -> float:
        """Milliseconds per inference.

        Args:
            keeps: patch tokens after each block; all of them good counts.
        """
        total = self.other_ms
        before = self.num_patches
        for keep in keeps:
            attention, _, reduce = self.rows[before + self.num_prefix]
            total += attention + self.rows[keep + self.num_prefix][1]
            if keep < before:
                total += reduce
            before = keep
        if self.short_last_block:
            total += self.rows[min(self.rows)][1] - self.rows[before + self.num_prefix][1]
        return total


def read(path: Path, shape: ModelShape, batch: int | None = None) -> LatencyTable:
    """Reads and checks a table.

    Args:
        batch: which batch size; None takes the only one, or 1, or the smallest.

    Raises:
        ScheduleError: missing, malformed, of another model, or without that batch.
    """
    data = read_json(path, _File, what="latency table", hint=_HINT, error=ScheduleError)
    _refuse_other_model(path, data, shape)
    rows = data.rows
    batches = sorted({row.batch for row in rows})
    chosen = batches[0] if batch is None else batch
    if chosen not in batches:
        raise ScheduleError(
            f"{path} has no batch {chosen}, only {', '.join(map(str, batches))}",
            "choose one of them with --on-batch",
        )
    return _table(path, data, [row for row in rows if row.batch == chosen], chosen, shape)


def _refuse_other_model(path: Path, data: _File, shape: ModelShape) -> None:
    for key, expected in (
        ("model", shape.name),
        ("depth", shape.depth),
        ("num_prefix", shape.num_prefix),
        ("num_patches", shape.num_patches),
    ):
        if (found := getattr(data, key)) != expected:
            raise ScheduleError(
                f"{path} is a table of another model: {key} {found!r:.80}, "
                f"{shape.name} has {expected!r}",
                "measure this model, at this image size, on the device",
            )


def _table(
    path: Path, data: _File, rows: list[_Row], batch: int, shape: ModelShape
) -> LatencyTable:
    by_tokens = {row.tokens: (row.attn_ms, row.mlp_ms, row.reduce_ms) for row in rows}
    if len(by_tokens) != len(rows):
        raise ScheduleError(f"{path} has two rows of one token count for batch {batch}")
    full = shape.num_prefix + shape.num_patches
    if full not in by_tokens:
        raise ScheduleError(
            f"{path} lacks the full sequence of {full} tokens for batch {batch}",
            "measure it: the dense model is what everything is compared with",
        )
    other_ms = data.other_ms.get(str(batch))
    if other_ms is None:
        raise ScheduleError(f'{path} has no "other_ms" for batch {batch}', _HINT)
    table = LatencyTable(
        device=data.device,
        batch=batch,
        num_prefix=shape.num_prefix,
        num_patches=shape.num_patches,
        other_ms=other_ms,
        rows=by_tokens,
        short_last_block=shape.head_reads_prefix_only,
    )
    if len(table.good_counts()) < 2:
        raise ScheduleError(
            f"{path}: no smaller number of tokens is faster than all {shape.num_patches}",
            "token reduction brings nothing on this device at this batch; try a larger batch",
        )
    return table
