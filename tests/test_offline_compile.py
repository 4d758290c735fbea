"""Every kernel compiled, without a GPU, for the GPUs it is meant for: the part of `bench.compile_report` that fits a test."""

import json
import subprocess
import sys

import pytest

from bench.occupancy import fit_together

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
    pairs = (("y", "down_project beside y"), ("dx", "down_project beside dx"), ("dx", "outer_pair beside dx"))
    for product, small in pairs:
        gemms = tuple(f"{product} {way} beside" for way in ("persistent", "pipelined"))
        for one in (result for result in results if result["case"].startswith(gemms)):
            # fp32 factors go pipelined, at any rank.
            if "persistent" in one["case"] and "/float32" in one["case"]:
                continue
            for other in (result for result in results if result["case"].startswith(small)):
                # The GEMM in Gluon alone waits for a round.
                if "persistent" in one["case"] and "in rounds" in other["case"]:
                    continue
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
    assert bool(pairs_side_by_side(results)) == ("large" in options)
    assert bool(written_in_parts(results)) == ("float32" in options)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--dtype bfloat16 --rank 8", "--dtype bfloat16/float32 --rank 8 32 64"])
def test_what_runs_beside_the_gemm_has_room_there(options):
    options = [*options.split(), "--shape", "large", "--case", "beside"]
    kernels = {"outer_pair", "fused_linear_persistent", "fused_linear_pipelined"}
    if "float32" not in " ".join(options):
        kernels.add("down_project")
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
    """The pass for dS and u is counted before it lets the GEMM begin; what runs beside the GEMM, up to its last program's end,
    waits until none is counted before it reads u or C."""
    script = """
import re, torch, triton, csrc_triton
from bench.offline_compile import TARGETS, catch_launches, specialize
from csrc_triton import configs
half = torch.bfloat16
# Sums in parts, so that there is a second stage of each.
configs.num_splits = lambda *_, **__: 4
g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
touches = r"ld[.]global[.](?!gpu)|st[.]global|cp[.]async[.]c"
count = r"(?:atom|ld|red)[.]global[.]gpu[.](acquire|acq_rel|release)"
for factors in (half, torch.float32):
    beside = factors == half
    a, b = torch.empty(16, 4096, dtype=factors), torch.empty(4096, 16, dtype=factors)
    s = torch.empty(2048, 16, dtype=factors)
    for norm, in_front in (("row", 2), ("matrix", 3), ("factor", 1), ("token", 2), (None, 0)):
        places = []
        for caught in catch_launches(lambda: csrc_triton.layer_grads(g, x, s, w, a, b, 2.0, norm, half, half), "sm_90"):
            source, options = specialize(*caught, "sm_90")
            ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
            touched = [match.start() for match in re.finditer(touches, ptx)]
            counts = [(match.start(), match[1]) for match in re.finditer(count, ptx)]
            waits, lets = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
            place, name = caught[2]["CHAIN"], caught[0].__name__
            places.append(place)
            assert bool(caught[2].get("launch_pdl")) == (place not in ("", "first")), name
            if name == "_down_project_kernel" and beside:
                (begins, first), (ends, last) = counts
                assert first == "acq_rel" and last == "release", counts
                assert begins < lets < touched[0] and touched[-1] < ends, name
                # The result of the first is there when the next kernel is let begin.
                result = re.search("%r[0-9]+", ptx[begins:])[0]
                assert re.search(rf"st[.]shared[^ ]*b32 .*{result};.*bar[.]sync", ptx[begins:lets], re.S), ptx[begins:lets]
                assert place == "first" and waits < 0, name
            elif place == "link":
                assert 0 < waits < lets < touched[0] and not counts, name
            elif place == "":
                # The second stage of dA and dB.
                assert waits < 0 and lets < 0, name
            elif place == "first":
                assert waits < 0 < lets < touched[0], name
            elif place == "midway":
                assert 0 < lets < waits, name
            else:
                assert place == "late" and 0 < lets < touched[0] and touched[-1] < waits, name
                assert [order for _, order in counts] == ["acquire"] * (2 * beside), counts
                if beside:
                    # In front of one loop, and of all that the other's end reads and writes: C, dB.
                    starts = [place for place, _ in counts]
                    assert any(place < starts[0] for place in touched) == (norm != "token"), name
                    between = [place for place in touched if starts[0] < place < starts[1]]
                    assert between and touched[-1] > starts[1], name
        if beside:
            # C; the others.
            expected = [*["first", *["link"] * in_front][:in_front], "first", "midway", "late", ""]
        else:
            # C, and dS and u in two stages; the factors' parts and the others.
            expected = ["first", *["link"] * (in_front + 1), "first", "midway", "late", ""]
        assert places == expected, (norm, places)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_c_and_s_have_room_beside_the_gemm_and_end_one_after_another():
    """All let the next begin at once; C's first kernel ends after S, and its second waits for that, so that the GEMM, which
    waits for the second, waits for all."""
    script = """
