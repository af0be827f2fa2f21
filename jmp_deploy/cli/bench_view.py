"""What `bench` shows and writes: progress, tables, the plot, single times as trtexec does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import TaskProgressColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..bench.measure import Series, trtexec_times
from ..core.errors import MissingPackageError, install_command
from ..core.files import atomic_path, write_json
from .progress import LINE_EVERY, Display
from .render import facts

COLOURS = ("#8a8f98", "#1f6f9f", "#c2792d", "#5b8c5a")


class BenchProgress(Display):
    """A context manager whose `update` is `bench`'s `on_progress`: a bar, or a line now and then.

    It draws between inferences only: a thread that redraws would run while one is timed.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, TaskProgressColumn(), TimeElapsedColumn(), auto_refresh=False)
        self.task = self.bar.add_task("opening", total=1.0)
        self.words, self.drawn = "", 0.0

    def update(self, words: str, share: float) -> None:
        """See `bench_measure.OnProgress`."""
        now = time.monotonic()
        changed = words != self.words
        if self.console.is_terminal:
            self.bar.update(self.task, description=words, completed=share)
            if changed or now - self.drawn > 0.2 or share >= 1:
                self.words, self.drawn = words, now
                self.bar.refresh()
        elif changed or now - self.drawn > LINE_EVERY:
            self.words, self.drawn = words, now
            self.console.print(f"{now - self.started:5.0f} s  {share:4.0%}  {words}")


def summary(result: dict[str, Any], files: Sequence[str] = ()) -> RenderableType:
    """The tables that end `bench`."""
    parts: list[RenderableType] = []
    if not result["complete"]:
        words = f"INCOMPLETE: {result['stopped']}; what was measured whole is below"
        parts.append(Text(words, "bold red"))
    parts.append(_rows(result))
    if result["ratios"]:
        parts.append(_ratios(result["ratios"]))
    parts.append(facts(_facts(result, files)))
    parts += [Text(f"warning: {words}", style="bold yellow") for words in result["warnings"]]
    parts += [Text(f"note: {words}") for words in result["notes"]]
    if any(artifact["random_weights"] for artifact in result["artifacts"]):
        parts.append(
            Text("random weights: fine for timing, meaningless in what they answer", "red")
        )
    return Group(*parts)


def table_summary(table: dict[str, Any], path: str) -> RenderableType:
    """The end of `bench --table`: milliseconds of one block over tokens, a column per batch."""
    batches = sorted({row["batch"] for row in table["rows"]})
    cost = {(row["batch"], row["tokens"]): row for row in table["rows"]}
    shown = Table(title=table["device"], title_justify="left", expand=False)
    shown.add_column("tokens", justify="right")
    for batch in batches:
        shown.add_column(f"attention ms, batch {batch}", justify="right")
        shown.add_column(f"MLP ms, batch {batch}", justify="right")
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
    warnings = [Text(f"warning: {words}", style="bold yellow") for words in table["warnings"]]
    return Group(shown, facts(lines), *warnings)


def write_times(everything: Sequence[Series], target: Path) -> list[str]:
    """Writes single inferences as `trtexec --exportTimes` does; one file per row of the result.

    Returns:
        The files: `target` itself for one row, else its name with the row's in it.
    """
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


def require_matplotlib() -> None:
    """Raises MissingPackageError now, not after minutes of measuring."""
    if find_spec("matplotlib") is None:
        raise MissingPackageError("--plot needs matplotlib", install_command("plot"))


def plot(result: dict[str, Any], target: Path) -> None:
    """Draws the median latency over the batch, up to p90, a line per artifact and backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, list[dict[str, Any]]] = {}
    short = short_names([artifact["path"] for artifact in result["artifacts"]])
    ways = len({_way(row) for row in result["rows"]}) > 1
    for row in result["rows"]:
        name = short[row["artifact"]]
        lines.setdefault(f"{name}, {_way(row)}" if ways else name, []).append(row)
    for index, (label, rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: row["batch"])
        batches = [row["batch"] for row in rows]
        colour = COLOURS[index % len(COLOURS)]
        middle = [row["latency_ms"]["p50"] for row in rows]
        above = [row["latency_ms"]["p90"] - row["latency_ms"]["p50"] for row in rows]
        below = [0.0] * len(rows)
        axes.errorbar(
            batches, middle, yerr=[below, above], color=colour, marker="o", capsize=3, label=label
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
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".").lower() or "png")


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
    table = Table(title=result["device"], title_justify="left", expand=False)
    table.add_column("artifact", overflow="fold")
    ways = len({_way(row) for row in rows}) > 1  # else the title says it
    if ways:
        table.add_column("run by", overflow="fold")
    names = ["batch", "images/s", "p50 ms", "p90", "p99", "mean"]
    names += ["GPU p50 ms", "GPU images/s"] if has_gpu else []
    names += ["W", "mJ/image"] if has_power else []
    for name in [*names, "n"]:
        table.add_column(name, justify="right")
    for row in rows:
        latency = row["latency_ms"]
        cells = [str(row["batch"]), f"{row['throughput']:.1f}"]
        cells += [_ms(latency[name]) for name in ("p50", "p90", "p99", "mean")]
        if has_gpu:
            gpu = row["gpu_ms"]
            cells += [_ms(gpu["p50"]), f"{row['gpu_throughput']:.1f}"] if gpu else ["-", "-"]
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
    table = Table(
        title=f"throughput of {short[pair[0]]} over {short[pair[1]]}",
        title_justify="left",
        expand=False,
    )
    ways = len({_way(entry) for entry in ratios}) > 1
    if ways:
        table.add_column("run by", overflow="fold")
    has_gpu = any(entry["gpu"] for entry in ratios)
    names = [
        "batch",
        "ratio",
        "95 % interval",
        *(["GPU alone"] if has_gpu else []),
        "FLOPs promise",
    ]
    for name in names:
        table.add_column(name, justify="right")
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
        ("latency", "host memory to host memory, one inference at a time; images/s at the median")
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
