"""Every kernel compiled, without a GPU, for the GPUs it is meant for: the part of `bench.compile_report` that fits a test."""

import json
import subprocess
import sys

import pytest

from bench.occupancy import fit_together

pytest.importorskip("triton")

KERNELS = {
    "combine",
    "down_project",
    "fused_linear",
    "gram",
    "low_rank_add",
    "matrix_coefficient",
    "quadratic_coefficient",
    "factor_coefficient",
    "sweep",
}


def compile_for(arch, *options, kernels=KERNELS - {"combine"}):
    # In a process of its own: in this one the kernels may be built for the interpreter.
    command = [sys.executable, "-m", "bench.compile_report", "--json", "--arch", arch, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)
    assert {result["kernel"] for result in results} >= kernels
    faulty = [result for result in results if result["faults"]]
    assert not faulty and done.returncode == 0, faulty or done.stderr
    assert all(result["blocks"] >= 1 and 0 < result["occupancy"] <= 1 for result in results)
    return results


def pairs_side_by_side(results):
    """How many (GEMM, small kernel) run beside one another on Hopper, after a check that all have room there together."""
    found = 0
    for product, small in (("y", "down_project beside"), ("dx", "outer_pair beside")):
        gemms = tuple(f"{product} {way} beside" for way in ("persistent", "pipelined"))
        for one in (result for result in results if result["case"].startswith(gemms)):
            for other in (result for result in results if result["case"].startswith(small)):
                blocks = [(result["num_warps"], result["registers"], result["shared"]) for result in (one, other)]
                assert fit_together("sm_90", *blocks), (one, other)
                found += 1
    return found


def written_in_parts(results):
    """How many GEMMs take fp32 factors in parts, after a check that what writes these has room beside them and loads wide."""
    gemms = [
        result for result in results if result["kernel"] == "fused_linear_pipelined" and "/float32" in result["case"]
    ]
    for small in (result for result in results if result["kernel"] == "in_parts"):
        loads, *_ = small["widths"]
        assert {bits for bits, _ in loads} == {128}, small
        for gemm in gemms:
            blocks = [(result["num_warps"], result["registers"], result["shared"]) for result in (gemm, small)]
            assert fit_together("sm_90", *blocks), (gemm, small)
    return len(gemms)


