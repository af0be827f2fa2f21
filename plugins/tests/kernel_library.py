"""The C launcher of token_reduce_kernel.h, through ctypes.

Serves three users: the host tests (NumPy arrays, the kernel compiled for the CPU), the GPU tests
and the GPU timings (device pointers, the kernel compiled by nvcc). Needs NumPy alone.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
DTYPES: dict[Any, int] = {np.dtype(np.float32): FLOAT32, np.dtype(np.float16): FLOAT16}
try:
    import ml_dtypes
except ImportError:  # comes with onnx; without it bfloat16 is not tested
    bfloat16: Any = None
else:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    DTYPES[bfloat16] = BFLOAT16


class Params(ctypes.Structure):
    """JmpTokenReduceParams, field by field."""

    _fields_ = (
        ("num_prefix", ctypes.c_int32),
        ("num_keep", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("tau", ctypes.c_float),
        ("merge_weight", ctypes.c_float),
        ("granularity", ctypes.c_int32),
        ("importance", ctypes.c_int32),
        ("proportional", ctypes.c_int32),
        ("selection", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("qkv_width", ctypes.c_int32),
        ("size_batch", ctypes.c_int32),
    )


def compile_for_cpu(compiler: Path, target: Path, *options: str) -> Path:
    """The kernels as a library for the stand-in for CUDA; returns `target`.

    Raises:
        subprocess.CalledProcessError: they do not compile; the compiler has said why.
    """
    source = Path(__file__).resolve().parents[1] / "token_reduce_kernel.cu"
    command = [str(compiler), "-std=c++17", "-pthread", "-DJMP_CUDA_ON_HOST", "-shared", "-fPIC"]
    command += [*options, "-x", "c++", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@dataclass(frozen=True)
class Outputs:
    """y [B, P+K, C], out_size and log_size [B, P+K], index int32 [B, M] of M tokens, K kept."""

    y: np.ndarray
    out_size: np.ndarray
    log_size: np.ndarray
    index: np.ndarray
    num_keep: int

    @property
    def destination(self) -> np.ndarray:
        """[B, N] output position of each input token, -1 = pruned: what `index` says of it."""
        prefix = self.out_size.shape[1] - self.num_keep
        fate, slot = np.divmod(self.index, self.num_keep)
        first = np.broadcast_to(np.arange(prefix), (len(slot), prefix))
        return np.concatenate([first, np.where(fate == 2, -1, prefix + slot)], axis=1)


def make_params(x: Any, qkv: Any, size: Any, dtype: int, **attributes: Any) -> Params:
    """Params for tensors of these shapes (anything with `.shape`) and the node's attributes."""
    return Params(
        **attributes,
        dtype=dtype,
        batch=x.shape[0],
        tokens=x.shape[1],
        channels=x.shape[2],
        qkv_width=qkv.shape[2],
        size_batch=size.shape[0],
    )


