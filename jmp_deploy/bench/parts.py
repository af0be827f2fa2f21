"""The halves of a ViT's blocks as models of their own, for timing them at any number of tokens.

A half stands in a chain with those of the other blocks, as many as the model is deep: alone, it
would be timed with the cost of its launch and with weights that fit into a cache. Needs PyTorch,
timm and the ONNX tools; random weights do, time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.artifact import Artifact
from ..export import graph
from ..jmp.schedule import ModelShape

ATTENTION, MLP, DENSE = "attention", "mlp", "dense"


@dataclass(frozen=True)
class Parts:
    """Exported parts: name -> ONNX file. The two chains take [B, N, C], any B and N.

    Attributes:
        shape: of the model.
        image: (channels, height, width) of the dense model's images.
        files: of ATTENTION, MLP and DENSE.
    """

    shape: ModelShape
    image: tuple[int, int, int]
    files: dict[str, Path]


def export_parts(
    artifact: Artifact, folder: Path, *, on_part: Callable[[str], None] = lambda name: None
) -> Parts:
    """Exports the dense model of an artifact, and the halves of its blocks, at its precision.

    Raises:
        ModuleNotFoundError: PyTorch, timm or the ONNX tools are missing.
        JmpDeployError: the model is not known or not supported.
    """
    from ..core.manifest import Weights
    from ..export import export
    from ..jmp.families import family_of
    from ..jmp.models import restore_model
    from ..jmp.patch import model_shape

    model = restore_model(replace(artifact, jmp=None, weights=Weights("random", seed=0)))
    shape = model_shape(model)
    size = family_of(model).patch_embed(model).img_size
    files = {}
    for name in (ATTENTION, MLP, DENSE):
        on_part(name)
        raw = folder / f"{name}.fp32.onnx"
        if name == DENSE:
            export.export_onnx(model, raw, image_size=size)
        else:
            _export_chain(model, name, shape, raw)
        files[name] = _at_precision(raw, folder / f"{name}.onnx", artifact.precision)
    return Parts(shape, artifact.image_shape, files)


def with_tokens(source: Path, tokens: int, target: Path) -> Path:
    """A chain for one number of tokens, as a reduction leaves it in a model: a static shape."""
    proto = graph.load_model(source)
    dimension = proto.graph.input[0].type.tensor_type.shape.dim[1]
    dimension.Clear()
    dimension.dim_value = tokens
    # Shapes that were inferred for any number of tokens would contradict it.
    del proto.graph.value_info[:]
    output = proto.graph.output[0].type.tensor_type.shape.dim[1]
    output.Clear()
    output.dim_value = tokens
    graph.save_model(proto, target)
    return target


def _at_precision(raw: Path, target: Path, precision: str) -> Path:
    from ..export.precision import LOW, to_low

    if precision == "fp32":
        return raw.replace(target)
    to_low(raw, target, precision if precision in LOW else "fp16")
    raw.unlink()
    return target


def _export_chain(model: Any, name: str, shape: ModelShape, path: Path) -> None:
    import torch

    from ..export.export import BATCH, to_proto

    most = shape.num_prefix + shape.num_patches
    example = torch.zeros(2, most, shape.width)
    dims = {0: BATCH, 1: torch.export.Dim("tokens", min=shape.num_prefix + 2)}
    proto = to_proto(_chain(model, name), example, dims, ["out"], name)
    graph.save_model(proto, path)


def _chain(model: Any, name: str) -> Any:
    """One half of every block, as a block with a reduction runs it."""
    from torch import Tensor, nn

    from ..jmp.families import family_of

    family = family_of(model)
    rotary = family.rotary(model)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(model.blocks)

        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                if name == MLP:
                    x = family.feed(block, x)
                    continue
                # The rows of the first patches: which ones takes no time.
                rope = None if rotary is None else rotary.rows(index)
                if rope is not None:
                    rope = rope[..., : x.shape[1] - model.num_prefix_tokens, :]
                x = family.attend(block, x, None, rope)[0]
            return x

    return Chain().eval()
