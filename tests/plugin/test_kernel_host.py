"""The CUDA kernels on a CPU: the same .cu, compiled by the host compiler, against the oracle.

The plain version (the specification) and the ways of the tuned one. What is shown here: arithmetic,
decisions, ties, indices, barriers and asynchronous copies (ThreadSanitizer), buffer bounds
(AddressSanitizer). What needs a GPU is in tests/gpu.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
sys.path[:0] = [str(PLUGINS.parent / "tests"), str(PLUGINS / "tests")]

import oracle  # noqa: E402
from kernel_cases import (  # noqa: E402
    Case,
    assert_legal,
    assert_matches,
    attributes,
    random_case,
    tied_case,
)
from kernel_library import (  # noqa: E402
    DTYPES,
    FLOAT16,
    FLOAT32,
    KernelLibrary,
    Outputs,
    Params,
    bfloat16,
    make_params,
    read_outputs,
    write_case,
)

KERNEL = PLUGINS / "token_reduce_kernel.cu"
DRIVER = PLUGINS / "tests" / "host_driver.cpp"
# How the tuned kernels go about a sample that fits shared memory, and one that does not: what the
# stand-in says of its device, blocks that fill it and bytes of shared memory.
DEVICES = {"alone": "0,101376", "split": "16,101376", "streamed": "256,0"}
VERSIONS = ("plain", *DEVICES)
DEIT_S = {"num_keep": 138, "num_heads": 6, "head_dim": 64, "scale": 0.125}
ALL_DTYPES = [np.float32, np.float16, *([bfloat16.type] if bfloat16 is not None else [])]
FLAGS = ["-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Wconversion", "-Werror"]

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
if "clang" not in os.environ.get("CXX", ""):  # __shared__ has a section of its own
    ADDRESS.append("-fsanitize-sections=jmp_shared")


# --- Building ------------------------------------------------------------------------------------


def compile_host(output: Path, *options: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++) on this machine")
    command = [compiler, *FLAGS, "-DJMP_CUDA_ON_HOST", *options, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode != 0 and re.search(r"cannot find.*(tsan|asan|ubsan)", done.stderr):
        pytest.skip("the compiler's sanitizer runtime is not installed")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel_host")


class Kernel:
    """One of VERSIONS in a library. All but `plain` refuse cases that would run that."""

    def __init__(self, library: KernelLibrary, version: str) -> None:
        self.library, self.version = library, version

    def __call__(self, *case: np.ndarray, want_index: bool = True, **attrs: Any) -> Outputs:
        plain = self.version == "plain"
        if not plain:
            params = make_params(*case, DTYPES[case[0].dtype], **attrs)
            assert self.library.check_tuned(params) is None
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JMP_HOST_DEVICE", DEVICES.get(self.version, ""))
            return self.library.run_host(*case, want_index=want_index, plain=plain, **attrs)


@pytest.fixture(scope="session")
def library(build_dir: Path) -> KernelLibrary:
    """With the GPU's block sizes."""
    options = ["-O2", "-shared", "-fPIC", "-x", "c++", str(KERNEL)]
    return KernelLibrary(compile_host(build_dir / "kernel.so", *options))


@pytest.fixture(params=VERSIONS)
def kernel(library: KernelLibrary, request: pytest.FixtureRequest) -> Kernel:
    return Kernel(library, request.param)


@pytest.fixture(params=DEVICES)
def tuned(library: KernelLibrary, request: pytest.FixtureRequest) -> Kernel:
    return Kernel(library, request.param)


def compile_driver(output: Path, *sanitizer: str) -> Path:
    """Real threads, hence few; tiles of few columns and blocks that take several of them."""
    small = ["-DJMP_BLOCK_THREADS=64", "-DJMP_PLAIN_THREADS=8", "-DJMP_TILE_COLUMNS=32"]
    small += ["-DJMP_TEST_SUBSET=1", "-DJMP_HOST_THREADS"]
    options = ["-O1", *sanitizer, *small, "-x", "c++", str(KERNEL), str(DRIVER)]
    return compile_host(output, *options)


@pytest.fixture(scope="session")
def thread_driver(build_dir: Path) -> Path:
    return compile_driver(build_dir / "driver_tsan", "-fsanitize=thread")


@pytest.fixture(scope="session")
def address_driver(build_dir: Path) -> Path:
    # -O0 last: the optimizer takes four times as long over what UndefinedBehaviorSanitizer adds.
    return compile_driver(build_dir / "driver_asan", *ADDRESS, "-O0")


# --- Against the oracle --------------------------------------------------------------------------