class KernelLibrary:
    """A shared library built from token_reduce_kernel.cu."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        params = ctypes.POINTER(Params)
        for function in (library.jmp_token_reduce_check, library.jmp_token_reduce_check_tuned):
            function.argtypes = [params, ctypes.c_char_p, ctypes.c_size_t]
            function.restype = ctypes.c_int
        for function in (
            library.jmp_token_reduce_workspace_bytes,
            library.jmp_token_reduce_plain_workspace_bytes,
        ):
            function.argtypes = [params]
            function.restype = ctypes.c_size_t
        for function in (library.jmp_token_reduce, library.jmp_token_reduce_plain):
            function.argtypes = [params] + [ctypes.c_void_p] * 9
            function.restype = ctypes.c_int
        library.jmp_token_reduce_error_string.argtypes = [ctypes.c_int]
        library.jmp_token_reduce_error_string.restype = ctypes.c_char_p
        self._library = library

    def check(self, params: Params) -> str | None:
        """What is wrong with `params`, or None."""
        return self._refusal(self._library.jmp_token_reduce_check, params)

    def check_tuned(self, params: Params) -> str | None:
        """Why the plain kernels run with `params`; None if the tuned ones do."""
        return self._refusal(self._library.jmp_token_reduce_check_tuned, params)

    @staticmethod
    def _refusal(function: Any, params: Params) -> str | None:
        message = ctypes.create_string_buffer(256)
        wrong = function(ctypes.byref(params), message, len(message))
        return message.value.decode() if wrong else None

    def workspace_bytes(self, params: Params, *, plain: bool = False) -> int:
        """Scratch bytes that a launch with `params` needs."""
        library = self._library
        count = (
            library.jmp_token_reduce_plain_workspace_bytes
            if plain
            else library.jmp_token_reduce_workspace_bytes
        )
        return int(count(ctypes.byref(params)))

    def launch(
        self, params: Params, *pointers: int | None, stream: int = 0, plain: bool = False
    ) -> None:
        """Launch with the addresses x, qkv, size, y, out_size, log_size, index, workspace.

        Raises:
            RuntimeError: the launcher returned a CUDA error.
        """
        library = self._library
        function = library.jmp_token_reduce_plain if plain else library.jmp_token_reduce
        error = function(ctypes.byref(params), *pointers, stream)
        if error:
            text = library.jmp_token_reduce_error_string(error).decode()
            raise RuntimeError(f"jmp_token_reduce: {text} ({error})")

    def run_host(
        self,
        x: np.ndarray,
        qkv: np.ndarray,
        size: np.ndarray,
        *,
        want_index: bool = True,
        plain: bool = False,
        **attributes: Any,
    ) -> Outputs:
        """Run a CPU build on contiguous NumPy arrays of one dtype of DTYPES.

        Outputs and workspace are full of NaN before the launch, so what it forgets to write shows.
        """
        params = make_params(x, qkv, size, DTYPES[x.dtype], **attributes)
        places = params.num_prefix + params.num_keep
        batch, tokens, channels = x.shape
        outputs = Outputs(
            y=np.full((batch, places, channels), np.nan, x.dtype),
            out_size=np.full((batch, places), np.nan, x.dtype),
            log_size=np.full((batch, places), np.nan, x.dtype),
            index=np.full((batch, tokens - params.num_prefix), np.iinfo(np.int32).min, np.int32),
            num_keep=params.num_keep,
        )
        workspace = np.full(self.workspace_bytes(params, plain=plain), 0xFF, np.uint8)
        arrays = [x, qkv, size, outputs.y, outputs.out_size, outputs.log_size]
        assert all(array.flags.c_contiguous for array in arrays)
        assert len({array.dtype for array in arrays}) == 1
        index = outputs.index.ctypes.data if want_index else None
        pointers = [array.ctypes.data for array in arrays]
        self.launch(params, *pointers, index, workspace.ctypes.data, plain=plain)
        return outputs


def write_case(
    path: Path, x: np.ndarray, qkv: np.ndarray, size: np.ndarray, **attributes: Any
) -> None:
    """Write a case file for host_driver.cpp."""
    params = make_params(x, qkv, size, DTYPES[x.dtype], **attributes)
    path.write_bytes(bytes(params) + x.tobytes() + qkv.tobytes() + size.tobytes())


def read_outputs(path: Path, x: np.ndarray, attributes: dict[str, Any]) -> Outputs:
    """Read what host_driver.cpp wrote for a case with input `x`."""
    prefix, keep = attributes["num_prefix"], attributes["num_keep"]
    places = prefix + keep
    batch, tokens, channels = x.shape
    content = path.read_bytes()
    arrays, offset = [], 0
    for shape, dtype in (
        ((batch, places, channels), x.dtype),
        ((batch, places), x.dtype),
        ((batch, places), x.dtype),
        ((batch, tokens - prefix), np.dtype(np.int32)),
    ):
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(content, dtype, count, offset).reshape(shape))
        offset += count * dtype.itemsize
    if offset != len(content):
        raise ValueError(f"{path}: {len(content)} bytes, expected {offset}")
    return Outputs(*arrays, keep)
