"""Which way a linear product goes through the kernels: what was measured on this device, else the least estimate."""

import dataclasses
import functools
from typing import NamedTuple

import torch

from . import batch_invariance, configs, parts, replay, tuning
from .chain import MAX_ROUNDS
from .configs import Config, cdiv
from .tiling import INTERPRETED

WAYS = {
    "inside": "S inside the GEMM, one launch",
    "tiles": "GEMM with the low-rank epilogue, a program a tile",
    "persistent": "persistent GEMM with the low-rank epilogue, tiles by descriptors",
    "pipelined": "GEMM in Gluon, which loads the next tile while it stores one",
    "vendor": "the rank-R product, then the vendor's GEMM added to it",
}
UNTRIED_WAYS = {"column": "GEMM in Gluon, S or dS by the tiles of its first column"}
"""Those that no GPU has run yet."""

_WIDEST_COLUMN = {"adapted_linear": 64, "layer_grads": 16}
"""The largest rank of each op that goes this way: with more columns for dS and u the GEMM leaves the sums for dB and dA no
shared memory beside it."""

OPS = ("adapted_linear", "fused_linear", "layer_grads")
"""The products that have a choice: y with S yet to be computed, any product with S given, and such a dX with the sums for dA
and dB yet to be computed."""

NOTHING, WIDE, EVERYTHING = range(3)
"""What of a call's operands tensor descriptors reach: x, W and y are the wide ones, S and B the rest."""

PERSISTENT = {"persistent": WIDE, "pipelined": EVERYTHING}
"""The ways whose GEMM leaves room on each multiprocessor for a small kernel beside it, and what descriptors have to reach: of
factors that go in parts, which are our own, the rest alone."""

GATHERED = 0.8
"""The speed of tiles whose rows are gathered over that of tiles whose rows lie in a run: what an H200 left for the two products
of a step with four adapters (1.05 ms, commit 3c5bc942d2) once its other passes are taken off as they are counted."""

SPLIT = 5
"""What tiles that split fp32 factors take longer, in columns of x and W for each of the rank: on an H200 361 µs with 16-bit
factors became 369 (M=8192 4096x4096, R=16)."""

_COST_BESIDE = 1 / 3
"""How much slower the GEMM is for what runs beside it, of what that takes alone."""


class Call(NamedTuple):
    """What a plan is chosen by: one of `OPS`, the sizes, and the dtypes of x and of S."""

    op: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype
    low_rank_dtype: torch.dtype


class LayerCall(NamedTuple):
    """What a layer's forward and backward pass are planned by: the sizes of x [M, K] and weight [N, K], the rank, the rule of
    C, and the dtypes of x and of S."""

    M: int
    N: int
    K: int
    R: int
    norm: str | None
    dtype: torch.dtype
    low_rank_dtype: torch.dtype

    @property
    def y(self) -> Call:
        return Call("adapted_linear", self.M, self.N, self.K, self.R, self.dtype, self.low_rank_dtype)

    @property
    def dx(self) -> Call:
        return self.y._replace(op="layer_grads", N=self.K, K=self.N)


class Plan(NamedTuple):
    """`way` is a key of `WAYS` or `UNTRIED_WAYS`; `config` that of its kernel, None where it is not ours."""

    way: str
    config: Config | None

    def __str__(self) -> str:
        return (WAYS | UNTRIED_WAYS)[self.way] + ("" if self.config is None else f" ({self.config})")


