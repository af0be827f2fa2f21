"""What GPU and driver are here: asked of the driver itself, without any CUDA package."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


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


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves, such as (12, 6); None where there is no driver."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def needs_cuda_12() -> bool:
    """Whether the driver here is before CUDA 13; False where there is none to ask."""
    served = driver_cuda()
    if served is None:  # a container without the driver, on JetPack 6 or 5
        return (jetson_linux() or (38,)) < (38,)
    return served < (13,)


def jetson_linux() -> tuple[int, ...] | None:
    """The release of Jetson Linux, such as (36, 4, 3); None on any other machine.

    JetPack 6 is release 36, of CUDA 12; JetPack 7 is 38, of CUDA 13.
    """
    try:
        text = Path("/etc/nv_tegra_release").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"R(\d+)[^,]*, REVISION: ([\d.]+)", text)
    return tuple(map(int, re.findall(r"\d+", f"{found[1]}.{found[2]}"))) if found else ()
