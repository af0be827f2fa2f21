"""Models by name, from a file, a folder or the user's Python: with weights, preprocessing, classes.

What is not asked for is taken from the nearest that knows it: the file's tensors (see
`Family.settings`), the settings that its trainer kept in it, the config beside it, and last the
defaults of the timm name. What was taken from where is said (`Weights.notes`).
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifact import Artifact
from ..core.classes import SYNSET, LabelOrder, of_json, read_labels
from ..core.errors import ModelError, WeightsError, one_line
from ..core.files import sha256
from ..core.images import Preprocess
from ..core.manifest import Weights
from . import checkpoint
from .sources import HUB, Source, source_of
from .timm_model import Size, create, fill, offline_unless_reachable, why

if TYPE_CHECKING:
    from torch import nn

IMAGENET = "imagenet"
"""In place of a file of class names: those of ImageNet-1k."""
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
TRAINED_ONLY = ("drop_rate", "drop_path_rate", "pretrained", "dynamic_img_size", "checkpoint_path")
"""Arguments of timm that mean nothing to a model that is deployed at one size."""


@dataclass(frozen=True)
class OwnModel:
    """What the user says of their own model where neither its file nor its name does.

    Attributes:
        weights_key: which state of a file that holds several.
        kwargs: arguments of `timm.create_model`.
        mean, std, crop_pct, interpolation: of the images, as timm means them.
        labels: "imagenet", or what `classes.read_labels` takes.
        label_order: of the classes, where `labels` is a folder.
        multi_label: each output is a question of its own.
        function: "package.module:function" that returns the model, in place of a name.
    """

    weights_key: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    labels: str | None = None
    label_order: LabelOrder | None = None
    multi_label: bool = False
    function: str | None = None

    def preprocessing(self) -> dict[str, Any]:
        """What is said of the images."""
        return {k: v for k in PREPROCESSING if (v := getattr(self, k, None)) is not None}


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
        settings: see `manifest.Model`.
        multi_label: see `Artifact`.
        function: see `manifest.Model`.
    """

    model: nn.Module
    name: str
    origin: Weights
    preprocess: Preprocess
    class_names: tuple[str, ...] | None
    synsets: tuple[str, ...] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    multi_label: bool = False
    function: str = ""


def load_model(
    name: str | nn.Module,
    weights: str = "auto",
    *,
    img_size: Size | None = None,
    seed: int = 0,
    own: OwnModel | None = None,
) -> LoadedModel:
    """Makes a timm model with the weights asked for.

    Args:
        name: short or timm name, "timm/NAME.TAG", "hf-hub:OWNER/NAME", "local-dir:PATH" (a folder
            with config.json and weights, of timm or of transformers), the path of a checkpoint
            that says what it is of, or a module, which is copied.
        weights: "auto" (pretrained if the hub or its cache has them, else random), "pretrained",
            "random", or a path to .safetensors, .pth, .pt, .bin or .ckpt. A folder's and a file's
            own for the former two.
        img_size: pixels, if not the file's, the folder's or the model's own.
        seed: of random weights.
        own: what else is to be said of the model.

    Raises:
        ModelError: unknown or unsupported model, or settings that contradict it.
        WeightsError: weights that cannot be had, read or fitted.
    """
    own = own or OwnModel()
    if own.function or not isinstance(name, str):
        return _from_python(name, img_size, own)
    of_its_own = weights in ("auto", "pretrained")
    source = source_of(name, own.weights_key if of_its_own else None)
    path = source.file
    if not of_its_own:
        path = None if weights == "random" else Path(weights)
    if path is not None:
        return _from_file(source, path, img_size, own)
    size = img_size or source.size
    settings = {**source.kwargs, **own.kwargs}
    _refuse_early(source.name, size, settings)
    if weights == "random":
        model, origin = _random(source.name, size, seed, settings)
    else:
        fall_back = weights == "auto" and not source.name.startswith(HUB)
        model, origin = _pretrained(source.name, size, settings, fall_back=fall_back, seed=seed)
    return _loaded(model, source, origin, settings, own, {})


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
    about, size = artifact.model, (artifact.preprocess.height, artifact.preprocess.width)
    mean, std = artifact.preprocess.folded or (artifact.preprocess.mean, artifact.preprocess.std)
    own = OwnModel(
        weights_key=origin.key or None,
        kwargs=about.settings,
        mean=mean,
        std=std,
        function=about.function or None,
    )
    if origin.kind == "python" and not about.function:
        raise WeightsError(
            f"the model was in the hands of the Python that built it ({about.asked_for})",
            "name a function that makes it with `build --from package.module:function`, or compare "
            "with the stored outputs",
        )
    source, name = weights or _source(origin), about.name
    if origin.kind == "pretrained" and str(origin.source).startswith(HUB):
        name = str(origin.source)
    loaded = load_model(name, source, img_size=size, seed=origin.seed or 0, own=own)
    if origin.kind in ("file", "python") and loaded.origin.sha256 != origin.sha256:
        raise WeightsError(
            f"{about.function or source} is not what the artifact was built from "
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
            restore=about.restores,
        )
    return loaded.model