def test_a_tile_of_an_fp32_sum_is_summed_alone():
    """Taken for the start of its dot, the sum so far would be cut off by the matrix units: no interpreter shows that."""
    script = """
import torch, triton
from bench import offline_compile as oc
from csrc_triton import configs, down_project, fused_linear, plans
from csrc_triton.row_norms import gram_parts

half, whole = torch.bfloat16, torch.float32
tiles = configs.candidates("fused_linear", 256, 256, 16, whole, "sm_90")[0]
square, s, b = torch.empty(256, 256), torch.empty(256, 16), torch.empty(256, 16)
calls = (
    lambda: fused_linear(square, square, None, s, b, plans.Plan("tiles", tiles)),
    lambda: gram_parts(torch.empty(16, 4096, dtype=half)),
    lambda: gram_parts(torch.empty(16, 4096)),
    lambda: down_project(torch.empty(8192, 4096, dtype=half), torch.empty(16, 4096), whole),
)
for call in calls:
    kernel, args, kwargs = oc.catch_launches(call, "sm_90")[0]
    source, options = oc.specialize(kernel, args, kwargs, "sm_90")
    code = triton.compile(source, target=oc.TARGETS["sm_90"], options=options).asm["ttir"]
    starts = [line.split("tt.dot")[1].split(",")[2].split()[0] for line in code.splitlines() if "tt.dot" in line]
    # A dot begins at zero, or goes on where the dot before it in this tile ended.
    assert starts and starts[0].startswith("%cst"), (kernel, starts)
    assert not any("iter" in start or start.startswith("%acc_arg") or start.startswith("%arg") for start in starts), starts
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, dtype",
    # fp16 takes the same tiles as bf16; one architecture of each kind of matrix unit stands for the rest.
    [
        ("sm_80", "bfloat16"),
        ("sm_90", "bfloat16"),
        ("sm_90", "float16"),
        ("sm_100", "bfloat16"),
        ("gfx942", "bfloat16"),
    ],
)
def test_compiles_without_spills_in_the_chips_shared_memory(arch, dtype):
    results = compile_for(arch, "--dtype", dtype, "--rank", "16", "--shape", "large")
    gemms = [result for result in results if result["kernel"].startswith("fused_linear")]
    assert {result["case"].split()[0] for result in gemms} == {"y", "dx"}
    assert arch != "sm_90" or (any(result["tma"] for result in gemms) and pairs_side_by_side(results))
    for gemm in gemms:
        assert gemm["matrix"] > 0, f"no matrix instruction of {arch}'s own kind: {gemm}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--dtype bfloat16/float32 --rank 16 --shape large",
        "--dtype bfloat16 --rank 64 --shape large",
        "--dtype bfloat16 --rank 20 --shape unaligned",
    ],
)
def test_other_adapters_and_odd_sizes_fit_hopper(options):
    results = compile_for("sm_90", *options.split())
    aligned, mixed = "large" in options, "float32" in options
    assert bool(pairs_side_by_side(results)) == (aligned and not mixed)
    assert bool(written_in_parts(results)) == mixed


@pytest.mark.slow
def test_what_runs_beside_the_gemm_has_room_there():
    options = ["--dtype", "bfloat16", "--rank", "8", "--shape", "large", "--case", "beside"]
    kernels = {"down_project", "outer_pair", "fused_linear_persistent", "fused_linear_pipelined"}
    assert pairs_side_by_side(compile_for("sm_90", *options, kernels=kernels))


@pytest.mark.slow
def test_what_writes_factors_in_parts_has_room_beside_the_gemm_that_takes_them():
    options = ["--dtype", "bfloat16/float32", "--rank", "8", "20", "64", "--shape", "large", "--case", " pipelined"]
    assert written_in_parts(compile_for("sm_90", *options, kernels={"in_parts", "fused_linear_pipelined"}))


@pytest.mark.slow
def test_c_takes_no_approximate_square_root_or_quotient():
    """At zero C is η as exactly as fp32 can say it, on any GPU."""
    script = """
