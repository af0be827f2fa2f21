"""The CUDA kernels on a GPU, plain and tuned, against the float64 oracle.

Needs nvcc and PyTorch; no TensorRT.

`scripts/gpu_check.sh` runs these. The library comes from JMP_KERNEL_LIBRARY, or is compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPO = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPO / "tests"), str(REPO / "plugins" / "tests")]

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
    KernelLibrary,
    Outputs,
    Params,
    bfloat16,
    make_params,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GUARD = 4096  # bytes around every buffer that nobody may touch
DEIT_S = {"num_keep": 138, "num_heads": 6, "head_dim": 64, "scale": 0.125}
ALL_DTYPES = [np.float32, np.float16, *([bfloat16.type] if bfloat16 is not None else [])]
VERSIONS = ("plain", "tuned")
IMPORTANCES = [(v, kind) for v in VERSIONS for kind in (oracle.CLASS_ROW, oracle.RECEIVED)]
# Products of 64 numbers and sums of dozens of tokens, in another order than the oracle's.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    given = os.environ.get("JMP_KERNEL_LIBRARY")
    if given:
        return KernelLibrary(Path(given))
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH, and JMP_KERNEL_LIBRARY is not set")
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    source = REPO / "plugins" / "token_reduce_kernel.cu"
    options = ["-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([nvcc, *options, str(source), "-o", str(path)], check=True)
    return KernelLibrary(path)


class Guarded:
    """A device buffer of exactly `count` bytes between two guards; all 0xff at first."""

    def __init__(self, count: int, content: np.ndarray | None = None) -> None:
        import torch

        self.count = count
        self.bytes = torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=DEVICE)
        if content is not None:
            self.write(content)

    @property
    def pointer(self) -> int:
        return int(self.bytes.data_ptr()) + GUARD

    def write(self, content: np.ndarray) -> None:
        import torch

        flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self.bytes[GUARD : GUARD + self.count] = torch.from_numpy(flat.copy()).to(DEVICE)

    def read(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        inside = self.bytes[GUARD : GUARD + self.count].cpu().numpy()
        return inside.view(dtype).reshape(shape)

    def untouched(self) -> bool:
        import torch

        ends = torch.cat([self.bytes[:GUARD], self.bytes[-GUARD:]])
        return bool((ends == 0xFF).all())


class Launch:
    """Device buffers of one case, for one or more launches."""

    def __init__(
        self, library: KernelLibrary, case: Case, attrs: dict[str, Any], version: str = "tuned"
    ) -> None:
        x, qkv, size = case
        self.library, self.dtype, self.plain = library, x.dtype, version == "plain"
        self.params: Params = make_params(x, qkv, size, DTYPES[x.dtype], **attrs)
        assert self.plain or library.check_tuned(self.params) is None
        places = self.params.num_prefix + self.params.num_keep
        self.shapes = [(len(x), places, x.shape[2]), (len(x), places), (len(x), places)]
        self.inputs = [Guarded(array.nbytes, array) for array in case]
        self.outputs = [Guarded(int(np.prod(s)) * x.dtype.itemsize) for s in self.shapes]
        self.index_shape = (len(x), x.shape[1] - self.params.num_prefix)
        self.index = Guarded(4 * int(np.prod(self.index_shape)))
        self.workspace = Guarded(library.workspace_bytes(self.params, plain=self.plain))

    def launch(self, stream: int = 0) -> None:
        buffers = [*self.inputs, *self.outputs, self.index, self.workspace]
        pointers = [buffer.pointer for buffer in buffers]
        self.library.launch(self.params, *pointers, stream=stream, plain=self.plain)

    def result(self) -> Outputs:
        import torch

        if DEVICE == "cuda":
            torch.cuda.synchronize()
        for buffer in (*self.inputs, *self.outputs, self.index, self.workspace):
            assert buffer.untouched(), "something wrote outside a buffer"
        y, out_size, log_size = (
            buffer.read(shape, self.dtype)
            for buffer, shape in zip(self.outputs, self.shapes, strict=True)
        )
        index = self.index.read(self.index_shape, np.int32)
        return Outputs(y, out_size, log_size, index, self.params.num_keep)


def run(
    library: KernelLibrary, case: Case, attrs: dict[str, Any], version: str = "tuned"
) -> Outputs:
    launch = Launch(library, case, attrs, version)
    launch.launch()
    return launch.result()


def same_bits(a: Outputs, b: Outputs, rows: slice = slice(None)) -> bool:
    names = ("y", "out_size", "log_size", "index")
    return all(getattr(a, n).tobytes() == getattr(b, n)[rows].tobytes() for n in names)


def check(library: KernelLibrary, case: Case, attrs: dict[str, Any], version: str = "tuned") -> int:
    got = run(library, case, attrs, version)
    return assert_matches(got, case, attrs, tolerance=TOLERANCE[case[0].dtype.name])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize(("version", "importance"), IMPORTANCES)
@pytest.mark.parametrize("proportional", [0, 1])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("tau", [-1.0, 0.3, 1.5])
@pytest.mark.parametrize("parts", [2, 3])
def test_every_option(
    library: KernelLibrary,
    dtype: Any,
    granularity: int,
    version: str,
    importance: int,
    proportional: int,
    selection: int,
    tau: float,
    parts: int,
) -> None:
    attrs = attributes(
        selection=selection,
        granularity=granularity,
        importance=importance,
        proportional=proportional,
        tau=tau,
        num_keep=23,
        head_dim=32,
    )
    case = random_case(1, attrs, batch=4, tokens=41, channels=72, parts=parts, dtype=dtype)
    assert check(library, case, attrs, version) >= 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_the_size_of_deit_s(
    library: KernelLibrary, version: str, dtype: Any, selection: int, prefix: int
) -> None:
    attrs = attributes(**DEIT_S, num_prefix=prefix, selection=selection)
    case = random_case(2, attrs, batch=4, tokens=196 + prefix, channels=384, dtype=dtype)
    assert check(library, case, attrs, version) >= 1


@pytest.mark.parametrize("head_dim", [8, 32, 40, 72, 96, 104, 128])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_head_sizes(library: KernelLibrary, head_dim: int, dtype: Any, selection: int) -> None:
    attrs = attributes(
        num_keep=70, num_heads=7, head_dim=head_dim, scale=head_dim**-0.5, selection=selection
    )
    case = random_case(10, attrs, batch=4, tokens=150, channels=520, dtype=dtype)
    assert check(library, case, attrs) >= 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    ("patches", "num_heads", "head_dim", "channels"),
    [(196, 12, 64, 768), (256, 12, 64, 768), (576, 16, 72, 1152), (1024, 6, 64, 384)],
)
def test_the_sizes_of_siglip(
    library: KernelLibrary,
    version: str,
    dtype: Any,
    patches: int,
    num_heads: int,
    head_dim: int,
    channels: int,
) -> None:
    attrs = attributes(
        num_prefix=0,
        num_keep=int(0.7 * patches),
        num_heads=num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        importance=oracle.RECEIVED,
        selection=oracle.DISTINCT,
        tau=0.0,
    )
    case = random_case(9, attrs, batch=2, tokens=patches, channels=channels, dtype=dtype)
    check(library, case, attrs, version)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("keep", [958, 400])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_the_size_of_dinov2_at_518(
    library: KernelLibrary, dtype: Any, keep: int, selection: int
) -> None:
    # So many tokens always have a near tie somewhere, so each kernel is held to the other: nearly
    # all tokens must go to the same place, and those must have the same values.
    attrs = attributes(**DEIT_S | {"num_keep": keep}, selection=selection, tau=0.0)
    case = random_case(11, attrs, batch=2, tokens=1370, channels=384, dtype=dtype)
    tuned, plain = (run(library, case, attrs, version) for version in ("tuned", "plain"))
    assert_legal(tuned, case[0], np.broadcast_to(case[2], (2, 1370)), attrs)
    assert (tuned.destination == plain.destination).mean() > 0.99
    assert np.isclose(tuned.y, plain.y, rtol=1e-2, atol=1e-2).mean() > 0.98


def test_streams_at_once(library: KernelLibrary) -> None:
    import torch

    attrs = attributes(**DEIT_S, selection=oracle.DISTINCT)
    cases = [
        random_case(20 + i, attrs, batch=3, tokens=197, channels=384, dtype=np.float16)
        for i in range(4)
    ]
    alone = [run(library, case, attrs) for case in cases]
    launches = [Launch(library, case, attrs) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        for launch, stream in zip(launches, streams, strict=True):
            launch.launch(stream=stream.cuda_stream)
    for launch, want in zip(launches, alone, strict=True):
        assert same_bits(launch.result(), want)


@pytest.mark.parametrize(
    ("prefix", "patches", "keep", "head_dim", "channels"),
    [(0, 1, 1, 1, 1), (0, 255, 100, 33, 129), (1, 7, 7, 8, 3), (5, 300, 1, 256, 64)],
)
def test_odd_sizes(
    library: KernelLibrary, prefix: int, patches: int, keep: int, head_dim: int, channels: int
) -> None:
    attrs = attributes(
        num_prefix=prefix,
        num_keep=keep,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        tau=0.05,
        importance=oracle.RECEIVED,
    )
    case = random_case(
        3, attrs, batch=3, tokens=prefix + patches, channels=channels, extra=1, broadcast=True
    )
    check(library, case, attrs, "plain")


def test_many_tokens(library: KernelLibrary) -> None:
    attrs = attributes(num_keep=2867, num_heads=1, head_dim=16, scale=0.25, tau=0.8)
    case = random_case(4, attrs, batch=1, tokens=4097, channels=8)
    got = run(library, case, attrs, "plain")
    assert_legal(got, case[0], case[2], attrs)
    assert (got.destination[0] >= 0).sum() > 2868 and (got.destination[0] < 0).any()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("seed", range(8))
def test_ties_go_to_the_lower_index(
    library: KernelLibrary, version: str, selection: int, seed: int
) -> None:
    attrs = attributes(
        num_heads=1, head_dim=16, num_keep=9, scale=0.5, tau=0.25, selection=selection
    )
    case = tied_case(seed, attrs, batch=8, tokens=33)
    assert_matches(run(library, case, attrs, version), case, attrs, exact=True, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("version", "importance"), IMPORTANCES)
@pytest.mark.parametrize("granularity", [oracle.TOKEN, oracle.SAMPLE])
@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_a_sample_is_the_same_alone_in_a_batch_and_again(
    library: KernelLibrary,
    dtype: Any,
    version: str,
    importance: int,
    granularity: int,
    selection: int,
) -> None:
    attrs = attributes(
        **DEIT_S, importance=importance, granularity=granularity, selection=selection
    )
    # 65 samples of four row groups: enough blocks for each to take all tiles of columns.
    case = random_case(5, attrs, batch=65, tokens=197, channels=384, dtype=dtype)
    together = run(library, case, attrs, version)
    for _ in range(3):
        assert same_bits(run(library, case, attrs, version), together)
    for b in (0, 32, 64):
        rows = slice(b, b + 1)
        x, qkv, size = (np.ascontiguousarray(array[rows]) for array in case)
        assert same_bits(run(library, (x, qkv, size), attrs, version), together, rows)


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_bad_numbers_stay_in_their_sample(
    library: KernelLibrary, selection: int, bad: float, where: int
) -> None:
    attrs = attributes(**DEIT_S, tau=-1.0, selection=selection)
    clean = random_case(6, attrs, batch=3, tokens=197, channels=64)
    x, qkv, size = (array.copy() for array in clean)
    (x, qkv, size)[where][1] = bad
    want, got = run(library, clean, attrs), run(library, (x, qkv, size), attrs)
    for rows in (slice(0, 1), slice(2, 3)):
        for name in ("y", "out_size", "log_size", "index"):
            assert getattr(got, name)[rows].tobytes() == getattr(want, name)[rows].tobytes()
    assert_legal(got, x, size, attrs)


@pytest.mark.parametrize("selection", [oracle.IMPORTANCE, oracle.DISTINCT])
def test_graph_capture_and_replay(library: KernelLibrary, selection: int) -> None:
    import torch

    attrs = attributes(**DEIT_S, selection=selection)
    first = random_case(7, attrs, batch=2, tokens=197, channels=384, dtype=np.float16)
    second = random_case(8, attrs, batch=2, tokens=197, channels=384, dtype=np.float16)
    launch = Launch(library, first, attrs)
    launch.launch()  # modules are loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.launch(stream=torch.cuda.current_stream().cuda_stream)
    for case in (second, first):
        for buffer, array in zip(launch.inputs, case, strict=True):
            buffer.write(array)
        torch.cuda.synchronize()
        graph.replay()
        assert same_bits(launch.result(), run(library, case, attrs))


def test_a_refused_call_launches_nothing(library: KernelLibrary) -> None:
    attrs = attributes()
    launch = Launch(library, random_case(9, attrs), attrs)
    launch.params.num_keep = 15
    with pytest.raises(RuntimeError, match="invalid"):
        launch.launch()
    assert np.isnan(launch.result().y).all()
