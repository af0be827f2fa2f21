"""The portable body of JMPTokenReduce in ONNX's text form, written for ONNX Runtime on a CPU.

What the definition's steps become, and why:

- Every operator costs a few microseconds whatever its size, and there are up to ten reductions:
  what a constant or a neighbour can do is not an operator of its own.
- QKV is split exactly as the block's attention splits it, so that ONNX Runtime finds the two the
  same and copies the keys once.
- The number of tokens is read off a tensor without a batch: its shape is static, and all that
  follows from it (ranges, masks) becomes a constant. The shape of `x` would not, as B is dynamic.
- Importance by the class row: one product of the keys, as they lie in QKV, with a matrix that
  holds each head's query in a row of its own and zeros elsewhere. No transposed copy of the keys.
- Prefix tokens get the importance and the rating +inf, so that one TopK places them and the
  critical tokens: nothing large is sliced apart and joined again.
- `distinct`: tokens are sorted by importance first. Who is more important is then the same
  triangle of a matrix in every sample, one subtraction instead of comparisons of all pairs. Where
  nobody is more important the distance is infinite, and so is the rating: prefix tokens and the
  first need no case of their own.
- The merge is a product with a zero-one matrix, not a scatter: no engine has to support
  ScatterElements with a reduction (TensorRT-RTX does not), and the order of the sum is fixed.
  Weights are divided by the new size beforehand, where they are few. A token that takes nothing in
  has weight s / s = 1 and adds exact zeros: it is copied.
- Pruned tokens go into that product too, with weight zero, and 0 * NaN is NaN: their row is read
  from a token that stays instead.
- What a NaN or an infinity among the queries and keys makes of its sample is not defined, but it
  must stay there: an index out of range would fail the whole batch, and a sort of NaN among numbers
  can leave its array. Softmax makes either all importances of a sample NaN or none, which sorts;
  ratings have no NaN; and TopK, not ArgMax, finds the most similar token.
- A number of its own is a Constant's `value`, a tensor with its type: onnx-graphsurgeon's folding
  makes float64 of a `value_float`. What stands in the node's attributes has no such form.
- ONNX Runtime walks a [B, L, 1] element by element where it meets a single number: such steps are
  done on [B, L], or by operators that take the number as a bound (Clip, Relu).

A token position is [B, L, 1] wherever rows are gathered by it; sizes and decisions have the same
shape, so that they broadcast along channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.errors import GraphError
from ..jmp.node import ATTRIBUTES, DOMAIN, OP_TYPE, OPSET, OUTPUTS, TokenReduce
from .graph import read_node, reductions

if TYPE_CHECKING:
    import onnx

QKV_PARTS = (3, 2)
"""How many parts of H*d columns the body takes QKV to have: queries, keys and values, or no
values."""

_CONSTANTS = """
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  one_two = Constant <value_ints = [1, 2]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  zero_s = Constant <value_int = 0> ()
  one_s = Constant <value_int = 1> ()
  zero_f = Constant <value = float {0.0}> ()
  infinite = Constant <value = float {inf}> ()
  tiny = Constant <value = float {1e-12}> ()
  least = Constant <value = float {1e-37}> ()
  always = Cast <to = 9> (one_s)
  lowest = Constant <value = float {-1.0}> ()
  highest = Constant <value = float {1.0}> ()
  prefix_s = Constant <value_int: int = @num_prefix> ()
  keep_s = Constant <value_int: int = @num_keep> ()
  heads_s = Constant <value_int: int = @num_heads> ()
  dim_s = Constant <value_int: int = @head_dim> ()
  scale = Constant <value_float: float = @scale> ()
  tau = Constant <value_float: float = @tau> ()
  merge_weight = Constant <value_float: float = @merge_weight> ()
  prefix = Unsqueeze (prefix_s, zero)
  heads = Unsqueeze (heads_s, zero)
  dim = Unsqueeze (dim_s, zero)
  places_s = Add (prefix_s, keep_s)
  places = Unsqueeze (places_s, zero)
  width_s = Mul (heads_s, dim_s)
  by_head = Concat <axis = 0> (zero, zero, heads, dim)
  size_f = Cast <to = 1> (size)
  any_sample = ReduceSum <keepdims = 0> (size_f, zero)
  tokens = Shape (any_sample)
  tokens_s = Squeeze (tokens)
  token_row = Range (zero_s, tokens_s, one_s)
  is_prefix_row = Less (token_row, prefix_s)
"""

_KEYS = """
  query_part, key_part{others} = Split <axis = 2, num_outputs = {parts}> (qkv)
  key = Cast <to = 1> (key_part)
  key_heads = Reshape (key, by_head)
"""

_CLASS_LOGITS = """
  columns = Range (zero_s, width_s, one_s)
  head_of_column = Div (columns, dim_s)
  head_row = Range (zero_s, heads_s, one_s)
  head_col = Unsqueeze (head_row, one)
  own_columns = Equal (head_col, head_of_column)
  query_class = Slice (query_part, zero, one, one)
  query = Cast <to = 1> (query_class)
  scale_or_zero = Where (own_columns, scale, zero_f)
  queries = Mul (query, scale_or_zero)
  key_t = Transpose <perm = [0, 2, 1]> (key)
  logits_plain = MatMul (queries, key_t)
  queries_axes = Identity (one)
