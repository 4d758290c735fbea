"""Compile the kernels for GPUs that are not here, exactly as a launcher would launch them.

A launcher is called on CPU tensors with the architecture pretended and every launch caught before it runs; what was
caught is compiled by Triton for the target, and the numbers are read from the machine code.

    python -m bench.offline_compile [--arch sm_90 ...] [--dtype bfloat16 ...] [--rank 16 ...] [--shape M N K] [--json]

Must not run under TRITON_INTERPRET=1, where the kernels have no machine code.
"""

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

import csrc_triton
from csrc_triton import configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Shared memory (LDS) one block can have, in bytes."""

_NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC.*MMA", "gfx942": "v_mfma"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one launch compiled to. Sizes in bytes; `matrix` is how many matrix instructions of the architecture's own
    kind (wgmma on sm_90, tcgen05 on sm_100, MFMA on gfx942) the code has."""

    kernel: str
    arch: str
    case: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    matrix: int

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= SHARED_LIMIT[self.arch]


def catch_launches(call, arch: str) -> list[tuple[JITFunction, tuple, dict]]:
    """The (kernel, args, kwargs) that `call()` would launch on `arch`; nothing runs."""
    caught = []

    def catch(self, *args, grid, warmup, **kwargs):
        caught.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", catch), mock.patch.object(configs, "arch_of", lambda device: arch):
        call()
    return caught


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, arch: str, case: str) -> Compiled:
    """Compile one caught launch for `arch` and read the result."""
    target = TARGETS[arch]
    backend = triton.compiler.make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = kwargs | {"debug": False}
    bound_args, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound_args, specialization, options)
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    registers, spills, code = _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)
    return Compiled(
        kernel=kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        arch=arch,
        case=case,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        matrix=len(re.findall(_MATRIX_INSTRUCTIONS[arch], code)),
    )


def _read_nvidia(compiled) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _run("nvdisasm", "-c", cubin.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    # A kernel's own stack can be used without a spill, a local load or store cannot be anything else here.
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    return registers, spills, code


def _read_amd(compiled) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count"), code


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_NVIDIA_BIN / tool, *args], check=True, capture_output=True, text=True).stdout


def launches(dtype: torch.dtype, adapter_dtype: torch.dtype, r: int, m: int = 2048, n: int = 4096, k: int = 4096):
    """(case, call) of every launcher at one size, with every rule whose code differs."""
    compute = torch.promote_types(dtype, adapter_dtype)
    x, g = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
    w, bias = torch.empty(n, k, dtype=dtype), torch.empty(n, dtype=dtype)
    a, b = torch.empty(r, k, dtype=adapter_dtype), torch.empty(n, r, dtype=adapter_dtype)
    s = torch.empty(m, r, dtype=compute)
    c = {norm: torch.empty(n + r if norm == "factor" else n, dtype=torch.float32) for norm in ("row", "factor")}
    label = f"{str(dtype).split('.')[1]}/{str(adapter_dtype).split('.')[1]} R={r}"
    yield f"down_project {label}", lambda: csrc_triton.down_project(x, a, compute)
    yield f"y {label}", lambda: csrc_triton.fused_linear(x, w, bias, s, b)
    yield f"dx {label}", lambda: csrc_triton.fused_linear(g, w.mT, None, s, a.mT)
    yield f"low_rank_add {label}", lambda: csrc_triton.low_rank_add(g, s, b)
    for norm in ("row", "matrix", "factor"):
        yield f"C {norm} {label}", lambda norm=norm: csrc_triton.weight_coefficient(a, b, 2.0, norm)
    for norm in ("row", "factor", "token", "entry"):
        yield (
            f"adapter_grads {norm} {label}",
            lambda norm=norm: csrc_triton.adapter_grads(
                g, x, s, b, c.get(norm), 2.0, norm, True, adapter_dtype, adapter_dtype
            ),
        )
    # Samples of 16 rows share a program, those of 512 are cut; the shortest take the Gram form.
    for norm, rows in (("row", 16), ("entry", 16), ("token", 512), ("row", 1), ("entry", 1)):
        segments = csrc_triton.Segments(m // rows, rows)
        args = (g, x, s, b, c.get(norm), 2.0, norm, True)
        yield (
            f"sample_grads {norm} T={rows} {label}",
            lambda args=args, segments=segments: csrc_triton.sample_grads(*args, True, True, segments),
        )
        yield (
            f"sample_norms {norm} T={rows} {label}",
            lambda args=args, segments=segments: csrc_triton.sample_squared_norms(
                *args, adapter_dtype, adapter_dtype, segments
            ),
        )
    starts = torch.empty(m // 16 + 1, dtype=torch.int32)
    ragged = csrc_triton.Segments(m // 16, 30, starts, starts)
    yield (
        f"sample_grads ragged {label}",
        lambda: csrc_triton.sample_grads(g, x, s, b, c["factor"], 2.0, "factor", True, True, True, ragged),
    )


def compile_all(archs, dtypes, ranks, shape=(2048, 4096, 4096)) -> list[Compiled]:
    """Every distinct launch of every launcher for each architecture, (dtype, adapter dtype) and rank, at (M, N, K)."""
    results = []
    for arch, (dtype, adapter_dtype), r in itertools.product(archs, dtypes, ranks):
        seen = set()
        for case, call in launches(dtype, adapter_dtype, r, *shape):
            for kernel, args, kwargs in catch_launches(call, arch):
                shapes = [(t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in args]
                identity = repr((kernel.__name__, shapes, kwargs))
                if identity not in seen:
                    seen.add(identity)
                    results.append(compile_launch(kernel, args, kwargs, arch, case))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float16"], help="bfloat16, or bfloat16/float32 for fp32 adapters"
    )
    parser.add_argument("--rank", nargs="+", type=int, default=[16])
    parser.add_argument("--shape", nargs=3, type=int, default=(2048, 4096, 4096), metavar=("M", "N", "K"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtypes = [tuple(getattr(torch, name) for name in (d.split("/") * 2)[:2]) for d in options.dtype]
    results = compile_all(options.arch, dtypes, options.rank, options.shape)
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
        return
    for c in results:
        print(
            f"{'ok  ' if c.fits else 'FAIL'} {c.arch:7} {c.case:40} {c.kernel:22} warps={c.num_warps} "
            f"registers={c.registers:3} spills={c.spills} shared={c.shared:6} matrix={c.matrix}"
        )
    if not all(c.fits for c in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
