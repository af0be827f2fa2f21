"""What GPU, driver and CPU are here: asked of driver and kernel, without any CUDA package."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FP8_FROM = (8, 9)
"""Compute capability from which GPUs multiply in FP8: Ada, Hopper, Blackwell and Thor have it, Orin
(8.7) and Ampere do not."""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, compute capability such as (8, 7), memory in bytes, and address on
    the bus such as "0000:17:00.0"."""

    name: str
    compute_capability: tuple[int, int]
    memory: int
    bus_id: str = ""


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
        name, address = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
        # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        results = (
            driver.cuDeviceGet(ctypes.byref(handle), index),
            driver.cuDeviceGetName(name, 256, handle),
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, handle),
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle),
            driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
            driver.cuDeviceGetPCIBusId(address, 64, handle),
        )
        if not any(results):
            capability = major.value, minor.value
            found.append(Gpu(name.value.decode(), capability, memory.value, address.value.decode()))
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


def cpu_count() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name, or its architecture where /proc/cpuinfo has none (as on ARM)."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.machine() or "unknown"
