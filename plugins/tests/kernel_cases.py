"""Cases for the kernel and their comparison with the oracle; for the host and the GPU tests.

Needs tests/oracle.py on sys.path.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
from kernel_library import Outputs, bfloat16

# Decisions closer than this may fall either way. float32 sums stay well below it; so do the tuned
# kernel's three products of halves (1e-7, plus a matrix unit's truncated sums on a GPU).
CLEAR = 4e-6
# Relative: a few ulps of float32, one of the others.
TOLERANCE: dict[Any, float] = {np.dtype(np.float32): 2e-6, np.dtype(np.float16): 1e-3}
if bfloat16 is not None:
    TOLERANCE[bfloat16] = 8e-3

Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def attributes(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "num_prefix": 1,
        "num_keep": 6,
        "num_heads": 2,
        "head_dim": 8,
        "scale": 8**-0.5,
        "tau": 0.3,
        "granularity": oracle.TOKEN,
        "importance": oracle.CLASS_ROW,
        "proportional": 1,
        "selection": oracle.IMPORTANCE,
        "merge_weight": 1.0,
    }
    return values | changes


def random_case(
    seed: int,
    attrs: dict[str, Any],
    *,
    batch: int = 2,
    tokens: int = 15,
    channels: int = 16,
    parts: int = 3,
    extra: int = 0,
    broadcast: bool = False,
    dtype: Any = np.float32,
) -> Case:
    """Normal x and qkv, whole sizes 1 to 4. `parts` * H * d + `extra` columns of qkv."""
    rng = np.random.default_rng(seed)
    width = parts * attrs["num_heads"] * attrs["head_dim"] + extra
    x = rng.standard_normal((batch, tokens, channels)).astype(dtype)
    qkv = rng.standard_normal((batch, tokens, width)).astype(dtype)
    size = rng.integers(1, 5, (1 if broadcast else batch, tokens)).astype(dtype)
    return x, qkv, size


def tied_case(seed: int, attrs: dict[str, Any], *, batch: int, tokens: int) -> Case:
    """Values for which float32 is exact: one head, keys with one or four entries of +-1.

    Their length is 1 or 2, so similarities are multiples of 1/4; there are only a few different
    keys, so importances and similarities tie all the time, exactly, in every implementation.
    """
    assert attrs["num_heads"] == 1
    rng = np.random.default_rng(seed)
    d = attrs["head_dim"]
    pool = np.zeros((5, d), np.float32)
    for row in pool:
        chosen = rng.choice(d, 1 if rng.random() < 0.5 else 4, replace=False)
        row[chosen] = rng.choice([-1.0, 1.0], len(chosen))
    keys = pool[rng.integers(0, len(pool), (batch, tokens))]
    query = rng.integers(-1, 2, (batch, tokens, d)).astype(np.float32)
    qkv = np.ascontiguousarray(np.concatenate([query, keys], axis=2))
    x = rng.standard_normal((batch, tokens, 8)).astype(np.float32)
    return x, qkv, np.ones((1, tokens), np.float32)


def assert_matches(
    got: Outputs,
    case: Case,
    attrs: dict[str, Any],
    *,
    exact: bool = False,
    tolerance: float | None = None,
) -> int:
    """Compare with the oracle; returns the number of samples that had no near tie.

    `tolerance`: relative and absolute, instead of the default for the type.
    `exact`: every decision of this case is computed exactly, so ties must be broken alike.
    """
    x, _, size = case
    want = oracle.token_reduce(*case, **attrs)
    clear = np.ones(len(x), bool) if exact else want.clear(CLEAR)
    np.testing.assert_array_equal(got.index[clear], want.index[clear])
    tolerance = tolerance or TOLERANCE[x.dtype]
    for name in ("y", "out_size", "log_size"):
        found = getattr(got, name)[clear].astype(np.float64)
        expected = getattr(want, name)[clear]
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    assert_legal(got, x, np.broadcast_to(size, x.shape[:2]), attrs)
    return int(clear.sum())


def assert_legal(got: Outputs, x: np.ndarray, size: np.ndarray, attrs: dict[str, Any]) -> None:
    """What holds whatever the values: the form of the result, and copies bit for bit."""
    prefix, keep = attrs["num_prefix"], attrs["num_keep"]
    assert got.index.min() >= 0 and got.index.max() < 3 * keep
    slots = np.broadcast_to(np.arange(keep), (len(x), keep))
    np.testing.assert_array_equal(got.index[got.index < keep].reshape(-1, keep), slots)
    for b, places in enumerate(got.destination):
        counts = np.bincount(places[places >= 0], minlength=prefix + keep)
        assert counts.min() >= 1, "an output position without a token"
        for place in np.flatnonzero(counts == 1):
            token = int(np.flatnonzero(places == place)[0])
            assert got.y[b, place].tobytes() == x[b, token].tobytes()
            assert got.out_size[b, place].tobytes() == size[b, token].tobytes()
