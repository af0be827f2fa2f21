"""The reduction alone, on a GPU: our kernel, its plain version, eager PyTorch, torch.compile.

All of them compute the same reduction (the first one of a model's `paper` schedule) from the same
tensors, in turns, each in a CUDA graph of many calls; eager PyTorch is timed without a graph too,
as it usually runs. The floor is what has to be read and written at least, over the bandwidth of a
large copy measured in the same run; a copy of just as many bytes is timed beside it, because small
transfers do not reach that bandwidth.

    python benchmarks/kernel.py                                   # all models, batch 1, 8, 64, 256
    python benchmarks/kernel.py --models deit_s -b 1,256 --compile none
    python benchmarks/kernel.py --dtypes float16,float32 --selections distinct -o results/h100

Needs an NVIDIA GPU and nvcc. torch.compile takes some 20 seconds for every row.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib import command, report, timing
from jmp_deploy.core.errors import ModelError
from jmp_deploy.jmp.node import SELECTIONS, TokenReduce

if TYPE_CHECKING:
    from benchmarks.lib.reduction_calls import Case

# name -> patch tokens, channels, heads, prefix tokens; heads of 64
MODELS = {
    "deit_t": (196, 192, 3, 1),
    "deit_s": (196, 384, 6, 1),
    "deit_b": (196, 768, 12, 1),
    "dinov2_s": (256, 384, 6, 1),
    "dinov2_s@518": (1369, 384, 6, 1),
    "siglip_b": (196, 768, 12, 0),
    "siglip_b@512": (1024, 768, 12, 0),
}
KEEP_RATE = 0.7  # of the schedule `paper`
HEAD_DIM = 64
LAUNCHES = 20  # in one graph: the launch of the graph itself does not count then
BIG_COPY = 1 << 31  # bytes moved by the copy that stands for the device's bandwidth
ROUNDS = 50
CONTENDERS = ("ours", "plain", "eager", "eager_graph", "compiled", "copy")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="benchmarks/kernel.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--models", default=",".join(MODELS), help="comma list (all)")
    add("-b", "--batch-size", default="1,8,64,256", help="comma list (1,8,64,256)")
    add("--dtypes", default="float16", help="of float16, bfloat16, float32 (float16)")
    add("--selections", default=",".join(SELECTIONS), help="comma list (importance,distinct)")
    add("--compile", default="all", help="models that torch.compile is timed for: all, none, list")
    add("--seconds", type=float, default=2, help="of timing per row (2)")
    add("--limit", type=float, default=math.inf, help="begin no new row after so many seconds")
    add("-o", "--output", type=Path, help="without suffix: writes .json, .md and .png")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    options = parser().parse_args(arguments)
    return command.exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and writes; returns the JSON's content."""
    import torch

    names = _chosen("--models", options.models, tuple(MODELS))
    selections = _chosen("--selections", options.selections, SELECTIONS)
    dtypes = _chosen("--dtypes", options.dtypes, ("float16", "bfloat16", "float32"))
    batches = [int(batch) for batch in options.batch_size.split(",")]
    if not torch.cuda.is_available():
        raise report.NeedsGpuError(
            "this benchmark times the CUDA kernel, and PyTorch finds no NVIDIA GPU here",
            "benchmarks/endtoend.py measures ONNX Runtime where there is no GPU",
        )
    from benchmarks.lib.reduction_calls import copy_calls

    compiled = names if options.compile == "all" else options.compile.split(",")
    facts = report.machine()
    base = options.output or report.default_output("kernel", facts)
    big = timing.cuda(timing.captured(copy_calls(BIG_COPY, 1)))
    bandwidth = BIG_COPY / timing.summary([big() for _ in range(ROUNDS)])["median"] * 1e6
    rows: list[dict[str, Any]] = []
    result = {"machine": facts, "copy_bytes_per_second": round(bandwidth), "rows": rows}
    print(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s")
    started = time.monotonic()
    for case in (make_case(name, selection) for name in names for selection in selections):
        for dtype in dtypes:
            for batch in batches:
                if time.monotonic() - started > options.limit:
                    print(f"--limit: {case.model} {case.attributes.selection} {batch} left out")
                    continue
                row = measure(
                    case, batch, dtype, bandwidth, options.seconds, case.model in compiled
                )
                torch.cuda.empty_cache()
                rows.append(row)
                _print(row)
                report.write(base, result, table(result))  # a cut run leaves what it has
    for path in report.write(base, result, table(result), lambda plt, to: plot(result, plt, to)):
        print(f"written    {path}")
    return result


def make_case(name: str, selection: str) -> Case:
    """The first reduction of the schedule `paper` in a model of MODELS."""
    from benchmarks.lib.reduction_calls import Case

    patches, channels, heads, prefix = MODELS[name]
    attributes = TokenReduce(
        num_prefix=prefix,
        num_keep=math.ceil(KEEP_RATE * patches),
        num_heads=heads,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        tau=0.0,  # random keys resemble each other little: this merges nearly all, the dearest case
        importance="class" if prefix else "received",
        selection=selection,
    )
    return Case(name, patches + prefix, channels, attributes)


def measure(
    case: Case, batch: int, dtype: str, bandwidth: float, seconds: float, compiled: bool
) -> dict[str, Any]:
    """One row: every contender's summary in microseconds per call, or None with a note."""
    import torch

    from benchmarks.lib import reduction_calls as calls

    kind = getattr(torch, dtype)
    sets = calls.sets_of(case, batch, kind)
    moved = case.bytes_moved(batch, kind.itemsize)
    builders: dict[str, Any] = {
        "ours": lambda: _graphed(calls.kernel_calls(case, sets, plain=False)),
        "plain": lambda: _graphed(calls.kernel_calls(case, sets, plain=True)),
        "eager": lambda: _enqueued(calls.pytorch_calls(case, sets, compiled=False)),
        "eager_graph": lambda: _graphed(calls.pytorch_calls(case, sets, compiled=False)),
        "compiled": lambda: _graphed(calls.pytorch_calls(case, sets, compiled=True)),
        "copy": lambda: _graphed(calls.copy_calls(moved, len(sets))),
    }
    if not compiled:
        del builders["compiled"]
    timers, notes = {}, {}
    for name, build in builders.items():
        try:
            timers[name] = build()
            timers[name]()
        except torch.cuda.OutOfMemoryError:
            timers.pop(name, None)
            notes[name] = "out of GPU memory"
            torch.cuda.empty_cache()
        except Exception as error:  # one contender less (inductor's errors are of many types)
            if name == "ours":
                raise
            timers.pop(name, None)
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    taken = timing.interleave(timers, rounds=ROUNDS, seconds=seconds)
    floor = moved / bandwidth * 1e6
    ours = taken["ours"]
    row: dict[str, Any] = {
        "model": case.model,
        "selection": case.attributes.selection,
        "dtype": dtype,
        "batch": batch,
        "tokens": [case.tokens, case.attributes.num_prefix + case.attributes.num_keep],
        "sets": len(sets),
        "bytes": moved,
        "floor_us": round(floor, 3),
        "ratio_to_floor": round(timing.summary(ours)["median"] / floor, 3),
        "microseconds": {name: timing.summary(values) for name, values in taken.items()},
        "speedup": {
            name: timing.ratio(values, ours) for name, values in taken.items() if name != "ours"
        },
    }
    if notes:
        row["notes"] = notes
    return row


def _graphed(calls: list[Any]) -> timing.Timer:
    repeats = max(1, LAUNCHES // len(calls))
    return timing.cuda(timing.captured(calls, repeats), repeats * len(calls))


def _enqueued(calls: list[Any]) -> timing.Timer:
    """Calls as Python issues them, a few in a row: at small batches the CPU is what is timed."""

    def work() -> None:
        for call in calls[:4]:
            call()

    work()
    return timing.cuda(work, len(calls[:4]))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = ["model, selection, type", "batch", "MB", "floor us"]
    head += ["ours us", "x floor", "plain us", "eager us", "eager graph us", "compiled us"]
    head += ["copy us", "eager graph / ours", "compiled / ours"]
    rows = []
    for row in result["rows"]:
        times = {name: row["microseconds"].get(name, {}).get("median") for name in CONTENDERS}
        ratios = {name: found["median"] for name, found in row["speedup"].items()}
        rows.append(
            [
                f"{row['model']} {row['selection']} {row['dtype']}",
                str(row["batch"]),
                report.number(row["bytes"] / 1e6),
                report.number(row["floor_us"]),
                report.number(times["ours"]),
                f"{row['ratio_to_floor']:.2f}",
                *(report.number(times[name]) for name in CONTENDERS[1:]),
                report.number(ratios.get("eager_graph")),
                report.number(ratios.get("compiled")),
            ]
        )
    title = report.heading("One reduction on a GPU", result["machine"])
    bandwidth = result["copy_bytes_per_second"] / 1e12
    note = f"Copy bandwidth {bandwidth:.2f} TB/s (read and written), floor = MB / bandwidth.\n"
    return f"{title}\n{note}\n{report.markdown(head, rows)}\n"


def plot(result: dict[str, Any], plt: Any, path: Path) -> None:
    """Time over batch, one panel per model and selection; dashed: the floor."""
    rows = result["rows"]
    panels = list(dict.fromkeys((r["model"], r["selection"], r["dtype"]) for r in rows))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        mine = [r for r in rows if (r["model"], r["selection"], r["dtype"]) == panel]
        for name in CONTENDERS:
            points = [
                (r["batch"], r["microseconds"][name]["median"])
                for r in mine
                if name in r["microseconds"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        batches = [r["batch"] for r in mine]
        axes.plot(batches, [r["floor_us"] for r in mine], "k--", linewidth=1, label="floor")
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="microseconds")
        axes.set_title(" ".join(panel), fontsize="small")
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
    grid.flat[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def _print(row: dict[str, Any]) -> None:
    times = ", ".join(f"{n} {v['median']:.1f}" for n, v in row["microseconds"].items())
    print(
        f"{row['model']} {row['selection']} {row['dtype']} batch {row['batch']}: {times} us; "
        f"{row['ratio_to_floor']:.2f}x the floor"
    )
    for name, note in row.get("notes", {}).items():
        print(f"  {name} left out: {note}", file=sys.stderr)


def _chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ModelError(f"{option}: unknown {unknown[0]!r}", f"known: {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
