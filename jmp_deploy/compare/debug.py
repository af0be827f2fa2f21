"""Which block loses the accuracy: two backends, block by block.

Two readings of the same blocks. Along the way: every block's output in either backend, for the
same images; errors add up from block to block, and the first block outside tolerance is named. By
itself (alone.py): where an error is made, also where the backends keep different tokens.

Along the way only tokens that are made of the same patches are held against each other, where both
backends show what they keep and merge; an engine does not, and there each token is held against its
nearest.

All blocks are marked at once rather than by halves: one run (for an engine one build) tells what
bisection needs several for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.onnxruntime import OnnxRuntimeBackend
from ..core.artifact import PORTABLE, Artifact
from ..core.errors import ArtifactError
from ..export.graph import load_model
from ..jmp.trace import Trace, owners
from .alone import PARTS, by_itself, limit_of, own_error
from .measures import TINY, TOLERANCES, coarser, cosines, relative

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..backends.base import Opened

IMAGES = 8
"""Images to look at: every block's tensors of all of them are held in memory."""
STANDS_OUT = 10.0
"""A block whose own error is this many times the median of all blocks is named as the cause."""


def examine(
    artifact: Artifact,
    a: Opened,
    b: Opened,
    images: NDArray[np.float32],
    min_cosine: float | None = None,
) -> dict[str, Any]:
    """Looks at the blocks of two backends of an artifact; `conclusion` has the answer's keys.

    Args:
        images: [B, 3, H, W], of which the first few are used.
        min_cosine: smallest cosine; None takes that of the coarser precision of the two.

    Raises:
        ArtifactError: the blocks of one of them cannot be seen.
        EngineError: an engine with marked blocks cannot be built or run.
    """

    def watch(opened: Opened) -> Trace:
        if opened.watch is None:
            raise ArtifactError(
                f"{opened.name} holds outputs only, nothing of the blocks",
                "compare where PyTorch is installed, or with --backends onnxruntime,engine",
            )
        return opened.watch(some, blocks=True)

    precision = coarser(*(opened.backend.precision(artifact) for opened in (a, b)))
    tolerance = TOLERANCES[precision] if min_cosine is None else min_cosine
    some = images[:IMAGES]
    traces = watch(a), watch(b)
    way = along_the_way(*traces, tolerance)
    alone = None
    by_file = {opened.backend.file: trace for opened, trace in zip((a, b), traces, strict=True)}
    if by_file.keys() == {None, PORTABLE}:
        portable = load_model(artifact.verified(PORTABLE))
        alone = by_itself(portable, by_file[None], artifact.precision, tolerance)
    return conclusion(a.name, b.name, tolerance, precision, way, alone)


def along_the_way(a: Trace, b: Trace, tolerance: float) -> list[dict[str, Any]]:
    """Every block's output in two backends, from the patch embedding to the last block.

    Args:
        tolerance: smallest cosine.

    Returns:
        Per stage {"stage", "prefix_cosine", "patch_cosine", "relative_error", "matched",
        "not_finite", "ok", "part"}. Cosines: the smallest of the prefix tokens (class token and
        registers), for the median image; of the matched patch tokens, the mean over all images (a
        few tokens beside one that changed places may be off for no fault of the block). The error
        is over the norm of both kinds, the largest of all images. matched is the share of patch
        tokens that are made of the same patches, None if unknown. not_finite names the backends
        with NaN or inf. ok: both cosines are within tolerance; that of tokens held against their
        nearest only counts where there are no prefix tokens. part: of a block that is not ok,
        "attention" where the tokens are off before its MLP and reduction, "mlp" where they are
        not; None where one of the backends does not show them there.
    """
    x, y = a.blocks[0].entry, b.blocks[0].entry
    rows = [{"stage": "embedding", **_tokens(a, b, x, y, None, tolerance), "part": None}]
    for index, (ours, theirs) in enumerate(zip(a.blocks, b.blocks, strict=True)):
        row = _tokens(a, b, ours.out, theirs.out, index, tolerance)
        part = None
        if not row["ok"] and ours.attended is not None and theirs.attended is not None:
            before = index - 1 if index else None
            attended = _tokens(a, b, ours.attended, theirs.attended, before, tolerance)
            part = "mlp" if attended["ok"] else "attention"
        rows.append({"stage": f"blocks.{index}", **row, "part": part})
    return rows


