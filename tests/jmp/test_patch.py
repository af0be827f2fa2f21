"""JMP in timm models: what changes, what must not, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from jmp_deploy.core.errors import ModelError, ScheduleError
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.families.vit import attention
from jmp_deploy.jmp.patch import JMPBlocks, model_shape, patch, unpatch
from tests.fakes.models import tiny_vit

FAMILIES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",  # two prefix tokens
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",  # LayerScale, class token without position
    "vit_small_patch14_reg4_dinov2",  # registers, LayerScale
    "vit_little_patch16_reg4_gap_256",  # no class token
    "vit_tiny_r_s16_p8_224",  # a hybrid: its patch embedding is a ResNet's first layers
]


def counted_macs(model, size):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_families_run_and_cost_what_the_closed_form_says(name):
    size = 224 if "256" not in name else 256
    options = {"img_size": 224} if "dinov2" in name else {}
    model = timm.create_model(name, **options).eval()
    shape = model_shape(model)
    assert counted_macs(model, size) == schedule.macs(shape)
    steps = schedule.paper(shape)
    patch(model, steps)
    assert counted_macs(model, size) == schedule.macs(shape, steps)
    tokens = model.forward_features(torch.zeros(2, 3, size, size)).shape[1]
    assert tokens == shape.num_prefix + steps.steps[-1][1]
    unpatch(model)
    steps = schedule.parse("spread", shape)
    assert steps.last_prefix_only == ("gap" not in name)
    patch(model, steps)
    assert counted_macs(model, size) == schedule.macs(shape, steps)


def test_deit_s_costs_what_the_paper_says():
    model = timm.create_model("deit_small_patch16_224").eval()
    assert counted_macs(model, 224) == pytest.approx(4.599e9, rel=2e-4)
    patch(model, schedule.paper(model_shape(model)))
    assert counted_macs(model, 224) == pytest.approx(2.998e9, rel=2e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"reg_tokens": 4},
        {"scale_attn_norm": True},
        {"num_classes": 0},
        {"mlp_layer": timm.layers.SwiGLUPacked},
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_what_the_last_block_leaves_out_is_never_read(options, fused):
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for prefix_only in (False, True):
        model = tiny_vit(**options)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        shape = model_shape(model)
        steps = schedule.improved(schedule.parse("1:12,3:7", shape), shape)
        assert steps.last_prefix_only
        patch(model, replace(steps, last_prefix_only=prefix_only), tau=0.3)
        outputs.append(model(x))
        tokens = model.forward_features(x).shape[1]
        assert tokens == model.num_prefix_tokens + (0 if prefix_only else 7)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert outputs[0].abs().max() > 0.1


def test_the_last_block_can_do_less_even_where_nothing_is_reduced():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tiny_vit()
    before = model(x)
    patch(model, schedule.Schedule("none", (), last_prefix_only=True))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "max", ""])
def test_a_head_that_reads_patches_keeps_them(pool):
    model = tiny_vit(global_pool=pool, **({} if pool else {"num_classes": 0}))
    shape = model_shape(model)
    steps = schedule.improved(schedule.parse("1:12,3:7", shape), shape)
    assert not steps.last_prefix_only
    with pytest.raises(ScheduleError, match="reads patch tokens"):
        patch(model, replace(steps, last_prefix_only=True))
    assert patch(model, steps).forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 1 + 7


def test_a_reduction_in_the_last_block_still_happens():
    model = tiny_vit()
    shape = model_shape(model)
    steps = schedule.improved(schedule.parse("1:12,5:7", shape), shape)
    assert not steps.last_prefix_only
    patch(model, steps)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 1 + 7


def test_a_schedule_says_how_tokens_are_selected():
    cases = (("paper", "importance"), ("1:12,3:7", "importance"), ("spread:60", "distinct"))
    for spec, selection in cases:
        model = tiny_vit()
        patch(model, schedule.parse(spec, model_shape(model)))
        assert {a.selection for a in model.blocks.reductions.values()} == {selection}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"qkv_bias": False},
        {"scale_attn_norm": True},
        {"reg_tokens": 4},
        {"mlp_layer": timm.layers.SwiGLUPacked},
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_our_attention_is_timms(options, fused):
    model = tiny_vit(**options)
    layer = model.blocks[0].attn
    layer.fused_attn = fused
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(2, 1, 1, 17, generator=torch.Generator().manual_seed(2))
    for bias in (None, mask):
        ours, queries_keys = attention(layer, x, bias)
        torch.testing.assert_close(ours, layer(x, attn_mask=bias), rtol=1e-5, atol=1e-6)
    assert queries_keys.shape[-1] == (96 if options.get("qk_norm") else 144)


def test_qk_norm_models_reduce_by_the_normalised_keys():
    """The plugin input holds what attention really uses: logits rebuilt from it are the model's."""
    model = tiny_vit(qk_norm=True)
    layer = model.blocks[0].attn
    x = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(1))
    _, packed = attention(layer, x, None)
    q, k = packed.reshape(1, 17, 2, 3, 16).permute(2, 0, 3, 1, 4)
    raw = layer.qkv(x).reshape(1, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(q, layer.q_norm(raw[0]))
    torch.testing.assert_close(k, layer.k_norm(raw[1]))


def test_schedules_may_be_words():
    model = patch(tiny_vit(img_size=64, depth=12), "paper")
    assert sorted(model.blocks.reductions) == [3, 6, 9]


def test_unpatching_restores_the_original_exactly():
    model = tiny_vit()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blocks, before = model.blocks, model(x)
    keys = list(model.state_dict())
    patch(model, schedule.parse("2:9,4:5", model_shape(model)))
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(x), before)
    unpatch(model)
    assert model.blocks is blocks
    assert torch.equal(model(x), before)
    assert unpatch(model) is model  # a second time is harmless