IMPORTANCES = [(v, kind) for v in VERSIONS for kind in (oracle.CLASS_ROW, oracle.RECEIVED)]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize(("version", "importance"), IMPORTANCES)
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize(("proportional", "tau"), [(0, -1.0), (1, 0.3), (1, 1.5)])
def test_every_option(
    library: KernelLibrary,
    dtype: Any,
    granularity: int,
    version: str,
    importance: int,
    selection: int,
    proportional: int,
    tau: float,
) -> None:
    attrs = attributes(
        granularity=granularity,
        importance=importance,
        proportional=proportional,
        selection=selection,
        tau=tau,
    )
    case = random_case(1, attrs, batch=3, dtype=dtype)
    got = Kernel(library, version)(*case, **attrs)
    assert assert_matches(got, case, attrs) >= 2
    pruned = (got.destination == -1).sum(axis=1)
    if tau == -1.0:
        assert (pruned == 0).all()
    if tau == 1.5:
        assert (pruned == 15 - 1 - attrs["num_keep"]).all()


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape_tuned(tuned: Kernel, data: st.DataObject) -> None:
    prefix = data.draw(st.sampled_from([0, 1, 2, 5]), "prefix")
    received = prefix == 0 or data.draw(st.booleans(), "received")
    patches = data.draw(st.one_of(st.integers(1, 40), st.integers(60, 200)), "patches")
    head_dim = data.draw(st.sampled_from([8, 24, 32, 40, 64, 72, 96, 104, 128]), "head_dim")
    attrs = attributes(
        num_prefix=prefix,
        num_keep=data.draw(st.integers(1, patches), "keep"),
        num_heads=data.draw(st.sampled_from([1, 3, 6, 7, 13]), "heads"),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        tau=data.draw(st.sampled_from([-1.0, 0.1, 0.4]), "tau"),
        granularity=data.draw(st.sampled_from([0, 1]), "granularity"),
        proportional=data.draw(st.sampled_from([0, 1]), "proportional"),
        importance=oracle.RECEIVED if received else oracle.CLASS_ROW,
        selection=data.draw(st.sampled_from([0, 1]), "selection"),
        merge_weight=data.draw(st.sampled_from([0.0, 0.25, 1.0]), "merge_weight"),
    )
    case = random_case(
        data.draw(st.integers(0, 2**32 - 1), "seed"),
        attrs,
        batch=data.draw(st.sampled_from([1, 2]), "batch"),
        tokens=prefix + patches,
        channels=data.draw(st.sampled_from([8, 264, 520]), "channels"),
        parts=data.draw(st.sampled_from([2, 3]), "parts"),
        extra=data.draw(st.sampled_from([0, 8]), "extra"),
        broadcast=data.draw(st.booleans(), "broadcast"),
        dtype=data.draw(st.sampled_from(ALL_DTYPES), "dtype"),
    )
    tolerance = 1e-5 if case[0].dtype == np.float32 else None  # sums of up to 200 tokens
    assert_matches(tuned(*case, **attrs), case, attrs, tolerance=tolerance)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape_plain(library: KernelLibrary, data: st.DataObject) -> None:
    prefix = data.draw(st.sampled_from([0, 1, 2, 5]), "prefix")
    patches = data.draw(st.integers(1, 17), "patches")
    keep = data.draw(st.integers(1, patches), "keep")
    head_dim = data.draw(st.sampled_from([1, 3, 8, 33]), "head_dim")
    attrs = attributes(
        num_prefix=prefix,
        num_keep=keep,
        num_heads=data.draw(st.integers(1, 3), "heads"),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        tau=data.draw(st.sampled_from([-1.0, -0.1, 0.2, 0.6, 1.5]), "tau"),
        granularity=data.draw(st.sampled_from([0, 1]), "granularity"),
        importance=1 if prefix == 0 else data.draw(st.sampled_from([0, 1]), "importance"),
        proportional=data.draw(st.sampled_from([0, 1]), "proportional"),
        selection=data.draw(st.sampled_from([0, 1]), "selection"),
        merge_weight=data.draw(st.sampled_from([0.0, 0.25, 1.0]), "merge_weight"),
    )
    case = random_case(
        data.draw(st.integers(0, 2**32 - 1), "seed"),
        attrs,
        batch=data.draw(st.sampled_from([1, 2]), "batch"),
        tokens=prefix + patches,
        channels=data.draw(st.sampled_from([1, 7, 40]), "channels"),
        parts=data.draw(st.sampled_from([2, 3]), "parts"),
        extra=data.draw(st.sampled_from([0, 1]), "extra"),
        broadcast=data.draw(st.booleans(), "broadcast"),
        dtype=data.draw(st.sampled_from([np.float32, np.float16]), "dtype"),
    )
    assert_matches(Kernel(library, "plain")(*case, **attrs), case, attrs)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1),
    keep=st.integers(1, 14),
    tau=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]),
    granularity=st.sampled_from([0, 1]),
    selection=st.sampled_from([0, 1]),
)
def test_ties_go_to_the_lower_index(
    kernel: Kernel, seed: int, keep: int, tau: float, granularity: int, selection: int
) -> None:
    # tau is itself a possible similarity: "merged iff v >= tau" must include equality. The mean of
    # a sample is not exact in float32 unless it is far from tau, hence a tau of its own there.
    attrs = attributes(
        num_heads=1,
        head_dim=16,
        num_keep=keep,
        scale=0.5,
        tau=tau if granularity == oracle.TOKEN else tau - 0.0123,
        granularity=granularity,
        selection=selection,
    )
    case = tied_case(seed, attrs, batch=2, tokens=15)
    assert_matches(kernel(*case, **attrs), case, attrs, exact=True)


