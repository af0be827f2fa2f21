"""What TensorRT-RTX puts around the plugin: nothing. Read off the builder's log; no GPU needed.

A plugin can slow an engine down by the copies that its formats force (NVIDIA/TensorRT #4029).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fakes.rtx import Layer, layers_of

TOKENS, CHANNELS, KEEP = 197, 96, 138


def block(path: Path, kind: str) -> Path:
    """The end of an attention block, a reduction and an MLP: f (float32), h, b, or q (INT8 MatMuls
    between float16)."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    element = {
        "f": onnx.TensorProto.FLOAT,
        "h": onnx.TensorProto.FLOAT16,
        "b": onnx.TensorProto.BFLOAT16,
        "q": onnx.TensorProto.FLOAT16,
    }[kind]
    random = np.random.default_rng(0)
    weights, nodes = [], []

    def weight(name: str, *shape: int) -> str:
        values = (random.standard_normal(shape) * 0.05).flatten()
        weights.append(helper.make_tensor(name, element, shape, values))
        return name

    def node(kind_of: str, inputs: list[str], output: str, **more: object) -> str:
        nodes.append(helper.make_node(kind_of, inputs, [output], name=f"{output}_node", **more))
        return output

    def product(of: str, name: str, columns: int, rows: int = CHANNELS) -> str:
        factor = weight(f"{name}_weight", rows, columns)
        if kind == "q":
            scale = helper.make_tensor(f"{name}_scale", element, [], [0.02])
            zero = helper.make_tensor(f"{name}_zero", onnx.TensorProto.INT8, [], [0])
            weights.extend([scale, zero])
            ends = [f"{name}_scale", f"{name}_zero"]
            of = node("QuantizeLinear", [of, *ends], f"{name}_q")
            of = node("DequantizeLinear", [of, *ends], f"{name}_dq")
            values = random.integers(-127, 128, (rows, columns)).flatten()
            weights[:] = [w for w in weights if w.name != factor]
            weights.append(
                helper.make_tensor(factor, onnx.TensorProto.INT8, (rows, columns), values)
            )
            factor = node("DequantizeLinear", [factor, *ends], f"{name}_w")
        made = node("MatMul", [of, factor], f"{name}_product")
        return node("Add", [made, weight(f"{name}_bias", columns)], name)

    norm = {"epsilon": 1e-6}
    node("LayerNormalization", ["x", weight("g1", CHANNELS), weight("b1", CHANNELS)], "n1", **norm)
    qkv = product("n1", "qkv", 3 * CHANNELS)
    attention = product("n1", "proj", CHANNELS)
    residual = node("Add", ["x", attention], "residual")
    weights.append(helper.make_tensor("size", element, (1, TOKENS), np.ones(TOKENS)))
    attributes = {"num_prefix": 1, "num_keep": KEEP, "num_heads": 3, "head_dim": 32}
    attributes |= {"granularity": 0, "importance": 0, "proportional": 1, "selection": 1}
    attributes["merge_weight"] = 0.4
    nodes.append(
        helper.make_node(
            "JMPTokenReduce",
            [residual, qkv, "size"],
            ["y", "out_size", "log_size"],
            name="reduce",
            domain="jmp_deploy",
            plugin_version="1",
            scale=32**-0.5,
            tau=0.7,
            **attributes,
        )
    )
    node("LayerNormalization", ["y", weight("g2", CHANNELS), weight("b2", CHANNELS)], "n2", **norm)
    hidden = node("Gelu", [product("n2", "fc1", 4 * CHANNELS)], "hidden")
    node("Add", ["y", product(hidden, "fc2", CHANNELS, 4 * CHANNELS)], "out")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", element, ["batch", TOKENS, CHANNELS])],
        [helper.make_tensor_value_info(name, element, None) for name in ("out", "log_size")],
        weights,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("jmp_deploy", 1)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    )
    return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Layer]]:
    """Layers of the engine of each kind of network, over both of its profiles."""
    folder = tmp_path_factory.mktemp("formats")
    models = [block(folder / f"{kind}.onnx", kind) for kind in KINDS]
    found = layers_of(folder, models, profiles=((1, 1, 1), (1, 8, 64)))
    return dict(zip(KINDS, found, strict=True))


KINDS = {"f": "Float", "h": "Half", "b": "BFloat16", "q": "Half"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_reads_and_writes_what_its_neighbours_do(
    engines: dict[str, list[Layer]], kind: str
) -> None:
    layers = engines[kind]
    ours = [layer for layer in layers if "reduce" in layer.nodes]
    assert len(ours) == 2  # one per profile, and nothing else is made of the node
    for layer in ours:
        assert layer.kind == "custom_layer"
        tensors = {**layer.inputs, **layer.outputs}
        scratch = {name for name in tensors if "wksp" in name}
        assert len(layer.inputs) >= 2 and len(layer.outputs.keys() - scratch) == 3
        for name in tensors.keys() - scratch:
            assert tensors[name] == (KINDS[kind], "(Linear) Row major linear format"), name
        # What makes x and qkv, and what reads y, are nodes of the network: no copy, no cast.
        made = [other for other in layers if other.outputs.keys() & layer.inputs.keys()]
        read = [other for other in layers if other.inputs.keys() & layer.outputs.keys() - scratch]
        before = set().union(*(other.nodes for other in made))
        after = set().union(*(other.nodes for other in read))
        assert {"residual_node", "qkv_node"} <= before, (kind, before)
        assert {"n2_node", "out_node"} <= after, (kind, after)
        for other in [*made, *read]:
            assert other.nodes, f"{other.name} comes from no node: a copy or a cast"