import re, torch, triton, csrc_triton
from bench.offline_compile import TARGETS, catch_launches, specialize
a, b, s = torch.empty(16, 512), torch.empty(512, 16), torch.empty(64, 16)
steps = [lambda norm=norm: csrc_triton.weight_coefficient(a, b, 2.0, norm) for norm in ("row", "matrix", "factor")]
steps.append(lambda: csrc_triton.adapter_grads(torch.empty(64, 512), None, s, b, None, 2.0, "entry", True, None, a.dtype))
for arch in ("sm_80", "sm_90", "sm_100"):
    found = set()
    for step in steps:
        for caught in catch_launches(step, arch):
            source, options = specialize(*caught, arch)
            ptx = triton.compile(source, target=TARGETS[arch], options=options).asm["ptx"]
            found |= set(re.findall(r"(?:sqrt|div|rsqrt|rcp)[.](?:approx|full|rn)[.a-z0-9]*", ptx))
    assert found and all(".rn" in name for name in found), (arch, found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_each_kernel_of_a_chain_waits_before_it_touches_memory():
    """And the one beside which the GEMM for dX runs begins when all before it has ended, as the GEMM needs it."""
    script = """
import re, torch, triton, csrc_triton
from bench.offline_compile import TARGETS, catch_launches, specialize
from csrc_triton import configs
half = torch.bfloat16
# Sums in parts, so that there is a second stage of each.
configs.num_splits = lambda *_, **__: 4
g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
s, a, b = (torch.empty(size, dtype=half) for size in ((2048, 16), (16, 4096), (4096, 16)))
touches = r"ld[.]global|st[.]global|cp[.]async|atom[.]|red[.]"
for norm, in_front in (("row", 2), ("matrix", 3), ("factor", 1), (None, 0)):
    places = []
    for caught in catch_launches(lambda: csrc_triton.layer_grads(g, x, s, w, a, b, 2.0, norm, half, half), "sm_90"):
        source, options = specialize(*caught, "sm_90")
        ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
        place, first_touch = caught[2].get("CHAIN"), re.search(touches, ptx).start()
        waits, lets = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
        places.append(place)
        if place == "link":
            assert caught[2]["launch_pdl"] and 0 < waits < lets < first_touch, caught[0]
        elif place == "":
            # The second stage of dA and dB.
            assert not caught[2].get("launch_pdl") and waits < 0 and lets < 0, caught[0]
        elif place == "first":
            assert not caught[2].get("launch_pdl") and waits < 0 < lets < first_touch, caught[0]
        else:
            # The GEMM: it waits at its end for the kernel beside which it runs.
            assert caught[2]["WAIT"] == "at the end" and lets < 0 < first_touch < waits, caught[0]
    c_and_ds = ["first"] + ["link"] * (in_front + 1)
    assert places == [*c_and_ds, "first", None, ""], (norm, places)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_nothing_comes_between_the_gemm_and_the_kernel_beside_it():
    """Not even an allocation: torch may fill it, and its memory may be what a kernel was using when the other began."""
    script = """
import torch, csrc_triton
from torch.utils._python_dispatch import TorchDispatchMode
from bench.offline_compile import catch_launches
from csrc_triton.launching import watch

half, done = torch.bfloat16, []

class Noted(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            done.append(str(func))
        return func(*args, **(kwargs or {}))

g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
s, a, b = (torch.empty(size, dtype=half) for size in ((2048, 16), (16, 4096), (4096, 16)))
watch.watcher = lambda kernel, *_: done.append(kernel.__name__)
calls = {
    "_down_project_kernel": lambda: csrc_triton.adapted_linear(x, w, None, a, b, half),
    "_outer_pair_kernel": lambda: csrc_triton.layer_grads(g, x, s, w, a, b, 2.0, "row", half, half),
    "_in_parts_kernel": lambda: csrc_triton.fused_linear(x, w, None, s.float(), b.float()),
}
for beside, call in calls.items():
    done.clear()
    with Noted():
        caught = catch_launches(call, "sm_90")
    gemm = done.index("_fused_linear_pipelined_kernel")
    assert done[gemm - 1] == beside and any("empty" in name for name in done[: gemm - 1]), done
    small, gemm = (next(c[2] for c in caught if c[0].__name__ == name) for name in (beside, done[gemm]))
    assert small["CHAIN"] == "first" and gemm["launch_pdl"] and gemm["WAIT"], (small, gemm)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_gemm_waits_for_factors_in_parts_whatever_it_was_to_wait_for():
    script = """
import torch
from bench.offline_compile import catch_launches
from csrc_triton import plans
from csrc_triton.fused_linear import launch_beside

half = torch.bfloat16
x, w, y = (torch.empty(size, dtype=half) for size in ((2048, 4096), (1024, 4096), (2048, 1024)))
s, b = torch.empty(2048, 16), torch.empty(1024, 16)
call = plans.Call("fused_linear", 2048, 1024, 4096, 16, half, torch.float32)
plan = next(plan for plan in plans.options(call, "sm_90", plans.WIDE) if plan.way == "pipelined")
for wait in ("", "for S", "at the end"):
    parts, gemm = catch_launches(lambda: launch_beside(x, w, None, s, b, y, plan, wait), "sm_90")
    # The first of a chain begins when all before it has ended.
    assert parts[2]["CHAIN"] == "first" and not parts[2].get("launch_pdl"), parts
    assert gemm[2]["WAIT"] == "for S" and gemm[2]["launch_pdl"], gemm
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