def test_distinct_keeps_an_unimportant_token_that_resembles_nothing(
    kernel: Kernel,
) -> None:
    # Token 12 points away from the class token's query and from the others, which are all alike.
    attrs = attributes(num_heads=1, head_dim=8, num_keep=2, tau=-1.0)
    x, qkv, size = random_case(2, attrs, tokens=13)
    first = np.eye(8)[0]
    qkv[..., 8:16] = first
    qkv[:, 0, :8] = first
    qkv[:, 12, 8:16] = -first
    for selection, last in ((oracle.IMPORTANCE, 1), (oracle.DISTINCT, 2)):
        got = kernel(x, qkv, np.ones_like(size), **attrs | {"selection": selection})
        assert (got.destination[:, 12] == last).all()


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("tau", [0.5, 1.5])
def test_identical_tokens_keep_the_first(kernel: Kernel, tau: float, selection: int) -> None:
    # One entry of 1: similarities are exactly 1, importances exactly equal.
    attrs = attributes(num_keep=4, tau=tau, selection=selection)
    x, qkv, size = random_case(2, attrs, tokens=12)
    qkv[:] = 0
    qkv[..., 16::8] = 1
    x[:] = x[:, :1]
    got = kernel(x, qkv, np.ones_like(size), **attrs)
    merged = 1 if tau < 1 else -1
    for places in got.destination:
        np.testing.assert_array_equal(places, [0, 1, 2, 3, 4] + [merged] * 7)
    assert got.out_size[0, 1] == (8 if tau < 1 else 1)
    np.testing.assert_allclose(got.y, np.broadcast_to(x[:, :1], got.y.shape), rtol=1e-6)


def test_zero_keys_are_similar_to_nothing(kernel: Kernel) -> None:
    # Length 0 is divided by 1e-12, not by 0: similarity 0, not NaN.
    for tau, merged in ((0.0, True), (1e-3, False)):
        attrs = attributes(tau=tau)
        x, qkv, size = random_case(3, attrs)
        qkv[..., 16:32] = 0
        got = kernel(x, qkv, np.ones_like(size), **attrs)
        assert ((got.destination[:, 7:] == 1) == merged).all()
        assert ((got.destination[:, 7:] == -1) != merged).all()


@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_keep_all_and_keep_one(kernel: Kernel, granularity: int, prefix: int) -> None:
    tokens = prefix + 11
    for keep in (11, 1):
        attrs = attributes(num_prefix=prefix, num_keep=keep, granularity=granularity, tau=-1.0)
        case = random_case(4, attrs, tokens=tokens)
        got = kernel(*case, **attrs)
        assert_matches(got, case, attrs)
        if keep == 11:  # nothing to do: everything is copied
            assert got.y.tobytes() == case[0].tobytes()
            assert got.out_size.tobytes() == case[2].tobytes()
        else:  # everything ends in one token
            np.testing.assert_array_equal(got.out_size[:, -1], case[2][:, prefix:].sum(axis=1))


def test_size_of_one_row_serves_the_batch(kernel: Kernel) -> None:
    attrs = attributes()
    x, qkv, size = random_case(5, attrs, batch=3, broadcast=True)
    full = np.ascontiguousarray(np.broadcast_to(size, (3, 15)))
    one, all_rows = (kernel(x, qkv, s, **attrs) for s in (size, full))
    assert_same_bits(one, all_rows, slice(None))
    assert (one.out_size > 1).any()


