"""The compile report finds what it is there to find, and counts the blocks that fit a multiprocessor."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import compile_report, offline_compile
from bench.machine_code import AccessWidths, access_widths
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
        ({"aligned": True, "widths": AccessWidths(((16, 33),), (), 32, 1)}, "32 loads of one element in the main loop"),
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


def test_what_may_be_loaded_one_by_one():
    for change in (
        {"aligned": False, "widths": AccessWidths(((16, 33),), (), 32, 1)},
        {"aligned": True, "widths": AccessWidths(((128, 4), (16, 1)), (), 1, 4)},
        {"aligned": True, "kernel": "combine", "widths": AccessWidths(((16, 1),), (), 1, 0)},
    ):
        assert dataclasses.replace(GEMM, **change).faults == []


PTX = """
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
$L__BB0_1:
	@%p1 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	@%p2 ld.global.L1::evict_first.b16 { %rs1 }, [ %rd3 + 0 ];
$L__BB0_2:
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {...};
	bra.uni 	$L__BB0_3;
$L__BB0_3:
	@%p3 bra 	$L__BB0_1;
	@%p4 st.global.v2.b32 [ %rd4 + 0 ], { %r1, %r2 };
	ld.global.b16 { %rs2 }, [ %rd5 + 0 ];
"""

GCN = """
	global_load_dwordx4 v[0:3], v[4:5], off
.LBB0_1:
	buffer_load_ushort v7, v8, s[0:3], 0 offen
	global_load_short_d16_hi v7, v[8:9], off
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], 0
	s_cbranch_scc1 .LBB0_1
	buffer_store_dwordx2 v[0:1], v4, s[0:3], 0 offen
"""


@pytest.mark.parametrize(
    "code, matrix, widths",
    [
        (PTX, "wgmma", AccessWidths(((128, 2), (16, 2)), ((64, 1),), 1, 1)),
        (PTX, "mma.sync", AccessWidths(((128, 2), (16, 2)), ((64, 1),), 0, 0)),
        (GCN, "v_mfma", AccessWidths(((128, 1), (16, 2)), ((64, 1),), 2, 0)),
    ],
)
def test_widths_of_accesses(code, matrix, widths):
    assert access_widths(code, matrix) == widths


def test_jobs_change_nothing():
    # In a process of its own: in this one the kernels may be built for the interpreter.
    program = (
        "import sys; from bench.compile_report import main; [main([*sys.argv[1:], '--jobs', jobs]) for jobs in '12']"
    )
    some = ["--arch", "sm_90", "--dtype", "bfloat16", "--rank", "16", "--shape", "narrow", "--case", "layer_grads row"]
    done = subprocess.run([sys.executable, "-c", program, "--json", *some], capture_output=True, text=True)
    one, two = done.stdout.splitlines()
    assert len(json.loads(one)) > 5 and one == two


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


def test_on_amd_a_spill_is_what_goes_to_memory():
    """Scalar registers that do not fit lie in lanes of vector registers."""
    code = ".vgpr_count: 156\n.sgpr_spill_count: 24\n"
    assert offline_compile._read_amd(SimpleNamespace(asm={"amdgcn": code}))[:2] == (156, 0)
    code += "scratch_store_dword off, v1, off\nscratch_load_dwordx4 v[0:3], off, off\n"
    assert offline_compile._read_amd(SimpleNamespace(asm={"amdgcn": code}))[:2] == (156, 2)
