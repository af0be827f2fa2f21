"""What the device does while a benchmark runs: clocks, temperature, power, throttling, other load.

Sources, each of which reads what it can and leaves out the rest: NVML (`nvml`), a
Jetson's sysfs (`jetson`), the host's /proc and /sys (`host`). Nothing here
raises: a benchmark does not end because a sensor did not answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from ..core.errors import JmpDeployError
from .host import Host, Reading, Source
from .jetson import Jetson
from .nvml import NoNvml, Nvml

INTERVAL = 0.2
"""Seconds between readings of a GPU."""


@dataclass(frozen=True)
class Energy:
    """What a stretch of time took: mean power in W, and by what it was found."""

    watts: float
    how: str


class Monitor:
    """A context manager that reads its sources from its beginning to its end."""

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.sources = list(sources)
        self.interval, self.clock = interval, clock
        self.readings: list[tuple[float, Reading]] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Monitor:
        self.poll()
        if any(source.live for source in self.sources):
            self._thread = threading.Thread(target=self._loop, daemon=True, name="telemetry")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.poll()

    def poll(self) -> Reading:
        """Reads all sources now; for each quantity the first source that knows it counts."""
        merged = _merge([_quietly(source.read, Reading()) for source in self.sources])
        with self._lock:
            self.readings.append((self.clock(), merged))
        return merged

    def energy(self, start: float, end: float) -> Energy | None:
        """Mean power between two times of the clock; None where power cannot be read.

        A counter of energy is exact over a second and more; else it is the mean of the readings.
        """
        with self._lock:
            inside = [reading for at, reading in self.readings if start <= at <= end]
            times = [at for at, _ in self.readings if start <= at <= end]
        counted = [
            (at, reading.energy_j)
            for at, reading in zip(times, inside, strict=True)
            if reading.energy_j is not None
        ]
        if len(counted) >= 2 and counted[-1][0] > counted[0][0]:
            joules = counted[-1][1] - counted[0][1]
            if joules > 0:
                return Energy(joules / (counted[-1][0] - counted[0][0]), "energy counter")
        watts = [reading.power_w for reading in inside if reading.power_w is not None]
        if not watts:
            return None
        return Energy(sum(watts) / len(watts), f"mean of {len(watts)} readings")

    def can_read_power(self) -> bool:
        """Whether any reading so far has power or energy in it."""
        with self._lock:
            return any(
                reading.power_w is not None or reading.energy_j is not None
                for _, reading in self.readings
            )

    def others(self) -> list[str]:
        """What else keeps the machine busy, of all sources."""
        nothing: list[str] = []
        return [words for source in self.sources for words in _quietly(source.others, nothing)]

    def throttled(self) -> list[str]:
        """Why the device ran slower than it could, at any time since the beginning."""
        with self._lock:
            readings = [reading for _, reading in self.readings]
        reasons = {reason: None for reading in readings for reason in reading.throttled}
        if readings:
            for name, last in readings[-1].events.items():
                first = readings[0].events.get(name, last)
                if last > first:
                    reasons[f"{name}: {last - first} times"] = None
        return list(reasons)

    def summary(self) -> dict[str, Any]:
        """For the result of a benchmark: facts, and the range of every quantity that was read."""
        with self._lock:
            readings = [reading for _, reading in self.readings]
        result: dict[str, Any] = {}
        nothing: dict[str, Any] = {}
        for source in self.sources:
            for key, value in _quietly(source.facts, nothing).items():
                result.setdefault(key, value)
        for name in ("gpu_mhz", "memory_mhz", "temperature_c", "power_w", "memory_mb"):
            values = [getattr(reading, name) for reading in readings]
            known = [value for value in values if value is not None]
            if known:
                result[name] = {"min": min(known), "median": median(known), "max": max(known)}
        result["readings"] = len(readings)
        result["throttled"] = self.throttled()
        return result

    def _loop(self) -> None:
        while not self._stop.wait(self.interval):
            self.poll()


def open_sources(*, gpu: bool, root: Path = Path("/")) -> list[Source]:
    """What can be read here; `gpu`: those of the GPU too."""
    sources: list[Source] = []
    if gpu:
        jetson = _quietly(lambda: Jetson.open(root), None)
        sources += [jetson] if jetson else []
        try:
            sources.append(Nvml())
        except JmpDeployError as error:
            sources.append(NoNvml(error))
    return [*sources, Host(root)]


def _merge(readings: list[Reading]) -> Reading:
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(Reading)):
        if name == "throttled":
            reasons = {reason: None for reading in readings for reason in reading.throttled}
            values[name] = tuple(reasons)
        elif name == "events":
            values[name] = {key: n for reading in readings for key, n in reading.events.items()}
        else:
            known = [getattr(reading, name) for reading in readings]
            values[name] = next((value for value in known if value is not None), None)
    return Reading(**values)


def _quietly(function: Callable[[], Any], otherwise: Any) -> Any:
    """What a source says, or `otherwise`: a driver's surprise must not end a benchmark."""
    try:
        return function()
    except Exception:  # a broken sensor, a library of another version, an odd sysfs
        return otherwise
