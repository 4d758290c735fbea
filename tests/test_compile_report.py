"""The compile report finds what it is there to find, and counts the blocks that fit a multiprocessor."""

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from bench import compile_report
from bench.occupancy import resident_blocks, resident_share
from bench.offline_compile import Compiled

GEMM = Compiled("fused_linear", "sm_90", "bfloat16", "y", 8, 192, 0, 147456, 0, 5, 0)


def test_a_good_kernel_has_no_faults():
    assert GEMM.faults == [] and GEMM.blocks == 1 and GEMM.occupancy == 8 / 64


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"spills": 3}, "3 spills"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, 232448 are the limit"),
        ({"matrix": 0}, "no wgmma"),
        ({"matrix": 0, "kernel": "fused_linear_persistent", "dtype": "float16", "tma": 6}, "no wgmma"),
        ({"kernel": "fused_linear_persistent"}, "descriptors without TMA"),
        ({"arch": "sm_100", "tensor_columns": 768}, "768 columns of tensor memory, 512 are the limit"),
    ],
)
def test_each_fault_is_found_and_fails_the_report(change, fault, monkeypatch, capsys):
    bad = dataclasses.replace(GEMM, **change)
    assert bad.faults == [fault]
    monkeypatch.setattr(compile_report, "compile_all", lambda *a: iter([GEMM, bad]))
    assert compile_report.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("FAIL") == 1 and fault in printed.out and "2 kernels, 1 at fault" in printed.err
    assert compile_report.main(["--json"]) == 1
    assert [c["faults"] for c in json.loads(capsys.readouterr().out)] == [[], [fault]]


def test_what_needs_no_wgmma(monkeypatch, capsys):
    for change in ({"dtype": "float32"}, {"arch": "sm_80"}, {"kernel": "combine"}):
        assert dataclasses.replace(GEMM, matrix=0, **change).faults == []
    monkeypatch.setattr(compile_report, "compile_all", lambda *a: iter([GEMM]))
    assert compile_report.main([]) == 0


@pytest.mark.parametrize(
    "arch, needs, blocks",
    [
        # warps, registers a thread, bytes of shared memory, columns of tensor memory
        ("sm_90", (4, 32, 0), 16),  # warps
        ("sm_90", (1, 16, 0), 32),  # blocks
        ("sm_90", (4, 128, 0), 4),  # registers
        ("sm_90", (4, 129, 0), 3),  # registers, in steps of 8
        ("sm_90", (8, 40, 113 * 1024), 2),  # shared memory, with the kilobyte that the system keeps
        ("sm_90", (8, 40, 113 * 1024 + 1), 1),
        ("sm_80", (4, 32, 80 * 1024), 2),
        ("sm_100", (4, 32, 1024, 256), 2),  # tensor memory
        ("gfx942", (4, 128, 0), 4),  # a SIMD's 512 registers hold 4 waves
        ("gfx942", (8, 40, 40 * 1024), 1),
        ("gfx942", (4, 513, 0), 0),
    ],
)
def test_resident_blocks(arch, needs, blocks):
    assert resident_blocks(arch, *needs) == blocks


def test_occupancy_is_a_share_of_the_warps():
    assert resident_share("sm_90", 8, 2) == 0.25
    assert resident_share("gfx942", 4, 8) == 1.0
