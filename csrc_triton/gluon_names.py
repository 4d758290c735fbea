"""What of Gluon, which is experimental, `fused_linear_pipelined` is written in, by its names in Triton 3.6 or those of later
versions. Where one is missing this cannot be imported, and the GEMM goes another way (`plans.options`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "load_tile",
    "mbarrier",
    "reinterpret",
    "store_tile",
    "sync_threads",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

_buffer = gl.shared_memory_descriptor
reinterpret = getattr(_buffer, "reinterpret", None) or _buffer._reinterpret
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier
