"""Random shapes and options through the kernels, against the float64 oracle.

    python scripts/kernel_sweep.py                       # 2,000 cases on a CPU, by the stand-in
    python scripts/kernel_sweep.py --seed 7 --first 500 --count 100
    JMP_KERNEL_LIBRARY=kernel.so python scripts/kernel_sweep.py --count 20000     # on a GPU

Seed and number make a case: batch (up to 2,048 and, every 250th, 70,000, of a few different
samples), tokens, heads, types, options, odd widths, and which kernels run it: tuned in one of its
ways (with clusters; blocks in another order), or plain. Every different sample is held against the
oracle, every copy of it in the batch against its bits. The first failure ends the run and says the
command that repeats it.

Exit code 0: all as they should be; 1: a case is not; 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
PLUGINS = REPO / "plugins"
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(PLUGINS / "tests")]

import oracle  # noqa: E402
from kernel_cases import Case, assert_matches, attributes, random_case  # noqa: E402
from kernel_library import (  # noqa: E402
    DTYPES,
    KernelLibrary,
    Outputs,
    compile_for_cpu,
    make_params,
)

from jmp_deploy.core.errors import ToolchainError  # noqa: E402
from jmp_deploy.plugin.toolchain import find_cxx  # noqa: E402

MOST_BATCH = 70_000
HUGE_EVERY = 250
DIFFERENT = 4
"""Samples of a batch that are not copies of others."""
WAYS = ("0,101376", "16,101376", "64,101376,1", "256,0", "1,0")
"""What the stand-in says of its device (plugins/token_reduce_kernel.cu): each has another way."""
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}

Run = Callable[[Case, dict[str, Any], bool], Outputs]
"""(case, attributes, by the plain kernels) -> outputs"""


@dataclass(frozen=True)
class Drawn:
    """A case: `batch` samples, each of them one of those of `case`.

    Attributes:
        which: [batch] sample of `case`.
        plain: by the plain kernels, even if the tuned ones would take it.
        way, order: of the stand-in.
    """

    case: Case
    attrs: dict[str, Any]
    which: np.ndarray
    plain: bool
    way: str
    order: int

    def __str__(self) -> str:
        x, qkv, size = self.case
        shapes = f"x {x.shape[1:]}, qkv {qkv.shape[1:]}, size {size.shape}, {x.dtype}"
        return (
            f"batch {len(self.which)}, {shapes}, {'plain' if self.plain else 'tuned'}, "
            f"way {self.way}, order {self.order}, {self.attrs}"
        )


def draw(seed: int, number: int, most_batch: int = MOST_BATCH) -> Drawn:
    """The case of a number."""
    rng = np.random.default_rng([seed, number])

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    huge = number % HUGE_EVERY == HUGE_EVERY - 1
    many = huge or rng.random() < 0.15
    plain = rng.random() < 0.3
    prefix = one_of(0, 1, 1, 2, 5)
    most = one_of(6, 6, 20) if many else one_of(40, 40, 100, 260, 17 if plain else 600)
    if huge:
        most = 4
    patches = int(rng.integers(1, most + 1))
    head_dim = int(one_of(1, 3, 8, 33) if plain else 8 * rng.integers(1, 3 if many else 17))
    received = prefix == 0 or rng.random() < 0.3
    attrs = attributes(
        num_prefix=prefix,
        num_keep=int(rng.integers(1, patches + 1)),
        num_heads=int(one_of(1, 2) if many else one_of(1, 2, 3, 6, 7, 13)),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        tau=one_of(-1.0, -0.1, 0.1, 0.4, 1.5),
        granularity=one_of(0, 1),
        importance=oracle.RECEIVED if received else oracle.CLASS_ROW,
        proportional=one_of(0, 1),
        selection=one_of(0, 1),
        merge_weight=one_of(0.0, 0.25, 1.0),
    )
    batch = int(2 ** rng.uniform(6, 11)) if many else int(rng.integers(1, 9))
    if huge:  # 65,535 is the limit of a grid in two of its directions
        batch = MOST_BATCH - int(rng.integers(4000))
    batch = min(batch, most_batch)
    case = random_case(
        int(rng.integers(2**32)),
        attrs,
        batch=min(batch, DIFFERENT),
        tokens=prefix + patches,
        channels=int(one_of(1, 7, 40) if plain else one_of(8, 24, 264, 520)),
        parts=one_of(2, 3),
        extra=one_of(0, 1 if plain else 8),
        broadcast=bool(rng.random() < 0.3),
        dtype=one_of(*DTYPES).type,
    )
    which = rng.integers(len(case[0]), size=batch)
    which[: len(case[0])] = np.arange(len(case[0]))
    return Drawn(case, attrs, which, plain, one_of(*WAYS), int(rng.integers(3)))


def check(drawn: Drawn, run: Run) -> None:
    """Runs a case.

    Raises:
        AssertionError: it is not what it should be.
    """
    x, qkv, size = drawn.case
    sizes = size if len(size) == 1 else size[drawn.which]
    whole = x[drawn.which], qkv[drawn.which], np.ascontiguousarray(sizes)
    got = run(whole, drawn.attrs, drawn.plain)
    names = ("y", "out_size", "log_size", "index")
    few = {name: getattr(got, name)[: len(x)] for name in names}
    tolerance = TOLERANCE[x.dtype.name]
    assert_matches(
        Outputs(**few, num_keep=got.num_keep), drawn.case, drawn.attrs, tolerance=tolerance
    )
    for name, values in few.items():
        bits = np.ascontiguousarray(values).reshape(len(x), -1).view(np.uint8)
        found = getattr(got, name).reshape(len(drawn.which), -1).view(np.uint8)
        wrong = np.flatnonzero((found != bits[drawn.which]).any(axis=1))
        assert not len(wrong), (
            f"{name} of samples {wrong[:5]} is not that of the same sample before"
        )


# --- On a CPU, on a GPU --------------------------------------------------------------------------


def on_host(library: KernelLibrary, drawn: Drawn) -> Run:
    """By the stand-in, in the way that the case says."""

    def run(case: Case, attrs: dict[str, Any], plain: bool) -> Outputs:
        os.environ["JMP_HOST_DEVICE"] = drawn.way
        os.environ["JMP_HOST_ORDER"] = str(drawn.order)
        if drawn.order == 0:
            del os.environ["JMP_HOST_ORDER"]
        return library.run_host(*case, plain=plain, **attrs)

    return run


def on_gpu(library: KernelLibrary, drawn: Drawn) -> Run:
    """By a GPU, every buffer between two that nobody may touch."""
    from tests.gpu.test_kernel_gpu import run as launch

    def run(case: Case, attrs: dict[str, Any], plain: bool) -> Outputs:
        params = make_params(*case, DTYPES[case[0].dtype], **attrs)
        tuned = not plain and library.check_tuned(params) is None
        return launch(library, case, attrs, "tuned" if tuned else "plain")

    return run


# --- The program ---------------------------------------------------------------------------------


def work(path: Path, gpu: bool, seed: int, numbers: range, most_batch: int, at: Any) -> None:
    """Runs cases in a process of its own, which a fault may end; `at` tells how far it came."""
    library = KernelLibrary(path)
    for number in numbers:
        at.value = number
        drawn = draw(seed, number, most_batch)
        check(drawn, (on_gpu if gpu else on_host)(library, drawn))
    at.value = numbers.stop


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all cases (0)")
    add("--first", type=int, default=0, help="number of the first case (0)")
    add("--count", type=int, default=2000, help="cases (2000)")
    add("--most-batch", type=int, default=MOST_BATCH, help=f"({MOST_BATCH})")
    add("--jobs", type=int, default=None, help="processes (one for each core; on a GPU one)")
    options = parser.parse_args(arguments)
    given = os.environ.get("JMP_KERNEL_LIBRARY")
    with tempfile.TemporaryDirectory() as folder:
        try:
            target = Path(folder) / "kernel.so"
            library = Path(given) if given else compile_for_cpu(find_cxx(), target, "-O2", "-g")
        except ToolchainError as error:
            print(f"kernel_sweep: {error.message}; {error.hint}", file=sys.stderr)
            return 2
        return sweep(library, options, gpu=given is not None)


def sweep(library: Path, options: argparse.Namespace, *, gpu: bool) -> int:
    """Runs the cases; the exit code."""
    jobs = options.jobs or (1 if gpu else os.cpu_count() or 1)
    stop = options.first + options.count
    context = multiprocessing.get_context("fork")
    workers = []
    for job in range(jobs):
        numbers = range(options.first + job, stop, jobs)
        at = context.Value("q", numbers.start)
        task = library, gpu, options.seed, numbers, options.most_batch, at
        worker = context.Process(target=work, args=task)
        worker.start()
        workers.append((worker, at, numbers))
    started = told = time.monotonic()
    running = True
    while running:
        running = False
        for worker, at, _ in workers:
            worker.join(0.2)
            running = running or worker.exitcode is None
            if worker.exitcode:
                for other, _, _ in workers:
                    other.terminate()
                print(
                    f"{draw(options.seed, at.value, options.most_batch)}\n"
                    f"kernel_sweep: case {at.value} failed (exit code {worker.exitcode}). Again:\n"
                    f"  python scripts/kernel_sweep.py --seed {options.seed} --first {at.value} "
                    f"--count 1 --most-batch {options.most_batch}",
                    file=sys.stderr,
                )
                return 1
        if time.monotonic() - told > 30:
            told = time.monotonic()
            done = sum(len(range(n.start, at.value, n.step)) for _, at, n in workers)
            print(f"kernel_sweep: {done} of {options.count}", flush=True)
    seconds = time.monotonic() - started
    where = "on a GPU" if gpu else "by the stand-in"
    print(f"kernel_sweep: {options.count} cases of seed {options.seed} {where}: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
