"""Block sizes as plain data, and the one function that picks them.

Provenance: sm_90's entries for 16-bit x are the fastest of those measured on an H200 on 2026-11-26 and an H100 on 2026-11-27
(docs/performance.md).
Every other entry was chosen from what it compiles to (registers, shared memory, instructions; see
tests/test_offline_compile.py), and has not been measured.
"""

import functools
import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one kernel. A size that the kernel does not have is 0.

    BLOCK_M: rows of x or G; BLOCK_N: the kernel's wide output dimension (N of a GEMM, columns of a sweep);
    BLOCK_K: a step of the reduction loop; BLOCK_R: rank. all_registers: launched with
    the options of `all_registers`.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 16
    all_registers: bool = False

    def __str__(self) -> str:
        sizes = " ".join(
            f"{d}={s}" for d, s in zip("MNKR", (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K, self.BLOCK_R)) if s
        )
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


NUM_SMS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "interpreter": 2,
}
"""Multiprocessors (compute units) of the usual part of each architecture, for the number of programs to aim at. The interpreter
has so few that small tensors give a program several tiles."""

DEFAULT_NUM_SMS = 64


@dataclass(frozen=True)
class Machine:
    """What `plans.estimate` knows of an architecture.

    flops: 16-bit matrix FLOP/s that the vendor's GEMM reaches; bandwidth: bytes/s; launch: seconds a kernel costs in a
    row of kernels; efficiency: speed of our GEMM over the vendor's where its tiles fill the chip, by the plan's way.
    """

    flops: float
    bandwidth: float
    launch: float
    efficiency: dict[str, float]
    efficiency_fp32: float
    provenance: str


_ASSUMED = {"tiles": 0.85, "inside": 0.85, "persistent": 0.95}
_HOPPER = {"tiles": 0.9, "inside": 0.7, "persistent": 0.98, "pipelined": 0.995}

MACHINES = {
    "sm_80": Machine(250e12, 1.7e12, 4e-6, _ASSUMED, 0.5, "assumed for an A100 80 GB on 2026-11-23, not measured"),
    "sm_90": Machine(
        800e12,
        3.0e12,
        4e-6,
        _HOPPER,
        0.5,
        "flops and bandwidth as an H100 reached them on 2026-11-27 (789e12, 3.03e12), efficiency measured on an H200 on "
        "2026-11-26 and 2026-11-27, launch assumed",
    ),
    "sm_100": Machine(1600e12, 7.0e12, 4e-6, _ASSUMED, 0.5, "assumed for a B200 on 2026-11-23, not measured"),
    "*": Machine(200e12, 1.0e12, 6e-6, _ASSUMED, 0.5, "assumed on 2026-11-23, not measured"),
}
"""By architecture; "*" is any other."""

SCRATCH_BYTES = 32 * 2**20
"""What the sweep over G may use for its sums over columns: they fit the L2 cache of a data-centre GPU."""

