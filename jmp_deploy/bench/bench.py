"""Latency, throughput, power: one artifact, or two side by side.

Every figure says what it is: end-to-end times go from images in host memory to outputs in host
memory, one inference after the other; GPU times are CUDA events around the computation alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ..backends import AUTO, pick
from ..backends.base import Backend, Timed
from ..core.artifact import Artifact
from ..core.device import cpu_count
from ..core.errors import ArtifactError, EngineError, JmpDeployError
from . import measure as figures
from . import telemetry
from .measure import OnProgress, Participant, Series, Settings, measure

BATCHES = (1, 8, 32)
SETTLE = 1 / 3
"""Share of an energy measurement that is not counted: sensors average over up to a second."""

UNSTEADY = 0.1
"""A 95 % interval wider than this share of its ratio is called unsteady."""
INTERRUPTED = "interrupted"

Opener = Callable[[Artifact, Backend], Timed]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        folder: the artifact; with `against`, the one that the other is compared with.
        against: a second artifact, or None.
        batches: batch sizes; none means those of 1, 8 and 32 that both profiles have.
        backends: of AUTO and `backends.NAMES`.
        cuda_graph: "both", "on" or "off"; for engines.
        threads: on a CPU; None takes every one that this process may use.
        settings: how long.
        energy_seconds: how long each row runs again for its power, where that can be read.
    """

    folder: Path
    against: Path | None = None
    batches: tuple[int, ...] = ()
    backends: tuple[str, ...] = (AUTO,)
    cuda_graph: str = "both"
    threads: int | None = None
    settings: Settings = field(default_factory=Settings)
    energy_seconds: float = 3.0


def bench(
    options: BenchOptions,
    *,
    on_progress: OnProgress = lambda words, share: None,
    opener: Opener | None = None,
    sources: Sequence[telemetry.Source] | None = None,
) -> tuple[dict[str, Any], list[Series]]:
    """Measures, and returns the result and the single inferences behind its rows.

    The result: {"device", "complete", "artifacts", "rows", "ratios", "settings", "telemetry",
    "warnings", "notes", "stopped"}; rows and ratios as in `_row` and `_ratios`. `complete` is false
    where Ctrl-C or an error cut it short, and `stopped` says which: what is in it was measured
    whole.

    Args:
        opener: in place of `Backend.timed` (tests); sources: in place of what can be read here.

    Raises:
        ArtifactError: a batch outside the profiles, or a broken artifact.
        EngineError: nothing can run it here.
        KeyboardInterrupt: before anything was measured.
    """
    threads = options.threads or cpu_count()
    folders = [options.folder, *([options.against] if options.against else [])]
    artifacts = [Artifact.read(folder) for folder in folders]
    batches = choose_batches(artifacts, options.batches)
    chosen = choose_backends(artifacts, options.backends)
    if opener is None:
        opener = partial(_open_timed, threads=threads)
    if sources is None:
        sources = telemetry.open_sources(gpu=any(backend.gpu() for backend in chosen))
    monitor = telemetry.Monitor(sources)
    busy = monitor.others()
    measured: list[tuple[Series, telemetry.Energy | None]] = []
    libraries: dict[str, str] = {}
    stopped: str | None = None
    work = [(backend, batch) for backend in chosen for batch in batches]
    try:
        with monitor, ExitStack() as stack:
            for done, (backend, batch) in enumerate(work):
                if backend.name not in libraries:
                    stack.close()  # one backend's memory and threads are not in another's way
                    opened = _open(stack, artifacts, backend, opener)
                    libraries[backend.name] = opened[0].library

                def report(words: str, share: float, done: int = done, batch: int = batch) -> None:
                    on_progress(f"{words}, batch {batch}", (done + share) / len(work))

                for item in _measure_group(artifacts, opened, work[done], options, monitor, report):
                    measured.append(item)
    except (KeyboardInterrupt, JmpDeployError) as error:
        if not measured:
            raise
        stopped = error.message if isinstance(error, JmpDeployError) else INTERRUPTED
    everything = [series for series, _ in measured]
    rows = [_row(series, energy) for series, energy in measured]
    ratios = _ratios(everything, artifacts) if options.against else []
    summary = monitor.summary()
    why = summary.get("no_power") or summary.get("no_nvml")
    result = {
        "device": device_words(chosen, threads, libraries),
        "complete": stopped is None,
        "stopped": stopped,
        "artifacts": [_artifact(item, chosen) for item in artifacts],
        "rows": rows,
        "ratios": ratios,
        "settings": {
            **asdict(options.settings),
            "threads": None if all(backend.gpu() for backend in chosen) else threads,
            "order": "ABBA",
            "input": "seeded noise",
            "throughput": "batch / median latency, one inference after the other",
        },
        "telemetry": summary,
        "warnings": _warnings(busy, monitor.throttled(), rows, ratios, artifacts, chosen),
        "notes": _notes(chosen, monitor.can_read_power(), why, rows),
    }
    return result, everything


