"""Measures a latency table (`jmp.latency`) for `tune --latency-ms X --on TABLE`.

Per token count, the attention halves and the MLP halves of all blocks are timed as two chains and
divided by the depth; what is outside the blocks is the dense model's time less theirs; and what a
reduction costs is what the artifact itself, if it has JMP, takes above the sum of its parts.
So the table adds up to the measured time of the dense model, and to that of the artifact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import AUTO, DEPLOYED
from ..backends.base import Backend, Timed
from ..backends.engine import TimedEngine
from ..backends.onnxruntime import TimedSession
from ..core.artifact import Artifact
from ..core.device import cpu_count
from ..core.errors import ArtifactError
from ..core.manifest import Flavour, Jmp
from ..engine.fit import EngineFile
from ..jmp.latency import FORMAT, LatencyTable
from ..jmp.schedule import ModelShape
from . import measure as figures
from . import parts as bench_parts
from . import telemetry
from .bench import choose_backends, choose_batches, device_words
from .measure import OnProgress, Participant, Settings, measure
from .parts import ATTENTION, DENSE, MLP, Parts

SETTINGS = Settings(
    warm_iterations=3,
    warm_seconds=0.3,
    iterations=4,
    rounds=2,
    visit_seconds=0.01,
    seconds=1.0,
)
"""Of one part in one sweep: shorter than a benchmark's, for there are some 50 parts."""
SWEEPS = 4
"""How often all token counts are gone through, to and fro: drift reaches all alike."""

Part = tuple[str, int | None]
"""A part's name, and the tokens of a chain."""
Opener = Callable[[str, int | None], Timed]
"""Opens a part by its name, a chain at a number of tokens; ARTIFACT is the artifact itself."""
ARTIFACT = "artifact"


@dataclass(frozen=True)
class TableOptions:
    """What to measure.

    Attributes:
        folder: the artifact.
        batches: as for `BenchOptions`.
        backend: AUTO or one of `backends.DEPLOYED`; PyTorch is not deployed, and has no table.
        threads: on a CPU.
        step: tokens from one row to the next.
        settings: how long, for every chain at every token count.
    """

    folder: Path
    batches: tuple[int, ...] = ()
    backend: str = AUTO
    threads: int | None = None
    step: int = 8
    settings: Settings = field(default_factory=lambda: SETTINGS)


def measure_table(
    options: TableOptions, *, on_progress: OnProgress = lambda words, share: None
) -> dict[str, Any]:
    """Measures a table: what the file holds.

    Ctrl-C leaves nothing: a table with some of its rows would let `tune` believe that no other
    token counts are worth a thought.

    Raises:
        JmpDeployError: as `bench`; a model that cannot be exported.
    """
    threads = options.threads or cpu_count()
    measured = Artifact.read(options.folder)
    batches = choose_batches([measured], options.batches)
    if options.backend not in (AUTO, *DEPLOYED):
        known = " or ".join(DEPLOYED)
        raise ArtifactError(f"a table is measured with {known}, not with {options.backend}")
    (backend,) = choose_backends([measured], (options.backend,))
    with telemetry.Monitor(telemetry.open_sources(gpu=bool(backend.gpu()))) as monitor:
        busy = monitor.others()
        with tempfile.TemporaryDirectory(prefix="jmp-table-") as scratch:
            parts = bench_parts.export_parts(
                measured, Path(scratch), on_part=lambda name: on_progress(f"exporting {name}", 0.0)
            )
            opener = _opener(measured, backend, parts, threads)
            table = fill(
                parts.shape, measured.jmp, batches, opener, options, on_progress=on_progress
            )
    table["device"] = device_words([backend], threads, {backend.name: table.pop("library")})
    table["backend"], table["precision"] = backend.name, measured.precision
    table["telemetry"] = monitor.summary()
    if busy:
        table["warnings"].append(f"the machine was busy before we began: {', '.join(busy)}")
    if throttled := monitor.throttled():
        table["warnings"].append(f"the device was throttled: {', '.join(throttled)}")
    return table


def fill(
    shape: ModelShape,
    jmp: Jmp | None,
    batches: Sequence[int],
    opener: Opener,
    options: TableOptions,
    *,
    on_progress: OnProgress = lambda words, share: None,
) -> dict[str, Any]:
    """The table's rows, with whatever opens a part; see `measure_table`."""
    counts = token_counts(shape, jmp, options.step)
    table: dict[str, Any] = {
        "format": FORMAT,
        "model": shape.name,
        "depth": shape.depth,
        "num_prefix": shape.num_prefix,
        "num_patches": shape.num_patches,
        "device": "unnamed device",
        "library": "",
        "other_ms": {},
        "dense_ms": {},
        "rows": [],
        "settings": asdict(options.settings),
        "warnings": [],
    }
    whole = [DENSE, *([ARTIFACT] if jmp else [])]
    units: list[list[Part]] = [[(name, None) for name in whole]]
    units += [[(ATTENTION, tokens), (MLP, tokens)] for tokens in counts]
    times: dict[tuple[int, Part], list[float]] = {}
    for sweep in range(SWEEPS):
        for index, unit in enumerate(units if sweep % 2 == 0 else units[::-1]):
            share = (sweep + index / len(units)) / SWEEPS
            on_progress(f"measuring parts, {counts[-1]} to {counts[0]} tokens", share)
            with _opened(opener, unit) as opened:
                table["library"] = opened[0].library
                for batch in batches:
                    measured = _measure(opened, batch, options.settings)
                    for part, values in zip(unit, measured, strict=True):
                        times.setdefault((batch, part), []).extend(values)
    median = {key: figures.latency(np.array(values))["p50"] for key, values in times.items()}
    for batch in batches:
        _add_batch(table, shape, jmp, batch, counts, median)
    return table