import re, torch, triton, csrc_triton
from bench.occupancy import fit_together
from bench.offline_compile import TARGETS, catch_launches, compile_launch, specialize
half = torch.bfloat16
x, w = torch.empty(2048, 4096, dtype=half), torch.empty(4096, 4096, dtype=half)
touches = r"ld[.]global|st[.]global|cp[.]async|atom[.]|red[.]"
for rank in (8, 16, 32):
    a, b = torch.empty(rank, 4096, dtype=half), torch.empty(4096, rank, dtype=half)
    blocks = {}
    for caught in catch_launches(
        lambda: csrc_triton.adapted_linear_and_coefficient(x, w, None, a, b, half, 2.0), "sm_90"
    ):
        source, options = specialize(*caught, "sm_90")
        result = compile_launch(source, options, "sm_90", "bfloat16", "")
        place = caught[2]["CHAIN"]
        assert not result.spills and place not in blocks
        blocks[place] = (result.num_warps, result.registers, result.shared)
        ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
        waits, lets = (ptx.find(f"griddepcontrol.{name}") for name in ("wait", "launch_dependents"))
        touched = [match.start() for match in re.finditer(touches, ptx)]
        assert bool(caught[2].get("launch_pdl")) == (place != "first"), place
        if place == "first":
            assert waits < 0 < lets < touched[0]
        elif place == "late":
            assert 0 < lets < touched[0] and touched[-1] < waits
        elif place == "open":
            assert 0 < lets < waits < touched[0]
        else:
            assert 0 < lets < waits, place
    assert list(blocks) == ["first", "late", "open", "midway"], blocks
    for small in ("late", "open"):
        assert fit_together("sm_90", *(blocks[place] for place in ("first", small, "midway"))), (rank, small, blocks)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_c_has_room_behind_a_gemm_that_s_has_none_beside():
    """C's kernels let the next begin at once; the first is counted until it has written, the second reads after it has waited
    for that, and neither ends before the GEMM."""
    script = """
import re, torch, triton, csrc_triton
from bench.occupancy import fit_together
from bench.offline_compile import TARGETS, catch_launches, compile_launch, specialize
half, whole = torch.bfloat16, torch.float32
x, w = torch.empty(8192, 4096, dtype=half), torch.empty(4096, 4096, dtype=half)
touches = r"ld[.]global[.](?!gpu)|st[.]global|cp[.]async[.]c"
count = r"(?:atom|ld|red)[.]global[.]gpu[.](acquire|acq_rel|release)"
for rank, factors in ((64, half), (256, half), (16, whole)):
    a, b = torch.empty(rank, 4096, dtype=factors), torch.empty(4096, rank, dtype=factors)
    caught = catch_launches(
        lambda: csrc_triton.adapted_linear_and_coefficient(x, w, None, a, b, factors, 2.0), "sm_90"
    )
    kernels = [kernel.__name__ for kernel, *_ in caught]
    gemm = kernels.index("_fused_linear_pipelined_kernel")
    assert kernels[gemm + 1 :] == ["_gram_kernel", "_quadratic_coefficient_kernel"], kernels
    blocks = []
    for launched in caught[gemm:]:
        source, options = specialize(*launched, "sm_90")
        result = compile_launch(source, options, "sm_90", "bfloat16", "")
        assert not result.spills
        blocks.append((result.num_warps, result.registers, result.shared))
        if len(blocks) == 1:
            assert launched[2]["CHAIN"] == ("first" if factors == half else "midway")
            continue
        assert launched[2]["CHAIN"] == "late" and launched[2]["launch_pdl"]
        ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
        waits, lets = (ptx.find(f"griddepcontrol.{name}") for name in ("wait", "launch_dependents"))
        touched = [match.start() for match in re.finditer(touches, ptx)]
        counts, orders = zip(*((match.start(), match[1]) for match in re.finditer(count, ptx)))
        assert lets < touched[0] and touched[-1] < waits
        if len(blocks) == 2:
            assert orders == ("acq_rel", "release"), orders
            assert counts[0] < lets and touched[-1] < counts[1] < waits
        else:
            assert orders == ("acquire",) and lets < counts[0] < touched[0]
    for small in blocks[1:]:
        assert fit_together("sm_90", blocks[0], small), (rank, factors, blocks)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_sums_have_room_beside_the_gemm_whose_first_column_finds_ds():
    """The GEMM waits for the kernel in front before it takes a tile, and counts those of dS before it lets the sums begin; what
    it writes is there before a count goes down."""
    script = """
