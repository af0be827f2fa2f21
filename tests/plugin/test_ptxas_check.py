"""What scripts/ptxas_check.py says of good and of bad kernels; and of ours, where nvcc is."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from jmp_deploy.core.errors import ToolchainError
from jmp_deploy.plugin import toolchain
from scripts import ptxas_check


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return ptxas_check


PREFIX = "_ZN55_GLOBAL__N__4b84b935_22_token_reduce_kernel_cu_a7f41cd0"
MERGE = f"{PREFIX}12merge_kernelI6__halfEEv20JmpTokenReduceParamsPKT_S5_NS_7ScratchEPS3_S7_S7_Pi"
PLAIN = f"{PREFIX}5plain13metric_kernelIfEEv20JmpTokenReduceParamsPKT_Pf"
MEASURE = (
    f"{PREFIX}14measure_kernelI13__nv_bfloat16Li8EEEv20JmpTokenReduceParamsPKT_S5_NS_7ScratchE"
)
RATE = f"{PREFIX}11rate_kernelILi4EEEv20JmpTokenReduceParamsNS_7ScratchEii"
RESIDENT = f"{PREFIX}15resident_kernelI6__halfLi31EEEv20JmpTokenReduceParamsPKT_S5_S5_"
DECIDE = f"{PREFIX}5plain13decide_kernelE20JmpTokenReduceParamsPKiPKfS3_Pi"


def report_of(symbol: str, spilled: int = 0) -> str:
    return (
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_90'\n"
        f"    {spilled} bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem\n"
    )


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (MERGE, "merge_kernel<f16>"),
        (PLAIN, "plain::metric_kernel<f32>"),
        (MEASURE, "measure_kernel<bf16, 8>"),
        (RATE, "rate_kernel<4>"),
        (RESIDENT, "resident_kernel<f16, 31>"),
        (DECIDE, "plain::decide_kernel"),
    ],
)
def test_names(check: ModuleType, symbol: str, name: str) -> None:
    assert check.demangle(symbol) == name


def test_a_report_is_read(check: ModuleType) -> None:
    kernels = check.read_report("90", report_of(MERGE, 24) + report_of(PLAIN))
    merge, plain = kernels[MERGE], kernels[PLAIN]
    assert (merge.registers, merge.shared_bytes, merge.spill_bytes) == (64, 512, 24)
    assert merge.tuned and not plain.tuned
    assert any("24 bytes spilled" in line for line in check.problems(merge))
    assert check.problems(plain) == []


def test_what_the_disassembly_must_show(check: ModuleType) -> None:
    def problems(arch: str, *instructions: str) -> str:
        kernel = check.Kernel(arch, "merge_kernel<f16>", tuned=True)
        kernel.instructions = dict.fromkeys(instructions, 1)
        return " ".join(check.problems(kernel))

    good = ("LDG.E.128.CONSTANT", "STG.E.128", "ACQBULK")
    assert problems("90", *good) == ""
    assert "no LDG.E.128" in problems("90", "LDG.E.64", *good[1:])
    assert "no STG.E.128" in problems("90", good[0], good[2])
    assert "ACQBULK" in problems("90", *good[:2]) and problems("87", *good[:2]) == ""
    assert "local memory (STL.64)" in problems("90", *good, "STL.64")
    assert problems("90") == ""  # nothing disassembled: nothing said of it


def test_a_cluster_has_a_barrier_and_machine_code_where_there_are_clusters(
    check: ModuleType,
) -> None:
    def problems(arch: str, step: int, *instructions: str) -> str:
        kernel = check.Kernel(arch, f"resident_kernel<f16, {step}>", tuned=True)
        kernel.instructions = dict.fromkeys(("EXIT", *instructions), 1)
        return " ".join(check.problems(kernel))

    good = ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128")
    assert problems("90", 31, *good, "UCGABAR_WAIT") == ""
    assert "UCGABAR_WAIT" in problems("90", 31, *good) and problems("87", 31) == ""
    assert "no HMMA" in problems("87", 2, *good[1:]) and problems("90", 2) == ""
    assert "no LDSM" in problems("87", 15, "HMMA", *good[2:])


def test_a_kernel_that_is_gone_is_missed(check: ModuleType) -> None:
    kernels = check.read_report("90", report_of(MERGE) + report_of(PLAIN))
    missing = " ".join(check.missing_kernels("90", kernels))
    assert "rate_kernel" in missing and "merge_kernel" not in missing


def test_without_nvcc_it_says_so_and_fails_nothing(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> tuple[Path, str]:
        raise ToolchainError("no nvcc anywhere", "install one")

    monkeypatch.setattr(check, "find_nvcc", missing)
    assert check.main([]) == 0
    assert capsys.readouterr().out == "skipped: no nvcc anywhere; install one\n"


@pytest.mark.slow
def test_our_kernels_are_as_meant(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        toolchain.find_nvcc()
    except ToolchainError as error:
        pytest.skip(error.message)
    code = check.main(["sm_87", "90", "--json", str(tmp_path / "report.json")])
    assert code == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    tuned = [kernel for kernel in report["kernels"] if kernel["tuned"]]
    assert len(tuned) == 2 * (9 + 12 + 4 + 4 + 3 + 18)
    # two blocks a multiprocessor, but for float32's wide heads, which nothing that is fast has
    wide = {"attention_kernel<f32, 8, 0>", "attention_kernel<f32, 8, 1>"}
    assert {k["name"] for k in tuned if k["registers"] > 128} == wide
