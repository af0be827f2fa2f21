"""Rotated queries and keys, and pooling by attention: tokens take along what they are."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch.utils.flop_counter import FlopCounterMode

from jmp_deploy.core.errors import ModelError
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.families import family_of, written_out_attention
from jmp_deploy.jmp.families.rope import Rotary, attention
from jmp_deploy.jmp.patch import model_shape, patch, unpatch
from jmp_deploy.jmp.reduction import make_plan
from tests.fakes.models import attributes, expected, inputs, tiny_eva, tiny_vit

CAT = {"rope_type": "cat", "rope_rotate_half": False}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
PE = {"attn_type": "rope", "global_pool": "map", "num_reg_tokens": 0, "use_abs_pos_emb": True}
MODELS = {
    "DINOv3": partial(tiny_eva, dynamic_img_size=True),
    "EVA-02": partial(tiny_eva, **CAT, **EVA02, global_pool="token"),
    "PE": partial(tiny_eva, **CAT, **PE, use_pre_transformer_norm=True),
    "RoPE of each head": partial(
        tiny_eva, **CAT | {"rope_type": "mixed", "attn_type": "rope", "global_pool": "token"}
    ),
    "QK norm": partial(
        tiny_eva, qk_norm=True, attn_type="rope", qkv_fused=False, attn_only_layer_scale=True
    ),
    "without rotation": partial(tiny_eva, use_rot_pos_emb=False, use_abs_pos_emb=True),
    "no class token": partial(tiny_eva, class_token=False),
    "SigLIP": partial(tiny_vit, class_token=False, global_pool="map"),
    "registers and pooling by attention": partial(
        tiny_vit, class_token=False, reg_tokens=4, global_pool="map"
    ),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("fused", [True, False])
def test_with_nothing_reduced_every_bit_is_timms(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    family = family_of(model)
    rotary = family.rotary(model)
    before = model(IMAGES)
    x = family.embed(model, IMAGES)
    for index, block in enumerate(model.blocks.children()):
        rope = rotary and rotary.rows(index)
        y = family.run(block, x, None, rope)
        assert torch.equal(family.feed(block, family.attend(block, x, None, rope)[0]), y)
        x = y
    assert torch.equal(family.head(model, x), before)
    patch(model, schedule.Schedule("none", ()))
    assert torch.equal(model(IMAGES), before)


def test_the_closed_form_is_what_pytorch_counts(model):
    def counted():
        with (
            written_out_attention(model),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            model(IMAGES[:1])
        return counter.get_total_flops() // 2

    shape = model_shape(model)
    assert counted() == schedule.macs(shape)
    for spec in ("1:12,3:7", "spread:70"):
        steps = schedule.parse(spec, shape)
        patch(model, steps)
        assert counted() == schedule.macs(shape, steps)
        unpatch(model)


def test_patching_goes_away_and_copies_are_whole(model):
    keys, before = list(model.state_dict()), model(IMAGES)
    patch(model, schedule.parse("1:12,3:7", model_shape(model)), tau=0.3)
    assert list(model.state_dict()) == keys
    reduced = model(IMAGES)
    assert not torch.equal(reduced, before)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(model.blocks[5].mlp.parameters()).zero_()
    assert torch.equal(other(IMAGES), reduced)
    assert torch.equal(unpatch(other)(IMAGES), before)
    assert other.blocks[0] is not model.blocks[0]


@pytest.mark.parametrize("kind", ["DINOv3", "RoPE of each head"])
def test_tokens_keep_their_place(kind):
    """Pruning alone, against timm's own blocks, given the rows of who was left: image by image,
    with indices, not with the node's."""
    model = MODELS[kind]()
    family, table = family_of(model), family_of(model).rotary(model).table
    patch(model, schedule.parse("1:11,3:6", model_shape(model)), tau=2.0, proportional=False)
    blocks, got = model.blocks, model(IMAGES)
    prefix = model.num_prefix_tokens
    for image, answer in zip(IMAGES, got, strict=True):
        x, left = family.embed(model, image[None]), torch.arange(16)
        for index, block in enumerate(blocks.children()):
            rows = (table[index] if table.ndim == 4 else table)[..., left, :]
            if (reduction := blocks.reductions.get(index)) is None:
                x = block(x, rope=rows)
                continue
            x, qkv = family.attend(block, x, None, rows)
            kept = make_plan(qkv, torch.ones(1, x.shape[1]), reduction).kept[0]
            assert not torch.equal(kept, torch.arange(len(kept))), "not just the first ones"
            x = family.feed(block, x[:, torch.cat((torch.arange(prefix), prefix + kept))])
            left = left[kept]
        torch.testing.assert_close(family.head(model, x)[0], answer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [None, 3])
