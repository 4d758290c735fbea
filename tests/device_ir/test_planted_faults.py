"""The check checked: in a copy of each kernel's source one mask is dropped, or two programs are made to share an element.
The fault has to be reported, by its kind and in its kernel."""

import itertools
import pkgutil
from typing import NamedTuple

import pytest
import torch
from first_column import y_and_s
from planting import module, plant
from ttsem.sanitize import KernelFault

import csrc_triton
from allora_kernels.testing import make_inputs
from csrc_triton import configs, plans
from csrc_triton.segments import Segments

F16, F32 = torch.float16, torch.float32


def products(way, M=70, N=136, K=64, R=16):
    x, weight, bias, a, b, _ = make_inputs(M, N, K, R, F16)
    call = plans.Call("adapted_linear", M, N, K, R, F16, F16)
    plan = next(plan for plan in plans.options(call, "sm_90") if plan.way == way)
    module("adapted_linear").adapted_linear(x, weight, bias, a, b, F16, plan)


def first_column(M=70, N=136, K=264):
    config = configs.candidates("fused_linear_pipelined", N, K, 16, F16, "sm_90")[0]
    x, weight, bias, a, b, _ = make_inputs(M, N, K, 16, F16)
    y_and_s((x, weight, bias, a, b), config)


def count_tiles():
    gemm = module("adapted_linear_pipelined")
    gemm.launch(gemm._count_tiles_kernel, (3,), torch.empty(70, dtype=torch.int32), 69, BLOCK_L=32, num_warps=1)


def stack_factors():
    tiles = torch.empty(3, dtype=torch.int32)
    module("layer_grads_pipelined").stack_factors(torch.randn(136, 3, dtype=F16), torch.randn(136), tiles)


