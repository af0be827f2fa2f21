"""What GPU is here: asked of the driver itself, without any CUDA package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, compute capability such as (8, 7), and memory in bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory: int


@lru_cache(maxsize=1)
def gpus() -> tuple[Gpu, ...]:
    """All CUDA devices that the driver lists; empty where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        handle, memory = ctypes.c_int(), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        results = (
            driver.cuDeviceGet(ctypes.byref(handle), index),
            driver.cuDeviceGetName(name, 256, handle),
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, handle),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle),
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
        )
        if not any(results):
            found.append(Gpu(name.value.decode(), (major.value, minor.value), memory.value))
    return tuple(found)
