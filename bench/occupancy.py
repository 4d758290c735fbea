"""How many blocks of a kernel one multiprocessor (compute unit) holds at once, from what the block needs.

Limits as in NVIDIA's CUDA programming guide (compute capabilities) and AMD's MI300 instruction set manual.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class _Limits:
    """Of one multiprocessor: registers (of 32 bits, for NVIDIA for all threads; for AMD a lane's in one of four SIMDs),
    warps, blocks, shared memory in bytes, what the system keeps of it for each block, columns of tensor memory."""

    registers: int
    warps: int
    blocks: int
    shared: int
    reserved: int
    tensor_columns: int = 0


_NVIDIA = {
    "sm_80": _Limits(65536, 64, 32, 164 * 1024, 1024),
    "sm_90": _Limits(65536, 64, 32, 228 * 1024, 1024),
    "sm_100": _Limits(65536, 64, 32, 228 * 1024, 1024, tensor_columns=512),
}
_AMD = {"gfx942": _Limits(512, 32, 32, 64 * 1024, 0)}
_SIMDS = 4


def resident_blocks(arch: str, num_warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Blocks of `num_warps` warps, `registers` a thread, `shared` bytes and `tensor_columns` that fit at once."""
    limits = (_NVIDIA | _AMD)[arch]
    counts = [limits.blocks, limits.warps // num_warps]
    if arch in _NVIDIA:
        # Handed out to a warp in units of 256, which is 8 a thread.
        warps = limits.registers // (32 * _round_up(max(registers, 1), 8))
        # Each quarter of the multiprocessor has its own registers.
        counts.append(warps // _SIMDS * _SIMDS // num_warps)
    else:
        waves_a_simd = min(limits.warps // _SIMDS, limits.registers // _round_up(max(registers, 1), 8))
        counts.append(waves_a_simd * _SIMDS // num_warps)
    if shared:
        counts.append(limits.shared // (_round_up(shared, 128) + limits.reserved))
    if tensor_columns:
        counts.append(limits.tensor_columns // tensor_columns)
    return max(0, min(counts))


def fit_together(arch: str, *blocks: tuple[int, int, int]) -> bool:
    """Whether one of NVIDIA's multiprocessors holds all of these blocks at once: of each its warps, a multiple of four, its
    registers a thread, and its bytes of shared memory."""
    limits = _NVIDIA[arch]
    registers = sum(32 * warps * _round_up(registers, 8) for warps, registers, _ in blocks)
    shared = sum(_round_up(shared, 128) + limits.reserved for _, _, shared in blocks)
    warps = sum(warps for warps, _, _ in blocks)
    return registers <= limits.registers and shared <= limits.shared and warps <= limits.warps


def resident_share(arch: str, num_warps: int, blocks: int) -> float:
    """The share of the warps a multiprocessor can hold that `blocks` blocks are."""
    return blocks * num_warps / (_NVIDIA | _AMD)[arch].warps


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