def test_index_is_optional(kernel: Kernel) -> None:
    attrs = attributes()
    case = random_case(6, attrs)
    with_it = kernel(*case, **attrs)
    without = kernel(*case, want_index=False, **attrs)
    assert without.y.tobytes() == with_it.y.tobytes()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_the_size_of_deit_s(tuned: Kernel, dtype: Any, selection: int) -> None:
    attrs = attributes(**DEIT_S, selection=selection)
    case = random_case(7, attrs, batch=2, tokens=197, channels=384, dtype=dtype)
    tolerance = 1e-5 if dtype == np.float32 else None  # sums of dozens of tokens
    assert assert_matches(tuned(*case, **attrs), case, attrs, tolerance=tolerance) >= 1


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_as_many_tokens_as_the_tuned_kernels_take(library: KernelLibrary, selection: int) -> None:
    # Three bits of a key each way: thousands of equal similarities, decided by the index.
    attrs = attributes(
        num_heads=1, head_dim=16, num_keep=1900, scale=0.5, tau=0.25, selection=selection
    )
    case = tied_case(3, attrs, batch=1, tokens=2049)
    tuned, plain = (Kernel(library, version)(*case, **attrs) for version in ("streamed", "plain"))
    assert_same_bits_of_decisions(tuned, plain)


def assert_same_bits_of_decisions(a: Outputs, b: Outputs) -> None:
    np.testing.assert_array_equal(a.destination, b.destination)
    np.testing.assert_array_equal(a.out_size, b.out_size)
    np.testing.assert_allclose(a.y, b.y, rtol=1e-5, atol=1e-6)


def test_a_popular_token_takes_in_many(tuned: Kernel) -> None:
    # One warp gathers them: more sources than lanes, and more columns than one round of accesses.
    attrs = attributes(num_keep=3, tau=-1.0)
    x, qkv, size = random_case(9, attrs, batch=1, tokens=150, channels=520)
    got = tuned(x, qkv, size, **attrs)
    assert assert_matches(got, (x, qkv, size), attrs, tolerance=1e-5) == 1
    assert np.bincount(got.destination[0]).max() > 40


@pytest.mark.parametrize("keep", [1, 45, 46, 120, 149, 150])
def test_ties_across_words_and_tiles(tuned: Kernel, keep: int) -> None:
    # All keys equal: the first `keep` stay, whatever word of bits or tile the cut falls into.
    attrs = attributes(num_keep=keep, tau=0.5)
    x, qkv, size = random_case(2, attrs, batch=1, tokens=151)
    qkv[:] = 0
    qkv[..., 16::8] = 1
    got = tuned(x, qkv, np.ones_like(size), **attrs)
    expected = np.minimum(np.arange(151), np.where(np.arange(151) <= keep, 151, 1))
    np.testing.assert_array_equal(got.destination[0], expected)


def test_large_numbers_do_not_overflow_the_softmax(kernel: Kernel) -> None:
    attrs = attributes(scale=50.0)
    case = random_case(8, attrs)
    assert_matches(kernel(*case, **attrs), case, attrs)


# --- Batches and bad numbers ---------------------------------------------------------------------


def assert_same_bits(a: Outputs, b: Outputs, rows: slice) -> None:
    for name in ("y", "out_size", "log_size", "index"):
        assert getattr(a, name).tobytes() == getattr(b, name)[rows].tobytes(), name


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize(("version", "importance"), IMPORTANCES)
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_sample_is_the_same_alone_and_in_a_batch(
    library: KernelLibrary,
    version: str,
    importance: int,
    granularity: int,
    selection: int,
    dtype: Any,
) -> None:
    kernel = Kernel(library, version)
    attrs = attributes(
        importance=importance, granularity=granularity, selection=selection, num_keep=5
    )
    case = random_case(9, attrs, batch=33, tokens=9, dtype=dtype)
    together = kernel(*case, **attrs)
    assert assert_matches(together, case, attrs) >= 25
    for b in (0, 16, 32):
        rows = slice(b, b + 1)
        x, qkv, size = (np.ascontiguousarray(array[rows]) for array in case)
        assert_same_bits(kernel(x, qkv, size, **attrs), together, rows)


