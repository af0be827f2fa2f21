"""Measures a latency table (`latency_table`) for `tune --latency-ms X --on TABLE`.

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

from . import bench_parts, bench_stats, manifest, telemetry
from .bench import choose_backends, choose_batches, device_words
from .bench_backend import Backend
from .bench_measure import OnProgress, Participant, Series, Settings, measure
from .bench_parts import ATTENTION, DENSE, MLP, Parts
from .bench_runners import OnnxRuntime, open_backend
from .errors import ArtifactError
from .latency_table import FORMAT, LatencyTable
from .schedule import ModelShape
from .telemetry_host import cpu_count

SETTINGS = Settings(
    warm_iterations=3,
    warm_seconds=1.0,
    iterations=12,
    rounds=6,
    visit_seconds=0.02,
    seconds=1.0,
)
"""Shorter than a benchmark's: there are two chains for each of some 25 token counts."""

Opener = Callable[[str, int | None], Backend]
"""Opens a part by its name, a chain at a number of tokens; ARTIFACT is the artifact itself."""
ARTIFACT = "artifact"


@dataclass(frozen=True)
class TableOptions:
    """What to measure.

    Attributes:
        folder: the artifact.
        batches: as for `BenchOptions`.
        backend: "auto", "engine" or "onnxruntime".
        threads: of ONNX Runtime.
        step: tokens from one row to the next.
        settings: how long, for every chain at every token count.
    """

    folder: Path
    batches: tuple[int, ...] = ()
    backend: str = "auto"
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
    data = manifest.read(options.folder)
    batches = choose_batches([options.folder], [data], options.batches)
    (backend,) = choose_backends([options.folder], [data], (options.backend,))
    with telemetry.Monitor(telemetry.open_sources(gpu=backend == "engine")) as monitor:
        busy = monitor.others()
        with tempfile.TemporaryDirectory(prefix="jmp-table-") as scratch:
            parts = bench_parts.export_parts(
                data, Path(scratch), on_part=lambda name: on_progress(f"exporting {name}", 0.0)
            )
            opener = _opener(options.folder, data, backend, parts, threads)
            table = fill(parts.shape, data, batches, opener, options, on_progress=on_progress)
    table["device"] = device_words([backend], threads, {backend: table.pop("library")})
    table["backend"], table["precision"] = backend, data["precision"]
    table["telemetry"] = monitor.summary()
    if busy:
        table["warnings"].append(f"the machine was busy before we began: {', '.join(busy)}")
    if throttled := monitor.throttled():
        table["warnings"].append(f"the device was throttled: {', '.join(throttled)}")
    return table


def fill(
    shape: ModelShape,
    data: dict[str, Any],
    batches: Sequence[int],
    opener: Opener,
    options: TableOptions,
    *,
    on_progress: OnProgress = lambda words, share: None,
) -> dict[str, Any]:
    """The table's rows, with whatever opens a part; see `measure_table`."""
    counts = token_counts(shape, data, options.step)
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
    work = len(counts) + 1
    names = [DENSE, *([ARTIFACT] if data["jmp"] else [])]
    whole: dict[int, dict[str, float]] = {}
    with _opened(opener, [(name, None) for name in names]) as models:
        table["library"] = models[0].library
        for batch in batches:
            on_progress(f"whole models, batch {batch}", 0.0)
            medians = _medians(models, batch, options.settings)
            whole[batch] = dict(zip(names, medians, strict=True))
    done: dict[tuple[int, int], tuple[float, float]] = {}
    for index, tokens in enumerate(counts):
        with _opened(opener, [(ATTENTION, tokens), (MLP, tokens)]) as chains:
            for batch in batches:
                on_progress(
                    f"measuring blocks, {counts[-1]} to {counts[0]} tokens", (index + 1) / work
                )
                attention, mlp = _medians(chains, batch, options.settings)
                done[batch, tokens] = attention / shape.depth, mlp / shape.depth
    for batch in batches:
        _add_batch(table, shape, data, batch, counts, done, whole[batch])
    return table