# By operation, then by (architecture, kind): BLOCK_M, BLOCK_N, BLOCK_K, the widest BLOCK_R, num_warps, num_stages; for a
# GEMM several, largest tile first. The kinds are "16" (16-bit x and factors; "16-broken" where rows of R elements do not
# fill wide loads), "mixed" (16-bit x, fp32 factors; "mixed-fp16" where fp16 x, which takes two bf16 parts, needs smaller
# tiles) and "32" (fp32 x). "*" is any architecture: its entries compile within 48 KB of shared memory everywhere.
# "unaligned" is any architecture too, see `candidates`.
_TABLES = {
    "fused_linear": {
        ("sm_90", "16"): [
            (128, 256, 64, 32, 8, 3),
            (128, 128, 64, 32, 8, 4),
            (64, 128, 64, 32, 4, 4),
            (64, 64, 64, 32, 4, 4),
        ],
        ("sm_90", "mixed"): [
            (128, 256, 64, 16, 8, 3),
            (128, 128, 64, 16, 8, 4),
            (64, 128, 64, 16, 4, 4),
            (64, 64, 64, 16, 4, 4),
        ],
        ("sm_100", "16"): [(128, 256, 64, 32, 8, 3), (128, 128, 64, 32, 8, 4), (128, 64, 64, 32, 4, 4)],
        # Every part of a split dot has its own accumulator in tensor memory: 256 columns do not fit.
        ("sm_100", "mixed"): [(128, 128, 64, 16, 8, 4), (128, 64, 64, 16, 4, 4)],
        ("sm_80", "16"): [(128, 128, 32, 32, 8, 4), (64, 128, 64, 32, 4, 3), (64, 64, 64, 32, 4, 4)],
        ("sm_80", "mixed"): [(128, 128, 32, 16, 8, 4), (64, 128, 64, 16, 4, 3), (64, 64, 64, 16, 4, 4)],
        ("*", "16"): [(64, 128, 32, 32, 4, 3), (64, 64, 32, 32, 4, 3)],
        ("*", "mixed"): [(64, 128, 32, 16, 4, 3), (64, 64, 32, 16, 4, 3)],
        ("*", "32"): [(64, 64, 16, 16, 4, 2)],
        ("unaligned", "mixed"): [(64, 64, 32, 16, 2, 3)],
        ("unaligned", "32"): [(64, 64, 16, 16, 4, 2)],
        ("interpreter", "*"): [(64, 64, 64, 64, 1, 1)],
    },
    "fused_linear_persistent": {
        ("sm_90", "16-broken"): [(128, 256, 64, 16, 8, 3)],
        ("sm_90", "16"): [(128, 256, 64, 32, 8, 3), (128, 128, 64, 32, 4, 4)],
        ("sm_90", "mixed"): [(128, 256, 64, 16, 8, 3), (128, 128, 64, 16, 4, 4)],
        ("interpreter", "*"): [(32, 64, 32, 64, 1, 1)],
    },
    # Descriptors reach S and B, too, so rows of R elements have to be whole 16 bytes.
    "fused_linear_pipelined": {
        ("sm_90", "16-broken"): [],
        ("sm_90", "16"): [(128, 256, 64, 64, 8, 3), (128, 128, 64, 64, 4, 4)],
    },
    "down_project": {
        ("sm_90", "16"): (64, 0, 128, 64, 4, 4),
        ("sm_90", "mixed"): (128, 0, 64, 32, 8, 4),
        ("*", "16"): (64, 0, 64, 64, 4, 2),
        ("*", "mixed"): (64, 0, 64, 16, 4, 2),
        ("*", "32"): (32, 0, 32, 32, 4, 2),
        ("interpreter", "*"): (64, 0, 64, 64, 1, 1),
    },
    # Small enough to stand on a multiprocessor beside a program of the persistent GEMM, whose first tile waits for it: with a
    # larger rank, and with fp32 factors, whose dots are taken in parts, it waits longer than the pass takes alone.
    "down_project_beside": {
        ("sm_90", "16"): [(64, 0, 64, 32, 4, 3)],
    },
    "down_project_twice_beside": {
        ("sm_90", "16"): [(64, 0, 64, 16, 4, 4), (64, 0, 64, 32, 4, 3)],
    },
    # As small, for the sums over rows that run beside the GEMM for dX, which does not wait for them.
    "outer_pair": {
        ("sm_90", "16"): [(64, 64, 0, 64, 4, 3)],
        ("sm_90", "mixed-fp16"): [],
        ("sm_90", "mixed"): [(32, 64, 0, 64, 4, 3)],
        ("interpreter", "*"): [(32, 32, 0, 64, 1, 1)],
    },
    "low_rank_add": {
        ("unaligned", "16"): (64, 64, 0, 32, 4, 1),
        ("*", "16"): (64, 128, 0, 32, 4, 1),
        ("sm_90", "mixed"): (64, 128, 0, 16, 4, 1),
        ("*", "mixed"): (32, 64, 0, 16, 4, 1),
        ("*", "32"): (32, 32, 0, 16, 4, 1),
        ("interpreter", "*"): (64, 64, 0, 64, 1, 1),
    },
    "sweep": {
        ("sm_90", "16"): (128, 128, 0, 64, 8, 3),
        ("sm_90", "mixed"): (64, 128, 0, 16, 4, 2),
        ("sm_90", "mixed-fp16"): (32, 64, 0, 16, 4, 2),
        ("gfx942", "16"): (32, 128, 0, 32, 4, 2),
        ("gfx942", "mixed-fp16"): (32, 64, 0, 16, 4, 1),
        ("*", "16"): (32, 128, 0, 64, 4, 2),
        ("*", "mixed"): (32, 64, 0, 16, 4, 2),
        ("*", "32"): (32, 32, 0, 16, 4, 2),
        ("interpreter", "*"): (32, 64, 0, 64, 1, 1),
    },
    "sweep_entry": {
        ("sm_90", "16"): (64, 128, 0, 32, 8, 2),
        ("sm_80", "mixed-fp16"): (32, 32, 0, 16, 4, 1),
        ("*", "16"): (32, 64, 0, 32, 4, 2),
        ("*", "mixed"): (32, 64, 0, 16, 4, 1),
        ("*", "32"): (32, 32, 0, 16, 4, 1),
        ("interpreter", "*"): (32, 64, 0, 64, 1, 1),
    },
}

