"""What a source of telemetry is, and the first of them: the host's CPUs, from /proc and /sys."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..core.device import cpu_count, cpu_name
from ..core.files import read_number, read_text

BUSY_LOAD = 0.25
"""Load average per CPU from which a machine counts as busy before a benchmark starts."""


@dataclass(frozen=True)
class Reading:
    """One reading; None is what a source cannot tell.

    Attributes:
        gpu_mhz, memory_mhz: clocks.
        temperature_c: of the GPU.
        power_w: of what the source's `power_of` names.
        energy_j: a counter; differences count.
        memory_mb: device memory in use, by whomever.
        throttled: reasons that hold at this moment.
        events: counters of throttling; a rise is throttling.
    """

    gpu_mhz: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    memory_mb: float | None = None
    throttled: tuple[str, ...] = ()
    events: dict[str, int] = field(default_factory=dict)


class Source(Protocol):
    """Something that can be read."""

    name: str
    live: bool
    """Whether it is worth a reading every INTERVAL; else the first and the last are enough."""

    def facts(self) -> dict[str, Any]:
        """What does not change: names, limits, power mode."""

    def read(self) -> Reading:
        """Now."""

    def others(self) -> list[str]:
        """What else keeps the device busy, in words; asked before a benchmark starts."""


class Host:
    """The machine's CPUs: who else uses them, and whether they are held back."""

    name = "host"
    live = False

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"cpu": cpu_name(self.root), "cpus": cpu_count()}
        governors = {
            text
            for path in self.root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
            if (text := read_text(path))
        }
        if governors:
            facts["cpu_governor"] = ", ".join(sorted(governors))
        return facts

    def read(self) -> Reading:
        events = {}
        counts = [
            read_number(path)
            for path in self.root.glob(
                "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"
            )
        ]
        if known := [int(count) for count in counts if count is not None]:
            events["CPU throttled by temperature"] = sum(known)
        for line in read_text(self.root / "sys/fs/cgroup/cpu.stat").splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == "nr_throttled" and words[1].isdigit():
                events["CPU quota of the container used up"] = int(words[1])
        return Reading(events=events)

    def others(self) -> list[str]:
        words = read_text(self.root / "proc/loadavg").split()
        load = float(words[0]) if words else 0.0
        cpus = cpu_count()
        if load <= BUSY_LOAD * cpus:
            return []
        return [f"load average {load:.1f} on {cpus} CPU{'s' if cpus > 1 else ''}"]
