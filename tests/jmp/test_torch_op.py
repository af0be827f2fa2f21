"""The PyTorch operator, as far as it goes without a GPU: schema, shapes, choice of the backend.

tests/gpu/test_torch_op_gpu.py has the rest. Tracing and the CUDA implementation's refusals are run
here with stand-ins for the GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jmp_deploy.core.errors import EngineError, JmpDeployError, ModelError, ToolchainError
from jmp_deploy.jmp import kernel, schedule, torch_op
from jmp_deploy.jmp.patch import model_shape, patch, unpatch
from jmp_deploy.jmp.reduction import token_reduce
from tests.fakes.models import attributes, inputs, tiny_vit

REPO = Path(__file__).resolve().parents[2]


def tensors(batch=3, *, attrs, dtype=torch.float32, **options):
    return [torch.from_numpy(a).to(dtype) for a in inputs(batch, attrs=attrs, **options)]


def operands(attrs, arrays, fallback=False):
    values = attrs.to_onnx()
    values["proportional"] = bool(values["proportional"])
    return (*arrays, *values.values(), attrs.index, fallback)


@pytest.fixture
def no_kernel(monkeypatch):
    """Forgets kernels and warnings before and after."""
    torch_op._find_kernel.cache_clear()
    torch_op._warn_once.cache_clear()
    yield monkeypatch
    torch_op._find_kernel.cache_clear()
    torch_op._warn_once.cache_clear()


@pytest.mark.parametrize("selection", ["importance", "distinct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_on_a_cpu_the_operator_is_the_reference(selection, dtype):
    attrs = attributes(
        selection=selection, granularity="sample", proportional=False, index=dtype != torch.float64
    )
    arrays = tensors(attrs=attrs, dtype=dtype)
    for ours, theirs in zip(
        torch_op.reduce_cuda(*arrays, attrs), token_reduce(*arrays, attrs), strict=True
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("importance", ["class", "received"])
@pytest.mark.parametrize("broadcast", [False, True])
def test_the_operator_keeps_pytorchs_contract(importance, broadcast):
    """Schema, fake kernel, no aliasing, the same result when compiled with dynamic shapes."""
    attrs = attributes(importance=importance, index=broadcast)
    x, qkv, size = tensors(attrs=attrs)
    size = size[:1] if broadcast else size
    torch.library.opcheck(
        torch.ops.jmp_deploy.token_reduce.default, operands(attrs, (x, qkv, size))
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_without_computing(device, dtype):
    attrs = attributes(num_prefix=2, num_keep=5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(7, 13, 20, device=device, dtype=dtype)
        qkv = torch.empty(7, 13, 72, device=device, dtype=dtype)
        size = torch.empty(1, 13, device=device, dtype=dtype)
        y, out_size, log_size = torch_op.reduce_auto(x, qkv, size, attrs)
        index = torch_op.reduce_auto(x, qkv, size, replace(attrs, index=True))[3]
    assert (index.shape, index.dtype, index.device.type) == ((7, 11), torch.int32, device)
    assert (y.shape, out_size.shape, log_size.shape) == ((7, 7, 20), (7, 7), (7, 7))
    assert {t.dtype for t in (y, out_size, log_size)} == {dtype}
    assert {t.device.type for t in (y, out_size, log_size)} == {device}


@pytest.mark.parametrize("backend", ["auto", "cuda", "reference"])
def test_a_patched_model_compiles_whole(backend, monkeypatch):
    monkeypatch.setattr("jmp_deploy.jmp.patch.check_backend", lambda backend: None)
    model = tiny_vit()
    patch(model, schedule.parse("1:11,3:7", model_shape(model)), backend=backend)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    operators: list[str] = []

    def record(graph, example):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        want = model(images)
        got = torch.compile(model, backend=record, fullgraph=True)(images)
    assert torch.equal(got, want)
    ours = sum("jmp_deploy.token_reduce" in name for name in operators)
    assert ours == (2 if backend == "cuda" else 0)


def test_auto_lets_gradients_through():
    model = tiny_vit().requires_grad_(True)
    patch(model, schedule.parse("1:11", model_shape(model)))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_export_does_not_see_the_backend(monkeypatch):
    """The exported graph holds the node, not our operator, whichever backend was chosen."""
    from jmp_deploy.export.export import _reduce_node, _symbolic_reductions

    monkeypatch.setattr("jmp_deploy.jmp.patch.check_backend", lambda backend: None)
    model = tiny_vit()
    patch(model, schedule.parse("1:11", model_shape(model)), backend="cuda")
    with _symbolic_reductions(model):
        assert model.blocks.reduce is _reduce_node
    assert model.blocks.reduce is torch_op.reduce_cuda
    unpatch(model)


def test_unknown_backend_is_refused_and_leaves_the_model_alone():
    model = tiny_vit()
    blocks = model.blocks
    with pytest.raises(ModelError, match="backend='gpu' is none of auto, cuda, reference"):
        patch(model, backend="gpu")
    assert model.blocks is blocks


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so():
    with pytest.raises(ToolchainError, match="PyTorch finds none") as caught:
        patch(tiny_vit(), backend="cuda")
    assert "reference" in (caught.value.hint or "")


def test_cuda_without_a_compiler_says_so_and_looks_once(no_kernel):
    calls = []

    def missing():
        calls.append(1)
        raise ToolchainError("no usable CUDA compiler (nvcc): none found", "install it")

    no_kernel.setattr(torch_op.torch.cuda, "is_available", lambda: True)
    no_kernel.setattr(torch_op.torch.cuda, "get_device_capability", lambda *device: (9, 0))
    no_kernel.setattr(kernel.toolchain, "find_nvcc", missing)
    for _ in range(2):
        with pytest.raises(ToolchainError, match="no usable CUDA compiler"):
            patch(tiny_vit(), backend="cuda")
    assert len(calls) == 1


def cuda_implementation():
    """What PyTorch calls for CUDA tensors."""
    return torch_op._operator._backend_fns["cuda"]


def test_fallback_warns_once_and_computes(no_kernel):
    def no_launch(*arguments, tuned_only):
        raise ToolchainError("no usable CUDA compiler (nvcc): none found")

    no_kernel.setattr(torch_op, "launch", no_launch)
    attrs = attributes()
    arrays = tensors(attrs=attrs)
    with pytest.warns(RuntimeWarning, match="plain PyTorch.*no usable CUDA compiler"):
        got = cuda_implementation()(*operands(attrs, arrays, fallback=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda_implementation()(*operands(attrs, arrays, fallback=True))
    assert all(map(torch.equal, got, token_reduce(*arrays, attrs)))
    with pytest.raises(ToolchainError):
        cuda_implementation()(*operands(attrs, arrays, fallback=False))


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ((torch.float64, torch.float64, torch.float64), "x torch.float64"),
        ((torch.float16, torch.float32, torch.float16), "qkv torch.float32"),
        ((torch.float16, torch.bfloat16, torch.float16), "qkv torch.bfloat16"),
    ],
)
def test_types_that_the_kernel_does_not_take_are_named(kinds, found):
    attrs = attributes()
    arrays = [t.to(kind) for t, kind in zip(tensors(attrs=attrs), kinds, strict=True)]
    with pytest.raises(ModelError, match=found):
        torch_op.launch(*arrays, attrs)


# --- The library, with a stand-in for the kernel --------------------------------------------------

STAND_IN = r"""
#include "token_reduce_kernel.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

