"""From answers per image to accuracy: one table of columns in, one result out.

An unsharded run and `merge` both end here, so that they give the same figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.stats import paired_difference, share_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Rows = dict[str, Array]

TOP = 5
COLUMNS = ("index", "label", "top1", "in_top5")
DENSE_COLUMNS = ("dense_top1", "dense_in_top5")
"""Columns of a table of answers, one row per image, all int64: position in the data set, class
number, the model's answer, whether the label is among its five best; the same of the dense model;
`knn` and `dense_knn`, answers of the nearest neighbours, where features were probed."""


def top_classes(scores: Array) -> Array:
    """[n, classes] -> [n, min(5, classes)] int32, best first, ties to the lower class number."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :TOP].astype(np.int32)


def answers(index: Array, labels: Array, model: Array, dense: Array | None) -> Rows:
    """Rows from the best classes [n, k] of the model and, where there is one, the dense model."""
    rows = {"index": index, "label": labels}
    for prefix, best in (("", model), ("dense_", dense)):
        if best is not None:
            rows[f"{prefix}top1"] = best[:, 0]
            rows[f"{prefix}in_top5"] = (best == labels[:, None]).any(1)
    return {name: np.asarray(column, dtype=np.int64) for name, column in rows.items()}


def score(rows: Rows) -> dict[str, Any]:
    """Accuracy and, where the dense model's answers are there, what was lost against it.

    All shares are percent and differences are points; a positive drop is a loss. Intervals are of
    95 %: Wilson's for a share, an exact paired one for a drop (`core.stats`). None has no width:
    100 right answers out of 100 are no proof of 100 %.

    Returns:
        {"n", "top1", "top5", "top1_ci95", "agreement_with_dense", "drop_points", "ci95" (of the
        drop), "top5_drop_points", "dense": {"top1", "top5"}, "only_dense_right",
        "only_model_right", "knn": {...}}; null where there is no dense model or no k-NN.
    """
    right = rows["top1"] == rows["label"]
    result: dict[str, Any] = {
        "n": len(right),
        "top1": _percent(right),
        "top5": _percent(rows["in_top5"]),
        "top1_ci95": [100 * bound for bound in share_interval(int(right.sum()), len(right))],
        "agreement_with_dense": None,
        "drop_points": None,
        "ci95": None,
        "top5_drop_points": None,
        "dense": None,
        "only_dense_right": None,
        "only_model_right": None,
        "knn": None,
    }
    if "dense_top1" in rows:
        dense = rows["dense_top1"] == rows["label"]
        result.update(
            agreement_with_dense=_percent(rows["top1"] == rows["dense_top1"]),
            **_drop(dense, right),
            top5_drop_points=_percent(rows["dense_in_top5"]) - _percent(rows["in_top5"]),
            dense={"top1": _percent(dense), "top5": _percent(rows["dense_in_top5"])},
            only_dense_right=int((dense & ~right).sum()),
            only_model_right=int((right & ~dense).sum()),
        )
    if "knn" in rows:
        result["knn"] = _knn(rows)
    return result


def _knn(rows: Rows) -> dict[str, Any]:
    right = rows["knn"] == rows["label"]
    result: dict[str, Any] = {"top1": _percent(right), "dense": None}
    if "dense_knn" in rows:
        dense = rows["dense_knn"] == rows["label"]
        agreement = _percent(rows["knn"] == rows["dense_knn"])
        result.update(dense=_percent(dense), agreement_with_dense=agreement, **_drop(dense, right))
    return result


def _drop(dense: Array, model: Array) -> dict[str, Any]:
    lost, gained = int((dense & ~model).sum()), int((model & ~dense).sum())
    interval = paired_difference(lost, gained, len(model))
    return {
        "drop_points": 100 * (lost - gained) / len(model),
        "ci95": [100 * bound for bound in interval],
    }


def _percent(hits: Array) -> float:
    return 100.0 * int(hits.sum()) / len(hits)
