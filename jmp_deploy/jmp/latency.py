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

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ScheduleError
from .schedule import ModelShape

FORMAT = "jmp_deploy.latency/1"
PLATEAU = 0.01
"""Two token counts within 1 % of each other's latency are on one step of the staircase."""

_HINT = "the format is in the docstring of jmp_deploy/jmp/latency.py"


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScheduleError(f"cannot read latency table {path}: {error.strerror}") from error
    except ValueError as error:
        raise ScheduleError(f"{path} is not a latency table: {error}", _HINT) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ScheduleError(f'{path} is not a latency table: no "format": "{FORMAT}"', _HINT)
    _refuse_other_model(path, data, shape)
    rows = _rows(path, data)
    batches = sorted({row["batch"] for row in rows})
    chosen = batches[0] if batch is None else batch
    if chosen not in batches:
        raise ScheduleError(
            f"{path} has no batch {chosen}, only {', '.join(map(str, batches))}",
            "choose one of them with --on-batch",
        )
    return _table(path, data, [row for row in rows if row["batch"] == chosen], chosen, shape)


def _refuse_other_model(path: Path, data: dict[str, Any], shape: ModelShape) -> None:
    for key, expected in (
        ("model", shape.name),
        ("depth", shape.depth),
        ("num_prefix", shape.num_prefix),
        ("num_patches", shape.num_patches),
    ):
        if data.get(key) != expected:
            raise ScheduleError(
                f"{path} is a table of another model: {key} {data.get(key)!r}, "
                f"{shape.name} has {expected!r}",
                "measure this model, at this image size, on the device",
            )


def _rows(path: Path, data: dict[str, Any]) -> list[dict[str, Any]]:
    rows = data.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ScheduleError(f"{path} has no rows", _HINT)
    checked = []
    for index, row in enumerate(rows):
        full = {"reduce_ms": 0.0, **row} if isinstance(row, dict) else {}
        counts = all(_is_count(full.get(key)) for key in ("batch", "tokens"))
        if not counts or not all(
            _is_time(full.get(key)) for key in ("attn_ms", "mlp_ms", "reduce_ms")
        ):
            raise ScheduleError(f"{path}: row {index} is not valid: {row!r}", _HINT)
        checked.append(full)
    return checked


def _table(
    path: Path, data: dict[str, Any], rows: list[dict[str, Any]], batch: int, shape: ModelShape
) -> LatencyTable:
    by_tokens = {
        row["tokens"]: (float(row["attn_ms"]), float(row["mlp_ms"]), float(row["reduce_ms"]))
        for row in rows
    }
    if len(by_tokens) != len(rows):
        raise ScheduleError(f"{path} has two rows of one token count for batch {batch}")
    full = shape.num_prefix + shape.num_patches
    if full not in by_tokens:
        raise ScheduleError(
            f"{path} lacks the full sequence of {full} tokens for batch {batch}",
            "measure it: the dense model is what everything is compared with",
        )
    other = data.get("other_ms")
    other_ms = other.get(str(batch)) if isinstance(other, dict) else None
    if not _is_time(other_ms):
        raise ScheduleError(f'{path} has no "other_ms" for batch {batch}', _HINT)
    table = LatencyTable(
        device=str(data.get("device", "unnamed device")),
        batch=batch,
        num_prefix=shape.num_prefix,
        num_patches=shape.num_patches,
        other_ms=float(other_ms),  # type: ignore[arg-type]
        rows=by_tokens,
        short_last_block=shape.head_reads_prefix_only,
    )
    if len(table.good_counts()) < 2:
        raise ScheduleError(
            f"{path}: no smaller number of tokens is faster than all {shape.num_patches}",
            "token reduction brings nothing on this device at this batch; try a larger batch",
        )
    return table


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_time(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value >= 0