def test_more_work_per_block_in_a_large_batch_changes_no_bit(tuned: Kernel) -> None:
    # 128 samples of two row groups are 256 blocks, enough for each to take all tiles of columns;
    # alone, one sample's groups are split.
    attrs = attributes(selection=oracle.DISTINCT, num_keep=50)
    case = random_case(13, attrs, batch=128, tokens=101)
    together = tuned(*case, **attrs)
    for b in (0, 127):
        rows = slice(b, b + 1)
        x, qkv, size = (np.ascontiguousarray(array[rows]) for array in case)
        assert_same_bits(tuned(x, qkv, size, **attrs), together, rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "qkv", "one key", "size"])
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_bad_numbers_stay_in_their_sample(
    kernel: Kernel, bad: float, where: str, granularity: int, selection: int
) -> None:
    attrs = attributes(granularity=granularity, selection=selection, tau=-1.0)
    clean = random_case(10, attrs, batch=3)
    dirty = tuple(array.copy() for array in clean)
    if where == "one key":
        dirty[1][1, 7, 20] = bad
    else:
        dirty[("x", "qkv", "size").index(where)][1] = bad
    want, got = (kernel(*case, **attrs) for case in (clean, dirty))
    for rows in (slice(0, 1), slice(2, 3)):
        for name in ("y", "out_size", "log_size", "index"):
            assert getattr(got, name)[rows].tobytes() == getattr(want, name)[rows].tobytes()
    assert_legal(got, dirty[0], dirty[2], attrs)  # K members, legal places, whatever it holds


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_nan_importance_selects_the_first_and_prunes_the_rest(
    kernel: Kernel, selection: int
) -> None:
    attrs = attributes(tau=-1.0, selection=selection)
    x, qkv, size = random_case(11, attrs)
    qkv[0] = np.nan
    got = kernel(x, qkv, size, **attrs)
    np.testing.assert_array_equal(got.destination[0], [*range(7)] + [-1] * 8)
    np.testing.assert_array_equal(got.y[0], x[0, :7])


@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("whose", ["kept", "leaving", "all"])
def test_odd_sizes_mean_the_same_to_both_versions(
    tuned: Kernel, whose: str, size: float, weight: float
) -> None:
    """Sizes without a part in who stays; what is merged of them, to the last special value."""
    attrs = attributes(tau=-1.0, proportional=0, merge_weight=weight)
    x, qkv, sizes = random_case(14, attrs)
    reference = Kernel(tuned.library, "plain")
    pruned = reference(x, qkv, sizes, **attrs | {"tau": 1.5})
    kept = pruned.destination >= 0
    sizes[{"kept": kept, "leaving": ~kept, "all": np.ones_like(kept)}[whose]] = size
    plain, got = (version(x, qkv, sizes, **attrs) for version in (reference, tuned))
    np.testing.assert_array_equal(got.destination, plain.destination)
    for name in ("y", "out_size", "log_size"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(plain, name), rtol=1e-5, atol=1e-6, err_msg=name
        )
    if weight == 0.0:  # whatever the sizes are, no content moves
        assert got.y.tobytes() == pruned.y.tobytes()


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named", "found"),
    [
        ({"num_prefix": -1}, "num_prefix", "-1"),
        ({"num_keep": 0}, "num_keep", "0"),
        ({"num_keep": 15}, "tokens", "15"),
        ({"num_keep": 2**31 - 1}, "num_keep", "2147483647"),
        ({"num_heads": 0}, "num_heads", "0"),
        ({"head_dim": -3}, "head_dim", "-3"),
        ({"num_heads": 2**16, "head_dim": 2**16}, "head_dim", "65536"),
        ({"scale": 0.0}, "scale", "0"),
        ({"scale": np.nan}, "scale", "nan"),
        ({"scale": np.inf}, "scale", "inf"),
        ({"tau": np.nan}, "tau", "NaN"),
        ({"granularity": 2}, "granularity", "2"),
        ({"importance": -1}, "importance", "-1"),
        ({"num_prefix": 0}, "num_prefix", "0"),
        ({"proportional": 2}, "proportional", "2"),
        ({"selection": 2}, "selection", "2"),
        ({"dtype": 3}, "dtype", "3"),
        ({"batch": 0}, "batch", "0"),
        ({"channels": 0}, "channels", "0"),
        ({"tokens": 6}, "tokens", "6"),
        ({"qkv_width": 31}, "qkv", "31"),
        ({"size_batch": 3}, "size", "3"),
        ({"batch": 2**30, "size_batch": 1}, "batch", "1073741824"),
    ],
)
def test_refusal_names_what_is_wrong(
    library: KernelLibrary, changes: dict[str, Any], named: str, found: str
) -> None:
    shape = {"dtype": FLOAT32, "batch": 2, "tokens": 15, "channels": 10, "qkv_width": 48}
    good = attributes() | shape | {"size_batch": 2}
    assert library.check(Params(**good)) is None
    params = Params(**(good | changes))
    message = library.check(params)
    assert message is not None and named in message and found in message
    assert library.workspace_bytes(params) == 0
    with pytest.raises(RuntimeError, match="invalid"):
        library.launch(params, *[None] * 8)


def params_of(**changes: Any) -> Params:
    """DeiT-S in float16, batch 64."""
    values = attributes(**DEIT_S) | {
        "dtype": FLOAT16,
        "batch": 64,
        "tokens": 197,
        "channels": 384,
        "qkv_width": 1152,
        "size_batch": 1,
    }
    return Params(**(values | changes))


