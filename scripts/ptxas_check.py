"""Compile the CUDA kernels and read what became of them: no GPU needed.

    python scripts/ptxas_check.py                 # sm_87 (Orin) and sm_90 (Hopper)
    python scripts/ptxas_check.py 89 90 110 120   # others
    python scripts/ptxas_check.py 75 --json -     # JSON to stdout

From the compiler's report: registers, static shared memory, and that nothing is spilled. From the
kernels compiled for a CPU, by a launch each: dynamic shared memory, for DeiT-S in float16. From
these: blocks that a multiprocessor has room for. From the disassembly (sass.py): 16-byte loads and
stores, matrix and copy instructions where they are meant; that nothing in global memory is touched
before the wait for the launch before; how many instructions a kernel has, and its loop with the
most products. These are instructions in the file, not those that are executed.

Exit code 0: as meant, or a tool is missing (said in one line; the rest is still checked); 1: not as
meant; 2: the kernels do not compile, or an unknown architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from jmp_deploy.core.errors import ToolchainError  # noqa: E402
from jmp_deploy.plugin.toolchain import find_cxx, find_disassembler, find_nvcc  # noqa: E402
from scripts.sass import (  # noqa: E402
    MATRIX,
    OVERLAP,
    PRODUCTS,
    WIDE_LOAD,
    Loop,
    early_accesses,
    find_loops,
    read_code,
    successors,
)

KERNEL = REPO / "plugins" / "token_reduce_kernel.cu"
SHARED_LIMIT = 48 << 10  # bytes that a block may have without asking
DISASSEMBLER_HINT = (
    "pip install triton (its wheel has cuobjdump and nvdisasm), or a CUDA toolkit with both"
)

# Instructions that each tuned kernel must have: the beginnings of their names.
WIDE_STORE, COPY = "STG.E.128", "LDGSTS.E.BYPASS.128"
ROWS, CLUSTER = "LDSM", "UCGABAR_WAIT"
MEANT: dict[str, tuple[str, ...]] = {
    "measure_kernel": (WIDE_LOAD, WIDE_STORE),
    "rate_kernel": (MATRIX, COPY),
    "match_kernel": (MATRIX, COPY),
    "merge_kernel": (WIDE_LOAD, WIDE_STORE),
    "attention_kernel": (MATRIX, ROWS),
    "resident_kernel": (),
}
# Of resident_kernel by its last argument: a step, all of them in one block, or in a cluster. The
# steps are for GPUs without clusters.
STEPS: dict[str, tuple[str, ...]] = {
    "1": (WIDE_LOAD, WIDE_STORE),
    "2": (MATRIX, ROWS, COPY),
    "4": (MATRIX, ROWS, COPY),
    "8": (WIDE_LOAD, WIDE_STORE),
    "15": (MATRIX, ROWS, WIDE_LOAD, WIDE_STORE),
    "31": (MATRIX, ROWS, COPY, WIDE_LOAD, WIDE_STORE, CLUSTER),
}
CLUSTERS_SINCE = 90
ASYNC_COPY_SINCE = 80  # before, a tile goes through registers
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")
OVERLAP_SINCE = 90

# Of a multiprocessor, by compute capability: warps, blocks, KB of shared memory (the CUDA C++
# Programming Guide; blocks and memory too in cuda_occupancy.h of the toolkit).
ROOM = {
    **{75: (32, 16, 64), 80: (64, 32, 164), 86: (48, 16, 100), 87: (48, 16, 164)},
    **{89: (48, 24, 100), 90: (64, 32, 228), 100: (64, 32, 228), 103: (64, 32, 228)},
    **{110: (48, 24, 228), 120: (48, 24, 100), 121: (48, 24, 100)},
}
REGISTERS = 65536  # in four parts, of which each has its own warps
THREADS, PLAIN_THREADS = 256, 128  # JMP_BLOCK_THREADS, JMP_PLAIN_THREADS

# What DeiT-S in float16 launches, by what the stand-in says of its device.
DEIT_S = {"num_keep": 138, "num_heads": 6, "head_dim": 64, "scale": 0.125, "selection": 1}
LAUNCHES = {
    "256,0": (
        *("measure_kernel<f16, 8>", "rate_kernel<4>", "match_kernel<4>"),
        "merge_kernel<f16>",
    ),
    "16,101376": tuple(f"resident_kernel<f16, {step}>" for step in (1, 2, 4, 8)),
    "0,101376": ("resident_kernel<f16, 15>",),
    "64,101376,1": ("resident_kernel<f16, 31>",),
}


@dataclass
class Kernel:
    """One kernel for one architecture.

    Attributes:
        shared_bytes, dynamic_bytes: static and, for DeiT-S, dynamic shared memory of a block.
        blocks: that a multiprocessor has room for; None where that is not known.
        loops: in the order of the file.
        early: accesses to global memory that may come before the wait for the launch before.
    """

    arch: str
    name: str
    tuned: bool
    registers: int = 0
    shared_bytes: int = 0
    dynamic_bytes: int | None = None
    blocks: int | None = None
    stack_bytes: int = 0
    spill_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)
    early: list[str] = field(default_factory=list)

    @property
    def family(self) -> str:
        return self.name.split("<")[0]

    @property
    def follows(self) -> bool:
        """Another of our launches, which it may overlap, comes before it."""
        return self.family in ("rate_kernel", "match_kernel", "merge_kernel")

    @property
    def meant(self) -> tuple[str, ...]:
        """Instructions that it must have."""
        if self.family != "resident_kernel":
            return MEANT[self.family] if self.tuned else ()
        step = self.name.rstrip(">").split(", ")[-1]
        left_out = step != "15" and (step == "31") != (int(self.arch) >= CLUSTERS_SINCE)
        return () if left_out else STEPS[step]

    @property
    def main_loop(self) -> Loop | None:
        """The loop with the most products; None where none has any."""
        for kind in PRODUCTS:
            if any(loop.products[kind] for loop in self.loops):
                return max(self.loops, key=lambda loop: (loop.products[kind], loop.instructions))
        return None


# --- Compiling and reading -----------------------------------------------------------------------


def compile_cubin(nvcc: Path, arch: str, output: Path) -> str:
    """Machine code for one architecture; returns ptxas's report, names demangled."""
    command = [str(nvcc), "-cubin", "-O3", "-std=c++17", f"-arch=sm_{arch}"]
    command += ["-Xptxas=-v", "-Werror", "all-warnings", str(KERNEL), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=KERNEL.parent)
    if done.returncode != 0:
        lines = [
            line for line in done.stderr.splitlines() if re.search("error|fatal|nsupported", line)
        ]
        raise ToolchainError(
            f"the kernels do not compile for sm_{arch}: {(lines or ['no message'])[0]}",
            " ".join(command),
        )
    return done.stderr


