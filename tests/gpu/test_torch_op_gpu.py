"""The PyTorch operator on a GPU: against the float64 oracle, compiled, captured, on other streams.

Needs nvcc, PyTorch and timm; no TensorRT. `scripts/gpu_check.sh` runs these.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jmp_deploy.jmp import schedule, torch_op
from jmp_deploy.jmp.patch import model_shape, patch, unpatch
from jmp_deploy.jmp.reduction import token_reduce
from tests.fakes.models import attributes, expected, inputs, tiny_vit

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def on_gpu(arrays, dtype=torch.float32):
    return [torch.from_numpy(a).to("cuda", dtype) for a in arrays]


def alike(got, want, tolerance=1e-3):
    """Share of samples in which all values agree; the others had a near tie somewhere."""
    near = torch.isclose(got.float(), want.float(), rtol=tolerance, atol=tolerance)
    return near.flatten(1).all(dim=1).float().mean().item()


@pytest.fixture
def model():
    return tiny_vit(img_size=64, embed_dim=96).cuda()  # heads of 32


def reduced(model, backend, **options):
    unpatch(model)
    steps = schedule.parse("1:50,3:31", model_shape(model))
    return patch(model, steps, backend=backend, **options)


def photos(batch, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, 3, 64, 64, generator=generator, device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("selection", ["importance", "distinct"])
@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_equals_the_oracle(dtype, selection, importance, granularity):
    # head_dim 32: the fast kernel serves head sizes 32 to 128.
    attrs = attributes(
        selection=selection,
        importance=importance,
        granularity=granularity,
        num_keep=23,
        head_dim=32,
        scale=32**-0.5,
    )
    tensors = on_gpu(inputs(16, 40, attrs=attrs, channels=64), dtype)
    rounded = [t.double().cpu().numpy() for t in tensors]  # what the kernel was given
    want = expected(*rounded, attrs)
    clear = want.clear(1e-5)
    assert clear.sum() >= 4
    y, out_size, log_size = (t.double().cpu().numpy() for t in torch_op.launch(*tensors, attrs))
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(y[clear], want.y[clear], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(out_size[clear], want.out_size[clear], rtol=tolerance)
    np.testing.assert_allclose(log_size[clear], want.log_size[clear], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operator_keeps_pytorchs_contract(dtype):
    attrs = attributes(num_keep=23, head_dim=32)
    values = {**attrs.to_onnx(), "proportional": True}
    tensors = on_gpu(inputs(3, 40, attrs=attrs, channels=64), dtype)
    torch.library.opcheck(
        torch.ops.jmp_deploy.token_reduce.default, (*tensors, *values.values(), attrs.index, False)
    )


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_model_computes_the_same_as_with_the_reference(model, granularity):
    images = photos(64)
    with torch.no_grad():
        want = reduced(model, "reference", granularity=granularity)(images)
        got = reduced(model, "cuda", granularity=granularity)(images)
    assert alike(got, want) >= 0.9


def test_auto_takes_the_kernel_without_gradients_and_the_reference_with(model, monkeypatch):
    launches = []
    launch = torch_op.launch

    def counting(*arguments, **options):
        launches.append(1)
        return launch(*arguments, **options)

    monkeypatch.setattr(torch_op, "launch", counting)
    reduced(model, "auto").requires_grad_(True)
    with torch.no_grad():
        model(photos(2))
    assert len(launches) == 2
    model(photos(2)).sum().backward()
    assert len(launches) == 2 and model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_autocast(model):
    reduced(model, "cuda")
    images = photos(16)
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        got = model(images)
        want = reduced(model, "reference")(images)
    assert alike(got, want, 5e-2) >= 0.8


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_compiled_whole(model, backend):
    reduced(model, backend)
    images = photos(32)
    with torch.no_grad():
        want = model(images)
        got = torch.compile(model, fullgraph=True)(images)
    assert alike(got, want) >= 0.9


def test_compiled_with_cuda_graphs(model):
    reduced(model, "cuda")
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):  # the first calls record
            images = photos(16, seed)
            got = compiled(images).clone()
            assert alike(got, model(images)) >= 0.8


def test_captured_into_a_graph(model):
    reduced(model, "cuda").half()
    images = photos(8).half()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(images)
    for seed in (1, 2):
        images.copy_(photos(8, seed).half())
        graph.replay()
        torch.cuda.synchronize()
        with torch.no_grad():
            assert alike(output, model(images), 1e-2) >= 0.8


def test_two_streams_at_once():
    """Scratch memory comes per call, so that calls may overlap."""
    attrs = attributes(num_keep=138, num_heads=6, head_dim=64, scale=0.125)
    cases = [on_gpu(inputs(64, 196, attrs=attrs, channels=384, seed=s)) for s in (0, 1)]
    alone = [torch_op.launch(*case, attrs) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results: list[list[tuple[torch.Tensor, ...]]] = [[], []]
    for _ in range(5):
        for stream, case, result in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(torch_op.launch(*case, attrs))
    torch.cuda.synchronize()
    for result, want in zip(results, alone, strict=True):
        for outputs in result:
            assert all(map(torch.equal, outputs, want))


def test_views_are_made_dense_and_aligned():
    attrs = attributes(num_keep=23, head_dim=32)
    x, qkv, size = on_gpu(inputs(4, 40, attrs=attrs, channels=64), torch.float16)
    strided = torch.stack((x, x), dim=-1)[..., 1]
    shifted = torch.cat((qkv.flatten()[:1], qkv.flatten()))[1:].view(qkv.shape)
    got, want = torch_op.launch(strided, shifted, size, attrs), torch_op.launch(x, qkv, size, attrs)
    assert all(map(torch.equal, got, want))


def test_what_the_kernel_refuses_falls_back_in_auto_only():
    attrs = attributes()
    x, qkv, size = on_gpu(inputs(2, attrs=attrs), torch.float64)
    with torch.no_grad():
        with pytest.raises(Exception, match="float32, float16 or bfloat16"):
            torch_op.reduce_cuda(x, qkv, size, attrs)
        torch_op._warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="plain PyTorch"):
            got = torch_op.reduce_auto(x, qkv, size, attrs)
    for ours, theirs in zip(got, token_reduce(x, qkv, size, attrs), strict=True):
        torch.testing.assert_close(ours, theirs)
