"""What a model's name leads to: a timm name, a checkpoint that says what it is of, a folder."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import ModelError, one_line
from ..core.files import parse_json, size_of
from . import checkpoint
from .timm_model import NORM_EPS

HUB, FOLDER = "hf-hub:", "local-dir:"
TRANSFORMERS = ("vit", "deit", "dinov2", "dinov2_with_registers")
MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


@dataclass(frozen=True)
class Source:
    """What a name leads to.

    Attributes:
        name: timm's, or "hf-hub:...".
        size: image size that a short name stands for, if it is not timm's.
        kwargs, config: arguments of `timm.create_model`, and timm's `pretrained_cfg`, of a folder.
        file: the folder's weights, or the checkpoint that was named.
        checkpoint: what is in that checkpoint.
    """

    name: str
    size: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    checkpoint: checkpoint.Checkpoint | None = None


def source_of(name: str, weights_key: str | None = None) -> Source:
    """What `load_model` is to make of a name (see there).

    Raises:
        ModelError: unknown name, or a file or folder that does not say what it is of.
        WeightsError: a checkpoint that cannot be read.
    """
    if name.startswith(HUB):
        return Source(name)
    if name.startswith(FOLDER):
        return _of_folder(Path(name.removeprefix(FOLDER)))
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        return _of_folder(path)
    if path.suffix in checkpoint.SUFFIXES and path.is_file():
        from .families import roots

        found = checkpoint.read(path, roots, weights_key)
        if found.architecture is None:
            raise ModelError(
                f"{path} does not say which model it is of",
                f"name it: build MODEL --weights {path}",
            )
        return replace(source_of(found.architecture), file=path, checkpoint=found)
    return Source(*resolve_name(name))


def _of_folder(folder: Path) -> Source:
    """A folder that timm's or transformers' `save_pretrained` made."""
    path = folder / "config.json"
    try:
        config = _read_config(path)
        file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
        if file is None:
            raise ModelError(
                f"{folder} has none of {', '.join(MODEL_FILES)}",
                "weights in several files are not read: save the model in one",
            )
        if "model_type" in config:
            return _of_transformers(folder, config, file)
        from timm.models._hub import load_model_config_from_path

        settings, architecture, kwargs = load_model_config_from_path(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"cannot read {path}: {one_line(error) or type(error).__name__}",
            "expected a folder with config.json and model.safetensors, as timm's save_for_hf or "
            "transformers' save_pretrained write it",
        ) from error
    name, size = resolve_name(architecture)
    return Source(name, size, dict(kwargs or {}), dict(settings), file)


def _read_config(path: Path) -> Any:
    """A JSON object; raises OSError or ValueError."""
    size_of(path)  # of a file, not of a pipe
    return parse_json(path.read_bytes(), dict[str, Any])


def _of_transformers(folder: Path, config: dict[str, Any], file: Path) -> Source:
    """A ViT, DeiT or DINOv2 of transformers as a timm model of its sizes."""
    kind = config["model_type"]
    if kind not in TRANSFORMERS:
        raise ModelError(
            f"{folder} holds a model of transformers' type {kind!r}",
            f"supported: {', '.join(TRANSFORMERS)}",
        )
    if config.get("hidden_act", "gelu") != "gelu" or config.get("use_swiglu_ffn"):
        raise ModelError(f"{folder}: only MLPs with gelu are supported, not what its config says")
    if any("WithTeacher" in str(name) for name in config.get("architectures") or ()):
        raise ModelError(
            f"{folder} holds a distilled DeiT with two classifiers in transformers' form, which is "
            "not supported",
            "timm has those weights: build deit_s_distilled",
        )
    width, dino = config["hidden_size"], kind.startswith("dinov2")
    size = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(width, "base")
    known = width != 192
    name = f"vit_{size}_patch14_dinov2" if dino and known else f"vit_{size}_patch16_224"
    if kind == "dinov2_with_registers":
        name = f"vit_{size}_patch14_reg4_dinov2"
    kwargs = {
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config.get("mlp_ratio") or config["intermediate_size"] / width,
        "patch_size": config["patch_size"],
        "qkv_bias": config.get("qkv_bias", True),
        NORM_EPS: config.get(NORM_EPS, 1e-6 if dino else 1e-12),
    }
    images = folder / "preprocessor_config.json"
    settings: dict[str, Any] = {"label_names": config.get("id2label")}
    if settings["label_names"] and "LABEL_0" in settings["label_names"].values():
        settings["label_names"] = None  # transformers' own words for "not known"
    side = config["image_size"]
    settings["input_size"] = (
        config.get("num_channels", 3),
        *((side, side) if isinstance(side, int) else side),
    )
    if images.is_file():
        found = _read_config(images)
        settings["mean"], settings["std"] = found.get("image_mean"), found.get("image_std")
        settings["interpolation"] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(
            found.get("resample")
        )
        crop, scaled = found.get("crop_size"), found.get("size") or {}
        if found.get("do_center_crop") and crop and "shortest_edge" in scaled:
            settings["crop_pct"] = crop["height"] / scaled["shortest_edge"]
        else:  # to the size itself, whatever the aspect
            settings["crop_pct"], settings["crop_mode"] = 1.0, "squash"
    return Source(name, None, kwargs, settings, file)


def resolve_name(name: str) -> tuple[str, int | None]:
    """A short or timm name to (timm name, default image size).

    Raises:
        ModelError: unknown name or tag; the hint has near matches.
    """
    import timm

    from .families import SHORT_NAMES

    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    plain, _, tag = name.removeprefix("timm/").partition(".")
    if timm.is_model(plain):
        known = [full.partition(".")[2] for full in timm.models.get_arch_pretrained_cfgs(plain)]
        if tag and tag not in known:
            tags = ", ".join(filter(None, known)) or "none"
            raise ModelError(f"{plain} has no weights with the tag {tag!r}", f"its tags: {tags}")
        return name.removeprefix("timm/"), None
    known = [*SHORT_NAMES, *timm.list_models()]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"short names: {', '.join(SHORT_NAMES)}"
    raise ModelError(f"unknown model {name!r}", hint)
