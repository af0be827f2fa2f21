"""The ONNX node `jmp_deploy::JMPTokenReduce`: its name and its attributes.

One node per reduction, with two implementations: the portable body (export/body.py), an ONNX local
function that any engine can run, and the TensorRT plugin in `plugins/`. Both follow `reduction.py`.

Inputs, all of one float type T:
    x     [B, N, C]  residual stream after the attention residual, before the MLP
    qkv   [B, N, W]  QKV projection as the GEMM left it: queries of head h at columns
                     h*d..(h+1)*d, keys at H*d + h*d..; W >= 2*H*d. (With QK norm: the normalised
                     queries and keys, concatenated; W = 2*H*d.)
    size  [B, N] or [1, N]  patches that each token stands for
Outputs:
    y [B, P+K, C], out_size [B, P+K], log_size [B, P+K] = log(out_size)
    index [B, N-P] int32, in version 2 alone: what became of each incoming patch token,
                     fate * K + k. Fate 0: it is kept patch token k of 0..K-1; 1: it was merged into
                     that; 2: it was pruned, and resembles that most.

Positions follow, and features are restored, by `index`. Models that need neither have version 1.

This module is light: it needs neither onnx nor PyTorch.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from ..core.errors import GraphError
from ..core.manifest import Granularity, Selection

DOMAIN = "jmp_deploy"
OP_TYPE = "JMPTokenReduce"
OPSET = 20
"""ONNX opset of everything that we export: the newest that TensorRT 10.3 (JetPack 6.1) parses.
It has Gelu and LayerNormalization as single ops; opset 23 would bring Attention, which
TensorRT-RTX builds in FP16 and refuses in FP32."""

# Their order is the node's: an ONNX file holds the position.
GRANULARITIES = get_args(Granularity)
IMPORTANCES = ("class", "received")
SELECTIONS = get_args(Selection)
OUTPUTS = ("y", "out_size", "log_size", "index")
KEPT, MERGED, PRUNED = range(3)
"""Fates in `index`."""


@dataclass(frozen=True)
class TokenReduce:
    """Attributes of one reduction (docs/method.md has the definition).

    Attributes:
        num_prefix: P, leading tokens that always stay (class, distillation, registers).
        num_keep: K, patch tokens that stay; at least 1. (Of M that come in; our models have K < M:
            with K = M the portable body ends the process in ONNX Runtime 1.23, whose TopK divides
            by zero on nothing.)
        num_heads: H.
        head_dim: d, width of a head.
        scale: factor of the attention logits, d**-0.5 in every ViT of timm.
        tau: a non-critical token is merged where its similarity reaches tau, else pruned;
            -1 merges all of them, anything above 1 prunes all of them.
        granularity: "token" decides for each token, "sample" for all of a sample at once.
        importance: "class" is the class token's attention row, "received" the mean over all
            queries, for models without a class token.
        proportional: add log(size) to the logits when importance is computed; true where the
            block's own attention does so.
        selection: which K tokens are critical: "importance" the most important; "distinct" those
            that would be missed most: sqrt(importance) times the distance (1 - cosine) to the
            nearest token more important than themselves.
        merge_weight: how much of a merged token's content its target takes, 0 to 1: 1 is the mean
            weighted by size, 0 leaves the target as it is. Its size goes over in whole.
        index: gives the fourth output. No attribute of the node but its version.
    """

    num_prefix: int
    num_keep: int
    num_heads: int
    head_dim: int
    scale: float
    tau: float
    granularity: str = "token"
    importance: str = "class"
    proportional: bool = True
    selection: str = "importance"
    merge_weight: float = 1.0
    index: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("num_prefix", self.num_prefix >= (1 if self.importance == "class" else 0)),
            ("num_keep", self.num_keep >= 1),
            ("num_heads", self.num_heads >= 1),
            ("head_dim", self.head_dim >= 1),
            ("scale", 0 < self.scale < float("inf")),
            ("tau", self.tau == self.tau and abs(self.tau) != float("inf")),
            ("granularity", self.granularity in GRANULARITIES),
            ("importance", self.importance in IMPORTANCES),
            ("selection", self.selection in SELECTIONS),
            ("merge_weight", 0 <= self.merge_weight <= 1),
        )
        for name, ok in checks:
            if not ok:
                raise GraphError(f"{OP_TYPE}: {name}={getattr(self, name)!r} is not valid")

    @property
    def version(self) -> int:
        """Of the node: 2 with `index`, else 1."""
        return 2 if self.index else 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the node's outputs."""
        return OUTPUTS if self.index else OUTPUTS[:3]

    def to_onnx(self) -> dict[str, int | float]:
        """The attributes as the node carries them: enumerations and booleans become integers."""
        attributes = asdict(self)
        del attributes["index"]
        attributes["granularity"] = GRANULARITIES.index(self.granularity)
        attributes["importance"] = IMPORTANCES.index(self.importance)
        attributes["proportional"] = int(self.proportional)
        attributes["selection"] = SELECTIONS.index(self.selection)
        return attributes

    def stored(self) -> TokenReduce:
        """The same as an ONNX file gives it back: floats have 32 bits there."""
        floats = (self.scale, self.tau, self.merge_weight)
        scale, tau, weight = struct.unpack("3f", struct.pack("3f", *floats))
        return replace(self, scale=scale, tau=tau, merge_weight=weight)

    @classmethod
    def from_onnx(cls, attributes: dict[str, Any], *, outputs: int = 3) -> TokenReduce:
        """Reads a node's attributes; it has as many outputs.

        Raises:
            GraphError: an attribute is missing, unknown, of the wrong type or out of range.
        """
        names = set(ATTRIBUTES)
        found = set(attributes)
        if found != names:
            raise GraphError(
                f"{OP_TYPE}: missing attributes {sorted(names - found)}, "
                f"unknown attributes {sorted(found - names)}",
                "export the model again with this version of jmp_deploy",
            )
        values = dict(attributes)
        for name, value in values.items():
            kind = float if name in ("scale", "tau", "merge_weight") else int
            if not isinstance(value, kind):
                raise GraphError(f"{OP_TYPE}: {name}={value!r} should be of type {kind.__name__}")
        enumerations = (
            ("granularity", GRANULARITIES),
            ("importance", IMPORTANCES),
            ("selection", SELECTIONS),
        )
        for name, words in enumerations:
            if values[name] not in range(len(words)):
                raise GraphError(f"{OP_TYPE}: {name}={values[name]!r} is not valid")
            values[name] = words[values[name]]
        values["proportional"] = bool(values["proportional"])
        return cls(**values, index=outputs == len(OUTPUTS))


ATTRIBUTES = tuple(name for name in TokenReduce.__dataclass_fields__ if name != "index")
"""Of the ONNX node, in its order."""


def reduction_name(block: int) -> str:
    """Name of the node that is a block's reduction."""
    return f"blocks.{block}.token_reduce"
