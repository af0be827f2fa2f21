"""Arrays and streams of PyTorch, CuPy, pycuda, Numba, cuda-core and the like, without any of them.

An array on the GPU is known by `__cuda_array_interface__` (version 3:
numba.readthedocs.io, "CUDA Array Interface") or by DLPack (dmlc.github.io/dlpack, ABI of version
0.x and 1.0, which every producer still gives where no newer one is asked for). Either is read, and
nothing is copied.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .cuda import Cuda

LEGACY_STREAM = 1
"""The legacy default stream's number in both protocols; its handle is 0."""

_DLPACK_CUDA, _DLPACK_MANAGED = 2, 13  # kDLCUDA, kDLCUDAManaged
_DLPACK_GPU = (_DLPACK_CUDA, _DLPACK_MANAGED)
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}


class DeviceArray:
    """A C-contiguous array in GPU memory.

    PyTorch (`torch.as_tensor(array, device="cuda")`), CuPy (`cupy.asarray(array)`) and pycuda
    (`GPUArray(array.shape, array.dtype, base=array, gpudata=array.pointer)`) take it without a
    copy. Those that `Engine.infer` allocated go back to its pool with the last reference.

    Args:
        pointer: device address.
        shape, dtype: as numpy's.
        owner: kept alive as long as this is.
        release: called once, when the array goes.

    Attributes:
        pointer, shape, dtype: as given.
        stream: handle of the stream that its producer works on, or None where it is not said.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        owner: Any = None,
        stream: int | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype
        self.stream = stream
        self._owner = owner
        self._release = release

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Complete when the call that returned it has returned, or, with a stream of the caller's,
        in the order of that stream: no stream to wait for."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, pointer={self.pointer:#x})"

    def __del__(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            release()


def stream_handle(stream: Any) -> int:
    """The CUDA handle of a stream of any library; 0 for the legacy default stream.

    Args:
        stream: an integer, or an object of PyTorch (`cuda_stream`), CuPy (`ptr`), pycuda or Numba
            (`handle`), or one with cuda-core's `__cuda_stream__`.

    Raises:
        EngineError: it is none of these.
    """
    handle = _stream_number(stream)
    return 0 if handle == LEGACY_STREAM else handle  # CU_STREAM_LEGACY has the same number


def _stream_number(stream: Any) -> int:
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            value = getattr(stream, name)
            value = getattr(value, "value", value)  # Numba: a ctypes pointer
            return int(value or 0)
    try:
        return int(stream)
    except (TypeError, ValueError) as error:
        raise EngineError(
            f"{type(stream).__name__} is no CUDA stream that is known here",
            "pass its handle, an integer",
        ) from error


def on_device(array: Any) -> bool:
    """Whether an array lies in GPU memory, as far as it says so."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[0]) in _DLPACK_GPU
    return hasattr(array, "__cuda_array_interface__")


def as_host(array: Any, what: str) -> NDArray[Any]:
    """A numpy array of anything in host memory.

    Raises:
        EngineError: numpy cannot make one of it.
    """
    try:
        found = np.asarray(array)
    except Exception as error:  # each library refuses in its own words
        raise EngineError(f"{what}: numpy cannot read a {type(array).__name__}: {error}") from error
    if found.dtype == object:  # numpy's answer to what it does not know
        raise EngineError(f"{what}: numpy cannot read a {type(array).__name__}")
    return found


def as_array(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A numpy array over host memory that is not numpy's; it does not own it."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory: Any = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def as_device(
    array: Any, what: str, cuda: Cuda, *, stream: int, writable: bool = False
) -> DeviceArray:
    """A view of an array in GPU memory; no copy.

    Args:
        array: of any library.
        what: how messages call it.
        cuda: where it will be used; within `Cuda.current`.
        stream: handle of the stream that will use it; a DLPack producer makes that stream wait
            for its own work.
        writable: it will be written to.

    Raises:
        EngineError: not contiguous, read-only where it must be written, on another GPU or on a
            device of another kind.
    """
    # DLPack first: it alone makes the producer's work wait. A producer need not have it.
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        kind, number = (int(part) for part in array.__dlpack_device__())
        if kind not in _DLPACK_GPU:
            raise EngineError(f"{what} lies on a device of kind {kind} (DLPack), not on a CUDA GPU")
        if kind == _DLPACK_CUDA:
            _require_here(number, what, cuda)
        return _from_dlpack(array, what, stream)
    if isinstance(array, DeviceArray):
        view = array
    elif hasattr(array, "__cuda_array_interface__"):
        view = _from_interface(array, what, writable)
    else:
        raise EngineError(f"{what}: a {type(array).__name__} is not an array on the GPU")
    owner = cuda.device_of(view.pointer)
    if owner is None:
        raise EngineError(f"{what}: CUDA knows of no memory at {view.pointer:#x}")
    _require_here(owner, what, cuda)
    return view