def choose_batches(artifacts: Sequence[Artifact], asked: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes to measure; each once, within every artifact's profile.

    Raises:
        ArtifactError: one is outside, with the range.
    """
    least = max(item.batch[0] for item in artifacts)
    most = min(item.batch[2] for item in artifacts)
    for batch in asked:
        for item in artifacts:
            low, _, high = item.batch
            if not low <= batch <= high:
                raise ArtifactError(
                    f"batch {batch} is outside the profile of {item.folder}: {low} to {high}",
                    f"choose from that range, or build it again with --batch: {item.rebuild}",
                )
    if asked:
        return tuple(dict.fromkeys(asked))
    if least > most:
        ranges = " and ".join("{0} to {2}".format(*item.batch) for item in artifacts)
        raise ArtifactError(
            f"the artifacts have no batch size in common: {ranges}", "build them with one --batch"
        )
    usual = tuple(batch for batch in BATCHES if least <= batch <= most)
    return usual or tuple(dict.fromkeys((least, most)))


def choose_backends(artifacts: Sequence[Artifact], asked: Sequence[str]) -> list[Backend]:
    """The backends to measure, each able to run every artifact; each once."""
    return list(dict.fromkeys(pick(artifacts, name)[0] for name in asked))


def _open(
    stack: ExitStack,
    artifacts: Sequence[Artifact],
    backend: Backend,
    opener: Opener,
) -> list[Timed]:
    """Every artifact, opened until the stack is closed."""
    opened = []
    for item in artifacts:
        opened.append(opener(item, backend))
        stack.callback(opened[-1].close)
    return opened


def _open_timed(artifact: Artifact, backend: Backend, *, threads: int) -> Timed:
    return backend.timed(artifact, threads=threads)


def _measure_group(
    artifacts: Sequence[Artifact],
    opened: Sequence[Timed],
    point: tuple[Backend, int],
    options: BenchOptions,
    monitor: telemetry.Monitor,
    on_progress: OnProgress,
) -> Iterator[tuple[Series, telemetry.Energy | None]]:
    """One backend at one batch size: its artifacts in turns, then the power of each.

    What was measured when Ctrl-C came is given out before the interruption goes on.
    """
    backend, batch = point
    participants = [
        Participant(str(ours.folder), backend.name, batch, item.prepare(batch, bool(graph)), graph)
        for graph in _graphs(opened, backend, options.cuda_graph)
        for ours, item in zip(artifacts, opened, strict=True)
    ]
    series, complete = measure(participants, options.settings, on_progress=on_progress)
    energies: list[telemetry.Energy | None] = []
    stop: BaseException | None = None if complete else KeyboardInterrupt()
    try:
        if complete and options.energy_seconds > 0 and monitor.can_read_power():
            for item in series:
                on_progress(f"power of {item.participant.artifact}", 1.0)
                energies.append(_power(item, options.energy_seconds, monitor))
    except (KeyboardInterrupt, JmpDeployError) as error:
        stop = error
    energies += [None] * (len(series) - len(energies))
    yield from zip(series, energies, strict=True)
    if stop is not None:
        raise stop


def _graphs(opened: Sequence[Timed], backend: Backend, asked: str) -> tuple[bool | None, ...]:
    """With which launches to measure: True is CUDA graphs, None where there is no choice."""
    if not backend.launches:
        return (None,)
    if asked == "off" or all(item.has_graphs for item in opened):
        return {"both": (False, True), "on": (True,), "off": (False,)}[asked]
    if asked == "on":
        raise EngineError("these engines cannot be run as CUDA graphs here", "use --cuda-graph off")
    return (False,)


def _power(series: Series, seconds: float, monitor: telemetry.Monitor) -> telemetry.Energy | None:
    """Power while nothing but this participant runs. In turns a sensor would mix them."""
    start = monitor.clock()
    while monitor.clock() - start < seconds:
        series.participant.infer()
    return monitor.energy(start + SETTLE * seconds, monitor.clock())


def _row(series: Series, energy: telemetry.Energy | None) -> dict[str, Any]:
    item = series.participant
    total = figures.by_round(series, figures.total)
    assert total is not None  # every runner has end-to-end times
    latency = figures.latency(total)
    row: dict[str, Any] = {
        "artifact": item.artifact,
        "backend": item.backend,
        "batch": item.batch,
        "cuda_graph": item.cuda_graph,
        "throughput": figures.throughput(item.batch, latency["p50"]),
        "latency_ms": latency,
        "gpu_ms": None,
        "gpu_throughput": None,
        "enqueue_ms": None,
        "enqueue_bound": None,
        "iterations": int(total.size),
        "warm_iterations": series.warm_iterations,
        "stable": series.stable,
        "power_w": None,
        "mj_per_image": None,
    }
    compute = figures.by_round(series, figures.compute)
    if compute is not None:
        row["gpu_ms"] = figures.latency(compute)
        row["gpu_throughput"] = figures.throughput(item.batch, row["gpu_ms"]["p50"])
    enqueue = figures.by_round(series, figures.enqueue)
    if enqueue is not None:
        row["enqueue_ms"] = figures.latency(enqueue)
        if compute is not None:
            row["enqueue_bound"] = row["enqueue_ms"]["p50"] > row["gpu_ms"]["p50"]
    if energy is not None:
        row["power_w"] = energy.watts
        row["mj_per_image"] = energy.watts * latency["mean"] / item.batch
    return row


def _ratios(everything: Sequence[Series], artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """The second artifact over the first, for every backend, batch and way to launch."""
    ratios = []
    promised = artifacts[0].macs.model / artifacts[1].macs.model

    def key(series: Series) -> tuple[str, int, bool | None]:
        item = series.participant
        return item.backend, item.batch, item.cuda_graph

    for (backend, batch, graph), group in groupby(everything, key):
        first, second = group
        totals = [figures.by_round(item, figures.total) for item in (first, second)]
        assert totals[0] is not None and totals[1] is not None
        entry = {
            "backend": backend,
            "batch": batch,
            "cuda_graph": graph,
            "first": first.participant.artifact,
            "second": second.participant.artifact,
            **figures.ratio(totals[0], totals[1]),
            "gpu": None,
            "promised_by_flops": promised,
        }
        gpu = [figures.by_round(item, figures.compute) for item in (first, second)]
        if gpu[0] is not None and gpu[1] is not None:
            entry["gpu"] = figures.ratio(gpu[0], gpu[1])
        ratios.append(entry)
    return ratios


def _artifact(measured: Artifact, chosen: Sequence[Backend]) -> dict[str, Any]:
    """What is measured, for the result."""
    return {
        "path": str(measured.folder),
        "model": measured.model.name,
        "image_size": measured.model.image_size,
        "precision": measured.precision,
        "precision_of": {backend.name: backend.timed_precision(measured) for backend in chosen},
        "jmp": measured.jmp.schedule_name if measured.jmp else None,
        "gmacs": measured.macs.model / 1e9,
        "random_weights": measured.is_random,
    }


def device_words(chosen: Sequence[Backend], threads: int, libraries: dict[str, str]) -> str:
    """What measures: the GPU, the CPU, and the library on it."""
    parts = []
    for backend in chosen:
        words = f"{backend.device()}, {libraries.get(backend.name, backend.name)}"
        if not backend.gpu():
            words += f", {threads} thread{'s' if threads > 1 else ''}"
        parts.append(words)
    return "; ".join(parts)


def _warnings(
    busy: Sequence[str],
    throttled: Sequence[str],
    rows: Sequence[dict[str, Any]],
    ratios: Sequence[dict[str, Any]],
    artifacts: Sequence[Artifact],
    chosen: Sequence[Backend],
) -> list[str]:
    """What makes these figures less than they seem."""
    found = []
    if busy:
        found.append(f"the machine was busy before we began: {', '.join(busy)}")
    if throttled:
        found.append(f"the device was throttled: {', '.join(throttled)}")
    for row in rows:
        if not row["stable"]:
            found.append(
                f"{row['artifact']} at batch {row['batch']} was not stable after "
                f"{row['warm_iterations']} warm-up inferences"
            )
        if row["enqueue_bound"]:
            host, gpu = row["enqueue_ms"]["p50"], row["gpu_ms"]["p50"]
            way = _way(row["cuda_graph"])
            found.append(
                f"{row['artifact']} at batch {row['batch']} ({way}) is bound by the host, which "
                f"takes {host:.3f} ms to enqueue it: of the GPU's {gpu:.3f} ms a part is waiting"
            )
    for entry in ratios:
        low, high = entry["ci95"]
        if high - low > UNSTEADY * entry["ratio"]:
            found.append(
                f"the ratio at batch {entry['batch']} is unsteady: {low:.2f} to {high:.2f}"
            )
    if len(artifacts) == 2:
        facts: list[tuple[str, list[Any]]] = [
            ("model", [item.model.name for item in artifacts]),
            ("image size", [item.model.image_size for item in artifacts]),
        ]
        for backend in chosen:
            facts.append(("precision", [backend.timed_precision(item) for item in artifacts]))
        for name, values in facts:
            if values[0] != values[1]:
                found.append(f"the artifacts differ in {name}: {values[0]} and {values[1]}")
    return list(dict.fromkeys(found))


def _way(cuda_graph: bool | None) -> str:
    return {None: "as it is", True: "CUDA graph", False: "no graph"}[cuda_graph]


def _notes(
    chosen: Sequence[Backend],
    has_power: bool,
    no_power: str | None,
    rows: Sequence[dict[str, Any]],
) -> list[str]:
    """What else has to be known of these figures."""
    found = []
    if not any(backend.gpu() for backend in chosen):
        names = ", ".join(backend.title for backend in chosen)
        found.append(f"measured on the CPU ({names}): it says nothing of an engine on a GPU")
    if not has_power:
        why = f": {no_power}" if no_power else ""
        found.append(f"no energy per image: power cannot be read here{why}")
    launched = any(backend.launches for backend in chosen)
    if launched and rows and not any(row["cuda_graph"] for row in rows):
        found.append("no row is of CUDA graphs: not asked for, or they cannot be captured here")
    if rows and min(row["iterations"] for row in rows) < 100:
        found.append("p99 of fewer than 100 inferences is close to the slowest one")
    return found
