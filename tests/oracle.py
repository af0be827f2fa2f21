"""Float64 oracle of the node JMPTokenReduce, written from its contract alone.

Plain loops, one sample at a time, no shared code with `jmp_deploy.jmp.reduction` or the CUDA
kernel: three implementations that agree were written three times. Besides the result it returns how
close every decision was, so that a test can tell a near tie (two correct float32 programs may
differ) from a bug.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOKEN, SAMPLE = 0, 1
CLASS_ROW, RECEIVED = 0, 1
IMPORTANCE, DISTINCT = 0, 1
PRUNED = -1

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Reduced:
    """What the node returns, what it decided, and by how much.

    With B samples, N tokens, P prefix tokens, M = N - P patch tokens, K kept, C channels:

    Attributes:
        y: [B, P+K, C] reduced tokens.
        out_size: [B, P+K] patches that each output token stands for.
        log_size: [B, P+K] natural logarithm of `out_size`.
        kept: [B, K] input index of each critical token, ascending.
        destination: [B, N] output position that an input token went to; -1 = pruned.
        index: [B, M] fate * K + k of each patch token: 0, it is kept token k; 1, it was merged into
            that; 2, it was pruned and resembles that most (k = 0 where nothing compares).
        importance: [B, N] mean attention that the token receives; prefix tokens included.
        similarity: [B, N] v of the non-critical patch tokens; NaN elsewhere.
        select_margin: [B] how close the choice of the critical set was: importance (or, for
            DISTINCT, the rating sqrt(importance) * distance) of the K-th token against the next,
            and for DISTINCT the gap in importance between any two tokens whose order decides it;
            inf when K = M.
        decide_margin: [B, N] |v - tau| (token) or |mean v - tau| (sample); inf where no decision.
        target_margin: [B, N] similarity to the best critical token minus that to the second
            best; inf where there is no second or no decision.
    """

    y: Float
    out_size: Float
    log_size: Float
    kept: Int
    destination: Int
    index: Int
    importance: Float
    similarity: Float
    select_margin: Float
    decide_margin: Float
    target_margin: Float

    def clear(self, margin: float) -> NDArray[np.bool_]:
        """[B] True for samples in which no decision was closer than `margin`.

        An exact tie (margin 0) is not clear: a test of ties must use values that every
        implementation computes exactly, and then compare without this mask.
        """
        return (
            (self.select_margin > margin)
            & (self.decide_margin.min(axis=1) > margin)
            & (self.target_margin.min(axis=1) > margin)
        )


def token_reduce(
    x: np.ndarray,
    qkv: np.ndarray,
    size: np.ndarray,
    *,
    num_prefix: int,
    num_keep: int,
    num_heads: int,
    head_dim: int,
    scale: float,
    tau: float,
    granularity: int = TOKEN,
    importance: int = CLASS_ROW,
    proportional: int = 1,
    selection: int = IMPORTANCE,
    merge_weight: float = 1.0,
) -> Reduced:
    """Run the node in float64.

    Args:
        x: [B, N, C] residual stream.
        qkv: [B, N, W] projection: queries of all heads, then keys of all heads, then anything.
        size: [B, N] or [1, N] token sizes.
        The rest: the node's attributes.

    Returns:
        Outputs, decisions and margins.
    """
    batch, tokens, channels = x.shape
    out_tokens = num_prefix + num_keep
    result = Reduced(
        y=np.zeros((batch, out_tokens, channels)),
        out_size=np.zeros((batch, out_tokens)),
        log_size=np.zeros((batch, out_tokens)),
        kept=np.zeros((batch, num_keep), dtype=np.int64),
        destination=np.full((batch, tokens), PRUNED, dtype=np.int64),
        index=np.zeros((batch, tokens - num_prefix), dtype=np.int64),
        importance=np.zeros((batch, tokens)),
        similarity=np.full((batch, tokens), np.nan),
        select_margin=np.full(batch, np.inf),
        decide_margin=np.full((batch, tokens), np.inf),
        target_margin=np.full((batch, tokens), np.inf),
    )
    size = np.broadcast_to(size, (batch, tokens))
    with np.errstate(all="ignore"):  # NaN and inf are legal inputs
        for b in range(batch):
            _reduce_sample(
                result,
                b,
                x[b].astype(np.float64),
                qkv[b].astype(np.float64),
                size[b].astype(np.float64),
                num_prefix=num_prefix,
                num_keep=num_keep,
                num_heads=num_heads,
                head_dim=head_dim,
                scale=scale,
                tau=tau,
                granularity=granularity,
                importance=importance,
                proportional=proportional,
                selection=selection,
                merge_weight=merge_weight,
            )
    return result


def _reduce_sample(
    result: Reduced,
    b: int,
    x: Float,
    qkv: Float,
    size: Float,
    *,
    num_prefix: int,
    num_keep: int,
    num_heads: int,
    head_dim: int,
    scale: float,
    tau: float,
    granularity: int,
    importance: int,
    proportional: int,
    selection: int,
    merge_weight: float,
) -> None:
    tokens = x.shape[0]
    inner = num_heads * head_dim
    query = qkv[:, :inner].reshape(tokens, num_heads, head_dim)
    key = qkv[:, inner : 2 * inner].reshape(tokens, num_heads, head_dim)

    # 1. Importance: attention that a key token receives, mean over heads (and query rows).
    rows = [0] if importance == CLASS_ROW else list(range(tokens))
    received = np.zeros(tokens)
    for head in range(num_heads):
        for row in rows:
            logits = scale * (key[:, head] @ query[row, head])
            if proportional:
                logits = logits + np.log(size)
            weights = np.exp(logits - logits.max())
            received += weights / weights.sum()
    received /= num_heads * len(rows)
    result.importance[b] = received

    metric = key.mean(axis=1)
    metric = metric / np.maximum(np.sqrt((metric**2).sum(axis=1)), 1e-12)[:, None]

    # 2. Critical set: largest first, ties to the lower index, NaN last.
    patches = range(num_prefix, tokens)
    order = sorted(patches, key=lambda t: (np.isnan(received[t]), -np.nan_to_num(received[t]), t))
    if selection == DISTINCT:
        order, margin = _by_distinctness(order, received, metric, num_keep)
        result.select_margin[b] = margin
    critical = sorted(order[:num_keep])
    others = sorted(order[num_keep:])
    result.kept[b] = critical
    if others and selection == IMPORTANCE:
        result.select_margin[b] = received[order[num_keep - 1]] - received[order[num_keep]]
    for t in range(num_prefix):
        result.destination[b, t] = t
    for slot, t in enumerate(critical):
        result.destination[b, t] = num_prefix + slot
        result.index[b, t - num_prefix] = slot

    # 3. Similarity of each other token to its nearest critical token. A NaN never wins.
    nearest: dict[int, int] = {}
    for i in others:
        best, best_slot, second = np.nan, -1, -np.inf
        for slot, j in enumerate(critical):
            s = np.clip(metric[i] @ metric[j], -1.0, 1.0)
            if np.isnan(s):
                continue
            if best_slot < 0 or s > best:
                second = best if best_slot >= 0 else second
                best, best_slot = s, slot
            elif s > second:
                second = s
        result.similarity[b, i] = best
        result.target_margin[b, i] = best - second
        nearest[i] = best_slot

    # 4. Decision: a comparison with NaN is false, so such a token is pruned.
    if others:
        values = np.array([result.similarity[b, i] for i in others])
        judged = values if granularity == TOKEN else np.full(len(others), values.mean())
        for i, value in zip(others, judged, strict=True):
            result.decide_margin[b, i] = abs(value - tau)
            merged = value >= tau and nearest[i] >= 0
            if merged:
                result.destination[b, i] = num_prefix + nearest[i]
            fate = 1 if merged else 2
            result.index[b, i - num_prefix] = fate * num_keep + max(nearest[i], 0)

    # 5. and 6. Merge by size, guests at `merge_weight`; a token without guests is copied.
    for out in range(num_prefix + num_keep):
        members = [t for t in range(tokens) if result.destination[b, t] == out]
        base = out if out < num_prefix else critical[out - num_prefix]
        if len(members) == 1:
            result.y[b, out] = x[base]
        else:
            guests = [t for t in members if t != base]
            weights = {base: size[base], **{t: merge_weight * size[t] for t in guests}}
            weighted = sum((w * x[t] for t, w in weights.items() if w), np.zeros(x.shape[1]))
            result.y[b, out] = weighted / sum(weights.values())
        result.out_size[b, out] = sum(size[t] for t in members)
        result.log_size[b, out] = np.log(result.out_size[b, out])


def _by_distinctness(
    elders_first: list[int], received: Float, metric: Float, num_keep: int
) -> tuple[list[int], float]:
    """Tokens in order of distinctness, most first, and the margin of the first `num_keep`.

    Distinctness: sqrt(importance) times the distance (1 - cosine) to the nearest token that comes
    before in `elders_first`; infinite without one. NaN importance counts as none.
    """
    root = {t: np.sqrt(max(np.nan_to_num(received[t]), 0.0)) for t in elders_first}
    rating: dict[int, float] = {}
    nearest: dict[int, int] = {}
    freed: dict[int, float] = {}  # the rating if the nearest elder were none
    for position, t in enumerate(elders_first):
        found = []
        for elder in elders_first[:position]:
            s = np.clip(metric[t] @ metric[elder], -1.0, 1.0)
            if not np.isnan(s):
                found.append((s, elder))
        found.sort(reverse=True)
        rating[t] = root[t] * (1 - found[0][0]) if found else np.inf
        nearest[t] = found[0][1] if found else -1
        freed[t] = root[t] * (1 - found[1][0]) if len(found) > 1 else np.inf
    order = sorted(elders_first, key=lambda t: (-rating[t], t))
    if num_keep == len(order):
        return order, np.inf
    last, first_out = rating[order[num_keep - 1]], rating[order[num_keep]]
    margin = np.inf if np.isinf(last) else last - first_out
    stays = set(order[:num_keep])
    # Pairs whose order by importance matters: with the younger first, the set would be another.
    for position, young in enumerate(elders_first):
        for old in elders_first[:position]:
            frees_young = young not in stays and nearest[young] == old and freed[young] >= last
            s = np.clip(metric[young] @ metric[old], -1.0, 1.0)
            dooms_old = old in stays and root[old] * (1 - s) <= first_out
            if frees_young or dooms_old:
                margin = min(margin, received[old] - received[young])
    return order, float(margin)
