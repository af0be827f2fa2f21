"""The CUDA kernel as a plain shared library: compile it once, call its C launcher.

`plugins/token_reduce_kernel.cu` knows neither TensorRT nor PyTorch; plugin.py compiles it into a
TensorRT plugin, this module into a library that `torch_op.py` calls with the addresses of tensors.
Needs nvcc and a C++ compiler, no TensorRT headers. Neither PyTorch nor CUDA is imported here.

Environment: JMP_DEPLOY_CACHE (where to build), and what toolchain.py reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import EngineError, ToolchainError
from ..core.paths import cache_dir
from ..plugin import toolchain
from ..plugin.library import SOURCES, sources_dir
from .node import TokenReduce

LIBRARY = "libjmp_token_reduce.so"
FLAGS = ("-shared", "-std=c++17", "-O3", "-cudart=static", "-Xcompiler=-fPIC")
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""JmpTokenReduceParams.dtype by the name that NumPy and PyTorch give the type."""


class Params(ctypes.Structure):
    """JmpTokenReduceParams of token_reduce_kernel.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_prefix", "num_keep", "num_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "tau", "merge_weight")),
        *(
            (name, ctypes.c_int32)
            for name in ("granularity", "importance", "proportional", "selection")
        ),
        *(
            (name, ctypes.c_int32)
            for name in ("dtype", "batch", "tokens", "channels", "qkv_width", "size_batch")
        ),
    )


def make_params(
    attributes: TokenReduce,
    dtype: str,
    x: Sequence[int],
    qkv: Sequence[int],
    size: Sequence[int],
) -> Params:
    """Params of one call.

    Args:
        attributes: of the node.
        dtype: of all tensors, a key of DTYPES.
        x, qkv, size: shapes [B, N, C], [B, N, W] and [B, N] or [1, N].
    """
    return Params(
        **attributes.to_onnx(),
        dtype=DTYPES[dtype],
        batch=x[0],
        tokens=x[1],
        channels=x[2],
        qkv_width=qkv[2],
        size_batch=size[0],
    )


class Kernel:
    """The launcher of a compiled library.

    Raises:
        EngineError: the file cannot be loaded, or lacks a function of token_reduce_kernel.h.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = library = ctypes.CDLL(str(path))
            params = ctypes.POINTER(Params)
            for check in (library.jmp_token_reduce_check, library.jmp_token_reduce_check_tuned):
                check.argtypes = [params, ctypes.c_char_p, ctypes.c_size_t]
                check.restype = ctypes.c_int
            for version in ("jmp_token_reduce", "jmp_token_reduce_plain"):
                getattr(library, version).argtypes = [params] + [ctypes.c_void_p] * 9
                getattr(library, version).restype = ctypes.c_int
                workspace = getattr(library, f"{version}_workspace_bytes")
                workspace.argtypes, workspace.restype = [params], ctypes.c_size_t
            library.jmp_token_reduce_error_string.argtypes = [ctypes.c_int]
            library.jmp_token_reduce_error_string.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise EngineError(
                f"{path} is not the token reduction kernel: {error}", f"delete {path.parent}"
            ) from error

    def refusal(self, params: Params) -> str | None:
        """One sentence on why the kernel does not take `params`, or None if it does."""
        return self._sentence(self._library.jmp_token_reduce_check, params)

    def why_plain(self, params: Params) -> str | None:
        """One sentence on why the slow plain kernels run for `params`, or None if they do not."""
        return self._sentence(self._library.jmp_token_reduce_check_tuned, params)

    def workspace_bytes(self, params: Params, *, plain: bool = False) -> int:
        """Scratch bytes that a launch with `params` needs."""
        return int(self._function("_workspace_bytes", plain)(ctypes.byref(params)))

    def launch(
        self,
        params: Params,
        addresses: Sequence[int],
        workspace: int,
        stream: int,
        *,
        plain: bool = False,
    ) -> None:
        """Enqueues one reduction; allocates nothing, waits for nothing.

        Args:
            params: of the call, not refused.
            addresses: of x, qkv, size, y, out_size, log_size and, if wanted, index on the current
                device, dense, aligned to 16 bytes.
            workspace: address of `workspace_bytes(params)` bytes, aligned to 256.
            stream: handle of a CUDA stream.
            plain: by the plain kernels, the specification that the tuned ones are held to.

        Raises:
            EngineError: CUDA refused the launch.
        """
        given = [*addresses, *([None] * (7 - len(addresses)))]
        error = self._function("", plain)(ctypes.byref(params), *given, workspace, stream)
        if error:
            text = self._library.jmp_token_reduce_error_string(error).decode()
            raise EngineError(f"the token reduction kernel did not start: CUDA: {text} ({error})")

    @staticmethod
    def _sentence(check: Any, params: Params) -> str | None:
        message = ctypes.create_string_buffer(256)
        wrong = check(ctypes.byref(params), message, len(message))
        return message.value.decode() if wrong else None

    def _function(self, suffix: str, plain: bool) -> Any:
        return getattr(self._library, f"jmp_token_reduce{'_plain' if plain else ''}{suffix}")


def kernel_library(arch: str, *, force: bool = False) -> Path:
    """The compiled kernel for one GPU architecture, from the cache or by a compilation.

    Args:
        arch: compute capability of the GPU such as "90". A GPU newer than the compiler gets PTX.
        force: compile again.

    Returns:
        Path of the shared library. Several processes may build at once: the file appears whole.

    Raises:
        ToolchainError: no compiler, an architecture older than it knows, a compile error, or no
            writable cache.
    """
    # Not find_toolchain: PyTorch's users have no TensorRT headers, and need none.
    nvcc, version = toolchain.find_nvcc()
    options = [*FLAGS, _gencode(nvcc, arch), *_cuda_sources()]
    compilers = [version, os.environ.get("CXX", ""), platform.machine()]
    identity = "\n".join([_sources_hash(), *options, *compilers])
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / key / LIBRARY
    if library.is_file() and not force:
        return library
    toolchain.announce(f"compiling the CUDA kernel once: {toolchain.compile_time(1)}")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            built = Path(folder) / LIBRARY
            log = library.with_name("build.log")
            options += ["-o", str(built)]
            toolchain.run_nvcc(nvcc, options, sources_dir(), log, "the CUDA kernel")
            built.replace(library)
    except OSError as error:
        raise ToolchainError(
            f"cannot write the kernel's cache {library.parent}: {error.strerror or error}",
            "set JMP_DEPLOY_CACHE to a folder that you can write",
        ) from error
    return library


def _gencode(nvcc: Path, arch: str) -> str:
    best = toolchain.compilable(arch, toolchain.known_architectures(nvcc))
    return f"-gencode=arch=compute_{best},code={'sm' if best == arch else 'compute'}_{best}"


def _cuda_sources() -> list[str]:
    return [name for name in SOURCES if name.endswith(".cu")]


def _sources_hash() -> str:
    """sha256 of the CUDA sources and every header beside them, names and contents."""
    folder = sources_dir()
    headers = sorted(p.name for p in folder.iterdir() if p.suffix in (".h", ".cuh"))
    digest = hashlib.sha256()
    for name in (*_cuda_sources(), *headers):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
