"""Checkpoints as trainers leave them: wrapped, prefixed, with settings, and broken ones."""

from __future__ import annotations

import argparse
import collections
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from jmp_deploy.core.errors import ModelError, WeightsError
from jmp_deploy.jmp import checkpoint
from jmp_deploy.jmp.models import OwnModel, load_model

NAME = "test_vit"


def trained(seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **{"num_classes": 7, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


MODEL = trained()
STATE = MODEL.state_dict()
OTHER = trained(1).state_dict()


def under(prefix, state=None):
    return {prefix + name: value for name, value in (STATE if state is None else state).items()}


def renamed(**names):
    """The state with its head under another name."""
    state = dict(STATE)
    for new, old in names.items():
        state[new.replace("__", ".")] = state.pop(old)
    return state


ARGS = argparse.Namespace(model=NAME, mean=[0.1, 0.2, 0.3], lr=np.float64(0.1), crop_pct=None)
BACKBONE = {k: v for k, v in STATE.items() if not k.startswith("head.")}
HEAD = {"weight": STATE["head.weight"], "bias": STATE["head.bias"]}
FORMS = {
    "timm": {
        "arch": NAME,
        "args": ARGS,
        "epoch": 3,
        "metric": np.float64(77.4),
        "state_dict": STATE,
    },
    "ema first": {"state_dict": OTHER, "state_dict_ema": STATE, "optimizer": {"state": {0: {}}}},
    "deit": {"model": OTHER, "model_ema": STATE, "args": ARGS},
    "ema alone": {"state_dict_ema": STATE},
    "ddp and compile": {"state_dict": under("module._orig_mod.")},
    "compile and ddp": {"state_dict": under("_orig_mod.module.")},
    "lightning": {
        "state_dict": {**under("model."), "loss.weight": torch.ones(7)},
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    },
    "lightning, head beside": {
        "state_dict": {**under("backbone.", BACKBONE), **under("fc.", HEAD)},
    },
    "net": {"net": under("net.")},
    "weights": {"weights": STATE},
    "checkpoint": {"checkpoint": STATE},
    "averaged model": {"n_averaged": torch.tensor(3), **under("module.")},
    "mask token": {**STATE, "mask_token": torch.zeros(1, 64)},
    "fc": renamed(fc__weight="head.weight", fc__bias="head.bias"),
    "head.1": renamed(head__1__weight="head.weight", head__1__bias="head.bias"),
    "half": {name: value.half() for name, value in STATE.items()},
    "numpy": {"model": STATE, "best": np.float32(1), "steps": np.int64(4), "d": np.dtype("f4")},
    "numbers as keys": {"state_dict": STATE, 0: torch.zeros(2)},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_checkpoints(tmp_path, form):
    torch.save(FORMS[form], tmp_path / "w.pth")
    loaded = load_model(NAME, str(tmp_path / "w.pth"))
    assert loaded.model.num_classes == 7 and loaded.class_names is None
    tolerance = 1e-3 if form == "half" else 0
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, STATE[name], atol=tolerance, rtol=tolerance)


def test_pickle_protocol_4(tmp_path):
    torch.save(FORMS["timm"], tmp_path / "w.pth", pickle_protocol=4)
    loaded = load_model(NAME, str(tmp_path / "w.pth"))
    assert torch.equal(loaded.model.norm.weight, STATE["norm.weight"])
    assert loaded.preprocess.mean == (0.1, 0.2, 0.3)


def test_dino_takes_the_teacher_and_leaves_out_its_projection(tmp_path):
    head = {"module.head.mlp.0.weight": torch.zeros(9, 64), "module.head.last.weight": STEPS}
    states = {
        "student": under("module.backbone.", {**OTHER}),
        "teacher": {**under("module.backbone.", BACKBONE), **head},
    }
    torch.save(states, tmp_path / "w.pth")
    loaded = load_model(NAME, str(tmp_path / "w.pth"))
    assert loaded.model.num_classes == 0
    assert torch.equal(loaded.model.norm.weight, STATE["norm.weight"])
    words = " ".join(loaded.origin.notes)
    assert "teacher" in words and "student" in words and "left out" in words


STEPS = torch.zeros(5, 5)


def test_the_choice_among_states_is_said_and_can_be_made(tmp_path):
    torch.save(FORMS["ema first"], tmp_path / "w.pth")
    taken = load_model(NAME, str(tmp_path / "w.pth")).origin.notes
    assert any("state_dict_ema" in note and "(EMA)" in note for note in taken)
    plain = load_model(NAME, str(tmp_path / "w.pth"), own=OwnModel(weights_key="state_dict"))
    assert torch.equal(plain.model.norm.weight, OTHER["norm.weight"])
    assert plain.origin.key == "state_dict"
    with pytest.raises(WeightsError, match="no state 'best'") as caught:
        load_model(NAME, str(tmp_path / "w.pth"), own=OwnModel(weights_key="best"))
    assert "state_dict, state_dict_ema" in caught.value.hint


def test_a_checkpoint_that_says_its_architecture_needs_no_name(tmp_path):
    torch.save(FORMS["timm"], tmp_path / "w.pth.tar")
    loaded = load_model(str(tmp_path / "w.pth.tar"))
    assert loaded.name == NAME and loaded.preprocess.mean == (0.1, 0.2, 0.3)
    torch.save(STATE, tmp_path / "bare.pth")
    with pytest.raises(ModelError, match="does not say which model it is of"):
        load_model(str(tmp_path / "bare.pth"))


def test_such_a_checkpoint_is_read_once(tmp_path, monkeypatch):
    torch.save(FORMS["timm"], tmp_path / "w.pth.tar")
    reads, genuine = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: reads.append(path) or genuine(path))
    load_model(str(tmp_path / "w.pth.tar"))
    assert len(reads) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"in_chans": 1},
        {"in_chans": 4},
        {"img_size": 192},
        {"patch_size": 8, "img_size": 80},
        {"qkv_bias": False},
        {"init_values": 0.1},
        {"num_classes": 1},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_settings_are_read_from_the_shapes(tmp_path, options):
    model = trained(**options)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    channels = options.get("in_chans", 3)
    own = OwnModel(mean=(0.5,) * channels, std=(0.5,) * channels)
    loaded = load_model(NAME, str(tmp_path / "w.safetensors"), own=own)
    assert loaded.origin.notes or options == {}
    x = torch.randn(1, channels, *model.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))


