"""Joint merging and pruning on tensors: the reference that every other implementation follows.

Plain functions of PyTorch tensors; no model, no state. The definition is in docs/method.md (the
abstract of "Joint merging and pruning: adaptive selection of better token compression strategy",
J. Electron. Imaging 33(4) 043045, gives the idea; the formulas are ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ScheduleError
from .node import MERGED, PRUNED, TokenReduce


@dataclass(frozen=True)
class Plan:
    """What becomes of each patch token of a batch. Patch indices count from 0 after the prefix.

    Attributes:
        kept: [B, K] int64, critical tokens in original order.
        rest: [B, M-K] int64, non-critical tokens in original order.
        target: [B, M-K] int64, position in `kept` of the critical token that each resembles most.
        merged: [B, M-K] bool, merged into its target (true) or pruned (false).
        importance: [B, M] float, attention by the class token (or by all); of every patch token.
        similarity: [B, M-K] float, cosine between each non-critical token and its target.
        rating: [B, M] float, what the K critical tokens were chosen by, largest first.
    """

    kept: Tensor
    rest: Tensor
    target: Tensor
    merged: Tensor
    importance: Tensor
    similarity: Tensor
    rating: Tensor


def token_reduce(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
) -> tuple[Tensor, ...]:
    """Reduces M patch tokens to K, sample by sample.

    Args:
        x: [B, N, C] residual stream after the attention residual.
        qkv: [B, N, W] QKV projection of the block (see `node.py` for its columns).
        size: [B, N] or [1, N], patches that each token stands for.
        attributes: K, tau and the rest.

    Returns:
        y [B, P+K, C], out_size [B, P+K] and log_size [B, P+K], all of x's dtype. Prefix tokens
        first, then the kept ones in original order. With `attributes.index` also index [B, M]
        int32 (see `node.py`).

    Raises:
        ScheduleError: fewer than K patch tokens come in.
    """
    return planned_reduce(x, qkv, size, attributes)[1]


def planned_reduce(
    x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
) -> tuple[Plan, tuple[Tensor, ...]]:
    """`token_reduce` and what it decided; arguments and errors as there.

    Whoever wants to see decisions takes them from here: they are those of the result.
    """
    plan = make_plan(qkv, size, attributes)
    reduced = apply_plan(x, size, plan, attributes.num_prefix, attributes.merge_weight)
    return plan, (*reduced, index_of(plan)) if attributes.index else reduced


def make_plan(qkv: Tensor, size: Tensor, attributes: TokenReduce) -> Plan:
    """Decides which patch tokens are critical and what becomes of the others.

    Args and errors as for `token_reduce`. Works in float32 (float64 stays float64).
    """
    tokens = qkv.shape[1]
    prefix, keep = attributes.num_prefix, attributes.num_keep
    if tokens - prefix < keep:
        raise ScheduleError(
            f"a reduction keeps {keep} patch tokens but only {tokens - prefix} come in",
            "resolve the schedule for the image size that the model is run with",
        )
    query, key = _queries_and_keys(qkv, attributes)
    importance = _importance(query, key, size.to(key.dtype), attributes)[:, prefix:]
    metric = key.mean(dim=1)[:, prefix:]  # [B, M, d]
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    rating = torch.where(importance.isnan(), -torch.inf, importance)
    if attributes.selection == "distinct":
        rating = _distinctness(rating, metric)
    order = rating.sort(dim=1, descending=True, stable=True).indices
    kept = order[:, :keep].sort(dim=1).values
    rest = order[:, keep:].sort(dim=1).values

    cosine = _rows(metric, rest) @ _rows(metric, kept).transpose(1, 2)
    similarity, target = cosine.clamp(-1, 1).max(dim=2)
    if attributes.granularity == "token":
        merged = similarity >= attributes.tau
    else:
        merged = (similarity.mean(dim=1, keepdim=True) >= attributes.tau).expand_as(similarity)
    return Plan(kept, rest, target, merged, importance, similarity, rating)


def apply_plan(
    x: Tensor, size: Tensor, plan: Plan, num_prefix: int, merge_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges and prunes as planned; arguments and results as for `token_reduce`.

    A target takes over the whole size of what is merged into it, but of its content only
    `merge_weight`: y_j = (s_j x_j + w sum s_i x_i) / (s_j + w sum s_i).

    On a GPU the sums over merged tokens are in no fixed order (PyTorch's scatter_add).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(work)
    sizes = size.to(work).expand(x.shape[0], -1)
    patches, patch_sizes = wide[:, num_prefix:], sizes[:, num_prefix:]

    weight = torch.where(plan.merged, patch_sizes.gather(1, plan.rest), 0)
    # Where, not a product with zero: a pruned NaN must leave no trace.
    share = weight * merge_weight
    incoming = torch.where(plan.merged[..., None], _rows(patches, plan.rest) * share[..., None], 0)
    own, own_size = _rows(patches, plan.kept), patch_sizes.gather(1, plan.kept)
    channels = plan.target[..., None].expand_as(incoming)
    total = (own * own_size[..., None]).scatter_add(1, channels, incoming)
    kept_size = own_size.scatter_add(1, plan.target, weight)
    divisor = own_size.scatter_add(1, plan.target, share)
    # A token that takes in nothing is copied, not multiplied and divided by its size.
    untouched = (divisor == own_size)[..., None]
    kept = torch.where(untouched, own, total / divisor[..., None])

    y = torch.cat((wide[:, :num_prefix], kept), dim=1)
    out_size = torch.cat((sizes[:, :num_prefix], kept_size), dim=1)
    return y.to(x.dtype), out_size.to(x.dtype), out_size.log().to(x.dtype)


def index_of(plan: Plan) -> Tensor:
    """What became of each patch token: [B, M] int32, as `node.py` says."""
    keep = plan.kept.shape[1]
    slots = torch.arange(keep, device=plan.kept.device).expand_as(plan.kept)
    others = plan.target + torch.where(plan.merged, MERGED * keep, PRUNED * keep)
    tokens = torch.cat((plan.kept, plan.rest), dim=1)
    found = torch.empty_like(tokens).scatter(1, tokens, torch.cat((slots, others), dim=1))
    return found.to(torch.int32)


def positions_of(index: Tensor, keep: int, before: Tensor) -> Tensor:
    """Where the kept tokens stand: [B, K], of `before` [B, M], where the incoming ones did.

    Args:
        index: [B, M] of a reduction to K = `keep`.
        before: int64.
    """
    # Who is not kept goes to a place that nobody reads: who is has a place of its own, so that the
    # order in which an engine scatters is all the same. (TensorRT wants the data no smaller than
    # the indices.)
    slot = index.clamp(max=keep).long()
    return torch.zeros_like(slot).scatter(1, slot, before.expand_as(slot))[:, :keep]


def slots_of(index: Tensor, keep: int) -> Tensor:
    """The kept token, 0 to K-1, that each incoming one went to or resembles: [B, M] int64."""
    return index.long() % keep


def _queries_and_keys(qkv: Tensor, attributes: TokenReduce) -> tuple[Tensor, Tensor]:
    """Splits [B, N, W] into queries and keys, each [B, H, N, d]."""
    batch, tokens, _ = qkv.shape
    heads, dim = attributes.num_heads, attributes.head_dim
    both = qkv[..., : 2 * heads * dim].to(torch.promote_types(qkv.dtype, torch.float32))
    query, key = both.reshape(batch, tokens, 2, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key


def _importance(query: Tensor, key: Tensor, size: Tensor, attributes: TokenReduce) -> Tensor:
    """Attention to every token, prefix included: [B, N], mean over heads (and queries)."""
    if attributes.importance == "class":
        query = query[:, :, :1]
    logits = (query * attributes.scale) @ key.transpose(-2, -1)  # [B, H, 1 or N, N]
    if attributes.proportional:
        logits = logits + size.log()[:, None, None, :]
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def _distinctness(importance: Tensor, metric: Tensor) -> Tensor:
    """sqrt(a) * (1 - r), r the largest cosine to a more important token: [B, M].

    Infinite for a token without such a one. Of two equally important tokens the one of lower
    index counts as more important.
    """
    index = torch.arange(importance.shape[1], device=importance.device)
    mine, other = importance[:, :, None], importance[:, None, :]
    elder = (other > mine) | ((other == mine) & (index < index[:, None]))
    cosine = (metric @ metric.transpose(1, 2)).clamp(-1, 1)
    redundancy = cosine.masked_fill(~elder | cosine.isnan(), -torch.inf).amax(dim=2)
    rating = importance.clamp_min(0).sqrt() * (1 - redundancy)
    return rating.masked_fill(redundancy == -torch.inf, torch.inf)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values [B, M, C] at index [B, L] along the tokens: [B, L, C]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
