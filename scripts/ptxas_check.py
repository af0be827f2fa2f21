"""Compile the CUDA kernels and read what became of them: no GPU needed.

    python scripts/ptxas_check.py                 # sm_87 (Orin) and sm_90 (Hopper)
    python scripts/ptxas_check.py 75 120 --json - # others; JSON to stdout

From the compiler's report: registers, shared memory, and that nothing is spilled to memory. From
the disassembly: 16-byte loads and stores, matrix and copy instructions where they are meant. Exit
code 0: as meant, or a tool is missing (said in one line; the rest is still checked); 1: not as
meant; 2: the kernels do not compile, or an unknown architecture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from jmp_deploy.core.errors import ToolchainError  # noqa: E402
from jmp_deploy.plugin.toolchain import find_disassembler, find_nvcc  # noqa: E402

KERNEL = REPO / "plugins" / "token_reduce_kernel.cu"
SHARED_LIMIT = 48 << 10  # bytes that a block may have without asking
DISASSEMBLER_HINT = (
    "pip install triton (its wheel has cuobjdump and nvdisasm), or a CUDA toolkit with both"
)

# Instructions that each tuned kernel must have: the beginnings of their names.
WIDE_LOAD, WIDE_STORE, MATRIX, COPY = "LDG.E.128", "STG.E.128", "HMMA", "LDGSTS.E.BYPASS.128"
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
OVERLAP = "ACQBULK"  # griddepcontrol.wait


@dataclass
class Kernel:
    """One kernel for one architecture."""

    arch: str
    name: str
    tuned: bool
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.split("<")[0]

    @property
    def meant(self) -> tuple[str, ...]:
        """Instructions that it must have."""
        if self.family != "resident_kernel":
            return MEANT[self.family] if self.tuned else ()
        step = self.name.rstrip(">").split(", ")[-1]
        left_out = step != "15" and (step == "31") != (int(self.arch) >= CLUSTERS_SINCE)
        return () if left_out else STEPS[step]


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
    that are types or non-negative integers.
    """
    types = {"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}
    match = re.search(r"(5plain)?\d\d([a-z_]+_kernel)(?:I(.*?)EEv|E)", symbol)
    if match is None:
        return symbol
    arguments = re.findall(r"Li(\d+)E?|(6__half|13__nv_bfloat16|f)", match[3] or "")
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


def read_disassembly(cuobjdump: Path, cubin: Path, kernels: dict[str, Kernel]) -> None:
    """Counts the instructions of each kernel, by full name such as LDG.E.128."""
    done = subprocess.run(
        [str(cuobjdump), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
    )
    counts: dict[str, int] = {}
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    for line in done.stdout.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = {}
            if match[1] in kernels:
                kernels[match[1]].instructions = counts
        elif match := instruction.match(line):
            counts[match[1]] = counts.get(match[1], 0) + 1


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
    # another of our launches
    follows = kernel.family in ("rate_kernel", "match_kernel", "merge_kernel")
    if follows and int(kernel.arch) >= OVERLAP_SINCE and OVERLAP not in kernel.instructions:
        found.append(f"{where}: does not wait for the launch before it ({OVERLAP})")
    return found


def missing_kernels(arch: str, kernels: dict[str, Kernel]) -> list[str]:
    """A kernel that was renamed must not pass unseen."""
    found = {kernel.family for kernel in kernels.values() if kernel.tuned}
    return [f"sm_{arch}: no kernel {name}" for name in MEANT if name not in found]


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
            wrong += missing_kernels(arch, found)
            kernels += found.values()
    wrong += [line for kernel in kernels for line in problems(kernel)]
    return kernels, wrong, skipped


def print_table(kernels: list[Kernel]) -> None:
    columns = (WIDE_LOAD, WIDE_STORE, "LDGSTS", MATRIX)
    print(f"{'arch':6}{'kernel':30}{'registers':>10}{'shared':>8}{'spills':>8}", end="")
    print("".join(f"{name:>11}" for name in columns))
    for kernel in sorted(kernels, key=lambda k: (int(k.arch), not k.tuned, k.name)):
        numbers = [
            sum(n for name, n in kernel.instructions.items() if name.startswith(column))
            for column in columns
        ]
        cells = "".join(f"{n if kernel.instructions else '-':>11}" for n in numbers)
        print(
            f"{kernel.arch:6}{kernel.name:30}{kernel.registers:>10}{kernel.shared_bytes:>8}"
            f"{kernel.spill_bytes:>8}{cells}"
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
