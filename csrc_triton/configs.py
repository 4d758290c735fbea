"""Block sizes as plain data, and the one function that picks them.

Provenance: every entry here was chosen from what it compiles to (registers, shared memory, instructions; see
tests/test_offline_compile.py). None has been measured on a device yet.
"""

import functools
import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one kernel. A size that the kernel does not have is 0.

    BLOCK_M: rows of x or G; BLOCK_N: the kernel's wide output dimension (N of a GEMM, columns of a sweep);
    BLOCK_K: a step of the reduction loop; BLOCK_R: rank.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8

    def __str__(self) -> str:
        sizes = " ".join(
            f"{d}={s}" for d, s in zip("MNKR", (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.BLOCK_R)) if s
        )
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


NUM_SMS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
"""Multiprocessors (compute units) of the usual part of each architecture, for the number of programs to aim at."""

DEFAULT_NUM_SMS = 64

SCRATCH_BYTES = 32 * 2**20
"""What the sweep over G may use for its sums over columns: they fit the L2 cache of a data-centre GPU."""

# By operation, then by (architecture, kind): BLOCK_M, BLOCK_N, BLOCK_K, the widest BLOCK_R, num_warps, num_stages. The
# kinds are "16" (16-bit x and factors), "mixed" (16-bit x, fp32 factors; "mixed-fp16" where fp16 x, which takes two bf16
# parts, needs smaller tiles) and "32" (fp32 x). "*" is any architecture: its entries compile within 48 KB of shared
# memory everywhere.
_TABLES = {
    "fused_linear": {
        ("sm_90", "16"): (128, 256, 64, 32, 8, 3),
        ("sm_90", "mixed"): (128, 256, 64, 16, 8, 3),
        ("sm_100", "16"): (128, 256, 64, 32, 8, 3),
        ("sm_100", "mixed"): (128, 256, 64, 16, 8, 3),
        ("sm_80", "16"): (128, 128, 32, 32, 4, 4),
        ("sm_80", "mixed"): (128, 128, 32, 16, 8, 4),
        ("*", "16"): (64, 128, 32, 32, 4, 3),
        ("*", "mixed"): (64, 128, 32, 16, 4, 3),
        ("*", "32"): (64, 64, 16, 16, 4, 2),
        ("interpreter", "*"): (64, 64, 64, 64, 1, 1),
    },
    "down_project": {
        ("sm_90", "16"): (64, 0, 128, 64, 4, 4),
        ("sm_90", "mixed"): (64, 0, 64, 32, 4, 4),
        ("*", "16"): (64, 0, 64, 64, 4, 2),
        ("*", "mixed"): (64, 0, 64, 16, 4, 2),
        ("*", "32"): (32, 0, 32, 32, 4, 2),
        ("interpreter", "*"): (64, 0, 64, 64, 1, 1),
    },
    "low_rank_add": {
        ("*", "16"): (64, 128, 0, 32, 4, 1),
        ("*", "mixed"): (32, 64, 0, 16, 4, 1),
        ("*", "32"): (32, 32, 0, 16, 4, 1),
        ("interpreter", "*"): (64, 64, 0, 64, 1, 1),
    },
    "sweep": {
        ("sm_90", "16"): (64, 256, 0, 64, 8, 3),
        ("sm_90", "mixed"): (64, 128, 0, 32, 8, 3),
        ("sm_90", "mixed-fp16"): (32, 64, 0, 16, 4, 2),
        ("gfx942", "16"): (32, 128, 0, 32, 4, 2),
        ("*", "16"): (32, 128, 0, 64, 4, 2),
        ("*", "mixed"): (32, 64, 0, 16, 4, 2),
        ("*", "32"): (32, 32, 0, 16, 4, 2),
        ("interpreter", "*"): (32, 64, 0, 64, 1, 1),
    },
    # Wide enough that a rule with two sums over columns writes little; "sweep" is for the ranks that do not fit.
    "sweep_wide": {
        ("sm_90", "16"): (64, 512, 0, 32, 8, 2),
        ("sm_90", "mixed"): (32, 256, 0, 16, 8, 2),
        ("sm_90", "mixed-fp16"): (32, 64, 0, 16, 4, 2),
        ("sm_100", "16"): (64, 512, 0, 32, 8, 2),
        ("sm_100", "mixed"): (32, 256, 0, 16, 8, 2),
        ("sm_100", "mixed-fp16"): (32, 64, 0, 16, 4, 2),
        ("sm_80", "16"): (32, 512, 0, 16, 8, 2),
        ("sm_80", "mixed"): (32, 256, 0, 16, 8, 2),
        ("sm_80", "mixed-fp16"): (32, 64, 0, 16, 4, 2),
        ("gfx942", "16"): (32, 512, 0, 16, 8, 1),
        ("*", "16"): (32, 128, 0, 64, 4, 2),
        ("*", "mixed"): (32, 64, 0, 16, 4, 2),
        ("*", "32"): (32, 32, 0, 16, 4, 2),
        ("interpreter", "*"): (32, 128, 0, 64, 1, 1),
    },
    "sweep_entry": {
        ("sm_90", "16"): (64, 128, 0, 32, 8, 2),
        ("sm_80", "mixed-fp16"): (32, 32, 0, 16, 4, 1),
        ("*", "16"): (32, 64, 0, 32, 4, 2),
        ("*", "mixed"): (32, 64, 0, 16, 4, 1),
        ("*", "32"): (32, 32, 0, 16, 4, 1),
        ("interpreter", "*"): (32, 64, 0, 64, 1, 1),
    },
    "sweep_entry_wide": {
        ("sm_90", "16"): (32, 256, 0, 16, 8, 2),
        ("sm_100", "16"): (32, 256, 0, 16, 8, 2),
        ("sm_80", "16"): (32, 256, 0, 16, 8, 2),
        ("sm_80", "mixed-fp16"): (32, 32, 0, 16, 4, 1),
        ("gfx942", "16"): (32, 256, 0, 16, 8, 2),
        ("*", "16"): (32, 64, 0, 32, 4, 2),
        ("*", "mixed"): (32, 64, 0, 16, 4, 1),
        ("*", "32"): (32, 32, 0, 16, 4, 1),
        ("interpreter", "*"): (32, 128, 0, 64, 1, 1),
    },
}