extern "C" int jmp_token_reduce_check(const JmpTokenReduceParams* p, char* message, size_t size) {
  if (p->qkv_width >= 2 * p->num_heads * p->head_dim) return 0;
  std::snprintf(message, size, "qkv is %d wide, expected 2*%d*%d", p->qkv_width, p->num_heads,
                p->head_dim);
  return 1;
}

extern "C" size_t jmp_token_reduce_workspace_bytes(const JmpTokenReduceParams* p) {
  return 4 * p->batch;
}

// y: first tokens of x; out_size: their size; log_size: first column of QKV; float32 only.
extern "C" int jmp_token_reduce(const JmpTokenReduceParams* p, const void* x, const void* qkv,
                                const void* size, void* y, void* out_size, void* log_size,
                                int32_t* index, void* workspace, void* stream) {
  if (stream != reinterpret_cast<void*>(0x123456789) || p->dtype != JMP_FLOAT32)
    return 1;
  if (index) std::fill(index, index + p->batch * (p->tokens - p->num_prefix), 77);
  const auto* in = static_cast<const float*>(x);
  const auto* projection = static_cast<const float*>(qkv);
  const auto* sizes = static_cast<const float*>(size);
  const int places = p->num_prefix + p->num_keep;
  std::memset(workspace, 0, 4 * p->batch);
  for (int b = 0; b < p->batch; ++b) {
    for (int t = 0; t < places; ++t) {
      std::memcpy(static_cast<float*>(y) + (b * places + t) * p->channels,
                  in + (b * p->tokens + t) * p->channels, 4 * p->channels);
      static_cast<float*>(out_size)[b * places + t] =
          sizes[(p->size_batch == 1 ? 0 : b) * p->tokens + t] * p->tau;
      static_cast<float*>(log_size)[b * places + t] =
          projection[(b * p->tokens + t) * p->qkv_width] * p->scale;
    }
  }
  return 0;
}

