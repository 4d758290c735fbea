"""What the launches compile to for a GPU that is not there, and what they allocate on the way; `test_offline_compile.py` runs
each `check` in a process where the kernels are not built for the interpreter."""

import json
import multiprocessing
import re
import traceback
from functools import partial
from unittest import mock

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import csrc_triton
from bench.occupancy import fit_together
from bench.offline_compile import TARGETS, catch_launches, compile_launch, specialize
from csrc_triton import configs, down_project, fused_linear, plans
from csrc_triton.launching import watch
from csrc_triton.row_norms import gram_parts

CHECKS = {}


def check(f):
    CHECKS[f.__name__] = f
    return f


def main():
    """Print what each check raises, or null, as JSON."""
    print(json.dumps({name: _problem_of(name) for name in CHECKS}))


def _problem_of(name):
    """In a process of its own, as some checks change what others would find; forked, so that the imports are paid for once."""
    forked = multiprocessing.get_context("fork")
    said, says = forked.Pipe(duplex=False)
    process = forked.Process(target=_say_problem, args=(name, says))
    process.start()
    says.close()
    try:
        return said.recv()
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"


def _say_problem(name, says):
    try:
        CHECKS[name]()
    except Exception:
        says.send(traceback.format_exc())
    else:
        says.send(None)


def code_of(launched, arch="sm_90"):
    """What a kernel that was caught compiles to."""
    source, options = specialize(*launched, arch)
    return triton.compile(source, target=TARGETS[arch], options=options).asm


def compiled(call, arch="sm_90"):
    """(kernel, keyword arguments, code) of each launch of `call`."""
    for launched in catch_launches(call, arch):
        yield launched[0], launched[2], code_of(launched, arch)


def block_of(launched):
    """(warps, registers, bytes of shared memory) of a block of a kernel that was caught, which spills nothing."""
    source, options = specialize(*launched, "sm_90")
    result = compile_launch(source, options, "sm_90", "bfloat16", "")
    assert not result.spills
    return result.num_warps, result.registers, result.shared


@check
def a_tile_of_an_fp32_sum_is_summed_alone():
    """Taken for the start of its dot, the sum so far would be cut off by the matrix units: no interpreter shows that."""
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
        first = catch_launches(call, "sm_90")[0]
        dots = [line.split("tt.dot")[1] for line in code_of(first)["ttir"].splitlines() if "tt.dot" in line]
        starts = [dot.split(",")[2].split()[0] for dot in dots]
        # A dot begins at zero, or goes on where the dot before it in this tile ended.
        assert starts and starts[0].startswith("%cst"), (first[0], starts)
        assert not any("iter" in start or start.startswith(("%acc_arg", "%arg")) for start in starts), starts


@check
def c_takes_no_approximate_square_root_or_quotient():
    """At zero C is η as exactly as fp32 can say it, on any GPU."""
    a, b, s = torch.empty(16, 512), torch.empty(512, 16), torch.empty(64, 16)
    steps = [lambda norm=norm: csrc_triton.weight_coefficient(a, b, 2.0, norm) for norm in ("row", "matrix", "factor")]
    g = torch.empty(64, 512)
    steps.append(lambda: csrc_triton.adapter_grads(g, None, s, b, None, 2.0, "entry", True, None, a.dtype))
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = set()
        for step in steps:
            for *_, code in compiled(step, arch):
                found |= set(re.findall(r"(?:sqrt|div|rsqrt|rcp)[.](?:approx|full|rn)[.a-z0-9]*", code["ptx"]))
        assert found and all(".rn" in name for name in found), (arch, found)


@check
def each_kernel_of_a_chain_waits_before_it_touches_memory():
    """The pass for dS and u is counted before it lets the GEMM begin; what runs beside the GEMM, up to its last program's end,
    waits until none is counted before it reads u or C."""
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
            call = partial(csrc_triton.layer_grads, g, x, s, w, a, b, 2.0, norm, half, half)
            for kernel, settings, code in compiled(call):
                ptx = code["ptx"]
                touched = [match.start() for match in re.finditer(touches, ptx)]
                counts = [(match.start(), match[1]) for match in re.finditer(count, ptx)]
                waits, lets = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
                place, name = settings["CHAIN"], kernel.__name__
                places.append(place)
                assert bool(settings.get("launch_pdl")) == (place not in ("", "first")), name
                if name == "_down_project_kernel" and beside:
                    (begins, first), (ends, last) = counts
                    assert first == "acq_rel" and last == "release", counts
                    assert begins < lets < touched[0] and touched[-1] < ends, name
                    # The result of the first is there when the next kernel is let begin.
                    result, between = re.search("%r[0-9]+", ptx[begins:])[0], ptx[begins:lets]
                    assert re.search(rf"st[.]shared[^ ]*b32 .*{result};.*bar[.]sync", between, re.S), between
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


@check
def c_and_s_have_room_beside_the_gemm_and_end_one_after_another():
    """All let the next begin at once; C's first kernel ends after S, and its second waits for that, so that the GEMM, which
    waits for the second, waits for all."""
    half = torch.bfloat16
    x, w = torch.empty(2048, 4096, dtype=half), torch.empty(4096, 4096, dtype=half)
    touches = r"ld[.]global|st[.]global|cp[.]async|atom[.]|red[.]"
    for rank in (8, 16, 32):
        a, b = torch.empty(rank, 4096, dtype=half), torch.empty(4096, rank, dtype=half)
        blocks = {}
        call = partial(csrc_triton.adapted_linear_and_coefficient, x, w, None, a, b, half, 2.0)
        for caught in catch_launches(call, "sm_90"):
            place = caught[2]["CHAIN"]
            assert place not in blocks
            blocks[place] = block_of(caught)
            ptx = code_of(caught)["ptx"]
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
            assert fit_together("sm_90", *(blocks[place] for place in ("first", small, "midway"))), (
                rank,
                small,
                blocks,
            )