"""

_ALL_LOGITS = """
  query_f = Cast <to = 1> (query_part)
  query_heads = Reshape (query_f, by_head)
  queries = Transpose <perm = [0, 2, 1, 3]> (query_heads)
  key_t = Transpose <perm = [0, 2, 3, 1]> (key_heads)
  products = MatMul (queries, key_t)
  logits_plain = Mul (products, scale)
  queries_axes = Identity (one_two)
"""

_LOG_SIZE = """
  log_in = Log (size_f)
  log_row = Unsqueeze (log_in, {axes})
  logits = Add (logits_plain, log_row)
"""

_IMPORTANCE = """
  attention = Softmax <axis = -1> (logits)
  importance_row = ReduceMean <keepdims = 0> (attention, queries_axes)
  importance_place = Where (is_prefix_row, infinite, importance_row)
  importance = Unsqueeze (importance_place, two)
"""

# The sum over heads: it has the direction of their mean.
_METRIC = """
  key_sum = ReduceSum <keepdims = 0> (key_heads, two)
  length_any = ReduceL2 <keepdims = 1> (key_sum, two)
  length = Clip (length_any, tiny)
  metric = Div (key_sum, length)
"""

_BY_IMPORTANCE = """
  rating = Identity (importance)
"""

# `least` instead of an importance of 0: 0 times an infinite distance would be NaN.
_DISTINCT = """
  eldest, eldest_first = TopK <axis = 1, largest = 1, sorted = 1> (importance, tokens)
  metric_sorted = GatherND <batch_dims = 1> (metric, eldest_first)
  metric_sorted_t = Transpose <perm = [0, 2, 1]> (metric_sorted)
  cosine_all = MatMul (metric_sorted, metric_sorted_t)
  square = Concat <axis = 0> (tokens, tokens)
  barred = Expand (infinite, square)
  not_elder = Trilu <upper = 1> (barred)
  one_or_prefix = Where (is_prefix_row, infinite, highest)
  farthest = Max (not_elder, one_or_prefix)
  distance_all = Sub (farthest, cosine_all)
  distance_any = ReduceMin <keepdims = 1> (distance_all, two)
  distance = Relu (distance_any)
  attended = Clip (eldest, least)
  root = Sqrt (attended)
  missed = Mul (root, distance)
  unknown = IsNaN (missed)
  infinite_or_none = Where (is_prefix_row, infinite, zero_f)
  prefix_first = Unsqueeze (infinite_or_none, one)
  rating_sorted = Where (unknown, prefix_first, missed)
  rating = ScatterElements <axis = 1> (importance, eldest_first, rating_sorted)
"""

_CRITICAL = """
  ranked, order = TopK <axis = 1, largest = 1, sorted = 1> (rating, tokens)
  staying = Slice (order, zero, places, one)
  rest = Slice (order, places, end, one)
  place_token, place_at = TopK <axis = 1, largest = 0, sorted = 1> (staying, places)
  kept = Slice (place_token, prefix, end, one)
"""

_SIMILARITY = """
  metric_kept = GatherND <batch_dims = 1> (metric, kept)
  metric_rest = GatherND <batch_dims = 1> (metric, rest)
  metric_kept_t = Transpose <perm = [0, 2, 1]> (metric_kept)
  cosine = MatMul (metric_rest, metric_kept_t)
  similarity = Clip (cosine, lowest, highest)
  best, target_slot = TopK <axis = 2, largest = 1> (similarity, one)
  target = Add (target_slot, prefix)
"""

_SURVIVOR_PREFIX = """
  survivor = Identity (zero_s)
"""

_SURVIVOR_ANY = """
  survivor = Slice (place_token, zero, one, one)
"""

_DECISION_BY_TOKEN = """
  merged = GreaterOrEqual (best, tau)
"""

_DECISION_BY_SAMPLE = """
  best_mean = ReduceMean <keepdims = 1> (best, one)
  merged_sample = GreaterOrEqual (best_mean, tau)
  best_shape = Shape (best)
  merged = Expand (merged_sample, best_shape)
"""

_MERGE = """
  size_all = Where (always, size_f, importance_row)
  size_col = Unsqueeze (size_all, two)
  size_place = GatherND <batch_dims = 1> (size_col, place_token)
  size_rest = GatherND <batch_dims = 1> (size_col, rest)
  weight = Where (merged, size_rest, zero_f)
  target_row = Squeeze (target, two)
  zero_or_one = Constant <value = float[2] {0.0, 1.0}> ()
  routes = OneHot <axis = 1> (target_row, places_s, zero_or_one)
  taken_in = MatMul (routes, weight)
  size_new = Add (size_place, taken_in)

  taken_share = Mul (taken_in, merge_weight)
  divisor = Add (size_place, taken_share)
  divisor_target = GatherND <batch_dims = 1> (divisor, target)
  weight_share = Mul (weight, merge_weight)
  share = Div (weight_share, divisor_target)
  share_own = Div (size_place, divisor)
  source = Where (merged, rest, survivor)
  x_place = GatherND <batch_dims = 1> (x, place_token)
  x_source = GatherND <batch_dims = 1> (x, source)
  x_place_f = Cast <to = 1> (x_place)
  x_source_f = Cast <to = 1> (x_source)
  x_share = Mul (x_source_f, share)
  incoming = MatMul (routes, x_share)
  own = Mul (x_place_f, share_own)
  y_f = Add (own, incoming)

  out_size_f = Squeeze (size_new, two)
  log_size_f = Log (out_size_f)
  y = CastLike (y_f, x)
  out_size = CastLike (out_size_f, x)
  log_size = CastLike (log_size_f, x)
