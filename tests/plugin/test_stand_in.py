"""What the stand-in for CUDA (plugins/tests/cuda_on_host.h) finds: each way has a planted fault.

Blocks in another order, shared memory full of what it was not before, clusters, the matrix products
of GPUs before 8.0, and the head size of the models that are shipped under both sanitizers.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.plugin.test_kernel_host import (
    ADDRESS,
    DRIVER,
    KERNEL,
    PLUGINS,
    compile_host,
    run_driver,
)

# test_kernel_host puts these folders on sys.path
import oracle  # isort: skip
from kernel_cases import Case, assert_matches, attributes, random_case  # isort: skip
from kernel_library import KernelLibrary, Outputs, read_outputs, write_case  # isort: skip

WAYS = {
    "alone": "0,101376",
    "split": "16,101376",
    "cluster": "64,101376,1",
    "streamed": "256,0",
}
Compile = Callable[..., KernelLibrary]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles the kernels, with a fault in a source if one is named: (FILE, was, becomes)."""

    def make(*options: str, fault: tuple[str, str, str] | None = None) -> KernelLibrary:
        folder = tmp_path_factory.mktemp("stand_in")
        sources = shutil.copytree(PLUGINS, folder / "plugins")
        if fault is not None:
            name, was, becomes = fault
            text = (sources / name).read_text()
            assert text.count(was) == 1, f"{name} has no single {was!r} any more: plant another"
            (sources / name).write_text(text.replace(was, becomes))
        flags = ("-O0", "-DJMP_TEST_SUBSET=1", "-shared", "-fPIC", *options)
        file = sources / KERNEL.name
        return KernelLibrary(compile_host(folder / "kernel.so", *flags, "-x", "c++", str(file)))

    return make


@pytest.fixture(scope="module")
def library(compiled: Compile) -> KernelLibrary:
    return compiled()


def make_case(batch: int = 3, **changes: Any) -> tuple[Case, dict[str, Any]]:
    """Four tiles of critical tokens, two groups of others."""
    shape = {"num_keep": 50, "num_heads": 3, "head_dim": 24, "scale": 24**-0.5}
    attrs = attributes(**shape | {"selection": oracle.DISTINCT} | changes)
    return random_case(5, attrs, batch=batch, tokens=90, channels=32, dtype=np.float16), attrs


def run(
    library: KernelLibrary, way: str, case: Case, attrs: dict[str, Any], **environment: str
) -> Outputs:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"JMP_HOST_DEVICE": WAYS[way], **environment}.items():
            patch.setenv(name, value)
        return library.run_host(*case, **attrs)


def noticed(
    library: KernelLibrary, way: str, case: Case, attrs: dict[str, Any], **environment: str
) -> bool:
    """Whether a faulty kernel gives something else, or crashes: in a process of its own."""

    def attempt() -> None:
        faulthandler.disable()  # a crash is one of the answers
        got = run(library, way, case, attrs, **environment)
        try:
            assert_matches(got, case, attrs)
        except AssertionError:
            os._exit(1)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=attempt)
    child.start()
    child.join()
    return child.exitcode != 0


# --- Order of the blocks, static shared memory ---------------------------------------------------