def test_the_documented_sizes_are_accepted(library: KernelLibrary) -> None:
    params = params_of(
        num_heads=16, head_dim=256, num_keep=2867, tokens=4097, channels=4096, qkv_width=3 * 4096
    )
    assert library.check(params) is None and library.check_tuned(params) is not None
    metric_alone = 64 * 4096 * 256 * 4
    assert metric_alone < library.workspace_bytes(params) < 1.2 * metric_alone


DINOV2 = {"tokens": 1370, "num_keep": 958}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": FLOAT32},
        DINOV2 | {"channels": 1536, "num_heads": 24, "qkv_width": 4608},
        {"tokens": 2049},
        {"head_dim": 128, "qkv_width": 1536},
        {"head_dim": 8},
        {"channels": 388, "dtype": FLOAT32},
    ],
)
def test_what_the_tuned_kernels_take(library: KernelLibrary, changes: dict[str, Any]) -> None:
    params = params_of(**changes)
    assert library.check_tuned(params) is None
    # Two halves per column, padded to 64 at least; the logits; up to 32 bytes per token, since the
    # plain kernels run where memory is misaligned; alignment.
    metric = 4 * 64 * (params.tokens - 1) * max(64, -params.head_dim // 32 * -32)
    logits = 4 * 64 * params.tokens * params.num_heads
    more = library.workspace_bytes(params) - metric - logits
    assert 0 < more < 32 * 64 * params.tokens + 8 * 256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 2050}, ["2048 patch tokens", "2049"]),
        ({"head_dim": 136, "qkv_width": 1632}, ["head_dim", "128", "136"]),
        ({"head_dim": 60}, ["head_dim", "multiple of 8", "60"]),
        ({"channels": 388}, ["multiples of 8", "388"]),
        ({"qkv_width": 1156}, ["multiples of 8", "1156"]),
        ({"num_heads": 65, "head_dim": 8}, ["64 heads", "65"]),
        ({"num_keep": 197}, ["tokens"]),
    ],
)
def test_what_runs_plain_says_why(
    library: KernelLibrary, changes: dict[str, Any], words: list[str]
) -> None:
    params = params_of(**changes)
    reason = library.check_tuned(params)
    assert reason is not None and all(word in reason for word in words)
    assert library.workspace_bytes(params) >= library.workspace_bytes(params, plain=True)


@pytest.mark.parametrize("head_dim", [8, 60, 64, 128])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_scratch_memory_does_for_smaller_shapes(
    library: KernelLibrary, head_dim: int, selection: int
) -> None:
    # Around 2048 patch tokens another version takes over, and both need memory for the largest.
    sizes = [
        library.workspace_bytes(
            params_of(
                head_dim=head_dim, qkv_width=3072, selection=selection, batch=batch, tokens=tokens
            )
        )
        for batch, tokens in (
            (1, 197),
            (2, 197),
            (2, 2048),
            (2, 2049),
            (2, 2050),
            (2, 2060),
            (3, 4097),
        )
    ]
    assert sizes == sorted(sizes) and sizes[0] > 0


@pytest.mark.parametrize("which", [0, 1, 3])  # x, qkv, y
def test_a_misaligned_buffer_gets_the_plain_kernels(library: KernelLibrary, which: int) -> None:
    attrs = attributes()
    case = random_case(12, attrs)
    aligned = library.run_host(*case, plain=True, **attrs)
    params = make_params(*case, FLOAT32, **attrs)
    assert library.check_tuned(params) is None
    room = [1 << 16] * 7 + [library.workspace_bytes(params)]  # AddressSanitizer's tests bound it
    buffers = [np.zeros(size + 32, np.uint8) for size in room]
    starts = [-array.ctypes.data % 16 for array in buffers]
    starts[which] += 4
    for array, start, value in zip(buffers, starts, case, strict=False):
        array[start:][: value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
    library.launch(params, *(b.ctypes.data + s for b, s in zip(buffers, starts, strict=True)))
    for at, name in enumerate(("y", "out_size", "log_size", "index"), 3):
        want = getattr(aligned, name).tobytes()
        assert buffers[at][starts[at] :][: len(want)].tobytes() == want, name


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5, 7])
def test_memory_that_cannot_be_used_is_refused(
    library: KernelLibrary, which: int, plain: bool
) -> None:
    buffers = [np.zeros(1 << 20, np.uint8) for _ in range(8)]
    pointers: list[int | None] = [array.ctypes.data + 15 & ~15 for array in buffers]
    params = params_of(batch=1, tokens=17, num_keep=9)
    with pytest.raises(RuntimeError, match="invalid"):
        library.launch(params, *pointers[:which], None, *pointers[which + 1 :], plain=plain)
    if which == 7:  # the workspace
        odd = (pointers[which] or 0) + 4
        with pytest.raises(RuntimeError, match="misaligned"):
            library.launch(params, *pointers[:which], odd, plain=plain)