"""


# As `order` is a permutation, every token is written once.
_INDEX = """
  pruned_code = Mul (keep_s, two)
  fate_code = Where (merged, keep_s, pruned_code)
  code_rest = Add (fate_code, target_slot)
  slot_row = Range (zero_s, keep_s, one_s)
  slot_col = Unsqueeze (slot_row, one)
  kept_shape = Shape (kept)
  code_kept = Expand (slot_col, kept_shape)
  code_token = Concat <axis = 1> (code_kept, code_rest)
  token_all = Concat <axis = 1> (kept, rest)
  token_patch = Sub (token_all, prefix)
  index_col = ScatterElements <axis = 1> (token_patch, token_patch, code_token)
  index_row = Squeeze (index_col, two)
  index = Cast <to = 6> (index_row)
"""


def add_bodies(proto: onnx.ModelProto) -> None:
    """Gives a model's JMPTokenReduce nodes their portable body, in place.

    Raises:
        GraphError: its nodes disagree in what one body can express.
    """
    from onnx.helper import make_opsetid

    nodes = reductions(proto)
    attributes = [read_node(n) for n in nodes]
    del proto.functions[:]
    if not attributes:
        return
    shared = {
        (a.granularity, a.importance, a.proportional, a.selection, a.index) for a in attributes
    }
    if len(shared) > 1:
        raise GraphError(
            "reductions of one model must agree in granularity, importance, proportional, "
            "selection and index"
        )
    widths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in [*proto.graph.value_info, *proto.graph.input]
        if value.type.tensor_type.shape.dim
    }
    parts = {
        widths.get(n.input[1], 0) / (a.num_heads * a.head_dim)
        for n, a in zip(nodes, attributes, strict=True)
    }
    if len(parts) > 1 or not parts <= set(QKV_PARTS):
        raise GraphError("reductions need a QKV tensor of two or three parts, and its width known")
    proto.functions.append(body(attributes[0], int(parts.pop())))
    if DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(make_opsetid(DOMAIN, attributes[0].version))


def body(attributes: TokenReduce, parts: int) -> onnx.FunctionProto:
    """The portable implementation of the node as an ONNX local function.

    The arithmetic is float32 whatever T is, so the body serves FP32 and FP16 models unchanged.
    All nodes of a model share one body, so they must agree in granularity, importance,
    proportional, selection, index and parts; K, tau and the rest are read from each node.

    Args:
        attributes: of any of the nodes.
        parts: W / (H*d), of `QKV_PARTS`.
    """
    return function(
        _operators(
            granularity=attributes.granularity,
            importance=attributes.importance,
            proportional=attributes.proportional,
            selection=attributes.selection,
            parts=parts,
            index=attributes.index,
        ),
        attributes.outputs,
    )


def function(operators: str, outputs: Sequence[str] = OUTPUTS[:3]) -> onnx.FunctionProto:
    """A local function in the node's place: its inputs, outputs and attributes, these operators.

    Args:
        operators: in ONNX's text form, from (x, qkv, size) to `outputs`.
    """
    import onnx.parser

    names = ", ".join(ATTRIBUTES)
    text = f"""
<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>
{OP_TYPE} <{names}> (x, qkv, size) => ({", ".join(outputs)})
{{
{operators}
}}
"""
    return onnx.parser.parse_function(text)


def _operators(
    *,
    granularity: str,
    importance: str,
    proportional: bool,
    selection: str,
    parts: int,
    index: bool,
) -> str:
    """The body in ONNX's text form for what it cannot read from its node."""
    by_class = importance == "class"
    if proportional:
        logits = _LOG_SIZE.format(axes="one" if by_class else "one_two")
    else:
        logits = "  logits = Identity (logits_plain)\n"
    steps = (
        _CONSTANTS,
        _KEYS.format(parts=parts, others=", value_part" if parts == 3 else ""),
        _CLASS_LOGITS if by_class else _ALL_LOGITS,
        logits,
        _IMPORTANCE,
        _METRIC,
        _DISTINCT if selection == "distinct" else _BY_IMPORTANCE,
        _CRITICAL,
        _SIMILARITY,
        _SURVIVOR_PREFIX if by_class else _SURVIVOR_ANY,
        _DECISION_BY_TOKEN if granularity == "token" else _DECISION_BY_SAMPLE,
        _MERGE,
        _INDEX if index else "",
    )
    return "".join(steps)