def demangle(symbol: str) -> str:
    """`measure_kernel<f16, 8>` or `plain::metric_kernel<f16>` of a mangled kernel; no c++filt.

    Enough for the kernels here: in an unnamed namespace, maybe in `plain`, with template arguments
    that are types, non-negative integers or booleans.
    """
    types = {"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}
    match = re.search(r"(5plain)?\d\d([a-z_]+_kernel)(?:I(.*?)EEv|E)", symbol)
    if match is None:
        return symbol
    arguments = re.findall(r"L[ib](\d+)E?|(6__half|13__nv_bfloat16|f)", match[3] or "")
    shown = ", ".join(number or types[kind] for number, kind in arguments)
    return ("plain::" if match[1] else "") + match[2] + (f"<{shown}>" if shown else "")


def read_report(arch: str, report: str) -> dict[str, Kernel]:
    """Kernels of a ptxas report, by mangled name."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = demangle(match[1])
            current = Kernel(arch, name, tuned=not name.startswith("plain::"))
            kernels[match[1]] = current
        elif current is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = map(int, match.groups())
            current.stack_bytes, current.spill_bytes = stack, stores + loads
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared_bytes = int(shared[1]) if shared else 0
    return kernels


def dynamic_shared() -> dict[str, int]:
    """Kernel -> bytes of dynamic shared memory of a block for DeiT-S, from the launches themselves;
    empty without a C++ compiler."""
    try:
        compiler = find_cxx()
    except ToolchainError:
        return {}
    sys.path[:0] = [str(REPO / "tests"), str(REPO / "plugins" / "tests")]
    import numpy as np
    from kernel_cases import attributes, random_case
    from kernel_library import KernelLibrary, compile_for_cpu

    attrs = attributes(**DEIT_S)
    case = random_case(0, attrs, batch=1, tokens=197, channels=384, dtype=np.float16)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        library, log = Path(name) / "kernel.so", Path(name) / "launches"
        try:
            compile_for_cpu(compiler, library, "-O0")
        except subprocess.CalledProcessError as error:
            command = " ".join(error.cmd)
            raise ToolchainError("the kernels do not compile for a CPU", command) from error
        for device, launched in LAUNCHES.items():
            log.unlink(missing_ok=True)
            os.environ |= {"JMP_HOST_DEVICE": device, "JMP_HOST_LOG": str(log)}
            KernelLibrary(library).run_host(*case, **attrs)
            del os.environ["JMP_HOST_DEVICE"], os.environ["JMP_HOST_LOG"]
            sizes = [int(line.split()[2]) for line in log.read_text().splitlines()]
            if len(sizes) != len(launched):
                raise ToolchainError(f"{len(sizes)} launches where LAUNCHES has {launched}")
            found |= dict(zip(launched, sizes, strict=True))
    return found


def room(kernel: Kernel) -> int | None:
    """Blocks that a multiprocessor has room for, by warps, registers and shared memory."""
    if int(kernel.arch) not in ROOM or (kernel.tuned and kernel.dynamic_bytes is None):
        return None
    warps, blocks, memory = ROOM[int(kernel.arch)]
    mine = (THREADS if kernel.tuned else PLAIN_THREADS) // 32
    of_warp = -(-kernel.registers * 32 // 256) * 256
    by_registers = 4 * (REGISTERS // 4 // of_warp) // mine if of_warp else blocks
    reserved = 0 if int(kernel.arch) < 80 else 1024
    bytes_ = reserved + kernel.shared_bytes + (kernel.dynamic_bytes or 0)
    by_memory = memory * 1024 // (-(-bytes_ // 128) * 128) if bytes_ else blocks
    return min(blocks, warps // mine, by_registers, by_memory)


def read_disassembly(cuobjdump: Path, cubin: Path, kernels: dict[str, Kernel]) -> None:
    """What machine code says of its kernel: instructions by full name (LDG.E.128), loops, early
    accesses."""
    done = subprocess.run(
        [str(cuobjdump), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    for symbol, code in read_code(done.stdout).items():
        if (kernel := kernels.get(symbol)) is None or not code:
            continue
        kernel.instructions = dict(Counter(one.name for one in code))
        ways = successors(code)
        kernel.loops = find_loops(code, ways)
        if kernel.follows and int(kernel.arch) >= OVERLAP_SINCE:
            kernel.early = early_accesses(code, ways)


# --- Judging -------------------------------------------------------------------------------------


def problems(kernel: Kernel) -> list[str]:
    """What is not as meant; the disassembly is judged only where there is one."""
    where = f"sm_{kernel.arch} {kernel.name}"
    found = []
    if kernel.spill_bytes or kernel.stack_bytes:
        found.append(
            f"{where}: {kernel.spill_bytes} bytes spilled, {kernel.stack_bytes} bytes of stack"
        )
    if kernel.shared_bytes > SHARED_LIMIT:
        found.append(f"{where}: {kernel.shared_bytes} bytes of shared memory")
    if not kernel.instructions:
        return found
    if local := [name for name in kernel.instructions if LOCAL_MEMORY.match(name)]:
        found.append(f"{where}: local memory ({', '.join(local)})")
    for wanted in kernel.meant:
        if wanted == COPY and int(kernel.arch) < ASYNC_COPY_SINCE:
            wanted = WIDE_LOAD
        if not any(name.startswith(wanted) for name in kernel.instructions):
            found.append(f"{where}: no {wanted}")
    if int(kernel.arch) >= OVERLAP_SINCE and kernel.follows:
        if OVERLAP not in kernel.instructions:
            found.append(f"{where}: does not wait for the launch before it ({OVERLAP})")
        elif kernel.early:
            found.append(f"{where}: does not wait before {', '.join(kernel.early)}")
    return found


def missing_kernels(arch: str, kernels: dict[str, Kernel]) -> list[str]:
    """A kernel that was renamed must not pass unseen."""
    found = {name for k in kernels.values() if k.tuned for name in (k.family, k.name)}
    wanted = (*MEANT, *(name for launched in LAUNCHES.values() for name in launched))
    return [f"sm_{arch}: no kernel {name}" for name in wanted if name not in found]


# --- The program ---------------------------------------------------------------------------------


def check(archs: list[str]) -> tuple[list[Kernel], list[str], str | None]:
    """Kernels, problems, and why nothing was disassembled (None if it was).

    Raises:
        ToolchainError: no nvcc, or the kernels do not compile.
    """
    nvcc, _ = find_nvcc()
    cuobjdump = find_disassembler(nvcc)
    skipped = None if cuobjdump else f"no cuobjdump with nvdisasm found: {DISASSEMBLER_HINT}"
    kernels: list[Kernel] = []
    wrong: list[str] = []
    dynamic = dynamic_shared()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        cubins = {arch: Path(name) / f"sm_{arch}.cubin" for arch in archs}
        reports = pool.map(lambda arch: compile_cubin(nvcc, arch, cubins[arch]), archs)
        for arch, report in zip(archs, reports, strict=True):
            found = read_report(arch, report)
            if cuobjdump is not None:
                try:
                    read_disassembly(cuobjdump, cubins[arch], found)
                except (OSError, subprocess.CalledProcessError) as error:  # older than nvcc
                    skipped = f"{cuobjdump} cannot read sm_{arch} ({error}): {DISASSEMBLER_HINT}"
            for kernel in found.values():
                kernel.dynamic_bytes = dynamic.get(kernel.name)
                kernel.blocks = room(kernel)
            wrong += missing_kernels(arch, found)
            kernels += found.values()
    wrong += [line for kernel in kernels for line in problems(kernel)]
    return kernels, wrong, skipped


def print_table(kernels: list[Kernel]) -> None:
    """`shared`: static + dynamic bytes; `loop`: instructions of the main one."""
    columns = (WIDE_LOAD, WIDE_STORE, "LDGSTS", MATRIX)
    print(
        f"{'arch':5}{'kernel':31}{'registers':>10}{'shared':>13}{'blocks':>7}{'spills':>7}", end=""
    )
    print(f"{'instructions':>13}{'loop':>6}" + "".join(f"{name:>11}" for name in columns))
    for kernel in sorted(kernels, key=lambda k: (int(k.arch), not k.tuned, k.name)):
        dynamic = "" if kernel.dynamic_bytes is None else f" + {kernel.dynamic_bytes}"
        counts = [
            sum(n for name, n in kernel.instructions.items() if name.startswith(start))
            for start in ("", *columns)
        ]
        blocks = "-" if kernel.blocks is None else kernel.blocks
        loop = kernel.main_loop
        counts.insert(1, loop.instructions if loop else 0)
        cells = [str(n) if kernel.instructions else "-" for n in counts]
        print(
            f"{kernel.arch:5}{kernel.name:31}{kernel.registers:>10}"
            f"{f'{kernel.shared_bytes}{dynamic}':>13}{blocks:>7}"
            f"{kernel.spill_bytes:>7}{cells[0]:>13}{cells[1]:>6}"
            + "".join(f"{cell:>11}" for cell in cells[2:])
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archs", nargs="*", default=["87", "90"], help="such as 87 or sm_87")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there; - for stdout")
    options = parser.parse_args(arguments)
    archs = [arch.lower().removeprefix("sm_") for arch in options.archs]
    if not all(arch.isdigit() for arch in archs):
        parser.error(f"expected architectures such as 87 or sm_87, found {' '.join(options.archs)}")
    try:
        nvcc, version = find_nvcc()
    except ToolchainError as error:
        print(f"skipped: {error.message}; {error.hint}")
        return 0
    try:
        kernels, wrong, skipped = check(archs)
    except ToolchainError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    report = {
        "nvcc": version,
        "ok": not wrong,
        "problems": wrong,
        "disassembly_skipped": skipped,
        "kernels": [asdict(kernel) for kernel in kernels],
    }
    if options.json == "-":
        print(json.dumps(report, indent=2))
    else:
        print(f"{nvcc} ({version})")
        print_table(kernels)
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out = sys.stderr if options.json == "-" else sys.stdout
    if skipped:
        print(f"disassembly skipped: {skipped}", file=out)
    for line in wrong:
        print(f"not as meant: {line}", file=out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