def conclusion(
    a: str,
    b: str,
    tolerance: float,
    precision: str,
    way: Sequence[Mapping[str, Any]],
    alone: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Names the first block outside tolerance and the one that loses most.

    Returns:
        {"a", "b", "tolerance", "first", "first_precision", "cause", "cause_part", "proposal",
        "verdict", "stages", "alone"}; first and cause are stages or None, proposal flags of `build`
        where an attention in 16 bits is at fault. A cause is a block whose error by
        itself stands out from the others, or that gives values that are not finite.
    """
    precisions = {row["stage"]: row["precision"] for row in alone or ()}
    first = next((row for row in way if not row["ok"]), None)
    where = precisions.get(first["stage"], precision) if first else None
    cause = _cause(alone, tolerance) if alone is not None else None
    words = []
    if first is None:
        words.append(f"every block is within tolerance ({b} against {a})")
    elif first["not_finite"]:
        words.append(f"{first['stage']} ({where}) is the first with NaN or inf")
    else:
        words.append(f"{first['stage']} ({where}) is the first outside tolerance")
    if cause:
        stage, part, error, usual = cause
        amount = "not finite" if error == np.inf else f"{error:.2%} of what it adds"
        words.append(
            f"by itself {stage} ({precisions[stage]}) is off in its {part}: {amount}, where the "
            f"median block is off by {usual:.2%}"
        )
    elif alone is None:
        words.append(
            "blocks by themselves can only be told of ONNX Runtime beside PyTorch, not of "
            + (b if b != OnnxRuntimeBackend.name else a)
        )
    else:
        stage, part, error = _worst(alone)
        words.append(
            f"no block stands out by itself (most: {stage}, {part}, {error:.2%} of what it adds); "
            "what there is adds up along the way"
        )
    proposal = None
    if cause and cause[1] == PARTS["attention"]:
        proposal = _proposal(cause[0], precisions[cause[0]])
    elif first and not cause and first.get("part") == "attention":
        proposal = _proposal(first["stage"], where or precision)
    if proposal:
        words.append(f"to compute that block's attention in FP32, build with `{proposal}`")
    return {
        "a": a,
        "b": b,
        "tolerance": tolerance,
        "first": first["stage"] if first else None,
        "first_precision": where,
        "cause": cause[0] if cause else None,
        "cause_part": cause[1] if cause else None,
        "proposal": proposal,
        "verdict": "; ".join(words),
        "stages": list(way),
        "alone": list(alone) if alone is not None else None,
    }


def _proposal(stage: str, precision: str) -> str | None:
    """The flags that compute a block's attention in FP32; None where it is."""
    return None if precision == "fp32" else f"--fp32 attention:{stage.removeprefix('blocks.')}"


def _tokens(
    a: Trace, b: Trace, x: NDArray[Any], y: NDArray[Any], block: int | None, tolerance: float
) -> dict[str, Any]:
    """One row of `along_the_way`."""
    broken = [t.backend for t, v in ((a, x), (b, y)) if not np.isfinite(v).all()]
    row: dict[str, Any] = {
        "prefix_cosine": None,
        "patch_cosine": None,
        "relative_error": None,
        "matched": None,
        "not_finite": broken,
        "ok": False,
    }
    if broken:
        return row
    prefix = a.num_prefix
    p, q = x.astype(np.float64), y.astype(np.float64)
    known = None
    if p.shape[1] > prefix and _comparable(a, b):
        known = _owners(a, block), _owners(b, block)
    patches, errors, matched = [], [], []
    for image in range(len(p)):
        ours, theirs = p[image, prefix:], q[image, prefix:]
        if known is not None:
            rows = _same_tokens(known[0][image], known[1][image])
            matched.append(len(rows[0]) / len(ours))
            ours, theirs = ours[rows[0]], theirs[rows[1]]
        elif len(ours):
            theirs = _nearest(ours, theirs)
        patches.append(cosines(ours, theirs))
        one = np.concatenate([p[image, :prefix], ours])
        errors.append(relative(np.concatenate([q[image, :prefix], theirs]) - one, one))
    if prefix:
        least = cosines(p[:, :prefix], q[:, :prefix]).min(axis=1)
        row["prefix_cosine"] = float(np.median(least))
    together = np.concatenate(patches)
    row["patch_cosine"] = float(together.mean()) if len(together) else None
    row["relative_error"] = max(errors)
    row["matched"] = float(np.mean(matched)) if matched else None
    judged = [row["prefix_cosine"]] if prefix else []
    if known is not None or not prefix:
        judged.append(row["patch_cosine"])
    judged = [value for value in judged if value is not None]
    row["ok"] = bool(judged) and min(judged) >= tolerance
    return row


def _comparable(a: Trace, b: Trace) -> bool:
    names = [None if t.choices is None else [c.name for c in t.choices] for t in (a, b)]
    return names[0] is not None and names[0] == names[1]


def _same_tokens(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of the patch tokens that stand at, and are made of, the same patches in either backend.

    Args:
        x, y: owners of an image's patches, [patches].
    """
    differ = x != y
    tainted = np.union1d(x[differ], y[differ])
    ours, theirs = np.unique(x[x >= 0]), np.unique(y[y >= 0])
    same = np.setdiff1d(np.intersect1d(ours, theirs), tainted)
    return np.searchsorted(ours, same), np.searchsorted(theirs, same)


def _nearest(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """For each row of x [K, C] the row of y that points most the same way."""
    one, other = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), TINY) for v in (x, y))
    return y[(one @ other.T).argmax(axis=1)]


def _owners(trace: Trace, block: int | None) -> NDArray[Any]:
    entry = trace.blocks[0].entry
    done = [c for c in trace.choices or () if block is not None and c.block <= block]
    return owners(done, entry.shape[1] - trace.num_prefix, len(entry))[-1]


def _cause(
    alone: Sequence[Mapping[str, Any]], tolerance: float
) -> tuple[str, str, float, float] | None:
    """(stage, part, its error, the median) of the block that stands out, if one does."""
    usual = float(np.median([own_error(row) for row in alone]))
    stage, part, error = _worst(alone)
    if error < np.inf and error <= max(STANDS_OUT * usual, limit_of(tolerance)):
        return None
    return stage, part, error, usual


def _worst(alone: Sequence[Mapping[str, Any]]) -> tuple[str, str, float]:
    """(stage, part in words, its error) of the largest error, the first of equal ones."""
    row = max(alone, key=own_error)
    error = own_error(row)
    part = next(part for part in PARTS if (row[part] or 0.0) == error)
    return row["stage"], PARTS[part], error
