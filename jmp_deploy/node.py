"""The ONNX node `jmp_deploy::JMPTokenReduce`: its name, its attributes, its portable body.

One node per reduction, with two implementations: the body below, an ONNX local function that any
engine can run, and the TensorRT plugin in `plugins/`. Both follow `reduction.py`.

Inputs, all of one float type T:
    x     [B, N, C]  residual stream after the attention residual, before the MLP
    qkv   [B, N, W]  QKV projection as the GEMM left it: queries of head h at columns
                     h*d..(h+1)*d, keys at H*d + h*d..; W >= 2*H*d. (With QK norm: the normalised
                     queries and keys, concatenated; W = 2*H*d.)
    size  [B, N] or [1, N]  patches that each token stands for
Outputs:
    y [B, P+K, C], out_size [B, P+K], log_size [B, P+K] = log(out_size)

This module is light: it needs onnx only where a body is made.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import GraphError

if TYPE_CHECKING:
    import onnx

DOMAIN = "jmp_deploy"
OP_TYPE = "JMPTokenReduce"
VERSION = 1
OPSET = 20
"""ONNX opset of everything that we export: the newest that TensorRT 10.3 (JetPack 6.1) parses.
It has Gelu and LayerNormalization as single ops; opset 23 would bring Attention, which
TensorRT-RTX builds in FP16 and refuses in FP32."""

GRANULARITIES = ("token", "sample")
IMPORTANCES = ("class", "received")
SELECTIONS = ("importance", "distinct")


@dataclass(frozen=True)
class TokenReduce:
    """Attributes of one reduction (design.md section 1 has the definition).

    Attributes:
        num_prefix: P, leading tokens that always stay (class, distillation, registers).
        num_keep: K, patch tokens that stay; at least 1.
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

    def to_onnx(self) -> dict[str, int | float]:
        """The attributes as the node carries them: enumerations and booleans become integers."""
        attributes = asdict(self)
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
    def from_onnx(cls, attributes: dict[str, Any]) -> TokenReduce:
        """Reads a node's attributes.

        Raises:
            GraphError: an attribute is missing, unknown, of the wrong type or out of range.
        """
        names = set(cls.__dataclass_fields__)
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
        return cls(**values)


