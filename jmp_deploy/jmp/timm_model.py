"""timm's own functions, told what to do with what may go wrong: quiet, with one clear message."""

from __future__ import annotations

import logging
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..core.errors import ModelError, WeightsError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

Size = int | tuple[int, int]
"""Pixels: of a square, or (height, width)."""
NORM_EPS = "layer_norm_eps"
"""Beside timm's arguments: what transformers' config says, 1e-12 for a ViT where timm has 1e-6."""


def create(timm_name: str, size: Size | None, **options: Any) -> nn.Module:
    """`timm.create_model`, with NORM_EPS among its options.

    Raises:
        ModelError: timm cannot make it so.
    """
    import timm
    from torch import nn

    if size is not None:
        options["img_size"] = size
    eps = options.pop(NORM_EPS, None)
    try:
        with _quiet_timm():
            model = timm.create_model(timm_name, **options)
    except TypeError as error:
        # CNNs take no img_size
        what = "image size" if set(options) <= {"img_size", "pretrained"} else "such settings"
        raise ModelError(
            f"{timm_name} takes no {what}: {one_line(error)}",
            "leave out --img-size" if what == "image size" else "look at --model-kwargs",
        ) from error
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{timm_name} cannot be made with {_words(options)}: {one_line(error)}"
        ) from error
    if eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(eps)
    return model


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{'image size' if name == 'img_size' else name} {value}" for name, value in options.items()
    )


def fill(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Loads a state with timm's names.

    Raises:
        WeightsError: what does not fit, all of it in one message.
    """
    import torch

    state, own = _fit(model, state), model.state_dict()
    if "head.bias" in own and "head.bias" not in state and "head.weight" in state:
        state["head.bias"] = torch.zeros_like(own["head.bias"])
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    both = [key for key in own if key in state]
    shapes = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in both
        if state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("keys of another shape", shapes),
        )
        if keys
    ]
    if problems:
        raise WeightsError(
            f"{path} does not fit {name}: {'; '.join(problems)}",
            "is it a checkpoint of this model? `inspect FILE` shows what is in it; a model of your "
            "own code goes in with --from package.module:function",
        )
    for key in both:
        if own[key].is_floating_point() and not _is_number(state[key]):
            raise WeightsError(
                f"{path} holds {str(state[key].dtype).removeprefix('torch.')} values in {key}, "
                "which are no weights as they are trained",
                "save the weights in float32, float16 or bfloat16, before they are quantized",
            )
    model.load_state_dict(state)


def _is_number(tensor: Tensor) -> bool:
    """Whether values are what they say: floats, neither quantized nor of 8 bits."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_quantized


def _fit(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state in the model's terms; as it is where timm cannot make sense of it."""
    from .families import family_of

    try:
        with _quiet_timm():
            return family_of(model).fit_checkpoint(model, state)
    except Exception:  # timm's code trusts what it is given
        return state  # what does not fit is named by its keys and shapes


@contextmanager
def offline_unless_reachable() -> Iterator[None]:
    """Tells the hub's client to use its cache only where the hub cannot be reached.

    The client itself retries for three quarters of a minute before it gives up.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not _hub_reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_reachable(endpoint: str, timeout: float = 3.0) -> bool:
    parts = urlsplit(endpoint)
    if urllib.request.getproxies().get(parts.scheme):
        return True  # a direct connection says nothing where a proxy is set: let the client try
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout).close()
    except OSError:
        return False
    return True


@contextmanager
def _quiet_timm() -> Iterator[None]:
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def why(error: BaseException) -> str:
    """Why pretrained weights could not be had; the hub's own words for "offline" fill a screen."""
    if type(error).__name__ == "LocalEntryNotFoundError":
        return "the hub cannot be reached and its cache has none"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return one_line(error) or type(error).__name__
