"""Every rule of token reduction that we compare, as one function of the node's inputs.

A `Rule` replaces `JMPBlocks.reduce`, so all methods run in the same model, at the same place of
the same blocks, with the same number of tokens. Written from the papers, not from their code; what
a method does beyond its choice of tokens (schedules found by search, training) is left out, and
`methods.py` says so for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from jmp_deploy.jmp.node import TokenReduce
from jmp_deploy.jmp.reduction import Plan, apply_plan, index_of


@dataclass
class Tally:
    """What a rule did, summed over images, for each reduction: [block order] of token counts."""

    merged: list[float] = field(default_factory=list)
    pruned: list[float] = field(default_factory=list)


@dataclass
class Rule:
    """One way to reduce M patch tokens to K. Call it in place of `reduction.token_reduce`.

    Attributes:
        importance: "class" (class token's attention row), "class_value" (times the norm of the
            value), "received" (attention from all queries), "random".
        metric: what the cosine is taken of: "key_mean" (keys, mean over heads), "keys" (all
            heads), "x", "x_normed" (x less its mean over the image's patch tokens).
        select: who goes. "importance": the M-K least important. "order": those that most resemble
            any token more important than themselves; "order_cost" and "order_root": least
            importance, or its root, times distance to that token first. "bipartite": ToMe's: of
            the tokens at even positions the M-K that most resemble one at an odd position.
        fate: "merge", "prune", "absolute" (merge where similarity >= tau), "sample" (the same by
            the mean over the sample), "deviation" (prune below mean - tau * std), "rank" (prune
            the tau share of lowest importance), "fuse" (all into one extra token).
        tau: parameter of `fate`.
        weighting: "size", or "similarity" (size times similarity, as DiffRate remarks).
        merge_weight: how much of a merged token's content counts (see `node.TokenReduce`).
        keep_norm: rescale a merged token to the size-weighted mean norm of its parts.
        seed: of "random".
    """

    importance: str = "class"
    metric: str = "key_mean"
    select: str = "importance"
    fate: str = "merge"
    tau: float = 0.0
    weighting: str = "size"
    merge_weight: float = 1.0
    keep_norm: bool = False
    seed: int = 0
    tally: Tally | None = None
    calls: int = 0

    def __call__(
        self, x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
    ) -> tuple[Tensor, ...]:
        if self.fate == "fuse":
            return self._fuse(x, qkv, size, attributes)
        plan = self.plan(x, qkv, size, attributes)
        if self.tally is not None:
            self.tally.merged.append(float(plan.merged.sum()))
            self.tally.pruned.append(float((~plan.merged).sum()))
        prefix = attributes.num_prefix
        if self.weighting == "similarity":
            weighted = size.expand(x.shape[0], -1).clone()
            patches = weighted[:, prefix:]  # a view
            patches.scatter_(
                1, plan.rest, patches.gather(1, plan.rest) * plan.similarity.clamp_min(0)
            )
            size = weighted
        if not self.keep_norm:
            reduced = apply_plan(x, size, plan, prefix, self.merge_weight)
            return (*reduced, index_of(plan)) if attributes.index else reduced
        y, out_size, log_size = apply_plan(x, size, plan, prefix, self.merge_weight)
        parts = x.norm(dim=-1, keepdim=True)
        norms, _, _ = apply_plan(parts, size, plan, prefix, self.merge_weight)
        return y * (norms / y.norm(dim=-1, keepdim=True).clamp_min(1e-12)), out_size, log_size

    def plan(self, x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce) -> Plan:
        """Who stays, who goes where; arguments as for `reduction.token_reduce`."""
        prefix, keep = attributes.num_prefix, attributes.num_keep
        patches = x.shape[1] - prefix
        leave = patches - keep
        importance = self._importance(x, qkv, size, attributes)[:, prefix:]
        metric = _metric(self.metric, x, qkv, attributes)[:, prefix:]
        if self.select == "importance" or leave == 0:
            pool_size = leave
            order = importance.sort(dim=1, descending=True, stable=True).indices
        elif self.select.startswith("order"):
            return self._plan_by_order(importance, metric, leave)
        elif self.select == "bipartite":
            pool_size = patches // 2
            positions = torch.arange(patches)
            order = torch.cat((positions[1::2], positions[0::2]))
            if patches % 2:  # one more even position than the pool holds
                order = torch.cat((positions[1::2], positions[-1:], positions[0:-1:2]))
            order = order.expand(x.shape[0], -1)
        else:
            raise ValueError(f"unknown selection {self.select!r}")
        if pool_size < leave:
            raise ValueError(f"{self.select}: at most {pool_size} of {patches} tokens can go")
        anchors = order[:, : patches - pool_size].sort(dim=1).values
        pool = order[:, patches - pool_size :].sort(dim=1).values
        cosine = _rows(metric, pool) @ _rows(metric, anchors).transpose(1, 2)
        similarity, nearest = cosine.clamp(-1, 1).max(dim=2)
        going = similarity.sort(dim=1, descending=True, stable=True).indices[:, :leave]
        going = going.sort(dim=1).values
        rest = pool.gather(1, going)
        similarity, nearest = similarity.gather(1, going), nearest.gather(1, going)
        stays = torch.ones(x.shape[0], patches, dtype=torch.bool)
        stays.scatter_(1, rest, False)
        kept = stays.nonzero()[:, 1].reshape(x.shape[0], keep)
        # Position of each anchor among the kept tokens.
        place = stays.cumsum(dim=1) - 1
        target = place.gather(1, anchors.gather(1, nearest))
        merged = self._merged(similarity, importance.gather(1, rest))
        return Plan(kept, rest, target, merged, importance, similarity, importance)

    def _plan_by_order(self, importance: Tensor, metric: Tensor, leave: int) -> Plan:
        """Redundant are those that resemble a token more important than themselves."""
        patches = importance.shape[1]
        order = importance.sort(dim=1, descending=True, stable=True).indices
        rank = order.argsort(dim=1)
        cosine = (metric @ metric.transpose(1, 2)).clamp(-1, 1)
        precedes = rank[:, None, :] < rank[:, :, None]
        redundancy = cosine.masked_fill(~precedes, -1).amax(dim=2)
        score = redundancy
        if self.select == "order_cost":
            score = -importance * (1 - redundancy)
        if self.select == "order_root":
            score = -importance.sqrt() * (1 - redundancy)
        score = score.scatter(1, order[:, :1], -torch.inf)  # the most important has no elder
        out = score.sort(dim=1, descending=True, stable=True).indices
        rest, kept = out[:, :leave].sort(dim=1).values, out[:, leave:].sort(dim=1).values
        between = _rows(metric, rest) @ _rows(metric, kept).transpose(1, 2)
        similarity, target = between.clamp(-1, 1).max(dim=2)
        merged = self._merged(similarity, importance.gather(1, rest))
        assert similarity.shape[1] == patches - kept.shape[1]
        return Plan(kept, rest, target, merged, importance, similarity, -score)

    def _merged(self, similarity: Tensor, importance: Tensor) -> Tensor:
        if self.fate == "merge":
            return torch.ones_like(similarity, dtype=torch.bool)
        if self.fate == "prune":
            return torch.zeros_like(similarity, dtype=torch.bool)
        if self.fate == "absolute":
            return similarity >= self.tau
        if self.fate == "sample":
            return (similarity.mean(dim=1, keepdim=True) >= self.tau).expand_as(similarity)
        if self.fate == "deviation":
            mean = similarity.mean(dim=1, keepdim=True)
            return similarity >= mean - self.tau * similarity.std(dim=1, keepdim=True)
        if self.fate == "rank":
            return importance >= importance.quantile(self.tau, dim=1, keepdim=True)
        raise ValueError(f"unknown fate {self.fate!r}")

    def _importance(self, x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce) -> Tensor:
        if self.importance == "random":
            random = torch.Generator().manual_seed(self.seed + self.calls)
            self.calls += 1
            return torch.rand(x.shape[0], x.shape[1], generator=random)
        query, key, value = _split(qkv, attributes)
        if self.importance != "received":
            query = query[:, :, :1]
        logits = (query * attributes.scale) @ key.transpose(-2, -1)
        if attributes.proportional:
            logits = logits + size.log()[:, None, None, :]
        row = logits.softmax(dim=-1).mean(dim=2)  # [B, H, N]
        if self.importance == "class_value":
            row = row * value.norm(dim=-1)
        return row.mean(dim=1)

    def _fuse(
        self, x: Tensor, qkv: Tensor, size: Tensor, attributes: TokenReduce
    ) -> tuple[Tensor, Tensor, Tensor]:
        """EViT: K-1 tokens stay, the others become one, weighted by their importance."""
        prefix, keep = attributes.num_prefix, attributes.num_keep
        importance = self._importance(x, qkv, size, attributes)[:, prefix:]
        order = importance.sort(dim=1, descending=True, stable=True).indices
        kept, rest = order[:, : keep - 1].sort(dim=1).values, order[:, keep - 1 :]
        weight = importance.gather(1, rest)[..., None]
        fused = (_rows(x[:, prefix:], rest) * weight).sum(dim=1, keepdim=True)
        fused = fused / weight.sum(dim=1, keepdim=True)
        y = torch.cat((x[:, :prefix], _rows(x[:, prefix:], kept), fused), dim=1)
        ones = y.new_ones(y.shape[:2])
        return y, ones, torch.zeros_like(ones)


def _metric(name: str, x: Tensor, qkv: Tensor, attributes: TokenReduce) -> Tensor:
    if name in ("x", "x_normed"):
        metric = x
        if name == "x_normed":
            metric = x - x[:, attributes.num_prefix :].mean(dim=1, keepdim=True)
    else:
        key = _split(qkv, attributes)[1]
        metric = key.mean(dim=1) if name == "key_mean" else key.transpose(1, 2).flatten(2)
    return metric / metric.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _split(qkv: Tensor, attributes: TokenReduce) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*D] to queries, keys and values, each [B, H, N, d]."""
    shape = (*qkv.shape[:2], -1, attributes.num_heads, attributes.head_dim)
    parts = qkv.reshape(shape).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[-1]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