def test_an_image_that_is_not_square_is_asked_for(tmp_path):
    model = trained(img_size=(80, 160))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="not square") as caught:
        load_model(NAME, str(tmp_path / "w.safetensors"))
    assert "--img-size" in caught.value.hint
    loaded = load_model(NAME, str(tmp_path / "w.safetensors"), img_size=(80, 160))
    assert (loaded.preprocess.height, loaded.preprocess.width) == (80, 160)
    x = torch.randn(1, 3, 80, 160)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))


def test_two_sizes_that_contradict_each_other(tmp_path):
    state = timm.create_model("deit_tiny_patch16_224", num_classes=2).state_dict()
    torch.save({"model": state, "args": {"input_size": 384}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"two image sizes: 384x384 .* 224x224"):
        load_model("deit_t", str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: torch.full_like(v, float("nan")), "not finite: norm.weight holds NaN"),
        (lambda v: v.mul(100).to(torch.int8), "int8 values in norm.weight"),
        (lambda v: v > 0, "bool values in norm.weight"),
        (lambda v: v.to(torch.complex64), "complex64 values in norm.weight"),
    ],
)
def test_values_that_are_no_weights_are_named(tmp_path, change, words):
    torch.save({**STATE, "norm.weight": change(STATE["norm.weight"])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=words):
        load_model(NAME, str(tmp_path / "w.pth"))


def test_weights_of_another_model_name_those_that_fit(tmp_path):
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="width 192 with 12 blocks") as caught:
        load_model("deit_s", str(tmp_path / "w.safetensors"))
    assert "deit_t" in caught.value.hint


class Whole(torch.nn.Linear):
    pass