TOYS = """
#include "cuda_on_host.h"
static int total[8];
// The fault: a block that counts on those before it.
static void chain() { total[blockIdx.x] = (blockIdx.x == 0 ? 0 : total[blockIdx.x - 1]) + 1; }
// The fault: a variable that no block but the first sets, and one that none does.
static void leftover() {
  __shared__ int left, fresh;
  if (blockIdx.x == 0) left = 7;
  total[2 * blockIdx.x] = left;
  total[2 * blockIdx.x + 1] = fresh;
}
int main(int, char** argv) {
  if (argv[1][0] == 'c') cuda_on_host::launch(8, 1, 0, [] { chain(); });
  else cuda_on_host::launch(4, 1, 0, [] { leftover(); });
  for (int value : total) printf("%d ", value);
}
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.cpp").write_text(TOYS)
    program = compile_host(
        folder / "toys", f"-I{PLUGINS / 'tests'}", "-Wno-unused", str(folder / "toys.cpp")
    )

    def go(which: str, **environment: str) -> list[int]:
        command = [str(program), which]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, check=True
        )
        return [int(value) for value in done.stdout.split()]

    return go


def test_a_block_that_counts_on_those_before_it_is_noticed(toys: Callable[..., list[int]]) -> None:
    assert toys("chain") == [1, 2, 3, 4, 5, 6, 7, 8]  # unnoticed in order
    found = [toys("chain", JMP_HOST_ORDER=seed) for seed in ("1", "2")]
    assert found[0] != found[1] and [1, 2, 3, 4, 5, 6, 7, 8] not in found


def test_shared_memory_of_a_block_before_is_gone(toys: Callable[..., list[int]]) -> None:
    assert toys("leftover") == [7, -1] + [-1] * 6


def test_an_overrun_of_static_shared_memory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(
        '#include "cuda_on_host.h"\n'
        "static void kernel(int n) { __shared__ int a[8]; int* p = a; p[threadIdx.x + n] = 1; }\n"
        "int main(int n, char**) { cuda_on_host::launch(2, 8, 0, [=] { kernel(n - 1); }); }\n"
    )
    flags = (*ADDRESS, "-DJMP_HOST_THREADS", f"-I{PLUGINS / 'tests'}", "-w", "-Wno-error")
    program = compile_host(tmp_path / "a", *flags, str(tmp_path / "a.cpp"))
    for arguments, complaint in (([], ""), (["more"], "global-buffer-overflow")):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert (complaint in done.stderr) and bool(done.returncode) == bool(complaint)


def test_kernels_that_count_on_zeros_in_shared_memory_are_noticed(compiled: Compile) -> None:
    fault = "equal_words[word] = equal;", "if (equal != 0u) equal_words[word] = equal;"
    mutant = compiled(fault=("token_reduce_select.cuh", *fault))
    case, attrs = make_case(batch=1, num_keep=4)
    assert noticed(mutant, "streamed", case, attrs)
    assert not noticed(mutant, "alone", case, attrs)  # which does not go there


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_blocks_changes_no_bit(
    library: KernelLibrary, way: str, selection: int
) -> None:
    case, attrs = make_case(selection=selection)
    want = run(library, way, case, attrs)
    assert assert_matches(want, case, attrs) >= 2
    for seed in ("1", "2"):
        got = run(library, way, case, attrs, JMP_HOST_ORDER=seed)
        for name in ("y", "out_size", "log_size", "index"):
            assert getattr(got, name).tobytes() == getattr(want, name).tobytes(), name


# --- Clusters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("blocks", [12, 24, 48])  # 2, 4 and 8 of them to a sample
def test_clusters_give_the_bits_of_one_block(
    library: KernelLibrary, blocks: int, selection: int, granularity: int
) -> None:
    case, attrs = make_case(selection=selection, granularity=granularity)
    alone = run(library, "alone", case, attrs)
    got = run(library, "cluster", case, attrs, JMP_HOST_DEVICE=f"{blocks},101376,1")
    for name in ("y", "out_size", "log_size", "index"):
        assert getattr(got, name).tobytes() == getattr(alone, name).tobytes(), name


@pytest.mark.parametrize(
    ("selection", "barrier"),
    [*((oracle.IMPORTANCE, n) for n in (1, 2)), *((oracle.DISTINCT, n) for n in (1, 2, 3))],
)
def test_a_missing_cluster_barrier_is_noticed(
    library: KernelLibrary, selection: int, barrier: int
) -> None:
    case, attrs = make_case(selection=selection)
    assert noticed(library, "cluster", case, attrs, JMP_SKIP_CLUSTER=str(barrier))


def test_there_is_no_other_cluster_barrier(library: KernelLibrary) -> None:
    case, attrs = make_case()
    assert not noticed(library, "cluster", case, attrs, JMP_SKIP_CLUSTER="4")


def test_bytes_that_nobody_sends_are_reported(compiled: Compile) -> None:
    """A GPU would wait for them for ever."""
    fault = ("expect_bytes(arrivals + 1, rest * 4);", "expect_bytes(arrivals + 1, rest * 4 + 4);")
    mutant = compiled(fault=("token_reduce_resident.cuh", *fault))
    case, attrs = make_case()
    assert noticed(mutant, "cluster", case, attrs)
    assert not noticed(mutant, "alone", case, attrs)  # which expects none


# --- GPUs before 8.0 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turing(compiled: Compile) -> KernelLibrary:
    return compiled("-DJMP_HOST_ARCH=750")


@pytest.mark.parametrize("way", ["alone", "split", "streamed"])
def test_products_in_two_halves(turing: KernelLibrary, way: str) -> None:
    for selection in (oracle.IMPORTANCE, oracle.DISTINCT):
        case, attrs = make_case(selection=selection)
        assert assert_matches(run(turing, way, case, attrs), case, attrs) >= 2


def test_halves_that_are_mixed_up_are_noticed(compiled: Compile) -> None:
    fault = ("multiply_half_tile(c, a[2], a[3], b1);", "multiply_half_tile(c, a[2], a[1], b1);")
    mutant = compiled("-DJMP_HOST_ARCH=750", fault=("token_reduce_warp.cuh", *fault))
    case, attrs = make_case()
    for way in ("alone", "streamed"):
        assert noticed(mutant, way, case, attrs)


# --- The head size of the models, under the sanitizers -------------------------------------------


THREADS = ("-DJMP_BLOCK_THREADS=64", "-DJMP_PLAIN_THREADS=8", "-DJMP_TILE_COLUMNS=32")


@pytest.fixture(scope="module", params=["thread", "address"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A driver with all types and head sizes."""
    flags = {"thread": ["-fsanitize=thread"], "address": ADDRESS}[request.param]
    output = tmp_path_factory.mktemp("sanitized") / f"driver_{request.param}"
    sources = ("-x", "c++", str(KERNEL), str(DRIVER))
    return compile_host(output, "-O0", *flags, *THREADS, "-DJMP_HOST_THREADS", *sources)


