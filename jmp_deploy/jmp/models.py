"""Models by short name, with weights, preprocessing and class names, through timm."""

from __future__ import annotations

import difflib
import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..core.artifact import Artifact, Weights
from ..core.errors import ModelError, WeightsError, one_line
from ..core.files import sha256
from ..core.images import Preprocess

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class LoadedModel:
    """A dense timm model in eval mode, and what has to be known about it.

    Attributes:
        model: of a family in `families`, float32, on the CPU.
        name: timm name.
        origin: where the weights come from, for the manifest.
        preprocess: what its images have to look like.
        class_names: one per output, or None where unknown.
        synsets: WordNet ids such as n01440764, one per output, or None where unknown.
    """

    model: nn.Module
    name: str
    origin: Weights
    preprocess: Preprocess
    class_names: tuple[str, ...] | None
    synsets: tuple[str, ...] | None = None


def resolve_name(name: str) -> tuple[str, int | None]:
    """A short or timm name to (timm name, default image size).

    Raises:
        ModelError: unknown name; the hint has near matches.
    """
    import timm

    from .families import SHORT_NAMES

    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if timm.is_model(name.split(".")[0]):
        return name, None
    known = [*SHORT_NAMES, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"short names: {', '.join(SHORT_NAMES)}"
    raise ModelError(f"unknown model {name!r}", hint)


def load_model(
    name: str, weights: str = "auto", *, img_size: int | None = None, seed: int = 0
) -> LoadedModel:
    """Makes a timm model with the weights asked for.

    Args:
        name: short or timm name.
        weights: "auto" (pretrained if the hub or its cache has them, else random), "pretrained",
            "random", or a path to .safetensors, .pth, .pt or .bin.
        img_size: pixels, if not the model's own.
        seed: of random weights.

    Raises:
        ModelError: unknown or unsupported model.
        WeightsError: weights that cannot be had, read or fitted.
    """
    timm_name, default_size = resolve_name(name)
    size = img_size or default_size
    _refuse_early(timm_name, size)
    if weights in ("auto", "pretrained"):
        model, origin = _pretrained(timm_name, size, fall_back=weights == "auto", seed=seed)
    elif weights == "random":
        model, origin = _random(timm_name, size, seed)
    else:
        model, origin = _from_file(timm_name, size, Path(weights))
    model.eval().requires_grad_(False)
    names, synsets = _classes(model)
    return LoadedModel(model, timm_name, origin, _preprocess(model), names, synsets)


def restore_model(artifact: Artifact, weights: str | None = None) -> nn.Module:
    """Makes the PyTorch model of an artifact again: its weights, and JMP as the build put it in.

    Args:
        artifact: what was built.
        weights: file or word as for `build --weights`, if the recorded place will not do.

    Raises:
        WeightsError: the weights are not to be had here, or are others than those of the build.
    """
    from .fold import fold_normalization, is_folded
    from .patch import patch
    from .schedule import from_manifest

    origin, jmp = artifact.weights, artifact.jmp
    source = weights or _source(origin)
    loaded = load_model(
        artifact.model.name, source, img_size=artifact.model.image_size, seed=origin.seed or 0
    )
    if origin.kind == "file" and loaded.origin.sha256 != origin.sha256:
        raise WeightsError(
            f"{source} is not the file that the artifact was built from "
            f"(sha256 {str(loaded.origin.sha256)[:12]}..., expected {str(origin.sha256)[:12]}...)",
            "name the right one with --weights",
        )
    if is_folded(artifact.preprocess) and not is_folded(loaded.preprocess):
        fold_normalization(loaded.model, loaded.preprocess)
    if jmp:
        patch(
            loaded.model,
            from_manifest(jmp),
            tau=jmp.tau,
            granularity=jmp.granularity,
            proportional=jmp.proportional,
        )
    return loaded.model


def _refuse_early(timm_name: str, size: int | None) -> None:
    """Refuses an unsupported model before weights are fetched or memory is taken for it."""
    import torch

    from .families import family_of

    with torch.device("meta"):
        model = _create(timm_name, size)
    patch = family_of(model).patch_embed(model).patch_size[0]
    if size is not None and size % patch:
        # timm would cut the rest of the image off without a word
        raise ModelError(
            f"image size {size} is not a multiple of the patch size {patch} of {timm_name}",
            f"use --img-size {size // patch * patch or patch}",
        )


def _create(timm_name: str, size: int | None, **options: Any) -> nn.Module:
    import timm

    if size is not None:
        options["img_size"] = size
    try:
        with _quiet_timm():
            return timm.create_model(timm_name, **options)
    except TypeError as error:
        # CNNs take no img_size
        raise ModelError(f"{timm_name} takes no image size: {error}", "leave out --img-size") from (
            error
        )
    except AssertionError as error:
        raise ModelError(f"{timm_name} cannot be made with image size {size}: {error}") from error


def _random(timm_name: str, size: int | None, seed: int) -> tuple[nn.Module, Weights]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _create(timm_name, size), Weights("random", seed=seed)


def _pretrained(
    timm_name: str, size: int | None, *, fall_back: bool, seed: int
) -> tuple[nn.Module, Weights]:
    import huggingface_hub

    # Errors of the hub, of HTTP and of the file system, and timm's for a model without weights.
    trouble = (OSError, RuntimeError, huggingface_hub.errors.EntryNotFoundError)
    try:
        with _offline_unless_reachable():
            model = _create(timm_name, size, pretrained=True)
    except trouble as error:
        if fall_back:
            model, origin = _random(timm_name, size, seed)
            return model, replace(origin, fallback_for="pretrained", reason=_why(error))
        raise WeightsError(
            f"no pretrained weights for {timm_name}: {_why(error)}",
            "pass --weights FILE.safetensors, connect to the hub, or use --weights random "
            "(for timing only)",
        ) from error
    config = model.pretrained_cfg
    source = config.get("hf_hub_id") or config.get("url") or "timm"
    return model, Weights("pretrained", source=source, tag=config.get("tag", ""))


def _from_file(timm_name: str, size: int | None, path: Path) -> tuple[nn.Module, Weights]:
    state = _read_checkpoint(path)
    options: dict[str, Any] = {}
    head = state.get("head.weight")
    if head is None:
        options["num_classes"] = 0
    elif head.ndim == 2:
        options["num_classes"] = head.shape[0]
    model = _create(timm_name, size, **options)
    state = _fit(model, state)
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
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
            f"{path} does not fit {timm_name}: {'; '.join(problems)}",
            "is it a checkpoint of this model, with timm's key names?",
        )
    model.load_state_dict(state)
    digest = sha256(path)
    return model, Weights("file", path=str(path.resolve()), sha256=digest)


