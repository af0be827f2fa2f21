"""The table of TensorRT's known faults."""

from __future__ import annotations

import pytest

from jmp_deploy.engine.known_faults import FAULTS, warnings


@pytest.mark.parametrize(
    ("version", "targets", "precision", "threads"),
    [
        ("10.3.0", ("sm_87",), "fp16", ["#4723"]),  # JetPack 6
        ("10.3.0", (), "fp16", ["#4723", "#4837"]),  # on an unknown GPU
        ("10.3.0.30", ("sm_87",), "int8", ["#4723"]),
        ("10.4.0.26", ("sm_86",), "bf16", ["#4723"]),
        ("10.4.0", ("sm_86",), "fp32", ["#4742"]),
        ("10.3.0", ("sm_87",), "fp32", []),
        ("10.2.0", ("sm_87",), "fp16", []),
        ("10.5.0", ("sm_87",), "fp16", []),
        ("10.16.1", ("sm_120",), "fp16", ["#4837"]),
        ("10.16.1.11", ("sm_89", "sm_120"), "bf16", ["#4837"]),
        ("10.16.2", ("sm_120",), "fp16", []),
        ("10.16.1", ("sm_120",), "fp32", []),
        ("10.16.1", ("sm_89",), "fp16", []),
        ("11.1.0", ("sm_120",), "fp16", []),
    ],
)
def test_an_engine_is_warned_of_where_its_version_gpu_and_precision_are_affected(
    version, targets, precision, threads
):
    found = warnings("tensorrt", version, targets, precision)
    assert len(found) == len(threads)
    for text, thread in zip(found, threads, strict=True):
        assert thread in text and version in text and "--fp32 attention" in text


def test_tensorrt_rtx_counts_its_versions_by_itself():
    assert warnings("rtx", "1.7.1", ("sm_120",)) == []
    assert all(fault.first <= fault.last for fault in FAULTS)