def sweep(norms=False, M=70, rows=7):
    g, x, s, b = (torch.randn(size) for size in ((M, 300), (M, 41), (M, 3), (300, 3)))
    grads = module("sample_grad").sample_squared_norms if norms else module("sample_grad").sample_grads
    dtypes = (F32, F32) if norms else (True, True)
    grads(g, x, s, b, None, 2.0, None, True, *dtypes, Segments(M // rows, rows))


def down_project():
    module("down_project").down_project(torch.randn(5, 2500), torch.randn(3, 2500), F32)


def in_parts():
    module("parts").in_parts(torch.randn(70, 3), torch.randn(50, 3))


def outer_pair(M=300):
    g, s, x, u = (torch.randn(size, dtype=F16) for size in ((M, 144), (M, 16), (M, 272), (M, 16)))
    config = module("outer_pair").pick_pair(144, 272, 16, F16, "sm_90", F16)
    rule = module("sweep").Rule()
    module("outer_pair").outer_pair(g, s, rule, x, u, rule, config, (F16, F32))


def down_project_twice():
    module("down_project").down_project_twice(torch.randn(70, 64), torch.randn(3, 64), torch.ones(64), F32)


def combine():
    module("combine").combine(torch.randn(3, 2000), F32)


def combine_pair():
    module("combine").combine_pair(torch.randn(3, 2000), torch.randn(3, 1000), (F32, F32))


def dequantize():
    packed, scales = torch.randint(256, (2000,), dtype=torch.uint8), torch.rand(63)
    module("dequantize").dequantize_4bit(packed, torch.randn(16), scales, None, None, None, 64, 1, 40, 100, F32)


def low_rank_add():
    module("low_rank_add").low_rank_add(torch.randn(70, 50), torch.randn(70, 3), torch.randn(50, 3))


def coefficient(norm):
    module("row_norms").weight_coefficient(torch.randn(40, 700), torch.randn(130, 40), 2.0, norm)


def grouped():
    x, weight, bias, a, b, _ = make_inputs(70, 136, 64, 16, F16)
    weight, bias, a, b = (torch.stack([t, t]) for t in (weight, bias, a, b))
    ends = torch.tensor([33, 70], dtype=torch.int32)
    s = module("grouped_down_project").grouped_down_project(x, a, ends, F16)
    module("grouped_fused_linear").grouped_fused_linear(x, weight, bias, s, b, ends)


def grouped_twice():
    g, _, _, _, b, _ = make_inputs(70, 136, 80, 16, F16)
    c, ends = torch.rand(2, 80), torch.tensor([33, 70], dtype=torch.int32)
    b = torch.stack([b[:80], b[:80]])
    module("grouped_down_project").grouped_down_project_twice(g, b.mT, c, ends, F16)


def in_any_order():
    x, weight, bias, a, b, _ = make_inputs(70, 136, 64, 16, F16)
    a, b = (torch.stack([t, t]) for t in (a, b))
    ends, order = torch.tensor([33, 70], dtype=torch.int32), torch.arange(69, -1, -1, dtype=torch.int32)
    s = module("grouped_down_project").grouped_down_project(x, a, ends, F16, order)
    module("grouped_fused_linear").grouped_fused_linear(x, weight, bias, s, b, ends, order, False)


def product_of_groups():
    s, b, bias = torch.randn(70, 16), torch.randn(2, 136, 16), torch.randn(136)
    ends, order = torch.tensor([33, 60], dtype=torch.int32), torch.arange(69, -1, -1, dtype=torch.int32)
    module("grouped_low_rank_product").grouped_low_rank_product(s, b, bias, ends, order, F32)


def samples_of_groups():
    x, _, _, a, b, g = make_inputs(12, 40, 64, 16)
    b, s = torch.stack([b, b]), x @ a.mT
    pieces = torch.tensor([0, 3, 3, 7, 9, 12, 12], dtype=torch.int32)
    module("grouped_sample_grad").grouped_sample_grads(g, x, s, b, None, pieces, 3, 2.0, "entry", False, False, True)


def first_pieces():
    module("groups").first_pieces(torch.tensor([3, 9, 9, 9], dtype=torch.int32), 12, 2)


class Planted(NamedTuple):
    """In `module` the text `old` becomes `new` (or each of several); `run` then launches `kernel`: a fault of `kind` is due."""

    kernel: str
    module: str
    kind: str
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    run: object


def race(*args):
    return Planted(*args[:2], "race", *args[2:])


def write(*args):
    return Planted(*args[:2], "oob_write", *args[2:])


def read(*args):
    return Planted(*args[:2], "oob_read", *args[2:])


FAULTS = [
    race("_combine_kernel", "combine", "out_ptr + group * NUMEL + offs", "out_ptr + group * NUMEL + offs % 512",
         combine),
    write("_combine_kernel", "combine", "axis=0), OUT_DTYPE), mask=mask)", "axis=0), OUT_DTYPE))", combine),
    race("_combine_pair_kernel", "combine", "out_ptr + group * NUMEL + offs", "out_ptr + group * NUMEL + offs % 512",
         combine_pair),
    write("_combine_pair_kernel", "combine", "axis=0), OUT_DTYPE), mask=mask)", "axis=0), OUT_DTYPE))", combine_pair),
    race("_dequantize_4bit_kernel", "dequantize", "block[:, None] * (2 * HALF_BLOCK)",
         "block[:, None] % BLOCKS * (2 * HALF_BLOCK)", dequantize),
    write("_dequantize_4bit_kernel", "dequantize", "out, mask=offs_out < NUMEL", "out, mask=offs_out < NUMEL + 8", dequantize),
    read("_dequantize_4bit_kernel", "dequantize", "packed_ptr + offs, mask=offs < NUM_BYTES,",
         "packed_ptr + offs, mask=offs < NUM_BYTES + 8,", dequantize),
    race("_down_project_kernel", "down_project", "part.to(tl.int64) * M", "0 * M", down_project),
    write("_down_project_kernel", "down_project", "narrow(acc, OUT_DTYPE), mask=mask_m[:, None] & mask_r[None, :])",
          "narrow(acc, OUT_DTYPE), mask=mask_r[None, :])", down_project),
    race("_down_project_kernel", "down_project", "tl.full((), PARTS, tl.int64) * M * R", "tl.full((), PARTS, tl.int64) * R",
         down_project_twice),
    race("_outer_pair_kernel", "outer_pair", "out_ptrs += offs_l[:, None]", "out_ptrs += (offs_l - pid_l * BLOCK_L)[:, None]",
         outer_pair),
    write("_outer_pair_kernel", "outer_pair", "OUT_DTYPE), mask=mask_l[:, None] & mask_r[None, :])",
          "OUT_DTYPE), mask=mask_r[None, :])", outer_pair),
    read("_outer_pair_kernel", "outer_pair", "v_ptrs, mask=mask_m[:, None] & mask_l[None, :]", "v_ptrs, mask=mask_m[:, None]",
         outer_pair),
    race("_fused_linear_kernel", "fused_linear", "y_ptr + offs_m[:, None]", "y_ptr + (offs_m - pid_m * BLOCK_M)[:, None]",
         lambda: products("tiles", M=300)),
    race("_fused_linear_kernel", "fused_linear", "s_ptr + offs_m[:, None]", "s_ptr + (offs_m - pid_m * BLOCK_M)[:, None]",
         lambda: products("inside", M=300, N=144)),
    write("_fused_linear_kernel", "fused_linear", "narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])",
          "narrow(acc, DTYPE), mask=mask_n[None, :])", lambda: products("tiles")),
    read("_fused_linear_kernel", "fused_linear", "w_ptrs, mask=mask_w, other=0.0", "w_ptrs",
         lambda: products("tiles")),
    race("_fused_linear_persistent_kernel", "fused_linear_persistent", "[start_m, start_n], narrow(left",
         "[0, start_n], narrow(left", lambda: products("persistent", M=300, N=520)),
    read("_fused_linear_persistent_kernel", "fused_linear_persistent", "mask=mask_n, other=0.0",
         "mask=mask_n | True", lambda: products("persistent")),
    race("_fused_linear_pipelined_kernel", "fused_linear_pipelined", "store_tile(y_desc, [start_m, start]",
         "store_tile(y_desc, [0, start]", lambda: products("pipelined", M=300, N=520)),
    read("_fused_linear_pipelined_kernel", "fused_linear_pipelined", "mask=offs_n < N, other=0.0", "mask=offs_n < N + 8",
         lambda: products("pipelined")),
    race("_count_tiles_kernel", "adapted_linear_pipelined",
         ("tl.program_id(0) * BLOCK_L + tl.arange", "(offs < num_m).to(tl.int32)"),
         ("tl.arange", "tl.program_id(0) + 0 * offs"), count_tiles),
    write("_count_tiles_kernel", "adapted_linear_pipelined", "mask=offs <= num_m)", "mask=offs >= 0)", count_tiles),
    race("_adapted_linear_pipelined_kernel", "adapted_linear_pipelined", "stride_bias, start_m, start_n, HAS_BIAS)",
         "stride_bias, 0, start_n, HAS_BIAS)", lambda: first_column(M=300)),
    write("_adapted_linear_pipelined_kernel", "adapted_linear_pipelined", "mask=(offs_m < M)[:, None] & (offs_r",
          "mask=(offs_r", first_column),
    race("_stack_factors_kernel", "layer_grads_pipelined", "* N + offs_n[None, :]", "* N + (offs_n % BLOCK_N)[None, :]",
         stack_factors),
    write("_stack_factors_kernel", "layer_grads_pipelined", "stacked_ptr + offs_r[:, None] * N",
          "stacked_ptr + 9 * offs_r[:, None] * N", stack_factors),
    read("_stack_factors_kernel", "layer_grads_pipelined", "mask=(offs_r < R)[:, None] & mask_n[None, :]",
         "mask=(offs_r < R)[:, None]", stack_factors),
    race("_in_parts_kernel", "parts", "out_ptr + offs_l[:, None] * WIDTH + offs_r",
         "out_ptr + (offs_l - pid_l * BLOCK_L)[:, None] * WIDTH + offs_r", in_parts),
    write("_in_parts_kernel", "parts", "else high, mask=mask_l[:, None] & mask_r[None, :])",
          "else high, mask=mask_r[None, :])", in_parts),
    write("_in_parts_kernel", "parts", "mask_end = mask_l[:, None] & (offs_end < WIDTH)[None, :]",
          "mask_end = (offs_end < WIDTH)[None, :]", in_parts),
    read("_in_parts_kernel", "parts", "t_ptrs, mask=mask_l[:, None] & mask_r[None, :]", "t_ptrs, mask=mask_l[:, None]",
         in_parts),
    race("_grouped_down_project_kernel", "grouped_down_project", "s_ptr + offs_m[:, None] * R",
         "s_ptr + (offs_m - start)[:, None] * R", grouped),
    write("_grouped_down_project_kernel", "grouped_down_project",
          "narrow(acc, DTYPE), mask=mask_m[:, None] & mask_r[None, :])", "narrow(acc, DTYPE), mask=mask_r[None, :])", grouped),
    write("_grouped_down_project_kernel", "grouped_down_project",
          "narrow(scaled, DTYPE), mask=mask_m[:, None] & mask_r[None, :])", "narrow(scaled, DTYPE), mask=mask_r[None, :])",
          grouped_twice),
    read("_grouped_down_project_kernel", "grouped_down_project", "stride_scale, mask=mask_k",
         "stride_scale, mask=mask_k | True", grouped_twice),
    race("_grouped_fused_linear_kernel", "grouped_fused_linear", "y_ptr + rows[:, None]", "y_ptr + (rows - start)[:, None]",
         grouped),
    read("_grouped_down_project_kernel", "grouped_down_project", "order_ptr, offs_m, mask_m,",
         "order_ptr, offs_m, mask_m | True,", in_any_order),
    read("_grouped_fused_linear_kernel", "grouped_fused_linear", "order_ptr, offs_m, mask_m,",
         "order_ptr, offs_m, mask_m | True,", in_any_order),
    write("_grouped_fused_linear_kernel", "grouped_fused_linear",
          "narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])", "narrow(acc, DTYPE), mask=mask_n[None, :])", grouped),
    race("_grouped_low_rank_product_kernel", "grouped_low_rank_product", "y_ptr + rows[:, None]",
         "y_ptr + (offs_m - start)[:, None]", product_of_groups),
    write("_grouped_low_rank_product_kernel", "grouped_low_rank_product",
          "narrow(acc, DTYPE), mask=mask_m[:, None] & mask_n[None, :])", "narrow(acc, DTYPE), mask=mask_m[:, None])",
          product_of_groups),
    read("_grouped_low_rank_product_kernel", "grouped_low_rank_product", "order_ptr, offs_m, mask_m,",
         "order_ptr, offs_m, mask_m | True,", product_of_groups),
    race("_first_pieces_kernel", "groups", ("_kernel, (1,)", "axis=0) - tiles, mask"),
         ("_kernel, (2,)", "axis=0) - tiles + tl.program_id(0), mask"), first_pieces),
    write("_first_pieces_kernel", "groups", "mask=offs_e <= GROUPS)\n\n\ndef",
          "mask=offs_e <= GROUPS + 99)\n\n\ndef", first_pieces),
    race("_low_rank_add_kernel", "low_rank_add", "pid_n * BLOCK_N, BLOCK_N", "pid_n * (BLOCK_N - 8), BLOCK_N",
         low_rank_add),
    write("_low_rank_add_kernel", "low_rank_add", "narrow(acc, DTYPE), mask=mask)", "narrow(acc, DTYPE))",
          low_rank_add),
    race("_gram_kernel", "row_norms", "tl.program_id(2).to(tl.int64) * R * R +", "", lambda: coefficient("row")),
    write("_gram_kernel", "row_norms", "acc, mask=mask_i[:, None] & mask_j[None, :])", "acc, mask=mask_j[None, :])",
          lambda: coefficient("row")),
    race("_quadratic_coefficient_kernel", "row_norms", "tl.store(c_ptr + offs_l, c, mask=mask_l)",
         "tl.store(c_ptr + offs_l % 64, c, mask=mask_l)", lambda: coefficient("row")),
    write("_quadratic_coefficient_kernel", "row_norms", "tl.store(c_ptr + offs_l, c, mask=mask_l)",
          "tl.store(c_ptr + offs_l, c)", lambda: coefficient("row")),
    race("_matrix_coefficient_kernel", "row_norms", ("(c.numel(),)", "tl.int64)\n    gram_a_ptr", "c_ptr + group, "),
         ("(2,)", "tl.int64) * 0\n    gram_a_ptr", "c_ptr, tl.program_id(0) + "),
         lambda: coefficient("matrix")),
    read("_matrix_coefficient_kernel", "row_norms", "mask = offs < NUMEL", "mask = offs < NUMEL + 8",
         lambda: coefficient("matrix")),
    race("_factor_coefficient_kernel", "row_norms", "c_ptr + N,", "c_ptr + N - 1,", lambda: coefficient("factor")),
    write("_factor_coefficient_kernel", "row_norms", "coefficient(norms, inv_eta_squared), mask=mask_l)",
          "coefficient(norms, inv_eta_squared))", lambda: coefficient("factor")),
    race("_outer_norms_kernel", "outer_norms", "part.to(tl.int64) * SAMPLES", "part * 0",
         lambda: sweep(norms=True, rows=1)),
    write("_outer_norms_kernel", "outer_norms", "squares, mask=mask_i)", "squares)",
          lambda: sweep(norms=True, rows=1)),
    race("_sweep_kernel", "sweep", "(pid_l.to(tl.int64) * M + offs_m[:, None])", "(offs_m[:, None])", sweep),
    race("_sweep_kernel", "sweep", "offset * stride_op + tile_ptrs, acc", "tile_ptrs, acc", sweep),
    write("_sweep_kernel", "sweep", "dot(v, f, zeros, DTYPE, PRECISION), mask=mask_mr",
          "dot(v, f, zeros, DTYPE, PRECISION), mask=mask_r[None, :]", sweep),
    write("_sweep_kernel", "sweep", "acc, mask=mask_lr & exists_l[:, None])", "acc, mask=mask_r[None, :])", sweep),
    race("_sweep_kernel", "sweep", "(SEGMENTS // PER_GROUP) + offset // PER_GROUP", "(SEGMENTS // PER_GROUP)",
         samples_of_groups),
    write("_sweep_kernel", "sweep", "(offset % PER_GROUP) * (SEGMENTS // PER_GROUP)", "offset * (SEGMENTS // PER_GROUP)",
          samples_of_groups),
    read("_sweep_kernel", "sweep", "PER_PROGRAM // PER_GROUP)", "PER_PROGRAM)", samples_of_groups),
]  # fmt: skip


def kernels():
    """Every kernel of the library: what `triton.jit` decorates and a launcher launches."""
    for found in pkgutil.iter_modules(csrc_triton.__path__):
        yield from (name for name in vars(module(found.name)) if name.endswith("_kernel"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel.strip('_')}-{fault.kind}")
@pytest.mark.parametrize("planted", [True, False], ids=["planted", "as-it-is"])
def test_a_planted_fault_is_reported(fault, planted, tmp_path, monkeypatch):
    if not planted:
        fault.run()
        return
    plant(fault.module, fault.old, fault.new, tmp_path, monkeypatch)
    with pytest.raises(KernelFault) as caught:
        fault.run()
    found = caught.value.fault
    assert (found.kernel, found.kind) == (fault.kernel, fault.kind), caught.value


def test_every_kernel_has_a_planted_race_and_a_dropped_mask(launches):
    launches.launches += 1  # nothing to launch
    planted = {(fault.kernel, fault.kind == "race") for fault in FAULTS}
    assert planted == set(itertools.product(kernels(), (False, True)))