def weights_digest(model: nn.Module) -> str:
    """sha256 over all parameters and buffers of a PyTorch model, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- the model -----------------------------------------------------------------------------------


def _refuse_early(timm_name: str, size: Size | None, settings: Mapping[str, Any]) -> nn.Module:
    """Refuses an unsupported model before weights are fetched or memory is taken for it.

    Returns:
        It, without memory.
    """
    import torch

    from .families import family_of

    with torch.device("meta"):
        model = create(timm_name, size, **settings)
    patch = family_of(model).patch_embed(model).patch_size
    for side, pixels in zip(_pair(size) if size else (), patch, strict=False):
        if side % pixels:
            # timm would cut the rest of the image off without a word
            raise ModelError(
                f"image size {side} is not a multiple of the patch size {pixels} of {timm_name}",
                f"use --img-size {side // pixels * pixels or pixels}",
            )
    return model


def _pair(size: Size) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _random(
    timm_name: str, size: Size | None, seed: int, settings: Mapping[str, Any]
) -> tuple[nn.Module, Weights]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(timm_name, size, **settings), Weights("random", seed=seed)


def _pretrained(
    timm_name: str, size: Size | None, settings: Mapping[str, Any], *, fall_back: bool, seed: int
) -> tuple[nn.Module, Weights]:
    import huggingface_hub

    # Errors of the hub, of HTTP and of the file system, and timm's for a model without weights.
    trouble = (OSError, RuntimeError, huggingface_hub.errors.EntryNotFoundError)
    try:
        with offline_unless_reachable():
            model = create(timm_name, size, pretrained=True, **settings)
    except trouble as error:
        if fall_back:
            model, origin = _random(timm_name, size, seed, settings)
            return model, replace(origin, fallback_for="pretrained", reason=why(error))
        raise WeightsError(
            f"no pretrained weights for {timm_name}: {why(error)}",
            "pass --weights FILE.safetensors, connect to the hub, or use --weights random "
            "(for timing only)",
        ) from error
    config = model.pretrained_cfg
    if timm_name.startswith(HUB):
        return model, Weights("pretrained", source=timm_name)
    source = config.get("hf_hub_id") or config.get("url") or "timm"
    return model, Weights("pretrained", source=source, tag=config.get("tag", ""))


def _from_file(source: Source, path: Path, img_size: Size | None, own: OwnModel) -> LoadedModel:
    from .families import family_of, roots

    found = source.checkpoint
    if found is None or found.path != path:
        found = checkpoint.read(path, roots, own.weights_key)
    asked = {**_trained_with(found.trainer), **source.kwargs, **own.kwargs}
    told = asked.pop("img_size", None) or _told_size(source.config, found.trainer)
    default = _refuse_early(source.name, None, asked)
    family = family_of(default)
    state = family.to_timm(found.state)
    wanted = _pair(img_size) if img_size else None
    try:
        shapes, inferred = family.settings(default, state, wanted or told)
    except WeightsError as error:
        raise WeightsError(f"{path} does not fit {source.name}: {error.message}", error.hint) from (
            error
        )
    trained = shapes.pop("img_size", None)
    notes = [*found.notes, *inferred]
    flexible = getattr(default, "dynamic_img_size", False) or (
        (found.trainer.get("model_kwargs") or {}).get("dynamic_img_size")
    )
    if told and trained and told != trained and not (wanted or flexible):
        raise WeightsError(
            f"{path} says two image sizes: {_by(told)} in its settings, {_by(trained)} by its "
            "position embeddings",
            f"say which with --img-size {told[0]},{told[1]}",
        )
    size = wanted or told or trained
    native = family.patch_embed(default).img_size
    if source.size and not (wanted or told) and trained in (None, tuple(native)):
        size = _pair(source.size)  # a short name's own, for what its authors published
    if size and trained and size != trained:
        notes.append(f"position embeddings of {_by(trained)} pixels resampled to {_by(size)}")
    elif size and size != tuple(native):
        notes.append(f"{_by(size)} pixels")
    if found.architecture and found.architecture.partition(".")[0] != source.name.partition(".")[0]:
        notes.append(f"the file itself says that it is of {found.architecture}")
    settings = {**asked, **shapes, **own.kwargs}
    _refuse_early(source.name, size, settings)
    model = create(source.name, size, **settings)
    fill(model, state, path, source.name)
    origin = Weights(
        "file",
        path=str(path.resolve()),
        sha256=sha256(path),
        key=own.weights_key or "",
        notes=tuple(one_line(note) for note in notes),
        recovered=found.recovered,
    )
    return _loaded(model, source, origin, settings, own, found.trainer)


def _by(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def _trained_with(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` that a trainer kept: timm's --model-kwargs and --gp."""
    kwargs = trainer.get("model_kwargs")
    found = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    if isinstance(trainer.get("gp"), str):
        found["global_pool"] = trainer["gp"]
    return {k: v for k, v in found.items() if k not in TRAINED_ONLY and v is not None}


