"""Features of every patch of the image, restored after tokens were reduced.

A patch gets the features of the token that it went to, or, if it was pruned, of the one that it
resembled most. The reductions' `index` says which that is; one after the other they compose to one
index per patch (`JMPBlocks.restores`), so that each output is gathered once, by the index of its
depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.outputs import DENSE, PROBABILITIES, Dense, output_named
from .patch import JMPBlocks

Layers = dict[int, tuple[Tensor, "Tensor | None"]]
"""Block -> the tokens [B, N, C] that left it, and the slots of every patch [B, M] among them (see
`JMPBlocks.restores`), None where every patch has its token still."""


class DenseFeatures(nn.Module):
    """A timm model that gives features of every patch, [B, M, C] row by row, class and register
    tokens left out.

    Args:
        model: of a family in `families`; patched, if it is, with `patch(restore=True)`.
        outputs: names as `outputs.Dense` has them: "dense" what `forward_features` gives of each
            patch, "dense_3" what leaves block 3, through the model's last norm, "raw_3" without it
            (timm's `forward_intermediates` with `norm=True` and `False`). Beside them may stand
            what the model itself gives: "logits", "probabilities" or "features".
    """

    def __init__(self, model: nn.Module, outputs: Sequence[str] = (DENSE.name,)) -> None:
        super().__init__()
        self.model: Any = model
        self.outputs = tuple(output_named(name) for name in outputs)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[B, channels, H, W] -> [B, M, C]; with several outputs all of them, in their order.

        Raises:
            ModelError: the model was patched without `restore`.
        """
        return self.of(lambda: self.model.forward_features(images))

    def of(self, run: Callable[[], Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The same of a run of the model's blocks and last norm, which gives its tokens [B, N, C].
        Layers are of the blocks that run."""
        blocks = self.model.blocks
        last = len(blocks) - 1
        wanted = {output.layer for output in self.outputs if isinstance(output, Dense)}
        if wanted and isinstance(blocks, JMPBlocks) and blocks.reductions and not blocks.restores:
            raise ModelError(
                "the model does not say where its patches went", "patch(model, ..., restore=True)"
            )
        with _leaving(blocks, {last if at is None else at for at in wanted}) as layers:
            tokens = run()
        found = []
        for output in self.outputs:
            if not isinstance(output, Dense):
                given = self.model.forward_head(tokens)
                found.append(given.softmax(dim=-1) if output == PROBABILITIES else given)
                continue
            at = last if output.layer is None else output.layer
            normed = output.normed and at == last
            left, slots = layers[at]
            patches = (tokens if normed else left)[:, self.model.num_prefix_tokens :]
            if slots is not None:
                patches = patches.gather(1, slots[..., None].expand(-1, -1, patches.shape[-1]))
            # Behind the gather, so that `graph.block_tensors` takes it for no block's norm.
            found.append(self.model.norm(patches) if output.normed and not normed else patches)
        return found[0] if len(found) == 1 else tuple(found)


@contextmanager
def _leaving(blocks: Any, wanted: set[int]) -> Iterator[Layers]:
    """What leaves these blocks while it lasts."""
    layers: Layers = {}
    if isinstance(blocks, JMPBlocks):
        # Its blocks are not always called as one: it notes itself what leaves them.
        blocks.left.layers, blocks.left.wanted = layers, wanted
        try:
            yield layers
        finally:
            blocks.left.layers, blocks.left.wanted = {}, set()
        return

    def keep(at: int) -> Any:
        def hook(block: nn.Module, given: Any, tokens: Tensor) -> None:
            layers[at] = tokens, None

        return hook

    hooks = [blocks[at].register_forward_hook(keep(at)) for at in sorted(wanted)]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