def token_counts(shape: ModelShape, jmp: Jmp | None, step: int) -> list[int]:
    """Token counts to measure, falling: all tokens, multiples of `step`, those of the artifact.

    Raises:
        ArtifactError: a step that leaves nothing to measure.
    """
    full = shape.num_prefix + shape.num_patches
    counts = {full, *range(step, full, step)}
    if jmp:
        counts |= {shape.num_prefix + keep for _, keep in jmp.schedule}
    found = sorted((n for n in counts if n > shape.num_prefix), reverse=True)
    if len(found) < 2:
        raise ArtifactError(
            f"a step of {step} tokens leaves one row: the model has {full} tokens",
            "take a smaller --table-step",
        )
    return found


def _add_batch(
    table: dict[str, Any],
    shape: ModelShape,
    jmp: Jmp | None,
    batch: int,
    counts: Sequence[int],
    median: dict[tuple[int, Part], float],
) -> None:
    full, dense = shape.num_prefix + shape.num_patches, median[batch, (DENSE, None)]
    blocks = {
        tokens: (
            median[batch, (ATTENTION, tokens)] / shape.depth,
            median[batch, (MLP, tokens)] / shape.depth,
        )
        for tokens in counts
    }
    other = dense - shape.depth * sum(blocks[full])
    if other < 0:
        table["warnings"].append(
            f"batch {batch}: the blocks alone took {-other:.3f} ms longer than the dense model; "
            "the rest of the model is counted as 0"
        )
    table["other_ms"][str(batch)] = max(other, 0.0)
    table["dense_ms"][str(batch)] = dense
    reduce_ms = 0.0
    if jmp:
        sums = LatencyTable(
            device="",
            batch=batch,
            num_prefix=shape.num_prefix,
            num_patches=shape.num_patches,
            other_ms=max(other, 0.0),
            rows={tokens: (*halves, 0.0) for tokens, halves in blocks.items()},
            short_last_block=jmp.last_prefix_only,
        )
        above = median[batch, (ARTIFACT, None)] - sums.latency(_keeps(shape, jmp.schedule))
        reduce_ms = max(above, 0.0) / len(jmp.schedule)
    for tokens, (attention, mlp) in blocks.items():
        table["rows"].append(
            {
                "batch": batch,
                "tokens": tokens,
                "attn_ms": attention,
                "mlp_ms": mlp,
                "reduce_ms": reduce_ms,
            }
        )


def _keeps(shape: ModelShape, steps: Sequence[Sequence[int]]) -> list[int]:
    """Patch tokens after each block."""
    after = {block: keep for block, keep in steps}
    keeps, now = [], shape.num_patches
    for block in range(shape.depth):
        now = after.get(block, now)
        keeps.append(now)
    return keeps


@contextmanager
def _opened(opener: Opener, unit: Sequence[Part]) -> Iterator[list[Timed]]:
    with ExitStack() as stack:
        opened = []
        for name, tokens in unit:
            opened.append(opener(name, tokens))
            stack.callback(opened[-1].close)
        yield opened


def _measure(opened: Sequence[Timed], batch: int, settings: Settings) -> list[list[float]]:
    """Times of each in ms, measured in turns: the device's own where it tells, else end to end."""
    graph = all(backend.has_graphs for backend in opened)
    participants = [
        Participant(str(index), "", batch, backend.prepare(batch, graph))
        for index, backend in enumerate(opened)
    ]
    series, complete = measure(participants, settings)
    if not complete:
        raise KeyboardInterrupt
    found = []
    for item in series:
        values = figures.by_round(item, figures.compute)
        if values is None:
            values = figures.by_round(item, figures.total)
        assert values is not None
        found.append(values.ravel().tolist())
    return found


def _opener(measured: Artifact, backend: Backend, parts: Parts, threads: int) -> Opener:
    open_part = (
        _engine_parts(measured, parts) if backend.launches else _session_parts(parts, threads)
    )

    def opener(name: str, tokens: int | None) -> Timed:
        if name == ARTIFACT:
            return backend.timed(measured, threads=threads)
        return open_part(name, tokens)

    return opener


def _session_parts(parts: Parts, threads: int) -> Opener:
    sessions: dict[str, TimedSession] = {}

    def opener(name: str, tokens: int | None) -> Timed:
        if name not in sessions:
            sessions[name] = TimedSession(parts.files[name], parts.image, threads)
        # One session serves all token counts: ONNX Runtime has no kernels for one shape alone.
        return sessions[name].view((tokens, parts.shape.width)) if tokens else sessions[name].view()

    return opener


def _engine_parts(measured: Artifact, parts: Parts) -> Opener:
    """Builds an engine for every part and token count: shapes are static in a real engine too."""
    from ..engine.builder import EngineSpec, build_engine

    assert measured.engine is not None
    flavour: Flavour = measured.engine.flavour
    built: dict[Path, EngineFile] = {}

    def opener(name: str, tokens: int | None) -> Timed:
        source = parts.files[name]
        plan = source.with_name(f"{name}.{tokens or 'whole'}.engine")
        if plan not in built:
            model = source
            if tokens:
                model = bench_parts.with_tokens(source, tokens, source.with_name("part.onnx"))
            spec = EngineSpec(
                batch=measured.batch,
                image=(tokens, parts.shape.width) if tokens else parts.image,
                precision=measured.precision,
            )
            cache = source.with_name("timing.cache")
            facts = build_engine(model, plan, flavour, spec, timing_cache=cache)
            built[plan] = EngineFile(plan, flavour, facts)
        return TimedEngine(built[plan])

    return opener