def _told_size(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) that settings beside the weights say: the trainer's, else the config's."""
    candidates = [trainer.get("input_size"), trainer.get("img_size"), config.get("input_size")]
    for value in candidates:
        sizes = [value] if isinstance(value, int) else list(value or ())
        if sizes and all(isinstance(side, int) and side > 0 for side in sizes) and len(sizes) < 4:
            return sizes[-2 if len(sizes) > 1 else -1], sizes[-1]
    return None


def _refuse_odd_values(model: nn.Module, name: str) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(
                f"the weights of {name} are not finite: {key} holds NaN or infinity",
                "training diverged, or the file was damaged: take an earlier checkpoint",
            )


def _from_python(name: str | nn.Module, img_size: Size | None, own: OwnModel) -> LoadedModel:
    """A model that the user's Python makes or has made."""
    from .families import family_of

    made: Any = _call(own.function) if own.function else name
    made = getattr(made, "_orig_mod", made)  # of torch.compile
    made = getattr(made, "module", made) if type(made).__name__.endswith("Parallel") else made
    family_of(made)  # the gate, before memory is taken for a copy
    try:
        model = copy.deepcopy(made).cpu().float()
    except Exception as error:  # a module may refuse to be copied in its own way
        raise ModelError(f"the model cannot be copied: {one_line(error)}") from error
    family = family_of(model)
    if img_size is not None and _pair(img_size) != tuple(family.patch_embed(model).img_size):
        raise ModelError(
            f"the model is of {_by(family.patch_embed(model).img_size)} pixels",
            "make it of another size (timm: model.set_input_size), and leave out --img-size",
        )
    called = f"{type(made).__module__}.{type(made).__qualname__}"
    config = getattr(model, "pretrained_cfg", None) or {}
    label = own.function or called
    origin = Weights("python", sha256=weights_digest(model), source=label)
    source = Source(str(config.get("architecture") or called), config=dict(config))
    return _loaded(model, source, origin, {}, own, {})


def _call(spec: str) -> Any:
    """What `package.module:function` returns."""
    from torch import nn

    module, _, function = spec.partition(":")
    hint = "write --from package.module:function, a function without arguments that returns a model"
    if not module or not function:
        raise ModelError(f"{spec!r} names no function", hint)
    here = str(Path.cwd())
    if here not in sys.path:  # `python -m` has it, the installed command has not
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's code
        what = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{spec} cannot be called: {what}", hint) from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"{spec} returned a {type(made).__name__}, not a torch.nn.Module", hint)
    return made


