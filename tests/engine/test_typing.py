"""Networks that TensorRT refuses strongly typed: the fallback, on a TensorRT of plain objects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jmp_deploy.core.errors import EngineError
from jmp_deploy.engine import api, worker

KINDS = SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16", INT64="int64")
TYPES = SimpleNamespace(
    CAST="cast",
    CONSTANT="constant",
    PLUGIN_V3="plugin",
    MATRIX_MULTIPLY="product",
    CONVOLUTION="convolution",
)


def module(version="10.2.0", name="tensorrt"):
    return SimpleNamespace(__name__=name, __version__=version, DataType=KINDS, LayerType=TYPES)


class Layer:
    def __init__(self, kind, *outputs):
        self.type, self.num_outputs = kind, len(outputs)
        self.outputs = [SimpleNamespace(dtype=dtype) for dtype in outputs]
        self.told, self.precision = {}, None

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, dtype):
        self.told[index] = dtype


def network(*layers):
    return SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)


@pytest.mark.parametrize(
    ("version", "name", "expected"),
    [
        ("10.0.1", "tensorrt", True),
        ("10.3.0.30", "tensorrt", True),
        ("10.6.0", "tensorrt", False),
        ("10.13.0", "tensorrt", False),
        ("11.1.0", "tensorrt", False),
        ("1.7.1", "tensorrt_rtx", False),
    ],
)
def test_only_a_tensorrt_before_10_6_may_fall_back(version, name, expected):
    assert api.may_fall_back(module(version, name)) is expected


def test_a_weakly_typed_network_is_told_every_type_of_the_onnx():
    norm, product, cast = Layer("norm", "float"), Layer("product", "half"), Layer("cast", "half")
    shape, ours = Layer("shape", "int64"), Layer("plugin", "half", "half", "half")
    options = api.weakly_typed_options(module(), network(norm, product, cast, shape, ours))
    assert options["precision_constraints"] == "obey" and options["fp16"]
    assert norm.told == {0: "float"} and norm.precision == "float"
    assert product.told == {0: "half"} and product.precision == "half"
    assert cast.told == {0: "half"} and cast.precision is None
    assert shape.told == {} and shape.precision is None
    assert ours.told == dict.fromkeys(range(3), "half") and ours.precision is None


def test_turing_is_left_out_where_anything_is_multiplied_in_more_than_half():
    half, wide = Layer("product", "half"), Layer("convolution", "float")
    assert api.multiplies_in_half_only(module(), network(half, Layer("norm", "float")))
    assert not api.multiplies_in_half_only(module(), network(half, wide))


@pytest.mark.parametrize("version", ["10.2.0", "10.13.0"])
def test_a_refused_network_is_tried_weakly_typed_where_that_may_help(version, monkeypatch):
    tried = []

    def build(trt, request, *, strongly_typed):
        tried.append(strongly_typed)
        if strongly_typed:
            raise EngineError("refused")
        return {"typing": "weak"}

    monkeypatch.setattr(worker.api, "load", lambda flavour: module(version))
    monkeypatch.setattr(worker, "_built", build)
    if version == "10.2.0":
        assert worker._build({"flavour": "tensorrt"}) == {"typing": "weak"}
        assert tried == [True, False]
    else:
        with pytest.raises(EngineError, match="refused"):
            worker._build({"flavour": "tensorrt"})
        assert tried == [True]
