"""Models by name, weights from wherever, and checkpoints that do not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from jmp_deploy.cli.main import main
from jmp_deploy.core.errors import ModelError, WeightsError
from jmp_deploy.core.manifest import Weights
from jmp_deploy.jmp import models
from jmp_deploy.jmp.families import SHORT_NAMES


@pytest.fixture(scope="module")
def state():
    return models.load_model("deit_t", "random", seed=3).model.state_dict()


def test_every_short_name_is_a_timm_model():
    import timm

    for timm_name, _ in SHORT_NAMES.values():
        assert timm.is_model(timm_name)


def test_random_weights_are_reproducible_and_marked():
    first, again, other = (models.load_model("deit_t", "random", seed=s) for s in (0, 0, 1))
    assert first.origin == Weights("random", seed=0)
    assert torch.equal(first.model.head.weight, again.model.head.weight)
    assert not torch.equal(first.model.head.weight, other.model.head.weight)
    assert first.class_names is None


def test_auto_falls_back_to_random_and_says_so():
    loaded = models.load_model("deit_t", "auto")
    assert loaded.origin.kind == "random"
    assert loaded.origin.fallback_for == "pretrained" and loaded.origin.reason


def test_pretrained_does_not_fall_back():
    with pytest.raises(WeightsError, match="no pretrained weights for deit_tiny"):
        models.load_model("deit_t", "pretrained")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "nested.pth"])
def test_weights_from_files(tmp_path, state, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if "nested" in suffix else state, path)
    loaded = models.load_model("deit_t", str(path))
    assert torch.equal(loaded.model.head.weight, state["head.weight"])
    assert loaded.origin.kind == "file" and len(loaded.origin.sha256) == 64


def test_a_checkpoint_with_another_number_of_classes(tmp_path, state):
    few = {**state, "head.weight": state["head.weight"][:7], "head.bias": state["head.bias"][:7]}
    save_file({k: v.contiguous() for k, v in few.items()}, tmp_path / "w.safetensors")
    loaded = models.load_model("deit_t", str(tmp_path / "w.safetensors"))
    assert loaded.model.num_classes == 7 and loaded.class_names is None


def test_position_embeddings_are_resampled(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    loaded = models.load_model("deit_t", str(tmp_path / "w.safetensors"), img_size=160)
    assert loaded.model.pos_embed.shape == (1, 101, 192)
    assert loaded.preprocess.height == 160
    assert torch.equal(loaded.model.pos_embed[:, 0], state["pos_embed"][:, 0])


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_as_its_authors_publish_it(tmp_path, registers):
    """With the mask token of the training, other names of registers, and 518 pixels' positions."""
    from timm.layers import resample_abs_pos_embed

    name = "dinov2_s_reg" if registers else "dinov2_s"
    own = models.load_model(name, "random", seed=1).model.state_dict()
    positions = torch.randn(1, 1 + 37 * 37, 384, generator=torch.Generator().manual_seed(0))
    published = {**own, "mask_token": torch.zeros(1, 384), "pos_embed": positions}
    if registers:
        published["register_tokens"] = published.pop("reg_token")
    torch.save(published, tmp_path / "w.pth")
    model = models.load_model(name, str(tmp_path / "w.pth")).model
    if registers:  # the class token's position is added to it, as timm keeps it
        assert torch.equal(model.reg_token, own["reg_token"])
        assert torch.equal(model.cls_token[0], own["cls_token"][0] + positions[:, 0])
        positions = positions[:, 1:]
    prefix = 0 if registers else 1
    wanted = resample_abs_pos_embed(positions, [16, 16], num_prefix_tokens=prefix)
    assert torch.equal(model.pos_embed, wanted)
    rest = {key: value for key, value in model.state_dict().items() if key.startswith("blocks")}
    assert rest and all(torch.equal(value, own[key]) for key, value in rest.items())


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("pos_embed", (1, 100, 192)),
        ("pos_embed", (197, 192)),
        ("visual.class_embedding", (3,)),  # timm takes it for one of CLIP's
        ("encoder", (3,)),
    ],
)
def test_states_that_timm_stumbles_over_are_refused_in_one_message(tmp_path, state, key, shape):
    save_file({**state, key: torch.zeros(shape)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"does not fit deit_tiny_patch16_224: \d+ "):
        models.load_model("deit_t", str(tmp_path / "w.safetensors"))


def test_keys_that_do_not_fit_are_named(tmp_path, state):
    wrong = dict(state)
    wrong["extra.weight"] = wrong.pop("blocks.0.attn.qkv.weight")
    wrong["norm.weight"] = wrong["norm.weight"][:5].clone()
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as caught:
        models.load_model("deit_t", str(tmp_path / "w.safetensors"))
    message = caught.value.message
    assert "1 missing keys (blocks.0.attn.qkv.weight)" in message
    assert "1 unexpected keys (extra.weight)" in message
    assert "1 keys of another shape (norm.weight [5] for [192])" in message


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("kind", ["pickle", "truncated", "text", "list", "object"])
def test_files_that_are_no_checkpoints(tmp_path, state, kind, capsys):
    path = tmp_path / ("w.safetensors" if kind in ("truncated", "text") else "w.pth")
    if kind == "pickle":
        torch.save({"model": Malicious()}, path)
    elif kind == "truncated":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "text":
        path.write_text("not weights")
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        torch.save({"epoch": 3, "weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError):
        models.load_model("deit_t", str(path))
    assert "code ran" not in capsys.readouterr().out


def test_missing_weights_file():
    with pytest.raises(WeightsError, match="no such weights file: nowhere"):
        models.load_model("deit_t", "nowhere.pth")


def test_unknown_models_get_near_matches():
    with pytest.raises(ModelError, match="unknown model 'diet_s'") as caught:
        models.load_model("diet_s")
    assert "deit_s" in caught.value.hint


def test_unsupported_models_are_refused_before_weights_are_fetched(monkeypatch):
    monkeypatch.setattr(models, "_pretrained", lambda *a, **k: pytest.fail("fetched weights"))
    with pytest.raises(ModelError, match="SwinTransformer cannot be patched"):
        models.load_model("swin_tiny_patch4_window7_224")


def test_image_size_that_does_not_fit():
    with pytest.raises(ModelError, match="image size"):
        models.load_model("resnet18", "random", img_size=100)


def test_names_in_a_checkpoint_reach_no_terminal_as_they_are(tmp_path, capsys):
    path = tmp_path / "hostile.safetensors"
    save_file({"head.weight\x1b[2J\r": torch.zeros(3, 192)}, path)
    arguments = ["build", "deit_t", "--weights", str(path), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--engine", "none"]) == 2
    shown = capsys.readouterr().err
    assert "unexpected keys" in shown and "\x1b" not in shown and "\r" not in shown


def test_the_channels_of_a_hybrid_are_those_of_its_images():
    loaded = models.load_model("vit_tiny_r_s16_p8_224", "random")
    assert loaded.preprocess.channels == 3