# Wide enough that a rule with two sums over columns writes little; "sweep" and "sweep_entry" are for the ranks that do not fit.
_TABLES["sweep_wide"] = _TABLES["sweep"] | {
    ("sm_100", "16"): (64, 512, 0, 32, 8, 2),
    ("sm_100", "mixed"): (32, 256, 0, 16, 8, 2),
    ("sm_100", "mixed-fp16"): (32, 64, 0, 16, 4, 2),
    ("sm_80", "16"): (32, 512, 0, 16, 8, 2),
    ("sm_80", "mixed"): (32, 256, 0, 16, 8, 2),
    ("sm_80", "mixed-fp16"): (32, 64, 0, 16, 8, 2),
    ("gfx942", "16"): (32, 512, 0, 16, 8, 1),
    ("interpreter", "*"): (32, 128, 0, 64, 1, 1),
}
_TABLES["sweep_entry_wide"] = _TABLES["sweep_entry"] | {
    **{(arch, "16"): (32, 256, 0, 16, 8, 2) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")},
    ("interpreter", "*"): (32, 128, 0, 64, 1, 1),
}
# Two accumulators fill the registers, of dots without matrix units and of dots in parts those of twice the threads.
_TABLES["down_project_twice"] = _TABLES["down_project"] | {
    ("sm_80", "mixed-fp16"): (64, 0, 64, 16, 8, 2),
    ("*", "32"): (32, 0, 32, 32, 8, 2),
}
# Finding a tile's group takes registers, which the fullest of the tiles have not got.
_TABLES["grouped_fused_linear"] = _TABLES["fused_linear"] | {
    ("sm_90", "mixed"): _TABLES["fused_linear"]["sm_90", "mixed"][1:],
    ("unaligned", "mixed"): [(32, 64, 32, 16, 2, 3)],
    ("unaligned", "32"): [(64, 32, 16, 16, 2, 2)],
}


def cdiv(size: int, step: int) -> int:
    """``⌈size / step⌉``; `triton.cdiv`, which kernels may call too, takes a microsecond longer."""
    return -(-size // step)


def block_r(r: int, limit: int = 64) -> int:
    """Tile width over the rank: a power of two, at least the 16 a dot needs, at most `limit`."""
    return max(16, min(1 << (r - 1).bit_length(), limit))


def aligned(N: int, K: int, R: int) -> bool:
    """Whether rows of these lengths begin where a wide load can."""
    return N % 16 == 0 and K % 16 == 0 and R % 8 == 0


def candidates(
    op: str, N: int, K: int, R: int, dtype: torch.dtype, arch: str, low_rank_dtype: torch.dtype | None = None
) -> list[Config]:
    """The configurations of `op` worth trying for these sizes, x's `dtype`, the low-rank products' dtype (None: the same)
    and `arch` as from `arch_of`. Any architecture gets some, an unknown one the safe default; only the persistent GEMMs have
    none where they cannot run."""
    if dtype == torch.float32:
        kinds = ("32", "*")
    elif low_rank_dtype == torch.float32:
        kinds = ("mixed-fp16", "mixed", "*") if dtype == torch.float16 else ("mixed", "*")
    else:
        kinds = ("16-broken", "16", "*") if R % 8 else ("16", "*")
    table = _TABLES[op]
    # Loads of rows that do not begin where a wide load can fill the registers with addresses: the smaller tile, spread over
    # twice the threads.
    described = op in ("fused_linear_persistent", "fused_linear_pipelined")
    unaligned = not aligned(N, K, R) and arch != "interpreter" and not described
    archs = ("unaligned", "*") if unaligned else (family(arch), "*")
    found = next((table[key] for key in itertools.product(archs, kinds) if key in table), [])
    rows = found if isinstance(found, list) else [found]
    all_registers = op.startswith("sweep") and kinds[0] in ("32", "mixed-fp16")
    return [
        Config(m, n, k, block_r(R, r), warps * 2 if unaligned else warps, stages, all_registers=all_registers)
        for m, n, k, r, warps, stages in rows
    ]


@functools.lru_cache(maxsize=4096)
def pick_config(
    op: str, M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: str, low_rank_dtype: torch.dtype | None = None
) -> Config:
    """The one of the `candidates` to take for M rows: of several, the tile whose waves over the chip cost least."""
    found = candidates(op, N, K, R, dtype, arch, low_rank_dtype)
    return found[0] if len(found) == 1 else min(found, key=lambda config: wave_cost(config, M, N, arch))


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin on this device before the one in front of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.version.hip is None and _gpu_properties(device.index).major >= 9


def beside(
    K: int, R: int, dtype: torch.dtype, arch: str, low_rank_dtype: torch.dtype, products: int = 1
) -> Config | None:
    """The configuration of a pass for S, or for two such `products`, that leaves room on each multiprocessor for the GEMM's
    program, which begins before S is there; None where this architecture has none or the rank needs more room."""
    op = "down_project_beside" if products == 1 else "down_project_twice_beside"
    return whole_rank(op, 0, K, R, dtype, arch, low_rank_dtype)


@functools.lru_cache(maxsize=4096)
def whole_rank(
    op: str, N: int, K: int, R: int, dtype: torch.dtype, arch: str, low_rank_dtype: torch.dtype
) -> Config | None:
    """The first of the `candidates` whose tile has the whole rank; None where none has."""
    found = candidates(op, N, K, R, dtype, arch, low_rank_dtype)
    return next((config for config in found if config.BLOCK_R >= R), None)


def wave_cost(config: Config, M: int, N: int, arch: str) -> float:
    """What a GEMM of M x N costs in these tiles, in elements of the output computed by one multiprocessor after another.

    A tile's operands are as many bytes as its perimeter is long, so a small tile costs more an element: 1 + 64 (1/m + 1/n)
    as much, fitted to what tiles of 64 to 256 took on an H200.
    """
    m, n = config.BLOCK_M, config.BLOCK_N
    waves = cdiv(cdiv(M, m) * cdiv(N, n), sms_of(arch))
    return waves * m * n * _perimeter_cost(m, n)


def even_cost(m: int, n: int, M: int, N: int, arch: str) -> float:
    """`wave_cost` of tiles of m x n that fill the chip evenly."""
    return M * N / sms_of(arch) * _perimeter_cost(m, n)


def _perimeter_cost(m: int, n: int) -> float:
    return 1 + 64 / m + 64 / n


def num_splits(tiles: int, length: int, step: int, arch: str, waves: int = 2) -> int:
    """Into how many parts to cut a reduction of `length` so that `tiles` output tiles give about `waves` full waves."""
    return max(1, min(waves * sms_of(arch) // max(tiles, 1), cdiv(length, step)))


def parts_of_k(config: Config, M: int, K: int, R: int, arch: str) -> int:
    """Into how many parts of K the pass for S is cut, by tiles of `config`: each part is summed up alone, which takes a second
    stage."""
    tiles = cdiv(M, config.BLOCK_M) * cdiv(R, config.BLOCK_R)
    # A part shorter than eight steps spends its time in the prologue.
    return num_splits(tiles, K, 8 * config.BLOCK_K, arch, waves=1)


def all_registers(arch: str) -> dict[str, int]:
    """Launch options that let a thread have as many registers as there are: left alone, NVIDIA's assembler spills a few of them
    to fit another block on a multiprocessor."""
    return {"maxnreg": 255} if arch.startswith("sm_") else {}


def leave_registers(config: Config) -> dict[str, int]:
    """Launch options that leave 96 registers a thread for four warps beside the GEMM's program of this configuration: of
    Hopper's 65,536 its eight warps would take all."""
    return {"maxnreg": 208} if config.num_warps == 8 else {}


def num_sms(device: torch.device) -> int:
    """Multiprocessors of this device."""
    return sms_of(arch_of(device))


def arch_of(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``"interpreter"`` for a CPU tensor. A part that has not as many multiprocessors as
    `NUM_SMS` says has its number behind it: ``"sm_90:114"``."""
    return _gpu_arch(device.index) if device.type == "cuda" else "interpreter"


def family(arch: str) -> str:
    """`arch` without a part's number of multiprocessors."""
    return arch.partition(":")[0]


@functools.cache
def sms_of(arch: str) -> int:
    """Multiprocessors of an `arch_of`."""
    name, _, count = arch.partition(":")
    return int(count) if count else NUM_SMS.get(name, DEFAULT_NUM_SMS)


@functools.cache
def _gpu_arch(index: int | None) -> str:
    properties = _gpu_properties(index)
    hip = torch.version.hip is not None
    name = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    count = properties.multi_processor_count
    return name if count == NUM_SMS.get(name) else f"{name}:{count}"


@functools.cache
def _gpu_properties(index: int | None):
    return torch.cuda.get_device_properties(index)