def block_r(r: int, limit: int = 64) -> int:
    """Tile width over the rank: a power of two, at least the 16 a dot needs, at most `limit`."""
    return max(16, min(1 << (r - 1).bit_length(), limit))


def pick_config(
    op: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: str, low_rank_dtype: torch.dtype | None = None
) -> Config:
    """The configuration of `op` for these sizes, x's `dtype`, the low-rank products' dtype (None: the same) and `arch` as
    from `arch_of`. Any architecture gets an answer; an unknown one gets the safe default."""
    if dtype == torch.float32:
        kinds = ("32", "*")
    elif low_rank_dtype == torch.float32:
        kinds = ("mixed-fp16", "mixed", "*") if dtype == torch.float16 else ("mixed", "*")
    else:
        kinds = ("16", "*")
    table = _TABLES[op]
    # Loads of rows that do not begin at a multiple of 16 elements cannot be wide, and their addresses fill the registers:
    # the smaller tile, spread over twice the threads.
    unaligned = (N % 16 or K % 16 or R % 8) and arch != "interpreter"
    archs = ("*",) if unaligned else (arch, "*")
    key = next(key for key in itertools.product(archs, kinds) if key in table)
    m, n, k, r, warps, stages = table[key]
    if unaligned:
        warps *= 2
    return Config(m, n, k, block_r(R, r), warps, stages)


def num_splits(tiles: int, length: int, step: int, arch: str, waves: int = 2) -> int:
    """Into how many parts to cut a reduction of `length` so that `tiles` output tiles give about `waves` full waves."""
    programs = waves * NUM_SMS.get(arch, DEFAULT_NUM_SMS) if arch != "interpreter" else 4
    return max(1, min(programs // max(tiles, 1), -(-length // step)))


def arch_of(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``"interpreter"`` for a CPU tensor."""
    return _gpu_arch(device.index) if device.type == "cuda" else "interpreter"


@functools.cache
def _gpu_arch(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