def test_a_pickled_module_is_refused_with_the_way_to_save_it(tmp_path):
    torch.save(Whole(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"pickled objects .*Whole") as caught:
        load_model(NAME, str(tmp_path / "w.pth"))
    assert "torch.save(model.state_dict()" in caught.value.hint


def test_preprocessing_by_flags_by_the_file_and_by_the_name(tmp_path):
    torch.save({"state_dict": STATE, "args": ARGS}, tmp_path / "w.pth")
    own = OwnModel(std=(0.3,), crop_pct=1.0, interpolation="bilinear")
    spec = load_model(NAME, str(tmp_path / "w.pth"), own=own).preprocess
    assert spec.mean == (0.1, 0.2, 0.3) and spec.std == (0.3,) * 3
    assert (spec.resize, spec.interpolation) == (160, "bilinear")
    torch.save(trained(in_chans=1).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(ModelError, match="takes 1 channel, but its mean has 3") as caught:
        load_model(NAME, str(tmp_path / "grey.pth"))
    assert "--mean 0.5 --std 0.25" in caught.value.hint


def test_a_folder_of_timm_brings_its_settings_and_names(tmp_path):
    model = trained(global_pool="avg", num_classes=3)
    names = ["cat", "dog", "owl"]
    timm.models.save_for_hf(
        model, tmp_path, model_config={"label_names": names}, data_config={"mean": [0.4] * 3}
    )
    loaded = load_model(f"local-dir:{tmp_path}")
    assert loaded.name == NAME and loaded.class_names == tuple(names)
    assert loaded.preprocess.mean == (0.4,) * 3 and loaded.origin.kind == "file"
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(ModelError, match="type 'swin'"):
        load_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_folder_of_transformers(tmp_path, kind):
    """The names and the config that transformers 5.24 writes for ViTForImageClassification; a
    DeiT's has a distillation token besides, which no head reads."""
    torch.manual_seed(0)
    options = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 8, "img_size": 32}
    options |= {"reg_tokens": 1, "no_embed_class": False} if kind == "deit" else {}
    model = timm.create_model("vit_base_patch16_224", num_classes=2, **options).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3  # large, so that it is seen
    state = collections.OrderedDict()
    swaps = (
        ("blocks.", "vit.encoder.layer."),
        ("attn.proj.", "attention.output.dense."),
        ("norm1.", "layernorm_before."),
        ("norm2.", "layernorm_after."),
        ("mlp.fc1.", "intermediate.dense."),
        ("mlp.fc2.", "output.dense."),
        ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
        ("cls_token", "vit.embeddings.cls_token"),
        ("reg_token", "vit.embeddings.distillation_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("head.", "classifier."),
    )
    for name, value in model.state_dict().items():
        name = "vit.layernorm." + name[5:] if name.startswith("norm.") else name
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        if "attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                key = name.replace("attn.qkv.", f"attention.attention.{part}.")
                state[key] = piece.clone()
        else:
            state[name] = value
    state = {name.replace("vit.", f"{kind}.", 1): value for name, value in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    config = {
        "model_type": kind,
        "layer_norm_eps": 1e-3,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "patch_size": 8,
        "image_size": 32,
        "id2label": {"0": "no", "1": "yes"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    loaded = load_model(str(tmp_path))
    assert loaded.class_names == ("no", "yes")
    assert (loaded.preprocess.crop_mode, loaded.preprocess.interpolation) == ("squash", "bilinear")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), model(x))
    again = load_model(loaded.name, loaded.origin.path, own=OwnModel(kwargs=loaded.settings))
    assert again.model.norm.eps == 1e-3  # as `restore_model` makes it
    config["architectures"] = ["DeiTForImageClassificationWithTeacher"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="two classifiers"):
        load_model(str(tmp_path))


def test_labels_and_imagenets_only_where_they_are_known(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    names = [f"c{index}" for index in range(7)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    own = OwnModel(labels=str(tmp_path / "names.txt"))
    assert load_model(NAME, str(tmp_path / "w.pth"), own=own).class_names == tuple(names)
    with pytest.raises(ModelError, match="imagenet has 1000 names, the model has 7"):
        load_model(NAME, str(tmp_path / "w.pth"), own=OwnModel(labels="imagenet"))
    torch.save(trained(num_classes=1000).state_dict(), tmp_path / "products.pth")
    assert load_model(NAME, str(tmp_path / "products.pth")).class_names is None


def test_unknown_tags_and_names_of_timms_hub():
    with pytest.raises(ModelError, match="no weights with the tag 'nonsense'") as caught:
        load_model("test_vit.nonsense")
    assert "r160_in1k" in caught.value.hint
    assert load_model("timm/test_vit.r160_in1k", "random").name == "test_vit.r160_in1k"


def make():
    return MODEL


def test_a_model_of_the_users_python():
    loaded = load_model("mine", own=OwnModel(function=f"{__name__}:make"))
    assert loaded.origin.kind == "python" and loaded.function
    assert loaded.model is not MODEL and torch.equal(loaded.model.norm.weight, MODEL.norm.weight)
    hand = load_model(MODEL)
    assert hand.origin.sha256 == loaded.origin.sha256
    for spec, words in (("os", "names no function"), ("os:getcwd", "returned a str")):
        with pytest.raises(ModelError, match=words):
            load_model("mine", own=OwnModel(function=spec))
