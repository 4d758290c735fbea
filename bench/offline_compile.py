"""Compile the kernels for GPUs that are not here, exactly as a launcher would launch them.

A launcher is called on CPU tensors with the architecture pretended and every launch caught before it runs; what was
caught is compiled by Triton for the target, and the numbers are read from the machine code. Must not run under
TRITON_INTERPRET=1, where the kernels have no machine code. `python -m bench.compile_report` is its command line.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, create_function_from_signature

import csrc_triton
from csrc_triton import configs, describable, plans
from csrc_triton.beside import Beside
from csrc_triton.chain import Counted, chained, counts, next_place
from csrc_triton.down_project import down_project_beside
from csrc_triton.fused_linear import launch_by_plan
from csrc_triton.low_rank_add import low_rank_product
from csrc_triton.outer_pair import outer_pair, pick_pair
from csrc_triton.sweep import Rule

from .machine_code import AccessWidths, access_widths
from .occupancy import resident_blocks, resident_share

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Shared memory (LDS) one block can have, in bytes."""
OVERLAPPING = ("sm_90", "sm_100")
"""Where a kernel can begin before the one in front of it has ended."""
TENSOR_COLUMNS = 512
"""Columns of sm_100's tensor memory. A kernel that needs more compiles to a trap."""

_NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX_INSTRUCTIONS = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "gfx942": "v_mfma",
}
_TMA_LOAD = r"cp\.async\.bulk\.tensor\.\dd\.shared"


_WIDE_LOADS = {"fused_linear", "fused_linear_persistent", "down_project", "outer_pair", "sweep"}
_NONE = AccessWidths()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one launch compiled to, for x of `dtype`. Sizes in bytes; `matrix` is how many matrix instructions of the
    architecture's own kind (wgmma on sm_90, tcgen05 on sm_100, MFMA on gfx942) the code has, `tma` how many loads by the
    tensor memory accelerator, `tensor_columns` what it takes of sm_100's tensor memory, `widths` what its accesses of
    global memory are wide; `aligned`: rows of all operands begin at, and are, whole wide loads."""

    kernel: str
    arch: str
    dtype: str
    case: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    tensor_columns: int
    matrix: int
    tma: int
    widths: AccessWidths = _NONE
    aligned: bool = False

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at once; 0 where not even one fits."""
        return resident_blocks(self.arch, self.num_warps, self.registers, self.shared, self.tensor_columns)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that these blocks are."""
        return resident_share(self.arch, self.num_warps, self.blocks)

    @property
    def faults(self) -> list[str]:
        """What must not be: spills, more shared or tensor memory than a block can have, a 16-bit GEMM on Hopper without
        wgmma, a persistent one without TMA, a main loop that loads 16-bit operands one by one though they are aligned."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} are the limit")
        if self.tensor_columns > TENSOR_COLUMNS:
            found.append(f"{self.tensor_columns} columns of tensor memory, {TENSOR_COLUMNS} are the limit")
        if self.kernel in ("fused_linear_persistent", "fused_linear_pipelined") and not self.tma:
            found.append("descriptors without TMA")
        gemm = self.kernel.startswith("fused_linear")
        if gemm and self.arch == "sm_90" and self.dtype != "float32" and not self.matrix:
            found.append("no wgmma")
        # A small tile gives a thread one element, with a load of its own; many of those are a large tile read one by one.
        narrow = self.widths.narrow_in_loop > self.widths.wide_in_loop
        if narrow and self.aligned and self.dtype != "float32" and self.kernel in _WIDE_LOADS:
            found.append(f"{self.widths.narrow_in_loop} loads of one element in the main loop")
        return found


def catch_launches(call, arch: str) -> list[tuple[JITFunction, tuple, dict]]:
    """The (kernel, args, kwargs) that `call()` would launch on `arch`; nothing runs, nor the vendor's GEMM."""
    caught = []

    def catch(self, *args, grid, warmup, **kwargs):
        caught.append((self, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(torch.Tensor, "addmm_", lambda self, *args, **kwargs: self),
        mock.patch.object(configs, "arch_of", lambda device: arch),
        mock.patch.object(configs, "can_overlap", lambda device: arch in OVERLAPPING),
    ):
        call()
    return caught


@functools.cache
def _binder(kernel: JITFunction, arch: str) -> tuple:
    backend = triton.compiler.make_backend(TARGETS[arch])
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def specialize(kernel: JITFunction, args: tuple, kwargs: dict, arch: str) -> tuple[triton.compiler.ASTSource, dict]:
    """What Triton would compile for a caught launch: the source as specialised to its arguments, and the options."""
    backend, binder = _binder(kernel, arch)
    kwargs = kwargs | {"debug": False}
    bound_args, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound_args, specialization, options)
    source = triton.compiler.ASTSource
    if kernel.is_gluon():
        # A Triton that was loaded for its interpreter cannot import it.
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return source(kernel, signature, constexprs, attrs), options.__dict__


