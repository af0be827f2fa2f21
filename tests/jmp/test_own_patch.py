"""Patched models in their users' hands: copied, changed, hooked, wrapped, exported."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from jmp_deploy import patch, unpatch
from jmp_deploy.core.errors import ModelError
from jmp_deploy.jmp.patch import model_shape
from jmp_deploy.jmp.schedule import parse
from tests.fakes.models import tiny_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_answer_alike_and_are_of_their_own(copied):
    model = patch(tiny_vit(), "spread")
    twin = copied(model)
    assert torch.equal(twin(X), model(X))
    assert twin.blocks.model[0] is twin
    unpatch(twin)
    assert torch.equal(twin(X), tiny_vit()(X))


def test_averaged_weights_of_a_patched_model_follow_it():
    from timm.utils import ModelEmaV3

    model = patch(tiny_vit(), "spread")
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    assert torch.allclose(ema(X), model(X), atol=1e-5)


def test_another_pooling_after_the_patch_sees_its_tokens():
    model = patch(tiny_vit(), "spread")
    assert model.blocks.last_prefix_only
    model.reset_classifier(7, "avg")
    answer = model(X)
    assert answer.shape == (2, 7) and answer.isfinite().all()


def test_an_image_of_another_size_is_refused():
    model = patch(tiny_vit(dynamic_img_size=True), "spread")
    with pytest.raises(ModelError, match="17 tokens of an image, 65 came in") as caught:
        model(torch.zeros(1, 3, 64, 64))
    assert "set_input_size" in caught.value.hint
    unpatch(model).set_input_size(img_size=64)
    assert patch(model, "spread")(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_hooks_that_will_not_be_called_are_named_and_the_others_are_called():
    model, called = tiny_vit(), []
    model.blocks[2].attn.register_forward_hook(lambda *args: called.append("attn"))
    model.blocks[2].mlp.register_forward_hook(lambda *args: called.append("mlp"))
    with pytest.warns(RuntimeWarning, match=r"hooks of blocks\.2\.attn will not be called"):
        patch(model, "2:9")
    model(X)
    assert called == ["mlp"]


def test_a_replaced_forward_is_not_passed_over():
    model = tiny_vit()
    model.blocks[2].attn.forward = lambda x, **_: x
    with pytest.raises(ModelError, match=r"blocks\.2\.attn has a forward of its own"):
        patch(model, "2:9")
    patch(model, "3:9")


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_wrapped_and_quantized_layers_get_a_true_sentence():
    model = tiny_vit()
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv)
    with pytest.raises(ModelError, match=r"block 1 has a LowRank .*merge LoRA.* at attn\.qkv"):
        patch(model, "spread")
    model = tiny_vit()
    weight = model.blocks[1].mlp.fc1.weight
    quantized = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    model.blocks[1].mlp.fc1.weight = quantized
    with pytest.raises(ModelError, match=r"block 1 has quantized weights in a Linear"):
        patch(model, "spread")


class Mae(timm.models.VisionTransformer):
    """As facebookresearch/mae writes it."""

    def forward_features(self, x, **masks):
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_a_model_that_runs_its_blocks_one_by_one_gets_a_true_sentence():
    model = Mae(img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=4)
    patch(model, "spread")
    with pytest.raises(ModelError, match="one by one"):
        model(X)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["spread", "paper"])
def test_short_models(depth, schedule):
    model = tiny_vit(depth=depth)
    steps = parse(schedule, model_shape(model)).steps
    assert steps and all(0 <= block < depth for block, _ in steps)
    assert patch(model, schedule)(X).isfinite().all()


@pytest.mark.parametrize("dynamo", [False, True])
def test_the_users_own_export_is_told_the_way(tmp_path, dynamo):
    model = patch(tiny_vit(), "spread")
    with pytest.raises(Exception) as caught:
        torch.onnx.export(model, (X,), tmp_path / "x.onnx", dynamo=dynamo)
    chain = [error := caught.value]
    while error := error.__cause__ or error.__context__:
        chain.append(error)
    found = [error for error in chain if isinstance(error, ModelError)]
    assert found and "jmp_deploy.build" in found[0].hint


def test_torch_export_alone_takes_a_patched_model():
    model = patch(tiny_vit(), "spread")
    program = torch.export.export(model, (X,), strict=True)
    assert torch.equal(program.module()(X), model(X))


def test_dropout_is_off_in_an_export_and_the_mode_stays(tmp_path):
    import onnx

    from jmp_deploy.export.export import export_onnx

    model = patch(tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5), "spread").train()
    model.norm.eval()
    export_onnx(model, tmp_path / "m.onnx", image_size=(32, 32))
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not {"RandomUniformLike", "Dropout", "Bernoulli"} & kinds
    assert model.training and model.blocks[0].training and not model.norm.training


def test_autocast_and_channels_last():
    model = patch(tiny_vit(), "spread")
    wanted = model(X)
    assert torch.allclose(model(X.to(memory_format=torch.channels_last)), wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).isfinite().all()


def test_a_distilled_model_in_training_mode():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=4, num_classes=3)
    patch(model, "spread").train()
    model.set_distilled_training()
    one, two = model(torch.zeros(1, 3, 224, 224))
    assert one.shape == two.shape == (1, 3)