def token_counts(shape: ModelShape, data: dict[str, Any], step: int) -> list[int]:
    """Token counts to measure, falling: all tokens, multiples of `step`, those of the artifact.

    Raises:
        ArtifactError: a step that leaves nothing to measure.
    """
    full = shape.num_prefix + shape.num_patches
    counts = {full, *range(step, full, step)}
    if data["jmp"]:
        counts |= {shape.num_prefix + keep for _, keep in data["jmp"]["schedule"]}
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
    data: dict[str, Any],
    batch: int,
    counts: Sequence[int],
    done: dict[tuple[int, int], tuple[float, float]],
    whole: dict[str, float],
) -> None:
    full = shape.num_prefix + shape.num_patches
    other = whole[DENSE] - shape.depth * sum(done[batch, full])
    if other < 0:
        table["warnings"].append(
            f"batch {batch}: the blocks alone took {-other:.3f} ms longer than the dense model; "
            "the rest of the model is counted as 0"
        )
    table["other_ms"][str(batch)] = max(other, 0.0)
    table["dense_ms"][str(batch)] = whole[DENSE]
    reduce_ms = 0.0
    if data["jmp"]:
        sums = LatencyTable(
            device="",
            batch=batch,
            num_prefix=shape.num_prefix,
            num_patches=shape.num_patches,
            other_ms=max(other, 0.0),
            rows={tokens: (*done[batch, tokens], 0.0) for tokens in counts},
            short_last_block=bool(data["jmp"].get("last_prefix_only")),
        )
        above = whole[ARTIFACT] - sums.latency(_keeps(shape, data["jmp"]["schedule"]))
        reduce_ms = max(above, 0.0) / len(data["jmp"]["schedule"])
    for tokens in counts:
        attention, mlp = done[batch, tokens]
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
def _opened(opener: Opener, wanted: Sequence[tuple[str, int | None]]) -> Iterator[list[Backend]]:
    with ExitStack() as stack:
        opened = []
        for name, tokens in wanted:
            opened.append(opener(name, tokens))
            stack.callback(opened[-1].close)
        yield opened


def _medians(opened: Sequence[Backend], batch: int, settings: Settings) -> list[float]:
    """Median ms of each, measured in turns: on the device where its events say, else end to end."""
    graph = all(backend.has_graphs for backend in opened)
    participants = [
        Participant(str(index), "", batch, backend.prepare(batch, graph))
        for index, backend in enumerate(opened)
    ]
    series, complete = measure(participants, settings)
    if not complete:
        raise KeyboardInterrupt
    return [_median(item) for item in series]


def _median(series: Series) -> float:
    values = bench_stats.by_round(series, bench_stats.compute)
    if values is None:
        values = bench_stats.by_round(series, bench_stats.total)
    assert values is not None
    return bench_stats.latency(values)["p50"]


def _opener(folder: Path, data: dict[str, Any], backend: str, parts: Parts, threads: int) -> Opener:
    if backend == "engine":
        return _engine_opener(folder, data, parts)
    sessions: dict[str, OnnxRuntime] = {}

    def opener(name: str, tokens: int | None) -> Backend:
        if name == ARTIFACT:
            return open_backend(folder, data, backend, threads=threads)
        if name not in sessions:
            sessions[name] = OnnxRuntime(parts.files[name], parts.image, threads)
        # One session serves all token counts: ONNX Runtime has no kernels for one shape alone.
        return sessions[name].view((tokens, parts.width)) if tokens else sessions[name].view()

    return opener


def _engine_opener(folder: Path, data: dict[str, Any], parts: Parts) -> Opener:
    """Builds an engine for every part and token count: shapes are static in a real engine too."""
    from .bench_engine import TimedEngine
    from .engine import EngineSpec, build_engine

    flavour = data["engine"]["flavour"]

    def opener(name: str, tokens: int | None) -> Backend:
        if name == ARTIFACT:
            return open_backend(folder, data, "engine", threads=1)
        source = parts.files[name]
        model, plan = source.with_suffix(".part.onnx"), source.with_suffix(".engine")
        spec = EngineSpec(
            batch=(data["batch"][0], data["batch"][1], data["batch"][2]),
            image=(tokens, parts.width) if tokens else parts.image,  # type: ignore[arg-type]
            precision=data["precision"],
        )
        if tokens:
            bench_parts.with_tokens(source, tokens, model)
        cache = source.with_name("timing.cache")
        build_engine(model if tokens else source, plan, flavour, spec, timing_cache=cache)
        return TimedEngine(plan, data, use_manifest=False)

    return opener
