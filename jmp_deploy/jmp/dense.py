"""Features of every patch of the image, restored after tokens were reduced.

A patch gets the features of the token that it went to, or, if it was pruned, of the one that it
resembled most. The reductions' `index` says which that is; one after the other they compose to one
index per patch (`JMPBlocks.restores`), so that features are gathered once, at the end.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .patch import JMPBlocks


class DenseFeatures(nn.Module):
    """A timm model that gives [B, M, C]: what its `forward_features` gives of each patch, row by
    row, class and register tokens left out.

    Args:
        model: of a family in `families`; patched, if it is, with `patch(restore=True)`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, M, C]."""
        patches = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        blocks = self.model.blocks
        if not isinstance(blocks, JMPBlocks) or not blocks.reductions:
            return patches
        slots = blocks.left.take_slots()
        return patches.gather(1, slots[..., None].expand(-1, -1, patches.shape[-1]))
