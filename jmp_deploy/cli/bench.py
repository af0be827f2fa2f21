"""The command `bench`. Flag names are those of timm's benchmark.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import AUTO, AUTO_HELP, NAMES
from ..core.errors import JmpDeployError, MissingPackageError, fail, install_command, say
from ..core.files import write_json
from . import checked, flags, show

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..bench.measure import Series

BACKENDS = (AUTO, *reversed(NAMES))
COLOURS = ("#8a8f98", "#1f6f9f", "#c2792d", "#5b8c5a")


def add(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = flags.add_command(
        commands,
        _bench,
        "bench",
        "measure latency, throughput and power; two artifacts side by side, in turns",
        (
            "bench artifacts/deit_s",
            "bench artifacts/deit_s-dense --against artifacts/deit_s -b 1,8,32",
            "bench artifacts/deit_s-dense --against artifacts/deit_s --plot latency.png --json -",
            "bench artifacts/deit_s -b 8 --cuda-graph on --times times.json",
            "bench artifacts/deit_s --table orin.json -b 1,8   # for tune --latency-ms",
        ),
    )
    flags.add_artifact(parser)
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR2",
        help="a second artifact; the ratio is its throughput over that of DIR (give the dense one "
        "as DIR)",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        dest="batches",
        type=_batches,
        metavar="N,N,..",
        help="images per inference (those of 1,8,32 that the profile has)",
    )
    parser.add_argument(
        "--backend",
        dest="backends",
        type=flags.words_of(*BACKENDS),
        metavar="A,B",
        help=f"of {', '.join(BACKENDS)}; {AUTO_HELP}",
    )
    parser.add_argument(
        "--num-warm-iter",
        dest="settings.warm_iterations",
        type=flags.positive,
        metavar="N",
        help="inferences before anything counts, at least; goes on until times are stable (10)",
    )
    parser.add_argument(
        "--num-bench-iter",
        dest="settings.iterations",
        type=flags.positive,
        metavar="N",
        help="inferences to measure, at least, if --seconds allows (40)",
    )
    parser.add_argument(
        "--seconds",
        dest="settings.seconds",
        type=_seconds,
        metavar="S",
        help="measure each row for this long at most, after at least four rounds (20; 1 with "
        "--table)",
    )
    parser.add_argument(
        "--threads",
        type=flags.positive,
        metavar="N",
        help="of ONNX Runtime, and of PyTorch on a CPU (every CPU that this process may use)",
    )
    parser.add_argument(
        "--cuda-graph",
        choices=("both", "on", "off"),
        help="replay engines as CUDA graphs, launch them kernel by kernel, or measure both (both)",
    )
    parser.add_argument(
        "--no-energy",
        dest="energy_seconds",
        action="store_const",
        const=0.0,
        help="do not run every row for three more seconds to read its power",
    )
    parser.add_argument(
        "--times",
        type=flags.new_file,
        default=None,
        metavar="FILE",
        help="write every inference in the form of trtexec --exportTimes, a file per row",
    )
    parser.add_argument(
        "--plot",
        type=flags.new_plot,
        default=None,
        metavar="FILE.png",
        help="draw latency over batch (needs matplotlib)",
    )
    parser.add_argument(
        "--table",
        type=flags.new_file,
        default=None,
        metavar="FILE",
        help="measure blocks over the number of tokens instead, for tune --latency-ms --on FILE "
        "(needs PyTorch and timm)",
    )
    parser.add_argument(
        "--table-step",
        dest="step",
        type=flags.positive,
        metavar="N",
        help="tokens between its rows (8)",
    )


def _batches(text: str) -> tuple[int, ...]:
    return tuple(flags.positive(part) for part in text.split(","))


def _seconds(text: str) -> float:
    value = flags.decimal(text, "a number of seconds")
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _bench(given: argparse.Namespace) -> int:
    from ..bench.bench import INTERRUPTED, BenchOptions, bench
    from ..bench.measure import Settings

    if given.table:
        return _table(given)
    if "step" in given:
        raise JmpDeployError("--table-step goes with --table FILE", "leave it out, or add --table")
    if given.plot and find_spec("matplotlib") is None:  # now, not after minutes of measuring
        raise MissingPackageError("--plot needs matplotlib", install_command("plot"))
    settings = flags.fill(Settings, given, "settings.")
    asked = flags.fill(BenchOptions, given, settings=settings)
    folders = [asked.folder, *([asked.against] if asked.against else [])]
    verdict = checked.check_first(folders, asked.backends)
    try:
        with show.Progress("opening", auto_refresh=False) as progress:
            result, everything = bench(asked, on_progress=progress.update)
    except KeyboardInterrupt:
        say("nothing was measured whole yet")
        raise
    result["notes"] += verdict.notes
    result["warnings"] += verdict.problems
    files = write_times(everything, given.times) if given.times else []
    if given.plot:
        plot(result, given.plot)
        files.append(str(given.plot))
    show.show(given, _summary(result, files), {**result, "files": files})
    if result["complete"]:
        checked.refuse(verdict)
        return 0
    if result["stopped"] == INTERRUPTED:
        return 130
    return fail(result["stopped"], None, 2)


def _table(given: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..bench.table import SETTINGS, TableOptions, measure_table

    backends = getattr(given, "backends", (AUTO,))
    if "against" in given or given.times or given.plot or len(backends) > 1:
        raise JmpDeployError(
            "--table measures one artifact with one backend: no --against, --times or --plot"
        )
    settings = replace(SETTINGS, seconds=getattr(given, "settings.seconds", SETTINGS.seconds))
    asked = flags.fill(TableOptions, given, backend=backends[0], settings=settings)
    with show.Progress("opening", auto_refresh=False) as progress:
        table = measure_table(asked, on_progress=progress.update)
    write_json(given.table, table)
    show.show(given, _table_summary(table, str(given.table)), table)
    return 0


def _summary(result: dict[str, Any], files: Sequence[str]) -> list[RenderableType]:
    """The tables that end `bench`."""
    parts: list[RenderableType] = []
    if not result["complete"]:
        words = f"INCOMPLETE: {result['stopped']}; what was measured whole is below"
        parts.append(show.styled(words, "bold red"))
    parts.append(_rows(result))
    if result["ratios"]:
        parts.append(_ratios(result["ratios"]))
    parts += [show.facts(_facts(result, files)), *show.warnings(result)]
    parts += [f"note: {words}" for words in result["notes"]]
    if any(artifact["random_weights"] for artifact in result["artifacts"]):
        words = "random weights: fine for timing, meaningless in what they answer"
        parts.append(show.styled(words, "red"))
    return parts


def _table_summary(table: dict[str, Any], path: str) -> list[RenderableType]:
    """The end of `bench --table`: milliseconds of one block over tokens, a column per batch."""
    batches = sorted({row["batch"] for row in table["rows"]})
    cost = {(row["batch"], row["tokens"]): row for row in table["rows"]}
    parts = [f">{part} ms, batch {batch}" for batch in batches for part in ("attention", "MLP")]
    shown = show.table(table["device"], ">tokens", *parts)
    for tokens in sorted({row["tokens"] for row in table["rows"]}, reverse=True):
        cells = []
        for batch in batches:
            row = cost[batch, tokens]
            cells += [f"{row['attn_ms']:.4f}", f"{row['mlp_ms']:.4f}"]
        shown.add_row(str(tokens), *cells)
    lines = [
        (f"batch {batch}", f"dense model {_ms(table['dense_ms'][str(batch)])} ms, outside the "
         f"blocks {_ms(table['other_ms'][str(batch)])} ms, a reduction "
         f"{_ms(cost[batch, tokens]['reduce_ms'])} ms")
        for batch in batches
    ]  # fmt: skip
    lines.append(("table", path))
    use = f"tune {table['model']} --images DIR --latency-ms X --on {path} --on-batch {batches[0]}"
    lines.append(("use it with", f"python -m jmp_deploy {use}"))
    return [shown, show.facts(lines), *show.warnings(table)]


def write_times(everything: Sequence[Series], target: Path) -> list[str]:
    """Writes single inferences as `trtexec --exportTimes` does; one file per row of the result.

    Returns:
        The files: `target` itself for one row, else its name with the row's in it.
    """
    from ..bench.measure import trtexec_times

    written = []
    for index, series in enumerate(everything):
        path = target
        if len(everything) > 1:
            item = series.participant
            graph = {None: "", True: ".graph", False: ".nograph"}[item.cuda_graph]
            name = f"{index + 1}.{Path(item.artifact).name}.{item.backend}.b{item.batch}{graph}"
            path = target.with_name(f"{target.stem}.{name}{target.suffix or '.json'}")
        write_json(path, trtexec_times(series.rounds))
        written.append(str(path))
    return written


def plot(result: dict[str, Any], target: Path) -> None:
    """Draws the median latency over the batch, up to p90, a line per artifact and backend."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lines: dict[str, list[dict[str, Any]]] = {}
    short = short_names([artifact["path"] for artifact in result["artifacts"]])
    ways = len({_way(row) for row in result["rows"]}) > 1
    for row in result["rows"]:
        name = short[row["artifact"]]
        lines.setdefault(f"{name}, {_way(row)}" if ways else name, []).append(row)
    with show.plot(target) as axes:
        for index, (label, rows) in enumerate(lines.items()):
            rows.sort(key=lambda row: row["batch"])
            batches = [row["batch"] for row in rows]
            colour = COLOURS[index % len(COLOURS)]
            middle = [row["latency_ms"]["p50"] for row in rows]
            above = [row["latency_ms"]["p90"] - row["latency_ms"]["p50"] for row in rows]
            below = [0.0] * len(rows)
            axes.errorbar(
                batches,
                middle,
                yerr=[below, above],
                color=colour,
                marker="o",
                capsize=3,
                label=label,
            )
            if all(row["gpu_ms"] for row in rows):
                gpu = [row["gpu_ms"]["p50"] for row in rows]
                axes.plot(batches, gpu, color=colour, ls="--", lw=1, label=f"{label}, GPU alone")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        shown = sorted({row["batch"] for row in result["rows"]})
        axes.set_xticks(shown, [str(batch) for batch in shown])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("images per inference")
        axes.set_ylabel("ms per inference, median to p90")
        incomplete = "" if result["complete"] else " (incomplete)"
        axes.set_title(f"{result['device']}{incomplete}", fontsize=9)
        axes.legend(frameon=False, fontsize=8)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Paths -> their last parts, as many as it takes to tell them apart."""
    parts = {path: Path(path).parts or (path,) for path in paths}
    longest = max((len(each) for each in parts.values()), default=1)
    for count in range(1, longest + 1):
        short = {path: str(Path(*each[-count:])) for path, each in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {path: path for path in paths}


def _rows(result: dict[str, Any]) -> Table:
    rows = result["rows"]
    has_gpu = any(row["gpu_ms"] for row in rows)
    has_power = any(row["mj_per_image"] for row in rows)
    short = short_names([artifact["path"] for artifact in result["artifacts"]])
    ways = len({_way(row) for row in rows}) > 1  # else the title says it
    names = ["batch", "images/s", "p50 ms", "p90", "p99", "mean"]
    names += ["GPU p50 ms", "GPU images/s", "enqueue ms"] if has_gpu else []
    names += ["W", "mJ/image"] if has_power else []
    left = ["artifact", "run by"] if ways else ["artifact"]
    table = show.table(result["device"], *left, *(f">{name}" for name in [*names, "n"]))
    for row in rows:
        latency = row["latency_ms"]
        cells = [str(row["batch"]), f"{row['throughput']:.1f}"]
        cells += [_ms(latency[name]) for name in ("p50", "p90", "p99", "mean")]
        if has_gpu:
            gpu = row["gpu_ms"]
            cells += [_ms(gpu["p50"]), f"{row['gpu_throughput']:.1f}"] if gpu else ["-", "-"]
            cells.append(_ms(row["enqueue_ms"]["p50"]) if row["enqueue_ms"] else "-")
        if has_power:
            known = row["mj_per_image"] is not None
            cells += (
                [f"{row['power_w']:.1f}", f"{row['mj_per_image']:.1f}"] if known else ["-", "-"]
            )
        way = [_way(row)] if ways else []
        table.add_row(short[row["artifact"]], *way, *cells, str(row["iterations"]))
    return table


def _ratios(ratios: Sequence[dict[str, Any]]) -> Table:
    pair = (ratios[0]["second"], ratios[0]["first"])
    short = short_names(pair)
    ways = len({_way(entry) for entry in ratios}) > 1
    has_gpu = any(entry["gpu"] for entry in ratios)
    columns = [*(["run by"] if ways else []), ">batch", ">ratio", ">95 % interval"]
    columns += [*([">GPU alone"] if has_gpu else []), ">FLOPs promise"]
    title = f"images/s of {short[pair[0]]} over {short[pair[1]]}, one inference at a time"
    table = show.table(title, *columns)
    for entry in ratios:
        cells = [str(entry["batch"]), f"{entry['ratio']:.3f}x", _interval(entry)]
        if has_gpu:
            gpu = entry["gpu"]
            cells.append(f"{gpu['ratio']:.3f}x ({_interval(gpu)})" if gpu else "-")
        way = [_way(entry)] if ways else []
        table.add_row(*way, *cells, f"{entry['promised_by_flops']:.2f}x")
    return table


def _facts(result: dict[str, Any], files: Sequence[str]) -> list[tuple[str, str]]:
    seen = result["telemetry"]
    lines = []
    for name, words in (("board", "board"), ("power_mode", "power mode"), ("driver", "driver")):
        if name in seen:
            lines.append((words, str(seen[name])))
    if "jetson_clocks" in seen:
        on = seen["jetson_clocks"]
        lines.append(("clocks", "fixed (jetson_clocks)" if on else "not fixed: run jetson_clocks"))
    for name, words, unit in (
        ("gpu_mhz", "GPU clock", "MHz"),
        ("temperature_c", "GPU temperature", "degrees C"),
        ("power_w", "power", "W"),
        ("memory_mb", "memory in use", "MB"),
    ):
        if name in seen:
            low, middle, high = (seen[name][key] for key in ("min", "median", "max"))
            limit = seen.get(f"{name}_limit")
            of = f", limit {limit:.0f}" if limit else ""  # of clocks and power
            about = f" ({seen['power_of']})" if name == "power_w" and "power_of" in seen else ""
            spread = f"{middle:.0f} {unit} ({low:.0f} to {high:.0f}{of}){about}"
            lines.append((words, spread))
    if "cpu_governor" in seen:
        lines.append(("CPU governor", seen["cpu_governor"]))
    lines.append(
        ("latency", "host memory to host memory, one inference at a time; images/s = batch / p50")
    )
    if files:
        lines.append(("written", "\n".join(files)))
    return lines


def _way(row: dict[str, Any]) -> str:
    graph = row["cuda_graph"]
    if graph is None:
        return str(row["backend"])
    return f"{row['backend']}, {'CUDA graph' if graph else 'no graph'}"


def _interval(entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{low:.3f} to {high:.3f}"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