# --- The stand-in itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("if (threadIdx.x % 2 == 0) __shfl_sync(~0u, 1, 0);\nelse __shfl_sync(~0u, 2, 0);", "warp"),
        ("if (threadIdx.x < 8) return;\n__syncthreads();", "barriers"),
        ("if (threadIdx.x < 8) __ballot_sync(~0u, true);\nelse __syncthreads();", "barriers"),
    ],
)
def test_threads_that_part_ways_are_an_error(
    build_dir: Path, statement: str, complaint: str
) -> None:
    source = build_dir / "diverged.cpp"
    source.write_text(
        '#include "cuda_on_host.h"\n'
        f"static void kernel() {{\n{statement}\n}}\n"
        "int main() { cuda_on_host::launch(1, 32, 0, [] { kernel(); }); }\n"
    )
    flags = (f"-I{PLUGINS / 'tests'}", "-Wno-unused", str(source))
    done = subprocess.run(
        [str(compile_host(build_dir / "diverged", *flags))], capture_output=True, text=True
    )
    assert done.returncode != 0 and complaint in done.stderr


# --- Half precision of the stand-in --------------------------------------------------------------


def test_half_conversion_is_that_of_ieee(build_dir: Path) -> None:
    """Every half widened, and float32 values around every rounding boundary narrowed."""
    source = build_dir / "half.cpp"
    source.write_text(
        '#include "cuda_on_host.h"\n'
        'extern "C" void widen(const __half* h, float* f, int n)'
        "{ for (int i = 0; i < n; ++i) f[i] = __half2float(h[i]); }\n"
        'extern "C" void narrow(const float* f, __half* h, int n)'
        "{ for (int i = 0; i < n; ++i) h[i] = __float2half_rn(f[i]); }\n"
    )
    import ctypes

    path = compile_host(
        build_dir / "half.so", f"-I{PLUGINS / 'tests'}", "-O2", "-shared", "-fPIC", str(source)
    )
    functions = ctypes.CDLL(str(path))
    halves = np.arange(2**16, dtype=np.uint16)
    wide = np.empty(2**16, np.float32)
    functions.widen(ctypes.c_void_p(halves.ctypes.data), ctypes.c_void_p(wide.ctypes.data), 2**16)
    expected = halves.view(np.float16).astype(np.float32)
    same = (wide.view(np.uint32) == expected.view(np.uint32)) | np.isnan(expected)
    assert same.all() and np.isnan(wide[np.isnan(expected)]).all()

    finite = expected[np.isfinite(expected)]
    midpoints = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
    values = np.concatenate([finite, midpoints, [65519.9, 65520, 1e30, 1e-30, np.inf, np.nan]])
    values = values.astype(np.float32)
    values = np.concatenate(
        [
            values,
            np.nextafter(values, np.float32(np.inf)),
            np.nextafter(values, -np.float32(np.inf)),
        ]
    )
    narrow = np.empty(len(values), np.uint16)
    functions.narrow(
        ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(narrow.ctypes.data), len(values)
    )
    with np.errstate(over="ignore"):
        want = values.astype(np.float16)
    ok = (narrow == want.view(np.uint16)) | (np.isnan(want) & np.isnan(narrow.view(np.float16)))
    assert ok.all()


# --- Sanitizers ----------------------------------------------------------------------------------


def run_driver(
    driver: Path, version: str, case: Path, out: Path, *planted: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    # At once: threads that read different flags wait for each other forever.
    exit_codes = {"TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "ASAN_OPTIONS": "exitcode=67"}
    # "streamed": so few blocks that each takes all tiles of columns
    exit_codes["JMP_HOST_DEVICE"] = {**DEVICES, "streamed": "1,0"}.get(version, "")
    kernels = "plain" if version == "plain" else "tuned"
    command = [str(driver), kernels, str(case), str(out), *planted]
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*prefix, *command],
            capture_output=True,
            text=True,
            timeout=1200,
            env=os.environ | exit_codes | environment,
        )
        # Older sanitizers cannot cope with 32 random bits in addresses: again without any.
        if "unexpected memory mapping" not in done.stderr:
            break
    return done


