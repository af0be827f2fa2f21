"""A Jetson's clocks, power rails, temperatures and power mode, from sysfs and `nvpmodel -q`.

Paths as in NVIDIA's Jetson Linux developer guide, "Platform Power and Performance" (r35, r36):
INA3221 monitors appear under hwmon with in<n>_label, in<n>_input (mV) and curr<n>_input (mA), an
INA238 (Thor's input) with power1_input (µW); over-current events as oc<n>_event_cnt; thermal
throttling as cooling devices. Reading them needs no root.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.files import read_number, read_text
from .host import Reading

INPUT_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")
"""Rails that measure the whole module (VIN: module and carrier board)."""
GPU_NODES = re.compile(r"(ga10b|gv11b|gpu)(-gpc-0)?$")
"""Device-tree names of the integrated GPU: Orin, Xavier, later ones."""


class Jetson:
    """The integrated GPU and the module's power."""

    name = "Jetson"
    live = True

    def __init__(self, root: Path, command: Callable[[list[str]], str] | None = None) -> None:
        self.root, self.command = root, command or _output
        self.model = read_text(root / "proc/device-tree/model")
        self.rails = _rails(root)
        self.devfreq = _gpu_devfreq(root)

    @classmethod
    def open(cls, root: Path, command: Callable[[list[str]], str] | None = None) -> Jetson | None:
        """None where this is no Jetson."""
        model = read_text(root / "proc/device-tree/model")
        if "Jetson" not in model and not (root / "etc/nv_tegra_release").exists():
            return None
        return cls(root, command)

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.model:
            found["board"] = self.model
        mode = re.search(r"NV Power Mode:\s*(\S+)", self.command(["nvpmodel", "-q"]))
        if mode:
            found["power_mode"] = mode.group(1)
        if self.devfreq is not None:
            least, most = (read_number(self.devfreq / f"{word}_freq") for word in ("min", "max"))
            if least and most:
                found["gpu_mhz_limit"] = most / 1e6
                # What jetson_clocks does: it raises the lowest clock to the highest.
                found["jetson_clocks"] = least == most
        if self.rails:
            found["power_of"] = " + ".join(total_rails(tuple(self.rails)))
        return found

    def read(self) -> Reading:
        clock = read_number(self.devfreq / "cur_freq") if self.devfreq is not None else None
        return Reading(
            gpu_mhz=None if clock is None else clock / 1e6,
            temperature_c=self._temperature(),
            power_w=self._power(),
            memory_mb=self._memory(),
            throttled=tuple(self._cooling()),
            events=self._over_current(),
        )

    def others(self) -> list[str]:
        """Load of the GPU before we use it, in tenths of a percent."""
        if self.devfreq is None:
            return []
        load = read_number(self.devfreq / "device/load")
        return [f"the GPU is {load / 10:.0f} % busy"] if load is not None and load > 50 else []

    def _power(self) -> float | None:
        total = 0.0
        for name in total_rails(tuple(self.rails)):
            watts = _watts(self.rails[name])
            if watts is None:  # a sum that lacks a rail would be wrong
                return None
            total += watts
        return total if self.rails else None

    def _temperature(self) -> float | None:
        for zone in sorted((self.root / "sys/class/thermal").glob("thermal_zone*")):
            if read_text(zone / "type").lower().startswith("gpu"):
                value = read_number(zone / "temp")
                # A sensor of a sleeping GPU answers with an error, or with -256 degrees.
                if value is not None and value > -200_000:
                    return value / 1000
        return None

    def _memory(self) -> float | None:
        sizes = {}
        for line in read_text(self.root / "proc/meminfo").splitlines():
            words = line.split()
            if len(words) >= 2 and words[1].isdigit():
                sizes[words[0].rstrip(":")] = int(words[1])  # kB
        if not {"MemTotal", "MemAvailable"} <= set(sizes):
            return None
        return (sizes["MemTotal"] - sizes["MemAvailable"]) / 1024

    def _cooling(self) -> list[str]:
        reasons = []
        for device in sorted((self.root / "sys/class/thermal").glob("cooling_device*")):
            kind = read_text(device / "type")
            about_gpu = kind.startswith("devfreq") and GPU_NODES.search(kind)
            if (about_gpu or kind.endswith("throttle-alert")) and read_number(device / "cur_state"):
                reasons.append(f"temperature ({kind})")
        return reasons

    def _over_current(self) -> dict[str, int]:
        events = {}
        for path in sorted((self.root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
            count = read_number(path)
            if count is not None:
                events[f"over-current ({path.name.split('_')[0]})"] = int(count)
        return events


def total_rails(names: tuple[str, ...]) -> tuple[str, ...]:
    """Which rails add up to the module's power: its input, or all that do not feed one another.

    AGX Orin has no rail for its input; there VDDQ_VDD2_1V8AO hangs on VIN_SYS_5V0 and must not
    count twice.
    """
    for name in INPUT_RAILS:
        if name in names:
            return (name,)
    nested = "VIN_SYS_5V0" in names
    return tuple(name for name in names if not (nested and name.startswith("VDDQ")))


def _rails(root: Path) -> dict[str, tuple[Path, ...]]:
    """Rail -> (its file in µW,) or (its file in mV, its file in mA)."""
    rails: dict[str, tuple[Path, ...]] = {}
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = read_text(chip / "name")
        if name == "ina238" and (chip / "power1_input").exists():
            rails["VIN"] = (chip / "power1_input",)
        if name != "ina3221":
            continue
        for channel in (1, 2, 3):  # 4 to 7 are shunt voltages and their sum
            label = read_text(chip / f"in{channel}_label")
            current = chip / f"curr{channel}_input"
            if label and label != "NC" and current.exists():
                rails[label] = (chip / f"in{channel}_input", current)
    return rails


def _watts(files: tuple[Path, ...]) -> float | None:
    values = [read_number(path) for path in files]
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    return known[0] / 1e6 if len(known) == 1 else known[0] * known[1] / 1e6


def _gpu_devfreq(root: Path) -> Path | None:
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        node = read_text(device / "device/of_node/name")
        if GPU_NODES.search(device.name) or GPU_NODES.search(node):
            return device
    return None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