def options(call: Call, arch: str, describable: int = EVERYTHING, untried: bool = False) -> list[Plan]:
    """Every plan that can run the call on `arch`; `describable`: what of it tensor descriptors reach (A, too, for ways that are
    `untried`)."""
    _, _, N, K, R, dtype, low_rank_dtype = call
    tiles = configs.candidates("fused_linear", N, K, R, dtype, arch, low_rank_dtype)
    found = [Plan("tiles", config) for config in tiles]
    for way, needs in PERSISTENT.items():
        if way == "pipelined" and not _gluon_is_there():
            continue
        rank, factors_dtype = R, low_rank_dtype
        if takes_parts(way, dtype, low_rank_dtype):
            needs, rank, factors_dtype = WIDE, parts.width(R), dtype
        if describable >= needs:
            described = configs.candidates(f"fused_linear_{way}", N, K, rank, dtype, arch, factors_dtype)
            found += [Plan(way, config) for config in described]
    # The rank's accumulator stays in registers beside the tile's, where the addresses of narrow loads leave no room, and
    # split factors would triple its dots.
    narrow = dtype.itemsize == 2 and dtype == low_rank_dtype and configs.aligned(N, K, R)
    fits = R <= 64 and (arch == "interpreter" or narrow)
    if call.op == "adapted_linear" and fits:
        found += [Plan("inside", dataclasses.replace(config, BLOCK_R=configs.block_r(R))) for config in tiles]
    if untried and _WIDEST_COLUMN.get(call.op, 0) >= R and dtype == low_rank_dtype and describable == EVERYTHING:
        # Loads run ahead by all stages but one, which has to be less than a tile.
        found += [
            Plan("column", config)
            for way, config in found
            if way == "pipelined" and cdiv(K, config.BLOCK_K) >= config.num_stages - 1
        ]
    return [*found, Plan("vendor", None)]


@functools.cache
def _gluon_is_there() -> bool:
    """Whether Triton's Gluon, which is experimental, is one that the GEMM can be written in; the interpreter does not ask."""
    if INTERPRETED:
        return True
    try:
        from . import gluon_names  # noqa: F401
    except Exception:
        # A name or a layout of it that is another's: all else runs.
        return False
    return True


def takes_parts(way: str, dtype: torch.dtype, low_rank_dtype: torch.dtype) -> bool:
    """Whether x of `dtype` and factors of `low_rank_dtype` go this way with the factors written as parts (`parts.in_parts`)."""
    return way == "pipelined" and parts.possible(dtype, low_rank_dtype)


def estimate(call: Call, plan: Plan, arch: str) -> float:
    """Seconds that the plan takes, from bytes, FLOPs and `configs.MACHINES`: computed, not measured."""
    M, N, K, dtype = call.M, call.N, call.K, call.dtype
    machine = _machine(arch)
    wide = dtype == torch.float32
    sms = configs.sms_of(arch)
    flops = machine.flops * sms / configs.sms_of(configs.family(arch))
    gemm = 2 * M * N * K / (flops / 16 if wide else flops)
    # Over x for S, over x and g for dA and dB.
    passes = 0.0
    if call.op == "adapted_linear":
        passes = machine.launch + M * K * dtype.itemsize / machine.bandwidth
    elif call.op == "layer_grads":
        passes = machine.launch + M * (N + K) * dtype.itemsize / machine.bandwidth
    runs_beside = plan.way in PERSISTENT and _finds_room_beside(call, plan.way, arch)
    if call.op == "adapted_linear" and not runs_beside:
        of_s = configs.pick_config("down_project", M, 0, K, call.R, dtype, arch, call.low_rank_dtype)
        passes += machine.launch * (configs.parts_of_k(of_s, M, K, call.R, arch) > 1)
    if plan.way == "vendor":
        return passes + gemm + 2 * machine.launch + M * N * dtype.itemsize / machine.bandwidth
    config = plan.config
    # Against a GEMM in tiles of 128 x 256 that fill the chip evenly.
    gemm *= configs.wave_cost(config, M, N, arch) / configs.even_cost(128, 256, M, N, arch)
    gemm /= machine.efficiency_fp32 if wide else machine.efficiency[plan.way]
    if runs_beside:
        # They run beside the GEMM. Of a larger rank none has room there.
        passes *= _COST_BESIDE
    if takes_parts(plan.way, dtype, call.low_rank_dtype):
        # fp32 is read, three times 16 bits are written; beside the GEMM, too.
        passes += _COST_BESIDE * (machine.launch + (M + N) * call.R * 10 / machine.bandwidth)
        gemm *= 1 + parts.width(call.R) / K
    elif call.low_rank_dtype.itemsize > dtype.itemsize:
        gemm *= 1 + SPLIT * call.R / K
    if plan.way == "inside":
        return machine.launch + gemm * (1 + config.BLOCK_R / config.BLOCK_N)
    return passes + machine.launch + gemm