def sanitizer_case(
    path: Path,
    version: str,
    *,
    dtype: Any = np.float32,
    importance: int = oracle.CLASS_ROW,
    selection: int = oracle.DISTINCT,
    ties: bool = False,
) -> tuple[Case, dict[str, Any]]:
    """Sample granularity passes every barrier; nothing is a multiple of a block or a tile."""
    attrs = attributes(
        granularity=oracle.SAMPLE, importance=importance, selection=selection, tau=-1.0
    )
    if version == "plain":
        attrs |= {"num_keep": 5, "head_dim": 9}
        case = random_case(12, attrs, batch=2, tokens=14, channels=11, parts=2, dtype=dtype)
    else:  # three tiles of critical tokens, two groups of others
        attrs |= {"num_keep": 70, "head_dim": 24, "num_heads": 3}
        case = random_case(12, attrs, batch=2, tokens=90, channels=24, parts=2, dtype=dtype)
    if ties:
        case[1][:, 40:] = case[1][:, 39:40]
    write_case(path, *case, **attrs)
    return case, attrs


@pytest.mark.parametrize(
    ("dtype", "selection"), [(np.float32, oracle.IMPORTANCE), (np.float16, oracle.DISTINCT)]
)
@pytest.mark.parametrize(("version", "importance"), IMPORTANCES)
@pytest.mark.parametrize("sanitizer", ["thread_driver", "address_driver"])
def test_sanitizers_report_nothing(
    sanitizer: str,
    dtype: Any,
    version: str,
    importance: int,
    selection: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    driver = request.getfixturevalue(sanitizer)
    case, attrs = sanitizer_case(
        tmp_path / "case", version, dtype=dtype, importance=importance, selection=selection
    )
    done = run_driver(driver, version, tmp_path / "case", tmp_path / "out")
    assert done.returncode == 0 and done.stderr == ""
    got = read_outputs(tmp_path / "out", case[0], attrs)
    assert assert_matches(got, case, attrs) == 2


SOURCES = sorted(PLUGINS.glob("*.cuh"))


def versions_of(file: Path) -> tuple[str, ...]:
    """The versions that run kernels of a source."""
    if "reference" in file.name:
        return ("plain",)
    return ("alone", "split") if "resident" in file.name else ("streamed",)


def importance_of(line: str) -> int:
    return oracle.RECEIVED if "received" in line else oracle.CLASS_ROW


def find_lines(pattern: str) -> list[tuple[tuple[str, ...], str]]:
    """(versions, FILE:LINE) of every line of the kernels that matches."""
    return [
        (versions_of(file), f"{file.name}:{number}")
        for file in SOURCES
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.match(pattern, line)
    ]


BARRIERS = find_lines(r"\s*__syncthreads\(\);")
WAITS = find_lines(r"\s*JMP_WAIT_COPIES\(")


def test_barriers_and_waits_were_found() -> None:
    text = "".join(file.read_text() for file in SOURCES)
    assert len(BARRIERS) == text.count("__syncthreads();") >= 15
    assert len(WAITS) == text.count("JMP_WAIT_COPIES(") - 2 >= 4  # less its two definitions


@pytest.mark.parametrize(("versions", "line"), BARRIERS)
def test_a_missing_barrier_is_reported(
    thread_driver: Path, versions: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    # Equal keys pass most barriers; importance alone has the softmax in another kernel.
    for version in versions:
        for ties in (True, False):
            for selection in (oracle.DISTINCT, oracle.IMPORTANCE):
                options = {"selection": selection, "ties": ties, "importance": importance_of(line)}
                sanitizer_case(tmp_path / "case", version, **options)
                done = run_driver(
                    thread_driver, version, tmp_path / "case", tmp_path / "out", JMP_SKIP=line
                )
                if done.returncode == 66 and "data race" in done.stderr:
                    return
    pytest.fail("no data race was reported")


@pytest.mark.parametrize(("versions", "line"), WAITS)
def test_a_missing_wait_is_noticed(
    thread_driver: Path, versions: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    version = versions[-1]  # the one that copies
    # float16: queries and keys of other types are no mere copies
    case, attrs = sanitizer_case(
        tmp_path / "case", version, dtype=np.float16, importance=importance_of(line)
    )
    done = run_driver(thread_driver, version, tmp_path / "case", tmp_path / "out", JMP_SKIP=line)
    if done.returncode == 66:
        return
    assert done.returncode == 0
    got = read_outputs(tmp_path / "out", case[0], attrs)
    with pytest.raises(AssertionError):
        assert_matches(got, case, attrs)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "buffer",
    ["x", "qkv", "size", "y", "out_size", "log_size", "index", "workspace"],
)
def test_a_buffer_too_small_is_reported(
    address_driver: Path, version: str, buffer: str, tmp_path: Path
) -> None:
    sanitizer_case(tmp_path / "case", version)
    done = run_driver(address_driver, version, tmp_path / "case", tmp_path / "out", buffer)
    assert done.returncode == 67
    assert "heap-buffer-overflow" in done.stderr and "token_reduce" in done.stderr