def _source(origin: Weights) -> str:
    if origin.kind != "file":
        return origin.kind
    if not Path(str(origin.path)).is_file():
        raise WeightsError(
            f"the weights {origin.path} are not here", "name them with --weights FILE"
        )
    return str(origin.path)


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads tensors without running anything that the file might contain."""
    import torch

    if not path.is_file():
        raise WeightsError(
            f"no such weights file: {path}", "use auto, pretrained, random or the path of a file"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each library raises its own kind for a broken file
        raise WeightsError(
            f"cannot read weights from {path}: {_first_line(error)}",
            "expected .safetensors, or a .pth of plain tensors (pickled objects are not loaded)",
        ) from error
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise WeightsError(f"{path} holds no state dict, but a {type(loaded).__name__}")
    strangers = [key for key, value in loaded.items() if not torch.is_tensor(value)]
    if strangers:
        raise WeightsError(f"{path} holds more than tensors: {', '.join(map(str, strangers[:3]))}")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def _fit(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state in the model's terms; as it is where timm cannot make sense of it."""
    from .families import family_of

    try:
        with _quiet_timm():
            return family_of(model).fit_checkpoint(model, state)
    except Exception:  # timm's code trusts what it is given
        return state  # what does not fit is named by its keys and shapes


def _preprocess(model: nn.Module) -> Preprocess:
    from timm.data import resolve_model_data_config

    from .families import family_of

    config = resolve_model_data_config(model)
    size = family_of(model).patch_embed(model).img_size
    return Preprocess.from_timm({**config, "input_size": (config["input_size"][0], *size)})


def _classes(model: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Names and synsets of the classes; a model with 1000 is taken for one of ImageNet-1k."""
    if model.num_classes != 1000:
        return None, None
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = tuple(info.index_to_description(index) for index in range(1000))
    return names, tuple(info.label_names())


@contextmanager
def _offline_unless_reachable() -> Iterator[None]:
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


def _why(error: BaseException) -> str:
    """Why pretrained weights could not be had; the hub's own words for "offline" fill a screen."""
    if type(error).__name__ == "LocalEntryNotFoundError":
        return "the hub cannot be reached and its cache has none"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return one_line(error) or type(error).__name__
