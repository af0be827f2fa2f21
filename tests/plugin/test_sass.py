"""What scripts/sass.py reads from machine code, and what scripts/ptxas_check.py makes of it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from scripts import ptxas_check, sass  # noqa: E402
from tests.plugin.test_kernel_host import compile_host  # noqa: E402


def code_of(*lines: str) -> list[sass.Instruction]:
    """Lines of "LABEL: instruction" or an instruction; jumps name labels."""
    labels = {line.split(":")[0]: 16 * n for n, line in enumerate(lines) if ":" in line}
    text = "\t\tFunction : kernel\n"
    for number, line in enumerate(lines):
        words = line.split(":")[-1].split()
        words = [f"{labels[word]:#x}" if word in labels else word for word in words]
        text += f"        /*{16 * number:04x}*/   {' '.join(words)} ;  /* 0x000f */\n"
    return sass.read_code(text)["kernel"]


def loops_of(*lines: str) -> list[tuple[int, int]]:
    """Of each loop: instructions, and how many are matrix products."""
    code = code_of(*lines)
    found = sass.find_loops(code, sass.successors(code))
    return [(loop.instructions, loop.products["HMMA"]) for loop in found]


def test_loops_are_counted_without_those_inside() -> None:
    assert loops_of(
        "MOV R1, RZ",
        "OUTER: HMMA.16816.F32 R1",
        "INNER: FFMA R2, R3, R4",
        "@P0 BRA INNER",
        "HMMA.16816.F32 R1",
        "@!P1 BRA OUTER",
        "EXIT",
    ) == [(3, 2), (2, 0)]


def test_a_way_back_that_is_no_loop_counts_as_none() -> None:
    # a rare case at the end of the code, which jumps back to where it came from
    rare = ("@P0 BRA RARE", "BACK: MOV R1, R2", "EXIT")
    assert loops_of(*rare, "RARE: MOV R3, R4", "BRA BACK") == []
    # the same for lanes of a warp that have parted
    divided = ("LOOP: BRA.DIV ~URZ, LANES", "BACK: FFMA R1", "@P0 BRA LOOP", "EXIT")
    assert loops_of(*divided, "LANES: SHFL R1", "BRA BACK") == [(3, 0)]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (("LDC R1, c[0x0]", "ACQBULK", "LDG.E.128 R1"), []),
        (("LDG.E.64 R1", "ACQBULK"), ["LDG.E.64 at 0x0"]),
        # on one of two ways
        (
            ("@P0 BRA WAIT", "STG.E R1", "WAIT: ACQBULK", "LDG.E R1", "EXIT"),
            ["STG.E at 0x10"],
        ),
        (("@P0 BRA LATER", "ACQBULK", "LATER: RED.E.MAX R1", "EXIT"), ["RED.E.MAX at 0x20"]),
        (("BRA.U !UP0, LATER", "ACQBULK", "LATER: LDGSTS.E R1"), ["LDGSTS.E at 0x20"]),
        # shared memory and what comes after the end
        (("LDS R1", "STS R2", "@P0 EXIT", "ACQBULK", "EXIT", "LDG.E R1"), []),
    ],
)
def test_global_memory_before_the_wait(lines: tuple[str, ...], found: list[str]) -> None:
    code = code_of(*lines)
    assert sass.early_accesses(code, sass.successors(code)) == found


def test_an_early_access_is_not_as_meant() -> None:
    kernel = ptxas_check.Kernel("90", "merge_kernel<f16>", tuned=True)
    kernel.instructions = dict.fromkeys(("LDG.E.128", "STG.E.128", "ACQBULK"), 1)
    assert ptxas_check.problems(kernel) == []
    kernel.early = ["LDG.E.128 at 0x40"]
    assert "does not wait before LDG.E.128 at 0x40" in " ".join(ptxas_check.problems(kernel))


CASES = [
    (arch, registers, memory)
    for arch in ("75", "80", "86", "87", "89", "90", "100", "110", "120")
    for registers, memory in ((32, 0), (64, 1536), (85, 0), (106, 35648), (121, 68352), (255, 4000))
]

OCCUPANCY = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cuda_occupancy.h>
int main(int argc, char** argv) {
  for (int i = 1; i + 4 < argc; i += 5) {
    const int arch = atoi(argv[i]), registers = atoi(argv[i + 1]), memory = atoi(argv[i + 2]);
    const int warps = atoi(argv[i + 3]), kilobytes = atoi(argv[i + 4]);
    cudaOccDeviceProp p;
    memset(static_cast<void*>(&p), 0, sizeof p);
    p.computeMajor = arch / 10;
    p.computeMinor = arch % 10;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = 32 * warps;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerMultiprocessor = kilobytes * 1024;
    p.reservedSharedMemPerBlock = arch < 80 ? 0 : 1024;
    p.sharedMemPerBlock = 48 * 1024;
    p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - p.reservedSharedMemPerBlock;
    p.numSms = 1;
    cudaOccFuncAttributes f;
    f.maxThreadsPerBlock = 1024;
    f.numRegs = registers;
    f.sharedSizeBytes = 0;
    f.partitionedGCConfig = PARTITIONED_GC_OFF;
    f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    f.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin;
    f.numBlockBarriers = 1;
    cudaOccDeviceState s;
    s.cacheConfig = CACHE_PREFER_SHARED;
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &s, 256, memory) != 0) return 1;
    printf("%d ", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_room_is_that_of_nvidias_calculator(tmp_path: Path) -> None:
    spec = find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    headers = next((p for f in folders for p in Path(f).glob("*/include/cuda_occupancy.h")), None)
    if headers is None:
        pytest.skip("no cuda_occupancy.h: the toolkit's wheels are not installed")
    (tmp_path / "a.cpp").write_text(OCCUPANCY)
    program = compile_host(
        tmp_path / "a", "-Wno-error", "-w", f"-isystem{headers.parent}", str(tmp_path / "a.cpp")
    )
    mine, arguments = [], []
    for arch, registers, memory in CASES:
        kernel = ptxas_check.Kernel(arch, "k", True, registers, dynamic_bytes=memory)
        mine.append(ptxas_check.room(kernel))
        warps, _, kilobytes = ptxas_check.ROOM[int(arch)]
        arguments += [arch, registers, memory, warps, kilobytes]
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert mine == [int(word) for word in done.stdout.split()]


def test_what_is_not_known_is_not_said() -> None:
    kernel = ptxas_check.Kernel("90", "rate_kernel<2>", True, 88)
    assert ptxas_check.room(kernel) is None  # its shared memory for no launch
    assert ptxas_check.room(ptxas_check.Kernel("999", "k", True, 32, dynamic_bytes=0)) is None


def test_dynamic_shared_memory_is_what_is_launched() -> None:
    found = ptxas_check.dynamic_shared()
    assert set(found) == {name for names in ptxas_check.LAUNCHES.values() for name in names}
    # 196 tokens in 13 tiles of 16 rows of 272 bytes and more
    assert found["resident_kernel<f16, 15>"] > 208 * 272 == 56576
    assert found["measure_kernel<f16, 8>"] == 4 * 384 and found["merge_kernel<f16>"] == 0