def test_rows_follow_through_two_reductions(heads):
    table = torch.randn(20, 8) if heads is None else torch.randn(2, heads, 20, 8)
    rotary, left = Rotary(table), np.broadcast_to(np.arange(20), (4, 20))
    for keep in (11, 6):
        attrs = attributes(num_keep=keep)
        want = expected(*inputs(4, left.shape[1], attrs=attrs, seed=keep), attrs)
        rotary = rotary.follow(torch.from_numpy(want.index.astype(np.int32)), keep)
        left = np.take_along_axis(left, want.kept - 1, axis=1)
    for block in (0, 1):
        rows = rotary.rows(block)
        for sample in range(4):
            here = table if heads is None else table[block]
            wanted = here[..., torch.from_numpy(left[sample].copy()), :]
            assert torch.equal(rows[sample].squeeze(0) if heads is None else rows[sample], wanted)


def test_the_reduction_reads_what_attention_compared():
    model = MODELS["DINOv3"]()
    layer, rope = model.blocks[0].attn, family_of(model).rotary(model).rows(0)
    x = torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(1))
    _, packed = attention(layer, x, None, rope)
    q, k = packed.unflatten(-1, (2, 3, 16)).permute(2, 0, 3, 1, 4)
    bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    raw = torch.nn.functional.linear(x, layer.qkv.weight, bias)
    for mine, part in zip((q, k), raw.unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)[:2]):  # noqa: B905
        assert torch.equal(mine[:, :, :3], part[:, :, :3])  # class token and registers stay
        turned = apply_rot_embed_cat(part[:, :, 3:], rope, half=True)
        torch.testing.assert_close(mine[:, :, 3:], turned)
        assert not torch.allclose(mine[:, :, 3:], part[:, :, 3:])


@pytest.mark.parametrize("proportional", [True, False])
def test_pooling_weighs_tokens_by_the_patches_that_they_stand_for(proportional):
    """Twelve patches of one colour and four of another, without position: merging each with its
    like changes nothing where sizes count."""
    model = tiny_vit(class_token=False, pos_embed="none", global_pool="map")
    images = torch.ones(1, 3, 32, 32)
    images[..., :8, :] = -1.0
    before = model(images)
    steps = schedule.improved(schedule.parse("1:3", model_shape(model)), model_shape(model))
    patch(model, steps, tau=-1.0, proportional=proportional)
    same = torch.allclose(model(images), before, rtol=1e-4, atol=1e-4)
    assert same == proportional


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_post_norm": True}, "block 0 is an EvaBlockPostNorm"),
        (
            {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
            "fewer heads of keys than of queries",
        ),
    ],
)
def test_what_is_built_otherwise_is_refused_with_the_reason(options, reason):
    with pytest.raises(ModelError, match=reason):
        model_shape(tiny_eva(**options))


def test_images_need_be_neither_square_nor_in_colour():
    model = tiny_eva(img_size=(16, 64), in_chans=2, dynamic_img_size=True, global_pool="token")
    images = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0))
    before, shape = model(images), model_shape(model)
    assert (shape.num_patches, family_of(model).channels(model)) == (16, 2)
    patch(model, schedule.Schedule("none", (), last_prefix_only=True))
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_images_of_another_form_and_masks_are_refused():
    model = patch(MODELS["DINOv3"](), "1:12")
    with pytest.raises(ModelError, match="2x8 patches, the schedule is for 4x4"):
        model(torch.zeros(1, 3, 16, 64))  # as many patches, with other rotations
    with pytest.raises(ModelError, match="no attention mask"):
        model.forward_features(IMAGES, attn_mask=torch.zeros(3, 1, 1, 19))
    with pytest.raises(ModelError, match="one by one"):
        model.forward_intermediates(IMAGES)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",
        "eva02_base_patch14_224",
        "vit_pe_core_tiny_patch16_384",
        "vit_small_patch16_rope_mixed_ape_224",
        "vit_so400m_patch14_siglip_224",
    ],
)
def test_timms_models_are_taken(name):
    with torch.device("meta"):
        shape = model_shape(timm.create_model(name))
    assert schedule.macs(shape, schedule.parse("spread:60", shape)) <= 0.6 * schedule.macs(shape)
