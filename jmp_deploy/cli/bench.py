"""The command `bench`: flags, and what is printed. Flag names are those of timm's benchmark.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..backends import AUTO, AUTO_HELP, NAMES
from ..core.errors import JmpDeployError
from . import show
from .flags import add_command, positive

BACKENDS = (AUTO, *reversed(NAMES))


def add_commands(commands: Any) -> None:
    """Adds it to what `add_subparsers` returned."""
    parser = add_command(
        commands,
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
    parser.add_argument("dir", type=Path, metavar="DIR", help="artifact folder made by `build`")
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
        type=_batches,
        default=(),
        metavar="N,N,..",
        help="images per inference (those of 1,8,32 that the profile has)",
    )
    parser.add_argument(
        "--backend",
        type=_backends,
        default=(AUTO,),
        metavar="A,B",
        help=f"of {', '.join(BACKENDS)}; {AUTO_HELP}",
    )
    parser.add_argument(
        "--num-warm-iter",
        type=positive,
        default=10,
        metavar="N",
        help="inferences before anything counts, at least; goes on until times are stable (10)",
    )
    parser.add_argument(
        "--num-bench-iter",
        type=positive,
        default=40,
        metavar="N",
        help="inferences to measure, at least, if --seconds allows (40)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        metavar="S",
        help="measure each row for this long at most, after at least four rounds (20; 1 with "
        "--table)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="of ONNX Runtime, and of PyTorch on a CPU (every CPU that this process may use)",
    )
    parser.add_argument(
        "--cuda-graph",
        choices=("both", "on", "off"),
        default="both",
        help="replay engines as CUDA graphs, launch them kernel by kernel, or measure both (both)",
    )
    parser.add_argument(
        "--no-energy",
        action="store_true",
        help="do not run every row for three more seconds to read its power",
    )
    parser.add_argument(
        "--times",
        type=Path,
        metavar="FILE",
        help="write every inference in the form of trtexec --exportTimes, a file per row",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw latency over batch (needs matplotlib)"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="measure blocks over the number of tokens instead, for tune --latency-ms --on FILE "
        "(needs PyTorch and timm)",
    )
    parser.add_argument(
        "--table-step", type=positive, default=8, metavar="N", help="tokens between its rows (8)"
    )


def _bench(options: argparse.Namespace) -> int:
    from ..bench.bench import INTERRUPTED, BenchOptions, bench
    from ..bench.measure import Settings
    from . import bench_view

    if options.table:
        return _table(options)
    if options.plot:
        bench_view.require_matplotlib()
    asked = BenchOptions(
        folder=options.dir,
        against=options.against,
        batches=options.batch_size,
        backends=options.backend,
        cuda_graph=options.cuda_graph,
        threads=options.threads,
        settings=Settings(
            warm_iterations=options.num_warm_iter,
            iterations=options.num_bench_iter,
            seconds=options.seconds or Settings().seconds,
        ),
        energy_seconds=0.0 if options.no_energy else 3.0,
    )
    try:
        with bench_view.BenchProgress(show.console(stderr=True)) as progress:
            result, everything = bench(asked, on_progress=progress.update)
    except KeyboardInterrupt:
        print("nothing was measured whole yet", file=sys.stderr)
        raise
    files = bench_view.write_times(everything, options.times) if options.times else []
    if options.plot:
        bench_view.plot(result, options.plot)
        files.append(str(options.plot))
    show.show(options, bench_view.summary(result, files), {**result, "files": files})
    if result["complete"]:
        return 0
    if result["stopped"] == INTERRUPTED:
        return 130
    return show.fail(result["stopped"], None, 2)


def _table(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..bench.table import SETTINGS, TableOptions, measure_table
    from ..core.files import write_json
    from . import bench_view

    if options.against or options.times or options.plot or len(options.backend) > 1:
        raise JmpDeployError(
            "--table measures one artifact with one backend: no --against, --times or --plot"
        )
    asked = TableOptions(
        folder=options.dir,
        batches=options.batch_size,
        backend=options.backend[0],
        threads=options.threads,
        step=options.table_step,
        settings=replace(SETTINGS, seconds=options.seconds or SETTINGS.seconds),
    )
    with bench_view.BenchProgress(show.console(stderr=True)) as progress:
        table = measure_table(asked, on_progress=progress.update)
    write_json(options.table, table)
    show.show(options, bench_view.table_summary(table, str(options.table)), table)
    return 0


def _batches(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _backends(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(BACKENDS)}")
    return names


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


HANDLERS = {"bench": _bench}
