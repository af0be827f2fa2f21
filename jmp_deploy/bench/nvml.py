"""NVML through NVIDIA's own Python package (nvidia-ml-py).

What a device (most of it on a Jetson) or its driver does not support is an error of NVML and is
left out.
"""

from __future__ import annotations

from typing import Any

from ..core.device import gpus
from ..core.errors import EngineError, JmpDeployError, MissingPackageError, install_command
from .host import Reading

BUSY_PERCENT = 5

# nvmlClocksEventReason* and the older nvmlClocksThrottleReason*, which has two more; idle,
# application clocks and display clocks are settings, not throttling.
REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown (temperature, power or external brake)",
    0x10: "sync boost (another GPU of its group is slower)",
    0x20: "temperature (driver)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability limit (voltage)",
}


class Nvml:
    """The GPU that CUDA calls device 0.

    NVML counts all GPUs in the order of the bus, CUDA those of CUDA_VISIBLE_DEVICES: the bus
    address is what both agree on.

    Raises:
        MissingPackageError: nvidia-ml-py is not installed.
        EngineError: no driver, or not this GPU.
    """

    name = "NVML"
    live = True

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise MissingPackageError(
                "nvidia-ml-py is not installed", install_command("runtime")
            ) from error
        self.nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            if gpus():
                self.handle = pynvml.nvmlDeviceGetHandleByPciBusId(gpus()[0].bus_id)
            else:
                self.handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError as error:
            raise EngineError(f"NVML: {error}") from error
        # Power and energy are the board's. Where others compute on its other instances, an image's
        # share of them cannot be told.
        mode = self._ask("MigMode")
        self.is_shared = mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"power_of": "the GPU board"}
        if self.is_shared:
            found = {"no_power": "MIG is on, and NVML has the power of the whole board alone"}
        limit = self._power("EnforcedPowerLimit")  # mW
        memory = self._ask("MemoryInfo")
        facts = {
            "driver": self._call("nvmlSystemGetDriverVersion"),
            "gpu_mhz_limit": self._ask("MaxClockInfo", self.nvml.NVML_CLOCK_SM),
            "power_w_limit": None if limit is None else limit / 1000,
            "memory_mb_total": None if memory is None else memory.total / 2**20,
        }
        return found | {name: value for name, value in facts.items() if value is not None}

    def read(self) -> Reading:
        power = self._power("PowerUsage")  # mW
        energy = self._power("TotalEnergyConsumption")  # mJ
        memory = self._ask("MemoryInfo")
        bits = self._ask("CurrentClocksThrottleReasons")
        if bits is None:  # renamed in driver 535, the old name kept
            bits = self._ask("CurrentClocksEventReasons") or 0
        return Reading(
            gpu_mhz=self._ask("ClockInfo", self.nvml.NVML_CLOCK_SM),
            memory_mhz=self._ask("ClockInfo", self.nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask("Temperature", self.nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
            energy_j=None if energy is None else energy / 1000,
            memory_mb=None if memory is None else memory.used / 2**20,
            throttled=tuple(words for bit, words in REASONS.items() if bits & bit),
        )

    def others(self) -> list[str]:
        """Processes on the GPU. Asked before we use it: all that are there are others."""
        found = []
        processes = self._ask("ComputeRunningProcesses_v3")
        if processes is None:  # before driver 510
            processes = self._ask("ComputeRunningProcesses_v2") or []
        if count := len(processes):
            found.append(f"{count} other process{'es' if count > 1 else ''} on the GPU")
        use = self._ask("UtilizationRates")  # percent over the last sample period (1/6 to 1 s)
        if use is not None and use.gpu > BUSY_PERCENT:
            found.append(f"the GPU is {use.gpu} % busy")
        return found

    def _power(self, what: str) -> Any:
        return None if self.is_shared else self._ask(what)

    def _ask(self, what: str, *arguments: Any) -> Any:
        return self._call(f"nvmlDeviceGet{what}", self.handle, *arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What NVML says; None where package, driver or device cannot."""
        try:
            return getattr(self.nvml, name)(*arguments)
        except (self.nvml.NVMLError, AttributeError):
            return None


class NoNvml:
    """In place of `Nvml`, where there is none: tells why."""

    name = "NVML"
    live = False

    def __init__(self, error: JmpDeployError) -> None:
        hint = f" ({error.hint})" if error.hint else ""
        self.reason = f"{error.message}{hint}"

    def facts(self) -> dict[str, Any]:
        return {"no_nvml": self.reason}

    def read(self) -> Reading:
        return Reading()

    def others(self) -> list[str]:
        return []