def _require_here(number: int, what: str, cuda: Cuda) -> None:
    if number != cuda.device:
        raise EngineError(
            f"{what} lies on GPU {number}, the engine is on GPU {cuda.device}",
            f"copy it there, or open the engine with device={number}",
        )


def _from_interface(array: Any, what: str, writable: bool) -> DeviceArray:
    facts = array.__cuda_array_interface__
    shape = tuple(int(size) for size in facts["shape"])
    dtype = np.dtype(facts["typestr"])
    pointer, read_only = facts["data"]
    if read_only and writable:
        raise EngineError(f"{what} is read-only")
    if facts.get("mask") is not None:
        raise EngineError(f"{what} has a mask")
    strides = facts.get("strides")
    if strides is not None:
        _require_contiguous(shape, tuple(int(step) for step in strides), dtype.itemsize, what)
    stream = facts.get("stream")
    handle = None if stream is None else 0 if stream == LEGACY_STREAM else int(stream)
    return DeviceArray(int(pointer or 0), shape, dtype, owner=array, stream=handle)


# --- DLPack -------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, its DLDevice and DLDataType written out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor: the tensor, the producer's context, and the function that lets it go."""


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (
    ("tensor", _Tensor),
    ("context", ctypes.c_void_p),
    ("deleter", _DELETER),
)

_NAME = b"dltensor"
_USED_NAME = b"used_dltensor"

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.restype = ctypes.c_int
_set_name.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(array: Any, what: str, stream: int) -> DeviceArray:
    try:
        capsule = array.__dlpack__(stream=LEGACY_STREAM if stream == 0 else stream)
    except Exception as error:  # PyTorch: a tensor that needs a gradient; each in its own words
        raise EngineError(f"{what}: {type(array).__name__} gives no DLPack: {error}") from error
    address = _get_pointer(capsule, _NAME)
    managed = ctypes.cast(address, ctypes.POINTER(_Managed))
    _set_name(capsule, _USED_NAME)  # ours now: its producer will not free it

    def release() -> None:
        if managed.contents.deleter:
            managed.contents.deleter(managed)

    try:
        tensor = managed.contents.tensor
        dtype = _dlpack_dtype(tensor, what)
        shape = tuple(tensor.shape[index] for index in range(tensor.ndim))
        if tensor.strides:
            steps = tuple(tensor.strides[index] * dtype.itemsize for index in range(tensor.ndim))
            _require_contiguous(shape, steps, dtype.itemsize, what)
    except BaseException:
        release()
        raise
    pointer = int(tensor.data or 0) + int(tensor.byte_offset)
    return DeviceArray(pointer, shape, dtype, owner=array, stream=stream, release=release)


def _dlpack_dtype(tensor: _Tensor, what: str) -> np.dtype[Any]:
    kind = _DLPACK_KINDS.get(tensor.code)
    if kind is None or tensor.lanes != 1 or tensor.bits % 8:
        raise EngineError(
            f"{what}: numpy has no type for DLPack's code {tensor.code} of {tensor.bits} bits"
        )
    return np.dtype(f"{kind}{tensor.bits // 8}")


def _require_contiguous(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, what: str
) -> None:
    """Raises EngineError unless strides (in bytes) are those of C order."""
    expected = itemsize
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and step != expected:
            raise EngineError(
                f"{what} is not contiguous: shape {shape}, strides {strides} bytes",
                "make it contiguous first; nothing is copied here",
            )
        expected *= size
