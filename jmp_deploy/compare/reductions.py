"""Where two backends first keep different tokens, and whether rounding explains it.

A reduction sorts tokens by a rating and keeps K. Two tokens that are rated alike (a near tie) may
change places through rounding alone: the outputs hardly change, and nothing is wrong. A token that
changes places because its rating moved far is another matter.

Only the first reduction in which an image's tokens differ is judged: from there on the backends
see different tokens, and what follows is inherited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import GraphError
from ..jmp.trace import patch_ids
from .measures import TABLE, TINY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..jmp.trace import Choice, Trace


def report(a: Trace, b: Trace, precision: str) -> dict[str, Any]:
    """Compares the choices of two backends that saw the same images.

    Returns:
        {"a", "b", "selection", "tolerance", "images", "first", "flagged", "near_ties", "nodes",
        "verdict"}; first is the node where the tokens that are kept, or what they take in, first
        differ, None if they never do. nodes has for each reduction:
        "node", "block", "keep", "of": its name, block, K and M;
        "same_set", "shared": share of images with the same kept set, mean share of tokens kept by
            both;
        "first_here": images whose tokens first differ here, of which "near_ties" are explained by
            rounding and "flagged" are not ("images": their indices);
        "margin": largest gap in a's rating between tokens that changed places here (or in their
            importance, see `_judge`), over the interquartile range of the image's ratings;
        "merged_elsewhere": images that keep the same tokens and first merge others differently;
        "moved": largest move of a rating over that range, at the 90th percentile of an image's
            tokens, among images that came in alike.

    Raises:
        GraphError: the backends have different reductions.
    """
    if a.choices is None or b.choices is None:
        raise ValueError("both traces need choices")
    names_a, names_b = ([c.name for c in trace.choices or ()] for trace in (a, b))
    if names_a != names_b:
        raise GraphError(f"{a.backend} has reductions {names_a}, {b.backend} has {names_b}")
    tolerance = TABLE[precision].near_tie
    nodes: list[dict[str, Any]] = []
    patches = a.choices[0].rating.shape[1] if a.choices else 0
    images = len(a.choices[0].kept) if a.choices else 0
    alike: NDArray[Any] = np.ones(images, dtype=bool)
    histories = (patch_ids(trace.choices or (), patches, images) for trace in (a, b))
    steps = zip(a.choices, b.choices, *(ids[1:] for ids in histories), strict=True)
    for ours, theirs, *kept in steps:
        node, alike = _node(ours, theirs, (kept[0], kept[1]), alike, tolerance)
        nodes.append(node)
    first = next((n["node"] for n in nodes if n["first_here"] or n["merged_elsewhere"]), None)
    result = {
        "a": a.backend,
        "b": b.backend,
        "selection": a.choices[0].selection if a.choices else None,
        "tolerance": tolerance,
        "images": images,
        "first": first,
        "near_ties": sum(n["near_ties"] for n in nodes),
        "flagged": sum(n["flagged"] for n in nodes),
        "nodes": nodes,
    }
    return {**result, "verdict": _verdict(result, precision)}


def _node(
    ours: Choice,
    theirs: Choice,
    kept: tuple[NDArray[Any], NDArray[Any]],
    alike: NDArray[Any],
    tolerance: float,
) -> tuple[dict[str, Any], NDArray[Any]]:
    """The report on one reduction, and which images [B] are alike after it.

    Args:
        kept: patches that each keeps, [B, K].
        alike: images whose tokens came in alike: the same patches, merged the same way.
    """
    same = (kept[0] == kept[1]).all(axis=1)
    same_fate = same & (ours.fate == theirs.fate).all(axis=1)
    shared = [len(np.intersect1d(p, q)) / len(p) for p, q in zip(*kept, strict=True)]
    first = np.flatnonzero(alike & ~same)
    judged = [_judge(ours, theirs, image, tolerance) for image in first]
    flagged = [int(i) for i, (_, ok) in zip(first, judged, strict=True) if not ok]
    moves = [_moved(ours.rating[i], theirs.rating[i]) for i in np.flatnonzero(alike)]
    node = {
        "node": ours.name,
        "block": ours.block,
        "keep": ours.kept.shape[1],
        "of": ours.rating.shape[1],
        "same_set": float(same.mean()),
        "shared": float(np.mean(shared)),
        "first_here": len(first),
        "near_ties": len(first) - len(flagged),
        "flagged": len(flagged),
        "merged_elsewhere": int((alike & same & ~same_fate).sum()),
        "margin": max((margin for margin, _ in judged), default=None),
        "moved": max((float(np.quantile(move, 0.9)) for move in moves), default=None),
        "images": flagged,
    }
    return node, alike & same_fate


def _judge(ours: Choice, theirs: Choice, image: Any, tolerance: float) -> tuple[float, bool]:
    """(margin, whether rounding explains the tokens that changed places).

    Rounding explains it if no such token's rating moved further than `tolerance`. With selection
    "distinct" a rating may also jump: it is the largest cosine to a more important token, and of
    two tokens alike in looks and importance only the less important one is redundant. So a jump
    is explained too where the order of importance changed among near ties; the margin is then
    theirs.
    """
    out = np.setdiff1d(ours.kept[image], theirs.kept[image])
    into = np.setdiff1d(theirs.kept[image], ours.kept[image])
    rating = _tame(ours.rating[image])
    margin = float(rating[out].max() - rating[into].min()) / _spread(rating)
    moved = _moved(ours.rating[image], theirs.rating[image])
    jumped = [token for token in np.union1d(out, into) if moved[token] > tolerance]
    if ours.selection != "distinct" or not jumped:
        return margin, not jumped
    x, y = _tame(ours.importance[image]), _tame(theirs.importance[image])
    flips = [_largest_flip(x, y, token) for token in jumped]
    explained = all(0 < flip <= tolerance for flip in flips)
    return (max(flips) if explained else margin), explained


def _largest_flip(x: NDArray[Any], y: NDArray[Any], token: int) -> float:
    """Largest gap in importance between `token` and one that overtook it, or that it overtook.

    Over the interquartile range of x; 0 if none did. Equal importance goes by index.
    """
    index = np.arange(len(x))

    def above(values: NDArray[Any]) -> NDArray[Any]:
        equal = (values == values[token]) & (index < token)
        return (values > values[token]) | equal

    flipped = above(x) != above(y)
    if not flipped.any():
        return 0.0
    return max(float(np.abs(x[flipped] - x[token]).max()) / _spread(x), TINY)


def _moved(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """How far each rating moved, over the interquartile range: [M]."""
    tame = _tame(x)
    return np.abs(_tame(y) - tame) / _spread(tame)


def _tame(values: NDArray[Any]) -> NDArray[Any]:
    """In float64, infinities taken for the largest and smallest finite value.

    The most important token is rated infinitely distinct, one without a number last.
    """
    wide = np.asarray(values, dtype=np.float64)
    finite = wide[np.isfinite(wide)]
    if not len(finite):
        return np.zeros_like(wide)
    return np.nan_to_num(
        wide, nan=finite.min(), posinf=float(finite.max()), neginf=float(finite.min())
    )


def _spread(values: NDArray[Any]) -> float:
    low, high = np.quantile(values, [0.25, 0.75])
    return max(float(high - low), TINY)


def _verdict(result: dict[str, Any], precision: str) -> str:
    if not result["nodes"]:
        return "the model reduces no tokens"
    if result["first"] is None:
        return "both keep the same tokens everywhere"
    where = f"tokens first differ at {result['first']}"
    if elsewhere := sum(n["merged_elsewhere"] for n in result["nodes"]):
        where += f"; in {elsewhere} images first by what a kept token takes in"
    if not result["flagged"]:
        if not result["near_ties"]:
            return f"{where}; those that are kept differ nowhere for another reason"
        return (
            f"{where}; every difference of those that are kept is a near tie of a size that "
            f"{precision.upper()} rounding explains: by itself no error"
        )
    nodes = ", ".join(n["node"] for n in result["nodes"] if n["flagged"])
    return (
        f"{where}; {result['flagged']} of them are more than rounding explains (at {nodes}): "
        "ratings differ there, look closer with --debug"
    )