def compile_launch(
    source: triton.compiler.ASTSource, options: dict, arch: str, dtype: str, case: str, aligned: bool = False
) -> Compiled:
    """Compile what `specialize` gave for `arch` and read the result; `dtype` (x's), `case` and `aligned` are its labels."""
    target = TARGETS[arch]
    compiled = triton.compile(source, target=target, options=options)
    registers, spills, code = _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)
    return Compiled(
        kernel=source.fn.__name__.removeprefix("_").removesuffix("_kernel"),
        arch=arch,
        dtype=dtype,
        case=case,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        matrix=len(re.findall(_MATRIX_INSTRUCTIONS[arch], code)),
        tma=len(re.findall(_TMA_LOAD, code)),
        widths=access_widths(code, _MATRIX_INSTRUCTIONS[arch]),
        aligned=aligned,
    )


def _read_nvidia(compiled) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL"))
        # Without a stack nothing can spill, and disassembling takes as long as compiling. A stack can be used without a spill;
        # a local load or store cannot be anything else here.
        code = _run("nvdisasm", "-c", cubin.name) if stack or local else ""
    return registers, len(re.findall(r"\b(?:STL|LDL)\b", code)), compiled.asm["ptx"]


def _read_amd(compiled) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    # A scalar register spills into a lane of a vector register; only what does not fit those goes to memory.
    return field("vgpr_count"), len(re.findall(r"\bscratch_(?:load|store)", code)), code


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_NVIDIA_BIN / tool, *args], check=True, capture_output=True, text=True).stdout


def in_a_chain(call, *places):
    """`call`, whose launches have these places in a chain; without any the first."""

    def run():
        with chained(True, *places):
            if places:
                next_place()
            call()

    return run


