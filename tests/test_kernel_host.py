"""The CUDA kernel on a CPU: the same .cu, compiled by the host compiler, against the oracle.

What is shown here: arithmetic, decisions, ties, indices, barriers (ThreadSanitizer) and buffer
bounds (AddressSanitizer). What needs a GPU is in tests/gpu.
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

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
sys.path[:0] = [str(Path(__file__).resolve().parent), str(PLUGINS / "tests")]

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
    FLOAT16,
    FLOAT32,
    KernelLibrary,
    Outputs,
    Params,
    read_outputs,
    write_case,
)

KERNEL = PLUGINS / "token_reduce_kernel.cu"
DRIVER = PLUGINS / "tests" / "host_driver.cpp"
FLAGS = ["-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Wconversion", "-Werror"]


# --- Building ------------------------------------------------------------------------------------


def compile_host(output: Path, *options: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++) on this machine")
    command = [compiler, *FLAGS, "-DJMP_CUDA_ON_HOST", *options, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0 and re.search(r"cannot find.*(tsan|asan|ubsan)", done.stderr):
        pytest.skip("the compiler's sanitizer runtime is not installed")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernel_host")


@pytest.fixture(scope="session")
def library(build_dir: Path) -> KernelLibrary:
    options = ["-O2", "-shared", "-fPIC", "-DJMP_BLOCK_THREADS=16", "-x", "c++", str(KERNEL)]
    return KernelLibrary(compile_host(build_dir / "kernel16.so", *options))


@pytest.fixture(scope="session")
def library_of_gpu_block_size(build_dir: Path) -> KernelLibrary:
    options = ["-O2", "-shared", "-fPIC", "-x", "c++", str(KERNEL)]
    return KernelLibrary(compile_host(build_dir / "kernel128.so", *options))


def compile_driver(output: Path, *sanitizer: str) -> Path:
    options = ["-O1", *sanitizer, "-DJMP_BLOCK_THREADS=8", "-x", "c++", str(KERNEL), str(DRIVER)]
    return compile_host(output, *options)


@pytest.fixture(scope="session")
def thread_driver(build_dir: Path) -> Path:
    return compile_driver(build_dir / "driver_tsan", "-fsanitize=thread")


@pytest.fixture(scope="session")
def address_driver(build_dir: Path) -> Path:
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return compile_driver(build_dir / "driver_asan", *flags)


# --- Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("importance", [oracle.CLASS_ROW, oracle.RECEIVED])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("proportional", [0, 1])
@pytest.mark.parametrize("tau", [-1.0, 0.3, 1.5])
def test_every_option(
    library: KernelLibrary,
    dtype: Any,
    granularity: int,
    importance: int,
    proportional: int,
    selection: int,
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
    got = library.run_host(*case, **attrs)
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
def test_any_shape(library: KernelLibrary, data: st.DataObject) -> None:
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
    assert_matches(library.run_host(*case, **attrs), case, attrs)


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
    library: KernelLibrary, seed: int, keep: int, tau: float, granularity: int, selection: int
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
    assert_matches(library.run_host(*case, **attrs), case, attrs, exact=True)


def test_distinct_keeps_an_unimportant_token_that_resembles_nothing(
    library: KernelLibrary,
) -> None:
    # Token 12 points away from the class token's query and from the others, which are all alike.
    attrs = attributes(num_heads=1, head_dim=2, num_keep=2, tau=-1.0)
    x, qkv, size = random_case(2, attrs, tokens=13)
    qkv[..., 2:4] = [1, 0]
    qkv[:, 0, :2] = [1, 0]
    qkv[:, 12, 2:4] = [-1, 0]
    for selection, last in ((oracle.IMPORTANCE, 1), (oracle.DISTINCT, 2)):
        got = library.run_host(x, qkv, np.ones_like(size), **attrs | {"selection": selection})
        assert (got.destination[:, 12] == last).all()


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("tau", [0.5, 1.5])
def test_identical_tokens_keep_the_first(
    library: KernelLibrary, tau: float, selection: int
) -> None:
    # One entry of 1: similarities are exactly 1, importances exactly equal.
    attrs = attributes(num_keep=4, tau=tau, selection=selection)
    x, qkv, size = random_case(2, attrs, tokens=12)
    qkv[:] = 0
    qkv[..., 16::8] = 1
    x[:] = x[:, :1]
    got = library.run_host(x, qkv, np.ones_like(size), **attrs)
    merged = 1 if tau < 1 else -1
    for places in got.destination:
        np.testing.assert_array_equal(places, [0, 1, 2, 3, 4] + [merged] * 7)
    assert got.out_size[0, 1] == (8 if tau < 1 else 1)
    np.testing.assert_allclose(got.y, np.broadcast_to(x[:, :1], got.y.shape), rtol=1e-6)


def test_zero_keys_are_similar_to_nothing(library: KernelLibrary) -> None:
    # Length 0 is divided by 1e-12, not by 0: similarity 0, not NaN.
    for tau, merged in ((0.0, True), (1e-3, False)):
        attrs = attributes(tau=tau)
        x, qkv, size = random_case(3, attrs)
        qkv[..., 16:32] = 0
        got = library.run_host(x, qkv, np.ones_like(size), **attrs)
        assert ((got.destination[:, 7:] == 1) == merged).all()
        assert ((got.destination[:, 7:] == -1) != merged).all()


@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_keep_all_and_keep_one(library: KernelLibrary, granularity: int, prefix: int) -> None:
    tokens = prefix + 11
    for keep in (11, 1):
        attrs = attributes(num_prefix=prefix, num_keep=keep, granularity=granularity, tau=-1.0)
        case = random_case(4, attrs, tokens=tokens)
        got = library.run_host(*case, **attrs)
        assert_matches(got, case, attrs)
        if keep == 11:  # nothing to do: everything is copied
            assert got.y.tobytes() == case[0].tobytes()
            assert got.out_size.tobytes() == case[2].tobytes()
        else:  # everything ends in one token
            np.testing.assert_array_equal(got.out_size[:, -1], case[2][:, prefix:].sum(axis=1))


def test_size_of_one_row_serves_the_batch(library: KernelLibrary) -> None:
    attrs = attributes()
    x, qkv, size = random_case(5, attrs, batch=3, broadcast=True)
    full = np.ascontiguousarray(np.broadcast_to(size, (3, 15)))
    one, all_rows = (library.run_host(x, qkv, s, **attrs) for s in (size, full))
    assert_same_bits(one, all_rows, slice(None))
    assert (one.out_size > 1).any()


def test_destination_is_optional(library: KernelLibrary) -> None:
    attrs = attributes()
    case = random_case(6, attrs)
    with_it = library.run_host(*case, **attrs)
    without = library.run_host(*case, want_destination=False, **attrs)
    assert without.y.tobytes() == with_it.y.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_gpu_block_size(library_of_gpu_block_size: KernelLibrary, dtype: Any) -> None:
    # 128 threads, as on the GPU; more keys, channels and patches than threads.
    attrs = attributes(num_keep=133, importance=oracle.CLASS_ROW, head_dim=16, scale=0.25)
    case = random_case(7, attrs, batch=1, tokens=139, channels=131, dtype=dtype)
    assert assert_matches(library_of_gpu_block_size.run_host(*case, **attrs), case, attrs) == 1


def test_large_numbers_do_not_overflow_the_softmax(library: KernelLibrary) -> None:
    attrs = attributes(scale=50.0)
    case = random_case(8, attrs)
    assert_matches(library.run_host(*case, **attrs), case, attrs)


# --- Batches and bad numbers ---------------------------------------------------------------------


def assert_same_bits(a: Outputs, b: Outputs, rows: slice) -> None:
    for name in ("y", "out_size", "log_size", "destination"):
        assert getattr(a, name).tobytes() == getattr(b, name)[rows].tobytes(), name


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("importance", [oracle.CLASS_ROW, oracle.RECEIVED])
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_sample_is_the_same_alone_and_in_a_batch(
    library: KernelLibrary, importance: int, granularity: int, selection: int, dtype: Any
) -> None:
    attrs = attributes(
        importance=importance, granularity=granularity, selection=selection, num_keep=5
    )
    case = random_case(9, attrs, batch=33, tokens=9, dtype=dtype)
    together = library.run_host(*case, **attrs)
    assert assert_matches(together, case, attrs) >= 25
    for b in (0, 16, 32):
        rows = slice(b, b + 1)
        x, qkv, size = (np.ascontiguousarray(array[rows]) for array in case)
        assert_same_bits(library.run_host(x, qkv, size, **attrs), together, rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "qkv", "one key", "size"])
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_bad_numbers_stay_in_their_sample(
    library: KernelLibrary, bad: float, where: str, granularity: int, selection: int
) -> None:
    attrs = attributes(granularity=granularity, selection=selection, tau=-1.0)
    clean = random_case(10, attrs, batch=3)
    dirty = tuple(array.copy() for array in clean)
    if where == "one key":
        dirty[1][1, 7, 20] = bad
    else:
        dirty[("x", "qkv", "size").index(where)][1] = bad
    want, got = (library.run_host(*case, **attrs) for case in (clean, dirty))
    for rows in (slice(0, 1), slice(2, 3)):
        for name in ("y", "out_size", "log_size", "destination"):
            assert getattr(got, name)[rows].tobytes() == getattr(want, name)[rows].tobytes()
    assert_legal(got, dirty[0], dirty[2], attrs)  # K members, legal places, whatever it holds


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_nan_importance_selects_the_first_and_prunes_the_rest(
    library: KernelLibrary, selection: int
) -> None:
    attrs = attributes(tau=-1.0, selection=selection)
    x, qkv, size = random_case(11, attrs)
    qkv[0] = np.nan
    got = library.run_host(x, qkv, size, **attrs)
    np.testing.assert_array_equal(got.destination[0], [*range(7)] + [-1] * 8)
    np.testing.assert_array_equal(got.y[0], x[0, :7])


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
        ({"dtype": 7}, "dtype", "7"),
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


def test_the_documented_sizes_are_accepted(library: KernelLibrary) -> None:
    params = Params(
        **attributes(num_heads=16, head_dim=256, num_keep=2867),
        dtype=FLOAT16,
        batch=64,
        tokens=4097,
        channels=4096,
        qkv_width=3 * 4096,
        size_batch=1,
    )
    assert library.check(params) is None
    metric_alone = 64 * 4096 * 256 * 4
    assert metric_alone < library.workspace_bytes(params) < 1.2 * metric_alone


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
    driver: Path, case: Path, out: Path, *planted: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    exit_codes = {"TSAN_OPTIONS": "exitcode=66", "ASAN_OPTIONS": "exitcode=67"}
    command = [str(driver), str(case), str(out), *planted]
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*prefix, *command],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | exit_codes | environment,
        )
        # Older sanitizers cannot cope with 32 random bits in addresses: again without any.
        if "unexpected memory mapping" not in done.stderr:
            break
    return done


def sanitizer_case(
    path: Path,
    *,
    dtype: Any = np.float32,
    importance: int = oracle.CLASS_ROW,
    selection: int = oracle.DISTINCT,
) -> tuple[Case, dict[str, Any]]:
    # Sample granularity passes every barrier; 13 patches and 11 channels leave no even block.
    attrs = attributes(
        num_keep=5,
        granularity=oracle.SAMPLE,
        importance=importance,
        selection=selection,
        tau=-1.0,
        head_dim=9,
    )
    case = random_case(12, attrs, batch=2, tokens=14, channels=11, parts=2, dtype=dtype)
    write_case(path, *case, **attrs)
    return case, attrs


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("importance", [oracle.CLASS_ROW, oracle.RECEIVED])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("sanitizer", ["thread_driver", "address_driver"])
def test_sanitizers_report_nothing(
    sanitizer: str,
    dtype: Any,
    importance: int,
    selection: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    driver = request.getfixturevalue(sanitizer)
    case, attrs = sanitizer_case(
        tmp_path / "case", dtype=dtype, importance=importance, selection=selection
    )
    done = run_driver(driver, tmp_path / "case", tmp_path / "out")
    assert done.returncode == 0 and done.stderr == ""
    got = read_outputs(tmp_path / "out", case[0], attrs["num_prefix"] + attrs["num_keep"])
    assert assert_matches(got, case, attrs) == 2


BARRIERS = [
    number
    for number, line in enumerate(KERNEL.read_text().splitlines(), 1)
    if re.match(r"\s*__syncthreads\(\);", line)
]


def test_barriers_were_found() -> None:
    assert len(BARRIERS) == KERNEL.read_text().count("__syncthreads") >= 3


@pytest.mark.parametrize("line", BARRIERS)
def test_a_missing_barrier_is_reported(thread_driver: Path, line: int, tmp_path: Path) -> None:
    sanitizer_case(tmp_path / "case")
    skip = {"JMP_SKIP_BARRIER": str(line)}
    done = run_driver(thread_driver, tmp_path / "case", tmp_path / "out", **skip)
    assert done.returncode == 66
    assert "data race" in done.stderr and "token_reduce_kernel.cu" in done.stderr


@pytest.mark.parametrize(
    "buffer",
    ["x", "qkv", "size", "y", "out_size", "log_size", "destination", "workspace"],
)
def test_a_buffer_too_small_is_reported(address_driver: Path, buffer: str, tmp_path: Path) -> None:
    sanitizer_case(tmp_path / "case")
    done = run_driver(address_driver, tmp_path / "case", tmp_path / "out", buffer)
    assert done.returncode == 67
    assert "heap-buffer-overflow" in done.stderr and "token_reduce_kernel.cu" in done.stderr