def body(attributes: TokenReduce) -> onnx.FunctionProto:
    """The portable implementation of the node as an ONNX local function.

    The arithmetic is float32 whatever T is, so the body serves FP32 and FP16 models unchanged.
    All nodes of a model share one body, so they must agree in granularity, importance,
    proportional and selection; K, tau and the merge weight are read from each node.

    The merge is a product with a one-hot matrix, not a scatter: exact zeros add nothing, no
    engine has to support ScatterElements with a reduction (TensorRT-RTX does not), and the
    result does not depend on the order of updates. Tokens that are not merged are zeroed
    first, because 0 * NaN is NaN.
    """
    import onnx.parser

    if attributes.importance == "class":
        row = """
  q_first = Slice (q_all, zero, one, one)
  query = Transpose <perm = [0, 2, 1, 3]> (q_first)
"""
    else:
        row = """
  query = Transpose <perm = [0, 2, 1, 3]> (q_all)
"""
    if attributes.proportional:
        logits = """
  log_in = Log (size_all)
  log_row = Unsqueeze (log_in, one)
  log_logit = Unsqueeze (log_row, one)
  logits = Add (logits_plain, log_logit)
"""
    else:
        logits = "  logits = Identity (logits_plain)\n"
    if attributes.granularity == "token":
        decision = "  reaches = GreaterOrEqual (best, tau)\n"
    else:
        decision = """
  mean_best = ReduceMean <keepdims = 1> (best, one)
  reaches_sample = GreaterOrEqual (mean_best, tau)
  best_shape = Shape (best)
  reaches = Expand (reaches_sample, best_shape)
"""
    if attributes.selection == "importance":
        rating = "  rating = Identity (importance)\n"
    else:
        # Comparisons, not a rank: the order of TopK's ties is then ours, lower index first.
        rating = """
  importance_row = Unsqueeze (importance, one)
  importance_col = Unsqueeze (importance, two)
  larger = Greater (importance_row, importance_col)
  equal = Equal (importance_row, importance_col)
  zero_s = Squeeze (zero)
  one_s = Squeeze (one)
  patches_s = Squeeze (patches)
  index = Range (zero_s, patches_s, one_s)
  index_row = Unsqueeze (index, zero)
  index_col = Unsqueeze (index, one)
  earlier = Less (index_row, index_col)
  equal_earlier = And (equal, earlier)
  elder_any = Or (larger, equal_earlier)
  metric_t = Transpose <perm = [0, 2, 1]> (metric)
  cosine_all = MatMul (metric, metric_t)
  cosine_nan = IsNaN (cosine_all)
  cosine_number = Not (cosine_nan)
  elder = And (elder_any, cosine_number)
  cosine_clipped = Clip (cosine_all, lowest, highest)
  cosine_elder = Where (elder, cosine_clipped, minus_inf)
  redundancy = ReduceMax <keepdims = 0> (cosine_elder, two)
  distance = Sub (one_f, redundancy)
  attended = Max (importance, zero_f)
  root = Sqrt (attended)
  missed = Mul (root, distance)
  has_elder = Greater (redundancy, minus_inf)
  rating = Where (has_elder, missed, plus_inf)
"""
    names = ", ".join(TokenReduce.__dataclass_fields__)
    text = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{OP_TYPE} <{names}> (x, qkv, size) => (y, out_size, log_size)
{{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  minus_one = Constant <value_ints = [-1]> ()
  zero_f = Constant <value_float = 0.0> ()
  one_f = Constant <value_float = 1.0> ()
  minus_inf = Constant <value_float = -inf> ()
  plus_inf = Constant <value_float = inf> ()
  tiny = Constant <value_float = 1e-12> ()
  lowest = Constant <value_float = -1.0> ()
  highest = Constant <value_float = 1.0> ()
  prefix_i = Constant <value_int: int = @num_prefix> ()
  keep_i = Constant <value_int: int = @num_keep> ()
  heads_i = Constant <value_int: int = @num_heads> ()
  dim_i = Constant <value_int: int = @head_dim> ()
  scale = Constant <value_float: float = @scale> ()
  tau = Constant <value_float: float = @tau> ()
  merge_weight = Constant <value_float: float = @merge_weight> ()
  prefix = Unsqueeze (prefix_i, zero)
  keep = Unsqueeze (keep_i, zero)
  heads = Unsqueeze (heads_i, zero)
  dim = Unsqueeze (dim_i, zero)

  x_shape = Shape (x)
  batch = Slice (x_shape, zero, one)
  tokens = Slice (x_shape, one, two)
  patches = Sub (tokens, prefix)
  batch_tokens = Concat <axis = 0> (batch, tokens)
  x_f = Cast <to = 1> (x)
  size_f = Cast <to = 1> (size)
  size_all = Expand (size_f, batch_tokens)

  width = Mul (heads, dim)
  width_2 = Mul (width, two)
  head_shape = Concat <axis = 0> (batch, tokens, heads, dim)
  q_part = Slice (qkv, zero, width, two)
  k_part = Slice (qkv, width, width_2, two)
  q_flat = Cast <to = 1> (q_part)
  k_flat = Cast <to = 1> (k_part)
  q_all = Reshape (q_flat, head_shape)
  k_all = Reshape (k_flat, head_shape)

{row}
  key = Transpose <perm = [0, 2, 3, 1]> (k_all)
  query_scaled = Mul (query, scale)
  logits_plain = MatMul (query_scaled, key)
{logits}
  attention = Softmax <axis = -1> (logits)
  heads_queries = Concat <axis = 0> (one, two)
  importance_all = ReduceMean <keepdims = 0> (attention, heads_queries)
  importance_raw = Slice (importance_all, prefix, tokens, one)
  not_a_number = IsNaN (importance_raw)
  importance = Where (not_a_number, minus_inf, importance_raw)

  key_mean = ReduceMean <keepdims = 0> (k_all, two)
  key_patches = Slice (key_mean, prefix, tokens, one)
  norm_raw = ReduceL2 <keepdims = 1> (key_patches, two)
  norm = Max (norm_raw, tiny)
  metric = Div (key_patches, norm)

{rating}
  ranked, order = TopK <axis = 1, largest = 1, sorted = 1> (rating, patches)
  kept_any = Slice (order, zero, keep, one)
  rest_any = Slice (order, keep, patches, one)
  rest_count = Sub (patches, keep)
  kept, kept_at = TopK <axis = 1, largest = 0, sorted = 1> (kept_any, keep)
  rest, rest_at = TopK <axis = 1, largest = 0, sorted = 1> (rest_any, rest_count)
  kept_index = Unsqueeze (kept, minus_one)
  rest_index = Unsqueeze (rest, minus_one)

  metric_kept = GatherND <batch_dims = 1> (metric, kept_index)
  metric_rest = GatherND <batch_dims = 1> (metric, rest_index)
  metric_kept_t = Transpose <perm = [0, 2, 1]> (metric_kept)
  cosine = MatMul (metric_rest, metric_kept_t)
  similarity = Clip (cosine, lowest, highest)
  best = ReduceMax <keepdims = 0> (similarity, two)
  target = ArgMax <axis = 2, keepdims = 0> (similarity)
{decision}

  x_patches = Slice (x_f, prefix, tokens, one)
  size_patches = Slice (size_all, prefix, tokens, one)
  x_kept = GatherND <batch_dims = 1> (x_patches, kept_index)
  x_rest = GatherND <batch_dims = 1> (x_patches, rest_index)
  size_kept = GatherND <batch_dims = 1> (size_patches, kept_index)
  size_rest = GatherND <batch_dims = 1> (size_patches, rest_index)
  weight = Where (reaches, size_rest, zero_f)
  zero_scalar = Squeeze (zero)
  one_scalar = Squeeze (one)
  positions = Range (zero_scalar, keep_i, one_scalar)
  positions_col = Unsqueeze (positions, one)
  target_row = Unsqueeze (target, one)
  hits = Equal (positions_col, target_row)
  weight_row = Unsqueeze (weight, one)
  routes = Where (hits, weight_row, zero_f)
  reaches_col = Unsqueeze (reaches, two)
  x_merged = Where (reaches_col, x_rest, zero_f)
  incoming_whole = MatMul (routes, x_merged)
  incoming = Mul (incoming_whole, merge_weight)
  incoming_size = ReduceSum <keepdims = 0> (routes, two)
  incoming_share = Mul (incoming_size, merge_weight)
  size_kept_col = Unsqueeze (size_kept, two)
  own = Mul (x_kept, size_kept_col)
  total = Add (own, incoming)
  kept_size = Add (size_kept, incoming_size)
  divisor = Add (size_kept, incoming_share)
  divisor_col = Unsqueeze (divisor, two)
  mean = Div (total, divisor_col)
  has_source = Greater (incoming_share, zero_f)
  has_source_col = Unsqueeze (has_source, two)
  y_patches = Where (has_source_col, mean, x_kept)

  x_prefix = Slice (x_f, zero, prefix, one)
  size_prefix = Slice (size_all, zero, prefix, one)
  y_f = Concat <axis = 1> (x_prefix, y_patches)
  out_size_f = Concat <axis = 1> (size_prefix, kept_size)
  log_size_f = Log (out_size_f)
  y = CastLike (y_f, x)
  out_size = CastLike (out_size_f, x)
  log_size = CastLike (log_size_f, x)
}}
"""
    return onnx.parser.parse_function(text)