extern "C" int jmp_token_reduce_check_tuned(const JmpTokenReduceParams* p, char* message,
                                            size_t size) {
  if (p->head_dim % 8 == 0) return 0;
  std::snprintf(message, size, "head_dim is %d", p->head_dim);
  return 1;
}
extern "C" size_t jmp_token_reduce_plain_workspace_bytes(const JmpTokenReduceParams*) { return 7; }
extern "C" int jmp_token_reduce_plain(const JmpTokenReduceParams*, const void*, const void*,
                                      const void*, void*, void*, void*, int32_t*, void*, void*) {
  return 1;
}
extern "C" const char* jmp_token_reduce_error_string(int error) { return error == 1 ? "one" : "?"; }
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A library of the same C interface that says what it was given."""
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "stand_in.cpp").write_text(STAND_IN)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-I", str(REPO / "plugins")]
    command += ["stand_in.cpp", "-o", "libstand_in.so"]
    subprocess.run(command, cwd=folder, check=True)
    return kernel.Kernel(folder / "libstand_in.so")


@pytest.fixture
def no_cuda_around(stand_in, monkeypatch):
    """`launch` on CPU tensors with the stand-in."""
    stream = type("Stream", (), {"cuda_stream": 0x123456789})()
    monkeypatch.setattr(torch_op, "load_kernel", lambda capability: stand_in)
    monkeypatch.setattr(torch_op.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch_op.torch.cuda, "device", lambda device: warnings.catch_warnings())
    monkeypatch.setattr(torch_op.torch.cuda, "current_stream", lambda device: stream)
    return stream


@pytest.mark.parametrize("broadcast", [False, True])
def test_launch_hands_over_every_argument(no_cuda_around, broadcast):
    attrs = attributes(num_prefix=2, tau=0.5, index=True)
    x, qkv, size = tensors(4, attrs=attrs)
    size = size[:1] if broadcast else size
    # x not dense, sizes off the 16-byte grid: the library must be given neither.
    strided = torch.stack((x, x), dim=-1)[..., 0]
    shifted = torch.cat((size.flatten()[:1], size.flatten()))[1:].view(size.shape)
    y, out_size, log_size, index = torch_op.launch(strided, qkv, shifted, attrs)
    assert index.shape == (4, 11) and (index == 77).all()
    assert torch.equal(y, x[:, :8])
    assert torch.equal(out_size, size[:, :8].expand(4, 8) * 0.5)
    assert torch.equal(log_size, qkv[:, :8, 0] * torch.tensor(attrs.scale, dtype=torch.float32))


def test_narrower_qkv_and_sizes_are_widened_as_autocast_needs(no_cuda_around):
    attrs = attributes()
    x, qkv, size = tensors(2, attrs=attrs)
    y, _, log_size = torch_op.launch(x, qkv.half(), size.half(), attrs)
    assert y.dtype == torch.float32 and torch.equal(y, x[:, :7])
    scale = torch.tensor(attrs.scale, dtype=torch.float32)
    assert torch.equal(log_size, qkv.half().float()[:, :7, 0] * scale)


def test_auto_leaves_what_is_not_tuned_to_pytorch(no_cuda_around, no_kernel):
    attrs = attributes(head_dim=7, num_heads=3)
    arrays = tensors(attrs=attrs)
    marked = cuda_implementation()(*operands(attrs, arrays, fallback=False))
    assert torch.equal(marked[0], arrays[0][:, :7])  # the stand-in's own output: it was launched
    with pytest.warns(RuntimeWarning, match="slow plain CUDA kernels take this: head_dim is 7"):
        got = cuda_implementation()(*operands(attrs, arrays, fallback=True))
    assert all(map(torch.equal, got, token_reduce(*arrays, attrs)))


def test_a_failed_launch_says_what_cuda_said(no_cuda_around):
    no_cuda_around.cuda_stream = 1
    attrs = attributes()
    with pytest.raises(EngineError, match=r"did not start: CUDA: one \(1\)"):
        torch_op.launch(*tensors(attrs=attrs), attrs)


def test_an_empty_batch_is_not_launched(no_cuda_around):
    attrs = attributes()
    x, qkv, size = (t[:0] for t in tensors(attrs=attrs))
    assert torch_op.launch(x, qkv, size, attrs)[0].shape == (0, 7, 20)


def test_what_the_kernel_refuses_is_passed_on(no_cuda_around):
    attrs = attributes(num_heads=50)
    with pytest.raises(ModelError, match=r"refuses this reduction: qkv is 72 wide") as caught:
        torch_op.launch(*tensors(attrs=attributes()), attrs)
    assert "reference" in (caught.value.hint or "")


def test_a_file_that_is_no_kernel(tmp_path):
    (tmp_path / "lib.so").write_bytes(b"no library")
    with pytest.raises(EngineError, match="is not the token reduction kernel"):
        kernel.Kernel(tmp_path / "lib.so")


def fake_nvcc(folder: Path, body: str) -> Path:
    """An nvcc that knows three architectures; `body` runs for a compilation."""
    script = folder / "nvcc"
    script.write_text(
        "#!/bin/bash\n"
        'case "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 13.0, V13.0.48';;\n"
        "--list-gpu-code) printf 'sm_80\\nsm_90\\nsm_120\\n';;\n"
        f"*) {body};;\nesac\n"
    )
    script.chmod(0o755)
    return script


WRITE_OUTPUT = 'echo "$@" >> "$LOG"; while [ "$1" != -o ]; do shift; done; echo built > "$2"'


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("JMP_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("JMP_NVCC", str(fake_nvcc(tmp_path, WRITE_OUTPUT)))
    return tmp_path


@pytest.mark.parametrize(
    ("arch", "code"),
    [
        ("90", "arch=compute_90,code=sm_90"),
        ("89", "arch=compute_80,code=compute_80"),  # unknown to this nvcc: PTX of an older one
        ("121", "arch=compute_120,code=compute_120"),
    ],
)
def test_the_kernel_is_compiled_once_for_the_gpu(compiler, arch, code):
    library = kernel.kernel_library(arch)
    assert library.read_text() == "built\n" and kernel.kernel_library(arch) == library
    (command,) = (compiler / "log").read_text().splitlines()
    assert code in command and "token_reduce_kernel.cu" in command
    assert "NvInfer" not in command and "tensorrt" not in command.lower()
    assert [p.name for p in library.parent.iterdir() if p.name.startswith(".")] == []
    kernel.kernel_library(arch, force=True)
    assert len((compiler / "log").read_text().splitlines()) == 2


def test_a_gpu_too_old_for_the_compiler(compiler):
    with pytest.raises(ToolchainError, match=r"does not compile for this GPU \(sm_75\)"):
        kernel.kernel_library("75")


def test_a_compile_error_names_the_log(compiler, monkeypatch):
    body = "echo 'kernel.cu(3): error: no such thing'; exit 1"
    (compiler / "broken").mkdir()
    monkeypatch.setenv("JMP_NVCC", str(fake_nvcc(compiler / "broken", body)))
    with pytest.raises(ToolchainError, match="no such thing") as caught:
        kernel.kernel_library("90")
    log = Path((caught.value.hint or "").removeprefix("full log: "))
    assert "no such thing" in log.read_text()
    assert not log.with_name(kernel.LIBRARY).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written(compiler, monkeypatch):
    (compiler / "closed").mkdir(mode=0o500)
    monkeypatch.setenv("JMP_DEPLOY_CACHE", str(compiler / "closed"))
    with pytest.raises(JmpDeployError, match="cannot write"):
        kernel.kernel_library("90")


def test_params_have_the_layout_of_the_header():
    """Names and order of the C struct; every field has four bytes."""
    header = (REPO / "plugins" / "token_reduce_kernel.h").read_text()
    struct = header[header.index("typedef struct JmpTokenReduceParams {") :]
    struct = struct[: struct.index("} JmpTokenReduceParams;")]
    fields = [
        (kind, name.rstrip(";"))
        for kind, name, *_ in (line.split() for line in struct.splitlines() if ";" in line)
        if kind in ("int32_t", "float")
    ]
    assert [name for _, name in fields] == [name for name, _ in kernel.Params._fields_]
    assert ctypes.sizeof(kernel.Params) == 4 * len(fields)
    floats = [name for kind, name in fields if kind == "float"]
    assert floats == [n for n, kind in kernel.Params._fields_ if kind is ctypes.c_float]