def launches(
    arch: str, dtype: torch.dtype, adapter_dtype: torch.dtype, r: int, m: int = 2048, n: int = 4096, k: int = 4096
):
    """(case, call) of every launcher at one size, with every plan for `arch` and every rule whose code differs."""
    compute = torch.promote_types(dtype, adapter_dtype)
    x, g = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype)
    w, bias = torch.empty(n, k, dtype=dtype), torch.empty(n, dtype=dtype)
    a, b = torch.empty(r, k, dtype=adapter_dtype), torch.empty(n, r, dtype=adapter_dtype)
    s = torch.empty(m, r, dtype=compute)
    c = {norm: torch.empty(n + r if norm == "factor" else n, dtype=torch.float32) for norm in ("row", "factor")}
    label = f"{str(dtype).split('.')[1]}/{str(adapter_dtype).split('.')[1]} R={r}"
    yield f"down_project {label}", lambda: csrc_triton.down_project(x, a, compute)
    room = configs.beside(k, r, dtype, arch, compute)
    counted = Counted(counts(x.device), 2, m // 2)
    if room is not None:
        for rounds, of_s in (("", Beside(room, 1, None)), (" in rounds", Beside(room, 2, counted))):
            yield (
                f"down_project beside y{rounds} {label}",
                in_a_chain(lambda of_s=of_s: down_project_beside(x, a, None, compute, of_s)),
            )
            of_ds = Beside(configs.beside(n, r, dtype, arch, compute, products=2), of_s.rounds, counted)
            yield (
                f"down_project beside dx{rounds} {label}",
                in_a_chain(lambda of_ds=of_ds: down_project_beside(g, b.mT, c["row"], compute, of_ds)),
            )
    call = plans.Call("adapted_linear", m, n, k, r, dtype, compute)
    for plan in plans.options(call, arch, describable(x, w, b), untried=True):
        open_for_parts = ("open",) * plans.takes_parts(plan.way, dtype, compute)
        if plan.way in plans.PERSISTENT:
            gemm = functools.partial(launch_by_plan, x, w, bias, s, b, g, plan, beside=True)
            yield f"y {plan.way} beside S {label}", in_a_chain(gemm, *open_for_parts, "midway")
            if plan.way == "pipelined" and room is not None:
                in_rounds = functools.partial(gemm, counted=counted)
                yield f"y {plan.way} beside S in rounds {label}", in_a_chain(in_rounds, *open_for_parts, "midway")
        if plan.way != "vendor":
            yield f"y {plan.way} {label}", lambda plan=plan: csrc_triton.adapted_linear(x, w, bias, a, b, compute, plan)
    call = plans.Call("fused_linear", m, k, n, r, dtype, compute)
    for plan in plans.options(call, arch, describable(g, w.mT, a.mT)):
        open_for_parts = ("open",) * plans.takes_parts(plan.way, dtype, compute)
        if plan.way != "vendor":
            yield f"dx {plan.way} {label}", lambda plan=plan: csrc_triton.fused_linear(g, w.mT, None, s, a.mT, plan)
            if plan.way in plans.PERSISTENT:
                gemm = functools.partial(launch_by_plan, g, w.mT, None, s, a.mT, x, plan, beside=True)
                places = (*open_for_parts, "midway") if open_for_parts else ()
                yield f"dx {plan.way} beside dB and dA {label}", in_a_chain(gemm, *places)
                if plan.way == "pipelined" and room is not None:
                    for rounds, of_ds in (("", None), (" in rounds", counted)):
                        behind = functools.partial(gemm, counted=of_ds)
                        yield f"dx {plan.way} beside dS{rounds} {label}", in_a_chain(behind, *open_for_parts, "midway")
    yield f"low_rank_add {label}", lambda: csrc_triton.low_rank_add(g, s, b)
    yield f"low_rank_product {label}", lambda: low_rank_product(s, b, bias, dtype)
    for norm in ("row", "matrix", "factor"):
        yield f"C {norm} {label}", lambda norm=norm: csrc_triton.weight_coefficient(a, b, 2.0, norm)
    for norm in ("row", "factor", "token", "entry"):
        yield (
            f"adapter_grads {norm} {label}",
            lambda norm=norm: csrc_triton.adapter_grads(
                g, x, s, b, c.get(norm), 2.0, norm, True, adapter_dtype, adapter_dtype
            ),
        )
    packed, code = torch.empty(n * k // 2, dtype=torch.uint8), torch.empty(16)
    numbers, scales = torch.empty(n * k // 64, dtype=torch.uint8), torch.empty(n * k // 64)
    nested = (numbers, torch.empty(256), torch.empty(-(-len(numbers) // 256)), torch.empty(()))
    for name, of_scales in (("nested", nested), ("plain", (scales, None, None, None))):
        yield (
            f"dequantize_4bit {name} {label}",
            lambda of_scales=of_scales: csrc_triton.dequantize_4bit(packed, code, *of_scales, 64, 256, n, k, dtype),
        )
    pair = pick_pair(n, k, r, dtype, arch, compute)
    if pair is not None:
        columns, rank = Rule(None, c["row"], "columns"), Rule(None, c["factor"], "rank")
        rows = Rule(row_scale=c["row"][:m])
        behind = (pair, (adapter_dtype,) * 2, None if room is None else counted)
        for norm, rules in (("row", (columns, Rule())), ("factor", (columns, rank)), ("token", (rows, rows))):
            yield (
                f"outer_pair beside dx {norm} {label}",
                in_a_chain(lambda rules=rules: outer_pair(g, s, rules[0], x, s, rules[1], *behind), "late"),
            )
    call = plans.Call("layer_grads", m, k, n, r, dtype, compute)
    untried = plans.options(call, arch, describable(g, w.mT, a.mT), untried=True)
    columns = [plan for plan in untried if plan.way == "column"]
    for norm, plan in itertools.product((None, "row", "matrix", "factor", "token"), (None, *columns)):
        yield (
            f"layer_grads {norm}{'' if plan is None else ' column'} {label}",
            lambda norm=norm, plan=plan: csrc_triton.layer_grads(
                g, x, s, w, a, b, 2.0, norm, adapter_dtype, adapter_dtype, plan=plan
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
    yield from grouped_launches(x, g, w, bias, a, b, s, label)
    yield from shared_launches(x, g, w, bias, a, b, s, label)


def grouped_launches(x, g, w, bias, a, b, s, label: str, groups: int = 8):
    """(case, call) of every launcher for groups of rows, each with these sizes of its own."""
    w, bias, a, b = (t.new_empty(groups, *t.shape) for t in (w, bias, a, b))
    ends = torch.empty(groups, dtype=torch.int32)
    (n, r), dtype = b.shape[1:], a.dtype
    c = {norm: torch.empty(groups, n + r if norm == "factor" else n) for norm in ("row", "factor")}
    yield f"grouped down_project {label}", lambda: csrc_triton.grouped_down_project(x, a, ends, s.dtype)
    yield f"grouped y {label}", lambda: csrc_triton.grouped_fused_linear(x, w, bias, s, b, ends)
    yield f"grouped dx {label}", lambda: csrc_triton.grouped_fused_linear(g, w.mT, None, s, a.mT, ends)
    for norm in ("row", "matrix", "factor"):
        yield f"grouped C {norm} {label}", lambda norm=norm: csrc_triton.weight_coefficient(a, b, 2.0, norm)
    for norm in ("row", "factor", "token", "entry"):
        yield (
            f"grouped adapter_grads {norm} {label}",
            lambda norm=norm: csrc_triton.grouped_adapter_grads(
                g, x, s, b, c.get(norm), ends, 2.0, norm, True, dtype, dtype
            ),
        )
    pieces = torch.empty(groups * 16 + 1, dtype=torch.int32)
    for norm in ("row", "factor", "token", "entry"):
        args = (g, x, s, b, c.get(norm), pieces, 16, 2.0, norm)
        yield (
            f"grouped sample_grads {norm} {label}",
            lambda args=args: csrc_triton.grouped_sample_grads(*args, True, True, True),
        )
        yield (
            f"grouped sample_squared_norms {norm} {label}",
            lambda args=args: csrc_triton.grouped_sample_squared_norms(*args, True, dtype, dtype),
        )
    yield (
        f"grouped weighted {label}",
        lambda: csrc_triton.grouped_adapter_grads(
            g, x, s, b, c["row"], ends, 2.0, "row", False, dtype, dtype, row_weights=torch.empty(len(g))
        ),
    )


def shared_launches(x, g, w, bias, a, b, s, label: str, groups: int = 8):
    """(case, call) of the same launchers where all groups share a weight, rows are in any order, and each group has its η;
    ranks are multiples of 16 there, as adapters are packed."""
    r = -(-a.shape[0] // 16) * 16
    a, b, s = a.new_empty(groups, r, a.shape[1]), b.new_empty(groups, b.shape[0], r), s.new_empty(s.shape[0], r)
    ends, order = torch.empty(groups, dtype=torch.int32), torch.empty(x.shape[0], dtype=torch.int32)
    etas, dtype, n = torch.empty(groups), a.dtype, b.shape[1]
    c = {norm: torch.empty(groups, n + r if norm == "factor" else n) for norm in ("row", "factor")}
    yield f"shared down_project {label}", lambda: csrc_triton.grouped_down_project(x, a, ends, s.dtype, order)
    yield f"shared y {label}", lambda: csrc_triton.grouped_fused_linear(x, w, bias, s, b, ends, order, False)
    yield f"shared dx {label}", lambda: csrc_triton.grouped_fused_linear(g, w.mT, None, s, a.mT, ends, order, False)
    product = csrc_triton.grouped_low_rank_product
    yield f"shared product for y {label}", lambda: product(s, b, bias, ends, order, x.dtype)
    yield f"shared product for dx {label}", lambda: product(s, a.mT, None, ends, order, x.dtype)
    for norm in ("row", "matrix", "factor"):
        yield f"shared C {norm} {label}", lambda norm=norm: csrc_triton.weight_coefficient(a, b, 2.0, norm, etas)
    for norm in ("row", "factor", "token", "entry"):
        yield (
            f"shared adapter_grads {norm} {label}",
            lambda norm=norm: csrc_triton.grouped_adapter_grads(
                g, x, s, b, c.get(norm), ends, 2.0, norm, True, dtype, dtype, order, etas
            ),
        )


def sources(archs, dtypes, ranks, shapes=((2048, 4096, 4096),), part: str = "") -> list[tuple]:
    """`compile_launch`'s arguments for every distinct launch of every launcher whose case has `part` in its name, for each
    architecture, (dtype, adapter dtype) and rank, at each (M, N, K); one that differs from an earlier one by its arguments
    alone is not compiled again."""
    found = {}
    for arch, (dtype, adapter_dtype), r, shape in itertools.product(archs, dtypes, ranks, shapes):
        for case, call in launches(arch, dtype, adapter_dtype, r, *shape):
            if part not in case:
                continue
            for caught in catch_launches(call, arch):
                source, options = specialize(*caught, arch)
                identity = (arch, source.fn.__name__, source.hash(), repr(sorted(options.items())))
                label = f"{case} {'x'.join(map(str, shape))}"
                aligned = configs.aligned(*shape[1:], r)
                found.setdefault(identity, (source, options, arch, str(dtype).removeprefix("torch."), label, aligned))
    return list(found.values())


_to_compile: list[tuple] = []


def _compile_number(i: int) -> Compiled:
    return compile_launch(*_to_compile[i])


def compile_all(
    archs, dtypes, ranks, shapes=((2048, 4096, 4096),), jobs: int = 1, part: str = ""
) -> Iterator[Compiled]:
    """All `sources`, compiled by as many processes as `jobs` says, in their order."""
    _to_compile[:] = sources(archs, dtypes, ranks, shapes, part)
    if jobs == 1:
        yield from map(_compile_number, range(len(_to_compile)))
        return
    # Forked, the workers have the sources, which cannot be sent to them.
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_compile_number, range(len(_to_compile)))