def test_blocks_before_the_first_reduction_run_as_in_timm():
    model = tiny_vit()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = {}
    model.blocks[3].register_forward_hook(lambda module, args, out: seen.update(out=out))
    model(x)
    dense = seen["out"]
    patch(model, schedule.parse("5:9", model_shape(model)))
    model(x)
    assert torch.equal(seen["out"], dense)


@pytest.mark.parametrize("start", [2, 4])
def test_blocks_may_start_where_the_dense_ones_were_left(start):
    model = tiny_vit()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = {}
    for name in (0, start):
        keep = partial(lambda name, module, inputs: seen.update({name: inputs[0]}), name)
        model.blocks[name].register_forward_pre_hook(keep)
    model(x)
    before, behind = seen[0], seen[start]
    patch(model, schedule.parse("4:9,5:5", model_shape(model)))
    assert torch.equal(model.blocks(behind, start=start), model.blocks(before))


def test_proportional_attention_is_an_option():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for proportional in (True, False):
        model = tiny_vit()
        steps = schedule.parse("2:4", model_shape(model))
        outputs.append(patch(model, steps, tau=-1.0, proportional=proportional)(x))
    assert not torch.allclose(*outputs)


def test_later_attention_weighs_tokens_by_their_size():
    """Merging equal tokens with proportional attention changes nothing at all."""
    model = tiny_vit(pos_embed="none")
    x = torch.ones(1, 3, 32, 32)
    before = model(x)
    patch(model, schedule.parse("1:5,3:2", model_shape(model)), tau=-1.0)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_running_blocks_one_by_one_is_refused():
    model = patch(tiny_vit(), schedule.parse("2:9", model_shape(tiny_vit())))
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ModelError, match="one by one"):
        model.forward_intermediates(x)
    model.set_grad_checkpointing()
    with pytest.raises(ModelError, match="one by one"):
        model(x)
    assert isinstance(model.blocks, JMPBlocks) and len(model.blocks) == 6


def test_patching_twice_is_refused():
    model = tiny_vit()
    steps = schedule.parse("2:9", model_shape(model))
    patch(model, steps)
    with pytest.raises(ModelError, match="patched already"):
        patch(model, steps)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "ResNet cannot be patched"),
        ("convnext_atto", "ConvNeXt cannot be patched"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer cannot be patched: .* windows"),
        ("samvit_base_patch16", "attend within windows"),
        ("naflexvit_base_patch16_siglip", "images come in any size"),
        ("beit_base_patch16_224", "a position bias for every pair"),
        ("eva02_enormous_patch14_clip_224", "block 0 is an EvaBlockPostNorm"),
        ("vit_large_patch16_sapiens2", "fewer heads of keys than of queries"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ModelError, match=reason) as caught:
        model_shape(model)
    assert caught.value.hint


def test_models_of_other_blocks_are_refused():
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ModelError, match="block 0 is a ParallelScalingBlock"):
        model_shape(tiny_vit(block_fn=ParallelScalingBlock))