def head_64(path: Path, selection: int) -> tuple[Case, dict[str, Any]]:
    attrs = attributes(
        num_keep=40,
        num_heads=2,
        head_dim=64,
        scale=0.125,
        tau=-1.0,
        granularity=oracle.SAMPLE,
        selection=selection,
    )
    case = random_case(12, attrs, batch=2, tokens=60, channels=24, parts=2, dtype=np.float16)
    write_case(path, *case, **attrs)
    return case, attrs


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("way", ["alone", "split", "streamed"])
def test_heads_of_64_under_the_sanitizers(
    sanitized: Path, way: str, selection: int, tmp_path: Path
) -> None:
    case, attrs = head_64(tmp_path / "case", selection)
    done = run_driver(sanitized, way, tmp_path / "case", tmp_path / "out")
    assert done.returncode == 0 and done.stderr == ""
    assert assert_matches(read_outputs(tmp_path / "out", case[0], attrs), case, attrs) == 2


@pytest.mark.parametrize("way", ["alone", "streamed"])
def test_a_fault_at_heads_of_64_is_reported(sanitized: Path, way: str, tmp_path: Path) -> None:
    head_64(tmp_path / "case", oracle.DISTINCT)
    if sanitized.name.endswith("thread"):
        file = "token_reduce_resident.cuh" if way == "alone" else "token_reduce_rate.cuh"
        lines = (PLUGINS / file).read_text().splitlines()
        barriers = [n for n, line in enumerate(lines, 1) if line.strip() == "__syncthreads();"]
        plants = [((), {"JMP_SKIP": f"{file}:{line}"}) for line in barriers]
        complaint = "data race"
    else:
        plants, complaint = [(("qkv",), {})], "heap-buffer-overflow"
    for arguments, environment in plants:  # some barriers are passed by other options alone
        done = run_driver(
            sanitized, way, tmp_path / "case", tmp_path / "out", *arguments, **environment
        )
        if complaint in done.stderr:
            return
    pytest.fail("nothing was reported")
