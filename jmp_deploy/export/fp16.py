"""Precision written into the ONNX: FP16 casts (the Q/DQ of INT8 is qdq.py's).

TensorRT builds strongly typed networks from what the model says, so one model serves TensorRT 10,
11 and TensorRT-RTX, and ONNX Runtime runs exactly the precision that the engine will have.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx

from .graph import load_model, save_model

FP16_MAX = float(np.finfo(np.float16).max)
FP16_TINY = 2.0**-24  # smallest subnormal


def to_fp16(source: Path, target: Path) -> Path:
    """Portable FP32 model -> portable FP16 model with FP32 inputs and outputs.

    LayerNormalization, Gelu and Softmax stay single ops, which engines compute in FP32 inside;
    JMPTokenReduce takes and gives FP16, its body works in FP32.

    Raises:
        GraphError: not a readable model.
    """
    save_model(half_proto(load_model(source)), target)
    return target


def half_proto(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`to_fp16` on a model in memory, which is used up.

    Q/DQ pairs (qdq.py) stay as they are: their scales are numbers that FP16 holds exactly.
    """
    from onnxconverter_common.float16 import convert_float_to_float16

    functions = list(proto.functions)
    # The converter would take a look at local functions for nothing: their bodies are type-free.
    del proto.functions[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)
        try:
            half = convert_float_to_float16(
                proto,
                min_positive_val=FP16_TINY,
                max_finite_val=FP16_MAX,
                keep_io_types=True,
                disable_shape_infer=True,
                op_block_list=[],
            )
        finally:
            logging.root.setLevel(level)
    half.functions.extend(functions)
    return half
