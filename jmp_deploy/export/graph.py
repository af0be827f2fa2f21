"""ONNX models as files and as graphs: reading and writing them, and finding our reductions in them.

Light to import: onnx is needed only once a model is at hand, so a device without it imports what
imports this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import GraphError
from ..core.files import atomic_path
from ..jmp.node import DOMAIN, TokenReduce

if TYPE_CHECKING:
    import onnx

PLUGIN_PREFIX = "plugin_"
"""Of the attributes by which a deployable model's nodes name their TensorRT plugin."""


def load_model(path: Path) -> onnx.ModelProto:
    """Reads an ONNX file.

    Raises:
        GraphError: missing, truncated or not ONNX.
        ModuleNotFoundError: onnx is not installed.
    """
    import onnx

    try:
        proto = onnx.load_model(path)
        if not proto.graph.node or not proto.graph.output:
            raise ValueError("it holds no graph")
    except FileNotFoundError as error:
        raise GraphError(f"no such file: {path}") from error
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, OSError, ...
        raise GraphError(
            f"{path} is truncated or not an ONNX model: {str(error).splitlines()[0]}",
            "build it again",
        ) from error
    return proto


def save_model(proto: onnx.ModelProto, path: Path) -> None:
    """Writes a model, whole or not at all.

    Raises:
        GraphError: it is above 2 GB.
        ArtifactError: the file cannot be written.
    """
    import onnx

    with atomic_path(path) as temporary:
        try:
            onnx.save_model(proto, str(temporary))
        except ValueError as error:  # protobuf's limit of 2 GB
            raise GraphError(
                f"the model is too large for one ONNX file ({error})",
                "models above 2 GB in FP32 (ViT-g and larger) are not supported yet",
            ) from error


@contextmanager
def temporary_file(proto: onnx.ModelProto) -> Iterator[Path]:
    """A model in a file for as long as it takes to open it.

    To open it from memory would hold it there three times over: whoever asks lets go of `proto`.
    """
    with tempfile.TemporaryDirectory(prefix="jmp-model-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(proto, path)
        del proto
        yield path


def is_reduction(graph_node: onnx.NodeProto) -> bool:
    """Whether a node (of onnx, or of onnx_graphsurgeon) is one of ours."""
    return graph_node.domain == DOMAIN


def reductions(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The JMPTokenReduce nodes of a model, portable or deployable, in graph order."""
    return [n for n in proto.graph.node if is_reduction(n)]


def read_node(graph_node: onnx.NodeProto) -> TokenReduce:
    """Attributes of a JMPTokenReduce node, of a portable or a deployable model.

    Raises:
        GraphError: they are not as expected.
    """
    from onnx.helper import get_attribute_value

    return TokenReduce.from_onnx(
        {
            a.name: get_attribute_value(a)
            for a in graph_node.attribute
            if not a.name.startswith(PLUGIN_PREFIX)
        }
    )


def weight_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of weights per data type, e.g. {"FLOAT16": 44000000, "INT64": 120}."""
    import onnx

    sizes: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type)
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        sizes[name] = sizes.get(name, 0) + int(np.prod(tensor.dims, dtype=np.int64)) * width
    return sizes