import re, torch, triton, csrc_triton
from bench.occupancy import fit_together
from bench.offline_compile import TARGETS, catch_launches, compile_launch, specialize
from csrc_triton import plans
half = torch.bfloat16
count = r"(?:atom|red)[.]global[.]gpu[.](relaxed|acq_rel|release)"
for rank in (8, 16):
    g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
    s, a, b = (torch.empty(size, dtype=half) for size in ((2048, rank), (rank, 4096), (4096, rank)))
    found = plans.options(plans.Call("layer_grads", 2048, 4096, 4096, rank, half, half), "sm_90", untried=True)
    for plan in [plan for plan in found if plan.way == "column"]:
        caught = catch_launches(
            lambda: csrc_triton.layer_grads(g, x, s, w, a, b, 2.0, "row", half, half, plan=plan), "sm_90"
        )
        kernels = [launched[0].__name__ for launched in caught]
        front = kernels.index("_stack_factors_kernel")
        assert kernels[front:] == [
            "_stack_factors_kernel", "_adapted_linear_pipelined_kernel", "_outer_pair_kernel"
        ], kernels
        assert [launched[2]["CHAIN"] for launched in caught[front:]] == ["first", "link", "late"]
        blocks = []
        for launched in caught[front:]:
            source, options = specialize(*launched, "sm_90")
            result = compile_launch(source, options, "sm_90", "bfloat16", "")
            assert not result.spills
            blocks.append((result.num_warps, result.registers, result.shared))
            if len(blocks) == 2:
                ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
        assert fit_together("sm_90", *blocks[1:]), (rank, blocks)
        counts = [(match.start(), match[1]) for match in re.finditer(count, ptx)]
        # One is taken at first; then there is a place for each step that is loaded, as any may be a tile's last.
        takes = [place for place, order in counts if order == "relaxed"]
        begins = [place for place, order in counts if order == "acq_rel"]
        lets = [match.start() for match in re.finditer("griddepcontrol.launch_dependents", ptx)]
        assert len(takes) == len(begins) == len(lets) > 1, counts
        assert all(take < begin < let for take, begin, let in zip(takes, begins, lets))
        assert 0 < ptx.find("griddepcontrol.wait") < takes[0] and lets[0] < ptx.find("cp.async.bulk.tensor")
        ends = [place for place, order in counts if order == "release"]
        stores = [match.start() for match in re.finditer("st[.]global", ptx)]
        assert len(ends) == 2 and stores and stores[-1] < ends[0]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_what_the_kernels_of_a_chain_write_is_allocated_in_front_of_what_is_given_back():
    """Torch may give memory that is given back to what begins before the kernel that was using it has ended."""
    script = """
import torch, csrc_triton
from torch.utils._python_dispatch import TorchDispatchMode
from bench.offline_compile import catch_launches
from csrc_triton.launching import watch

half, done = torch.bfloat16, []

class Noted(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What the first call makes for all is none of a chain's.
        if not func.is_view and "zeros" not in str(func):
            done.append("new" if "empty" in str(func) else str(func))
        return func(*args, **(kwargs or {}))

g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
s, a, b = (torch.empty(size, dtype=half) for size in ((2048, 16), (16, 4096), (4096, 16)))
wide_s, wide_a, wide_b = s.float(), a.float(), b.float()
watch.watcher = lambda kernel, *_: done.append(kernel.__name__.removesuffix("_kernel"))
S, GEMM, pair = "_down_project", "_fused_linear_pipelined", "_outer_pair"
calls = {
    # y, S; y, S, C's scratch, C. No scratch is given back before the last allocation.
    lambda: csrc_triton.adapted_linear(x, w, None, a, b, half): ["new", "new", S, GEMM],
    lambda: csrc_triton.adapted_linear_and_coefficient(x, w, None, a, b, half, 2.0): [
        *("new", "new", S, "new", "_gram", "new", "_quadratic_coefficient", GEMM)
    ],
    # y; the factors' parts; C's scratch, C.
    lambda: csrc_triton.adapted_linear_and_coefficient(x, w, None, wide_a, wide_b, torch.float32, 2.0): [
        *("new", "new", "new", "_in_parts", GEMM, "new", "_gram", "new", "_quadratic_coefficient")
    ],
    # dX; dS and u; dB and dA.
    lambda: csrc_triton.layer_grads(g, x, s, w, a, b, 2.0, "row", half, half): [
        *("new", "new", S, GEMM, "new", "new", pair)
    ],
    # y; the factors' parts.
    lambda: csrc_triton.fused_linear(x, w, None, wide_s, wide_b): ["new", "new", "new", "_in_parts", GEMM],
}
for call, expected in calls.items():
    done = []
    with Noted():
        catch_launches(call, "sm_90")
    start = done.index(S) - 2 if pair in expected else 0
    start = done.index("_in_parts") - 3 if "_in_parts" in expected else start
    assert done[start : start + len(expected)] == expected, done
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_gemm_of_factors_in_parts_waits_for_them():
    script = """
