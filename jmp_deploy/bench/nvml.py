"""NVML, asked of the driver's own library: no package is needed, and none can be too old.

Functions and constants: NVML API reference (nvml.h), those of driver 450 and later. What a device
does not support (most of it on a Jetson) returns an error code and is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from .host import Reading

LIBRARY = "libnvidia-ml.so.1"
CLOCK_SM, CLOCK_MEMORY = 1, 2
TEMPERATURE_GPU = 0
INSUFFICIENT_SIZE = 7  # NVML_ERROR_INSUFFICIENT_SIZE: there are more processes than room for them
BUSY_PERCENT = 5

# nvmlClocksEventReasons*; idle, application clocks and display clocks are settings, not throttling.
REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown (temperature, power or external brake)",
    0x20: "temperature (driver)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t, in percent over the last sample period (1/6 to 1 s)."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """One GPU through NVML."""

    name = "NVML"
    live = True

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(
        cls,
        load: Callable[[str], Any] = ctypes.CDLL,
        bus_id: Callable[[], bytes | None] | None = None,
    ) -> Nvml | None:
        """The GPU that CUDA calls device 0, or None without a driver.

        NVML counts all GPUs in the order of the bus, CUDA those of CUDA_VISIBLE_DEVICES: the bus
        address is what both agree on.
        """
        try:
            library = load(LIBRARY)
        except OSError:
            return None
        if library.nvmlInit_v2() != 0:
            return None
        handle = ctypes.c_void_p()
        address = (bus_id or _cuda_bus_id)()
        if address is not None:
            code = library.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(handle))
        else:
            code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), ctypes.byref(handle))
        return cls(library, handle) if code == 0 else None

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"power_of": "the GPU board"}
        version = ctypes.create_string_buffer(80)
        if self._ok("nvmlSystemGetDriverVersion", version, ctypes.c_uint(80), device=False):
            found["driver"] = version.value.decode(errors="replace")
        most = self._uint("nvmlDeviceGetMaxClockInfo", ctypes.c_uint(CLOCK_SM))
        if most is not None:
            found["gpu_mhz_limit"] = most
        limit = self._uint("nvmlDeviceGetEnforcedPowerLimit")
        if limit is not None:
            found["power_w_limit"] = limit / 1000
        memory = _Memory()
        if self._ok("nvmlDeviceGetMemoryInfo", ctypes.byref(memory)):
            found["memory_mb_total"] = memory.total / 2**20
        return found

    def read(self) -> Reading:
        power = self._uint("nvmlDeviceGetPowerUsage")  # mW
        energy = self._number(ctypes.c_ulonglong, "nvmlDeviceGetTotalEnergyConsumption")  # mJ
        bits = None
        for name in ("ThrottleReasons", "EventReasons"):  # renamed in driver 535, the old one kept
            if bits is None:
                bits = self._number(ctypes.c_ulonglong, f"nvmlDeviceGetCurrentClocks{name}")
        memory = _Memory()
        has_memory = self._ok("nvmlDeviceGetMemoryInfo", ctypes.byref(memory))
        return Reading(
            gpu_mhz=self._uint("nvmlDeviceGetClockInfo", ctypes.c_uint(CLOCK_SM)),
            memory_mhz=self._uint("nvmlDeviceGetClockInfo", ctypes.c_uint(CLOCK_MEMORY)),
            temperature_c=self._uint("nvmlDeviceGetTemperature", ctypes.c_uint(TEMPERATURE_GPU)),
            power_w=None if power is None else power / 1000,
            energy_j=None if energy is None else energy / 1000,
            memory_mb=memory.used / 2**20 if has_memory else None,
            throttled=tuple(words for bit, words in REASONS.items() if int(bits or 0) & bit),
        )

    def others(self) -> list[str]:
        """Processes on the GPU. Asked before we use it: all that are there are others."""
        found = []
        count = ctypes.c_uint(0)
        for name in (
            "nvmlDeviceGetComputeRunningProcesses_v3",  # driver 510
            "nvmlDeviceGetComputeRunningProcesses_v2",
            "nvmlDeviceGetComputeRunningProcesses",
        ):
            code = self._code(name, ctypes.byref(count), None)
            if code in (0, INSUFFICIENT_SIZE):
                if count.value:
                    found.append(
                        f"{count.value} other process{'es' if count.value > 1 else ''} on the GPU"
                    )
                break
        use = _Utilization()
        if self._ok("nvmlDeviceGetUtilizationRates", ctypes.byref(use)) and use.gpu > BUSY_PERCENT:
            found.append(f"the GPU is {use.gpu} % busy")
        return found

    def _uint(self, name: str, *arguments: Any) -> float | None:
        return self._number(ctypes.c_uint, name, *arguments)

    def _number(self, kind: Any, name: str, *arguments: Any) -> float | None:
        value = kind()
        return value.value if self._ok(name, *arguments, ctypes.byref(value)) else None

    def _ok(self, name: str, *arguments: Any, device: bool = True) -> bool:
        return self._code(name, *arguments, device=device) == 0

    def _code(self, name: str, *arguments: Any, device: bool = True) -> int | None:
        """A function's return code; None where this driver does not have it."""
        try:
            function = getattr(self.library, name)
        except AttributeError:
            return None
        return int(function(self.handle, *arguments) if device else function(*arguments))


def _cuda_bus_id() -> bytes | None:
    """The bus address of CUDA's device 0, such as b"0000:17:00.0"."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    text, device = ctypes.create_string_buffer(64), ctypes.c_int()
    results = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetPCIBusId(text, 64, device),
    )
    return None if any(results) else text.value
