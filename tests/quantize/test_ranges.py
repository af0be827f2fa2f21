"""Ranges of activations, against what PyTorch sees and against plain numpy."""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import pytest
import torch

from jmp_deploy.core.errors import CalibrationError
from jmp_deploy.export import export
from jmp_deploy.jmp import schedule
from jmp_deploy.jmp.patch import model_shape, patch
from jmp_deploy.quantize import ranges
from jmp_deploy.quantize.layers import find_layers
from jmp_deploy.quantize.ranges import BINS, Observed
from tests.fakes.models import tiny_vit

STEPS = "1:12,2:8,4:5"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, path = tiny_vit(), tmp_path_factory.mktemp("ranges") / "m.onnx"
    patch(model, schedule.parse(STEPS, model_shape(model)), tau=0.3)
    export.export_onnx(model, path, image_size=(32, 32))
    return model, path, find_layers(onnx.load(path))


def seen_by_pytorch(model, images):
    """Inputs of the linear layers, by hooks on the modules themselves."""
    inputs = {}
    modules = {"patch_embed": model.patch_embed.proj, "head": model.head}
    for index, block in enumerate(model.blocks.children()):
        attn, mlp = block.attn, block.mlp
        for name, module in (
            ("qkv", attn.qkv),
            ("proj", attn.proj),
            ("fc1", mlp.fc1),
            ("fc2", mlp.fc2),
        ):
            modules[f"blocks.{index}.{name}"] = module
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, n=name: inputs.update({n: args[0].numpy()})
        )
        for name, module in modules.items()
    ]
    with torch.inference_mode():
        model(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    return inputs


def test_what_is_observed_is_what_pytorch_computes(tiny, images):
    model, path, layers = tiny
    observed = ranges.observe(path, layers, np.split(images, 4))
    truth = seen_by_pytorch(model, images)
    assert set(observed) == set(truth) == {layer.name for layer in layers}
    for name, one in observed.items():
        axis = 1 if name == "patch_embed" else -1
        others = tuple(i for i in range(truth[name].ndim) if i != axis % truth[name].ndim)
        want = np.abs(truth[name]).max(axis=others)
        np.testing.assert_allclose(one.channel_amax, want, rtol=1e-3, atol=1e-4)
        assert one.amax == one.channel_amax.max()
        assert one.histogram.sum() == truth[name].size
    # tokens that each layer works on: 17, then those that the schedule leaves
    tokens = [17, 13, 9, 9, 6, 6]
    assert [observed[f"blocks.{b}.fc2"].rows for b in range(6)] == tokens
    assert [observed[f"blocks.{b}.qkv"].rows for b in range(6)] == [17, 17, 13, 9, 9, 6]
    assert observed["patch_embed"].rows == 16 and observed["head"].rows == 1


def test_batches_do_not_stay_in_memory(tiny, images):
    _, path, layers = tiny
    alive = []

    def batches():
        for start in range(0, 12, 2):
            batch = images[start : start + 2].copy()
            assert sum(reference() is not None for reference in alive) <= 1
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    ranges.observe(path, layers, batches())
    assert len(alive) == 6


@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_the_histogram_does_not_depend_on_the_order(size):
    random = np.random.default_rng(0)
    pieces = [(size * s * random.normal(size=(50, 8))).astype(np.float32) for s in (0.1, 1, 7)]
    one, other = Observed(), Observed()
    for piece in pieces:
        one.add(piece, -1)
    for piece in reversed(pieces):
        other.add(piece, -1)
    assert one.limit == other.limit >= one.amax and np.log2(one.limit) == int(np.log2(one.limit))
    np.testing.assert_array_equal(one.histogram, other.histogram)
    values = np.abs(np.concatenate(pieces)).ravel().astype(np.float64)
    edges = np.linspace(0, one.limit, BINS + 1)
    np.testing.assert_array_equal(one.histogram, np.histogram(values, edges)[0])


def observed(values):
    one = Observed()
    one.add(np.asarray(values, dtype=np.float32).reshape(-1, 1), -1)
    return one


def threshold(one, method):
    return ranges.choose({"x": one}, method)["x"].threshold


def test_max_clips_nothing():
    values = np.random.default_rng(0).standard_cauchy(10000)
    one = observed(values)
    assert threshold(one, "max") == np.float32(np.abs(values).max())


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_numpys(percentile):
    values = np.random.default_rng(0).normal(size=20000)
    want = np.percentile(np.abs(values), percentile, method="inverted_cdf")
    found = threshold(observed(values), f"percentile:{percentile}")
    assert want <= found + 1e-6 <= want + 3 * 8 / BINS


def test_entropy_clips_a_lone_outlier_and_not_a_flat_distribution():
    random = np.random.default_rng(0)
    bulk = random.normal(size=200_000)
    assert 3 < threshold(observed([*bulk, 60.0]), "entropy") < 15
    flat = threshold(observed(random.uniform(-1, 1, size=200_000)), "entropy")
    assert flat > 0.95


@pytest.mark.parametrize("method", ["max", "percentile", "entropy"])
def test_odd_inputs_have_a_range_or_none(method):
    constant = ranges.choose({"x": observed(np.full(1000, 0.3))}, method)["x"]
    assert constant.scale * 127.5 >= 0.3 and constant.scale * 127 < 0.31
    one_bit = ranges.choose({"x": observed(np.tile([0.0, 1.0], 500))}, method)["x"]
    assert one_bit.scale * 127 == pytest.approx(1, rel=1e-3)
    assert ranges.choose({"x": observed(np.zeros(100))}, method) == {}


def test_values_that_are_not_finite(tiny, images):
    _, path, layers = tiny
    spoiled = images.copy()
    spoiled[5, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="input of patch_embed is not finite"):
        ranges.observe(path, layers, np.split(spoiled, 3))


def test_no_images(tiny):
    _, path, layers = tiny
    with pytest.raises(CalibrationError, match="no images"):
        ranges.observe(path, layers, [])


@pytest.mark.parametrize("text", ["", "minmax", "percentile:", "percentile:101", "max:3", "nan"])
def test_unknown_methods(text):
    with pytest.raises(CalibrationError, match="unknown calibration method"):
        ranges.parse_method(text)