import torch
from bench.offline_compile import catch_launches
from csrc_triton import plans
from csrc_triton.fused_linear import fused_linear

half = torch.bfloat16
x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (1024, 4096)))
s, b = torch.empty(2048, 16), torch.empty(1024, 16)
call = plans.Call("fused_linear", 2048, 1024, 4096, 16, half, torch.float32)
plan = next(plan for plan in plans.options(call, "sm_90", plans.WIDE) if plan.way == "pipelined")
parts, gemm = catch_launches(lambda: fused_linear(x, w, None, s, b, plan), "sm_90")
# The first of a chain begins when all before it has ended.
assert parts[2]["CHAIN"] == "first" and not parts[2].get("launch_pdl"), parts
assert gemm[2]["CHAIN"] == "midway" and gemm[2]["launch_pdl"] and gemm[2]["maxnreg"] == 208, gemm
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_nothing_is_allocated_where_a_kernel_of_the_chain_may_still_read():
    """What a kernel of a chain was given lives until the last allocation in that chain: the next kernel, which runs beside it,
    would write to its memory."""
    script = """
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import csrc_triton
from csrc_triton import configs, plans

read, doubtful, places = [], {}, []

def storage(t):
    return StorageWeakRef(t.untyped_storage())

def run(self, *args, grid, warmup, **kwargs):
    place = kwargs.get("CHAIN", "")
    places.append(place)
    tensors = [t for t in (getattr(arg, "base", arg) for arg in args) if isinstance(t, torch.Tensor)]
    if place in ("", "first"):
        read.clear()
        doubtful.clear()
    elif place != "link":
        gone = {name for t in tensors for name in doubtful.get(storage(t).cdata, ())}
        assert not gone, f"{self.__name__} ({places}) may have memory that {gone} still reads"
    if place != "":
        read.extend((self.__name__, storage(t)) for t in tensors)

class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) and places and places[-1] != "":
            doubtful[storage(result).cdata] = {name for name, t in read if t.expired()}
        return result

half, whole = torch.bfloat16, torch.float32
for factors in (half, whole):
    g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
    s, a, b = (torch.empty(size, dtype=factors) for size in ((2048, 16), (16, 4096), (4096, 16)))
    calls = [
        lambda: csrc_triton.adapted_linear(x, w, None, a, b, factors),
        lambda: csrc_triton.adapted_linear_and_coefficient(x, w, None, a, b, factors, 2.0),
        lambda: csrc_triton.fused_linear(x, w, None, s, b),
    ]
    columns = [None]
    if factors == half:
        call = plans.Call("layer_grads", 2048, 4096, 4096, 16, half, half)
        columns += [plan for plan in plans.options(call, "sm_90", untried=True) if plan.way == "column"][:1]
    calls += [
        lambda norm=norm, plan=plan: csrc_triton.layer_grads(g, x, s, w, a, b, 2.0, norm, factors, factors, plan=plan)
        for norm in ("row", "matrix", "factor", "token", None)
        for plan in columns
    ]
    for call in calls:
        places.clear()
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(configs, "arch_of", lambda device: "sm_90"),
            mock.patch.object(configs, "can_overlap", lambda device: True),
            Watched(),
        ):
            call()
        assert "first" in places or factors == half
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