def _loaded(
    model: nn.Module,
    source: Source,
    origin: Weights,
    settings: Mapping[str, Any],
    own: OwnModel,
    trainer: Mapping[str, Any],
) -> LoadedModel:
    """The model with all that is known of it."""
    model.eval().requires_grad_(False)
    _refuse_odd_values(model, source.name)
    told = {k: v for k in PREPROCESSING if (v := source.config.get(k)) is not None}
    told.update({k: v for k in PREPROCESSING if (v := trainer.get(k))})
    if (ratio := trainer.get("eval_crop_ratio")) and "crop_pct" not in told:  # DeiT's main.py
        told["crop_pct"] = ratio
    preprocess = _preprocess(model, {**told, **own.preprocessing()})
    names, synsets, note = _classes(model, source, origin, own, trainer)
    if note:
        origin = replace(origin, notes=(*origin.notes, note))
    architecture = source.name
    if architecture.startswith(HUB):
        architecture = model.pretrained_cfg.get("architecture", architecture)
    return LoadedModel(
        model,
        architecture,
        origin,
        preprocess,
        names,
        synsets,
        settings={k: v for k, v in settings.items() if k not in TRAINED_ONLY},
        multi_label=own.multi_label,
        function=own.function or "",
    )


def _source(origin: Weights) -> str:
    if origin.kind == "python":
        return "auto"
    if origin.kind != "file":
        return origin.kind
    if not Path(str(origin.path)).is_file():
        raise WeightsError(
            f"the weights {origin.path} are not here", "name them with --weights FILE"
        )
    return str(origin.path)


def _preprocess(model: nn.Module, said: Mapping[str, Any]) -> Preprocess:
    """Preprocessing by what was said of it, and for the rest by the timm name."""
    from timm.data import resolve_data_config

    from .families import family_of

    family = family_of(model)
    channels = family.channels(model)
    size = family.patch_embed(model).img_size
    # A class of timm's that the user called has no config: timm's defaults.
    base = {**(getattr(model, "pretrained_cfg", None) or {}), "input_size": (channels, *size)}
    found = {**resolve_data_config({}, pretrained_cfg=base), **said}
    for name in ("mean", "std"):
        value = found[name]
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        found[name] = value * channels if len(value) == 1 else value
    return Preprocess.from_timm({**found, "input_size": (channels, *size)})


def _classes(
    model: nn.Module,
    source: Source,
    origin: Weights,
    own: OwnModel,
    trainer: Mapping[str, Any],
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None, str]:
    """Names and synsets of the classes, as far as something says them, and a note.

    Raises:
        ModelError: --labels has another number of names than the model has classes.
    """
    count = int(model.num_classes)
    names: tuple[str, ...]
    synsets: tuple[str, ...] | None
    if own.labels is not None:
        if own.labels == IMAGENET and not Path(IMAGENET).exists():
            names, synsets = _imagenet()
        else:
            order = own.label_order or ("natural" if _is_timms(trainer) else None)
            names = read_labels(Path(own.labels), order)
            synsets = names if all(map(SYNSET.match, names)) else None
        if len(names) != count:
            raise ModelError(
                f"{own.labels} has {len(names)} names, the model has {count} classes",
                "name the file, or the training set, that it was trained with",
            )
        return names, synsets, ""
    keys = ("label_names", "class_names", "classes", "id2label", "idx_to_class", "class_to_idx")
    for value in [place.get(key) for place in (trainer, source.config) for key in keys]:
        try:
            names = of_json(value) if value else ()
        except (ValueError, TypeError):
            continue
        if count and len(names) == count and all(name.isprintable() for name in names):
            synsets = names if all(map(SYNSET.match, names)) else None
            described = source.config.get("label_descriptions")
            if isinstance(described, Mapping):
                names = tuple(str(described.get(name, name)) for name in names)
            return names, synsets, ""
    # timm's own weights with 1000 outputs are of ImageNet-1k; of a file nobody knows.
    if count == 1000 and origin.kind == "pretrained" and not str(origin.source).startswith(HUB):
        return (*_imagenet(), "")
    if count and origin.kind != "random":
        return None, None, "class names are not known: --labels FILE (or --labels imagenet)"
    return None, None, ""


def _is_timms(trainer: Mapping[str, Any]) -> bool:
    """Whether settings are of timm's train.py, which numbers class folders in timm's order."""
    return {"class_map", "train_split", "model_ema"} <= set(trainer)


def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = tuple(info.index_to_description(index) for index in range(1000))
    return names, tuple(info.label_names())
