"""Model families: all that JMP knows of how a model is built, one file for each family.

A new family is a class that has what `Family` lists, and an entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from ...core.errors import ModelError
from ..schedule import ModelShape
from .rope import Rope, Rotary
from .vit import ViT


class Family(Protocol):
    """What differs from family to family. `x` is [B, N, C]; `block` is one of the model's.

    Attributes:
        model_class: timm's; a model of this class is the family's to take or to refuse.
        supported: names of models that it takes, for hints.
        short_names: short name -> (timm name, image size if not timm's own).
    """

    model_class: type[nn.Module]
    supported: str
    short_names: dict[str, tuple[str, int | None]]

    def refusal(self, model: Any) -> str | None:
        """Why JMP cannot be put into this model; None if it can."""

    def shape(self, model: Any) -> ModelShape:
        """Its sizes."""

    def patch_embed(self, model: Any) -> Any:
        """timm's patch embedding, with (height, width) as img_size, patch_size and grid_size."""

    def roots(self, names: Mapping[str, Any]) -> list[str]:
        """The prefixes under which named tensors hold a model of this family."""

    def to_timm(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state with other projects' names, such as Hugging Face's, with timm's."""

    def settings(
        self, model: Any, state: dict[str, Tensor], size: tuple[int, int] | None = None
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What a state's shapes tell of its model, as far as timm's default is another.

        Args:
            model: as timm makes it, on the meta device.
            state: with timm's names.
            size: (height, width) in pixels, where something else says it.

        Returns:
            Arguments of `timm.create_model` ("img_size" always, where it can be known), and what
            was found in words.

        Raises:
            WeightsError: of a model of another size, or an image size that cannot be known.
        """

    def channels(self, model: Any) -> int:
        """Of its input images."""

    def fit_checkpoint(self, model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A published state with the names and sizes of this model, as timm itself loads it."""

    def embed(self, model: Any, images: Tensor) -> Tensor:
        """[B, 3, H, W] to what enters the first block."""

    def head(self, model: Any, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """What leaves the last block to the model's output, or to what its classifier reads."""

    def reads_prefix_only(self, model: Any) -> bool:
        """Whether the head looks at no patch token."""

    def pooling(self, model: Any) -> nn.Module | None:
        """The head's pooling by attention, called with tokens and `attn_mask`, if it has one."""

    def rotary(self, model: Any) -> Rotary | None:
        """Rotations of its patch tokens, for the image size that it has; None if it has none."""

    def put(self, model: Any, blocks: nn.Module) -> None:
        """Makes the model run these blocks: JMP's, or its own again."""

    def passed_over(self, block: Any) -> list[tuple[str, nn.Module]]:
        """(name, module) of what `attend` and `feed` do not call, but only its layers."""

    def heads(self, block: Any) -> tuple[int, int, float]:
        """(number, width of one, scale of the attention logits)."""

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """The modules that the tokens enter the attention half and the MLP half by."""

    def run(
        self, block: Any, x: Tensor, mask: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        """The whole block, by timm's code; `mask` is added to the attention logits, `rope` are
        the rows of `rotary`."""

    def attend(
        self,
        block: Any,
        x: Tensor,
        mask: Tensor | None = None,
        rope: Tensor | None = None,
        first: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention half with its residual, of all tokens or of the first ones alone.

        Returns:
            The tokens [B, N, C] or [B, first, C], and the QKV that a reduction decides by (see
            `node.py`).
        """

    def feed(self, block: Any, x: Tensor) -> Tensor:
        """The MLP half with its residual."""


FAMILIES: tuple[Family, ...] = (ViT(), Rope())

_BIAS = "its attention has a position bias for every pair of places, which JMP would have to cut"
_WINDOWS = "its blocks attend within windows of the image, in which every token has to be in place"
_GLOBAL = "take one that attends over the whole image: dinov2_*, dinov3_*, deit3_*"
OTHERS: dict[str, tuple[str, str]] = {
    "NaFlexVit": (
        "its images come in any size, so that their number of tokens is not fixed",
        "take its twin of one size: siglip2_b for naflexvit_base_patch16_siglip",
    ),
    "VisionTransformerSAM": (_WINDOWS, _GLOBAL),
    "SwinTransformer": (_WINDOWS, _GLOBAL),
    "SwinTransformerV2": (_WINDOWS, _GLOBAL),
    "Beit": (_BIAS, "take its successor: eva02_*"),
    "VisionTransformerRelPos": (_BIAS, "take deit3_*, or one that rotates: vit_*_rope_*"),
}
"""Transformers of timm that are of no family: class -> (why, what to take instead)."""

SHORT_NAMES = {name: model for family in FAMILIES for name, model in family.short_names.items()}
"""Short name -> (timm name, image size if not timm's own)."""


def roots(names: Mapping[str, Any]) -> list[str]:
    """The prefixes under which named tensors hold a model of any family."""
    return list(dict.fromkeys(root for family in FAMILIES for root in family.roots(names)))


def family_of(model: nn.Module) -> Family:
    """The family that a model is of; the gate that unsupported models stop at.

    Raises:
        ModelError: JMP cannot be put into it, with the reason.
    """
    names = [family.model_class.__name__ for family in FAMILIES]
    reason: str | None
    reason, instead = OTHERS.get(
        type(model).__name__,
        (
            f"it is not built like timm's {' or '.join(names)}",
            f"supported: {', '.join(family.supported for family in FAMILIES)}",
        ),
    )
    for family in FAMILIES:
        if isinstance(model, family.model_class):
            reason = family.refusal(model)
            if reason is None:
                return family
    raise ModelError(f"{type(model).__name__} cannot be patched: {reason}", instead)


@contextmanager
def written_out_attention(model: nn.Module) -> Iterator[None]:
    """Attention as matmul, softmax, matmul: timm's own form for `fused_attn=False`.

    It is the pattern that TensorRT fuses (and scaled_dot_product_attention does not decompose
    with a dynamic batch in torch 2.15); FLOP counters see into it on a CPU too.
    """
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True