@check
def c_has_room_behind_a_gemm_that_s_has_none_beside():
    """C's kernels let the next begin at once; the first is counted until it has written, the second reads after it has waited
    for that, and neither ends before the GEMM."""
    half, whole = torch.bfloat16, torch.float32
    x, w = torch.empty(8192, 4096, dtype=half), torch.empty(4096, 4096, dtype=half)
    touches = r"ld[.]global[.](?!gpu)|st[.]global|cp[.]async[.]c"
    count = r"(?:atom|ld|red)[.]global[.]gpu[.](acquire|acq_rel|release)"
    for rank, factors in ((64, half), (256, half), (16, whole)):
        a, b = torch.empty(rank, 4096, dtype=factors), torch.empty(4096, rank, dtype=factors)
        call = partial(csrc_triton.adapted_linear_and_coefficient, x, w, None, a, b, factors, 2.0)
        caught = catch_launches(call, "sm_90")
        kernels = [kernel.__name__ for kernel, *_ in caught]
        gemm = kernels.index("_fused_linear_pipelined_kernel")
        assert kernels[gemm + 1 :] == ["_gram_kernel", "_quadratic_coefficient_kernel"], kernels
        blocks = []
        for launched in caught[gemm:]:
            blocks.append(block_of(launched))
            if len(blocks) == 1:
                assert launched[2]["CHAIN"] == ("first" if factors == half else "midway")
                continue
            assert launched[2]["CHAIN"] == "late" and launched[2]["launch_pdl"]
            ptx = code_of(launched)["ptx"]
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


@check
def the_sums_have_room_beside_the_gemm_whose_first_column_finds_ds():
    """The GEMM waits for the kernel in front before it takes a tile, and counts those of dS before it lets the sums begin; what
    it writes is there before a count goes down."""
    half = torch.bfloat16
    count = r"(?:atom|red)[.]global[.]gpu[.](relaxed|acq_rel|release)"
    for rank in (8, 16):
        g, x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (2048, 4096), (4096, 4096)))
        s, a, b = (torch.empty(size, dtype=half) for size in ((2048, rank), (rank, 4096), (4096, rank)))
        found = plans.options(plans.Call("layer_grads", 2048, 4096, 4096, rank, half, half), "sm_90", untried=True)
        for plan in [plan for plan in found if plan.way == "column"]:
            arguments = (g, x, s, w, a, b, 2.0, "row", half, half)
            caught = catch_launches(partial(csrc_triton.layer_grads, *arguments, plan=plan), "sm_90")
            kernels = [launched[0].__name__ for launched in caught]
            front = kernels.index("_stack_factors_kernel")
            names = ["_stack_factors_kernel", "_adapted_linear_pipelined_kernel", "_outer_pair_kernel"]
            assert kernels[front:] == names, kernels
            assert [launched[2]["CHAIN"] for launched in caught[front:]] == ["first", "link", "late"]
            _, gemm, sums = map(block_of, caught[front:])
            assert fit_together("sm_90", gemm, sums), (rank, gemm, sums)
            ptx = code_of(caught[front + 1])["ptx"]
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


@check
def what_the_kernels_of_a_chain_write_is_allocated_in_front_of_what_is_given_back():
    """Torch may give memory that is given back to what begins before the kernel that was using it has ended."""
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


@check
def the_gemm_of_factors_in_parts_waits_for_them():
    half = torch.bfloat16
    x, w = (torch.empty(size, dtype=half) for size in ((2048, 4096), (1024, 4096)))
    s, b = torch.empty(2048, 16), torch.empty(1024, 16)
    call = plans.Call("fused_linear", 2048, 1024, 4096, 16, half, torch.float32)
    plan = next(plan for plan in plans.options(call, "sm_90", plans.WIDE) if plan.way == "pipelined")
    parts, gemm = catch_launches(lambda: fused_linear(x, w, None, s, b, plan), "sm_90")
    # The first of a chain begins when all before it has ended.
    assert parts[2]["CHAIN"] == "first" and not parts[2].get("launch_pdl"), parts
    assert gemm[2]["CHAIN"] == "midway" and gemm[2]["launch_pdl"] and gemm[2]["maxnreg"] == 208, gemm


@check
def nothing_is_allocated_where_a_kernel_of_the_chain_may_still_read():
    """What a kernel of a chain was given lives until the last allocation in that chain: the next kernel, which runs beside it,
    would write to its memory."""
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
            partial(csrc_triton.adapted_linear, x, w, None, a, b, factors),
            partial(csrc_triton.adapted_linear_and_coefficient, x, w, None, a, b, factors, 2.0),
            partial(csrc_triton.fused_linear, x, w, None, s, b),
        ]
        columns = [None]
        if factors == half:
            call = plans.Call("layer_grads", 2048, 4096, 4096, 16, half, half)
            columns += [plan for plan in plans.options(call, "sm_90", untried=True) if plan.way == "column"][:1]
        calls += [
            partial(csrc_triton.layer_grads, g, x, s, w, a, b, 2.0, norm, factors, factors, plan=plan)
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