def _finds_room_beside(call: Call, way: str, arch: str) -> bool:
    """Whether the call's small kernel, for S or for dA and dB, has a configuration that leaves room to the GEMM."""
    _, M, N, K, R, dtype, low_rank_dtype = call
    if call.op == "adapted_linear":
        config = configs.beside(K, R, dtype, arch, low_rank_dtype)
        return config is not None and rounds_beside(way, M, config.BLOCK_M, arch) > 0
    pair = call.op == "layer_grads"
    return pair and configs.whole_rank("outer_pair", N, K, R, dtype, arch, low_rank_dtype) is not None


def rounds_beside(way: str, M: int, block_m: int, arch: str) -> int:
    """In how many rounds a pass over M rows, block_m a program, works beside a GEMM of this way so that no multiprocessor gets
    two programs of it; 0 where the GEMM could not wait for them: only the one in Gluon waits for a round."""
    rounds = cdiv(cdiv(M, block_m), configs.sms_of(arch))
    return rounds if rounds <= (MAX_ROUNDS if way == "pipelined" else 1) else 0


def pays_beside(M: int, K: int, block_m: int, dtype: torch.dtype, arch: str) -> bool:
    """Whether a pass over M rows of K elements costs more alone than beside the GEMM, block_m rows a program: a multiprocessor
    that has one of its programs is late by that, however few have."""
    machine, row = _machine(arch), K * dtype.itemsize
    alone = machine.launch + M * row / machine.bandwidth
    rows_of_all = cdiv(M, block_m * configs.sms_of(arch)) * block_m * configs.sms_of(arch)
    return _COST_BESIDE * rows_of_all * row / machine.bandwidth < alone


def by_vendor_for_groups(call: Call, device: torch.device) -> bool:
    """Whether rows in groups that share a weight go through the vendor's GEMM, added to the groups' low-rank products, and not
    through each group's own tiles. Never under batch invariance, nor in the interpreter."""
    arch = configs.arch_of(device)
    return not batch_invariance.enabled() and arch != "interpreter" and vendor_beats_groups(call, arch)


@functools.lru_cache(maxsize=4096)
def vendor_beats_groups(call: Call, arch: str) -> bool:
    """What of the two costs less on `arch`, by estimate."""
    _, M, N, K, R, dtype, low_rank_dtype = call
    tiles = Plan("tiles", configs.pick_config("grouped_fused_linear", M, N, K, R, dtype, arch, low_rank_dtype))
    return estimate(call, Plan("vendor", None), arch) < estimate(call, tiles, arch) / GATHERED


def _machine(arch: str) -> configs.Machine:
    return configs.MACHINES.get(configs.family(arch), configs.MACHINES["*"])


def pick(call: Call, device: torch.device, describable: int) -> Plan:
    """The plan of this call on this device.

    What `tuning` has measured comes first. The interpreter takes tiles, whatever they cost. Under batch invariance the
    plan is the same for every number of rows and every alignment of the operands.
    """
    if batch_invariance.enabled():
        return _pick_invariant(call._replace(M=batch_invariance.PLANNED_ROWS), configs.arch_of(device))
    return pick_by_cost(call, device, describable)


def pick_by_cost(call: Call, device: torch.device, describable: int) -> Plan:
    """`pick` where no batch invariance is asked for."""
    key = tuning.device_key(device) if device.type == "cuda" else None
    return _pick(call, configs.arch_of(device), describable, key)


@functools.lru_cache(maxsize=4096)
def _pick(call: Call, arch: str, describable: int, key: str | None) -> Plan:
    found = options(call, arch, describable)
    # What is measured of dX is dX alone.
    product = call._replace(op="fused_linear") if call.op == "layer_grads" else call
    measured = tuning.lookup(key, product) if key else None
    if measured in found:
        return Plan(*measured)
    return found[0] if arch == "interpreter" else min(found, key=lambda plan: estimate(call, plan, arch))


@functools.lru_cache(maxsize=4096)
def _pick_invariant(call: Call, arch: str) -> Plan:
    # The vendor's GEMM chooses by M what it runs.
    found = [plan for plan in options(call, arch, NOTHING) if plan.way != "vendor"]
    return found[0] if arch == "interpreter" else min(found, key=lambda plan: estimate(call, plan, arch))


def forget() -> None:
    """Pick anew from now on: after tuning."""
    _pick.cache_clear()
    replay.forget()
