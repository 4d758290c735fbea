"""``python -m bench.compile_report``: every kernel as it compiles for each architecture, without a GPU.

For every launch that the launchers can make: registers, spills, shared memory, occupancy, matrix instructions and loads
by TMA. Exits with 1 if one spills, needs more shared memory than a block can have, or is a 16-bit GEMM on sm_90 without
wgmma, or loads aligned 16-bit operands one by one in its main loop. --arch, --dtype, --rank, --shape and --case choose from it.
"""

import argparse
import dataclasses
import json
import os
import sys

import torch

from .offline_compile import TARGETS, Compiled, compile_all

DTYPES = ("bfloat16", "float16", "float32", "bfloat16/float32", "float16/float32")
RANKS = (8, 16, 64, 128)
SHAPES = {
    # (M, N, K): what makes `pick_config` and Triton's own specialisation choose differently.
    "large": (8192, 4096, 4096),
    "small-m": (64, 4096, 4096),
    "narrow": (512, 1024, 4096),
    "unaligned": (70, 1100, 1301),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument(
        "--dtype", nargs="+", default=DTYPES, choices=DTYPES, help="of x, and of the adapter where that differs"
    )
    parser.add_argument("--rank", nargs="+", type=int, default=RANKS)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--case", default="", help="only launches with this text in their name, as 'grouped sample'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (all cores)")
    parser.add_argument("--faults", action="store_true", help="print only what is at fault")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    options = parser.parse_args(arguments)

    dtypes = [tuple(getattr(torch, name) for name in (d.split("/") * 2)[:2]) for d in options.dtype]
    shapes = [SHAPES[name] for name in options.shape]
    everything = []
    for compiled in compile_all(options.arch, dtypes, options.rank, shapes, options.jobs, options.case):
        everything.append(compiled)
        if not options.json and (compiled.faults or not options.faults):
            print(line(compiled), flush=True)
    if options.json:
        print(json.dumps([_as_data(compiled) for compiled in everything]))
    faulty = sum(bool(compiled.faults) for compiled in everything)
    print(f"{len(everything)} kernels, {faulty} at fault", file=sys.stderr)
    return 1 if faulty else 0


def line(c: Compiled) -> str:
    """One kernel as a line of the report."""
    text = (
        f"{'FAIL' if c.faults else 'ok  '} {c.arch:6} {c.kernel:22} warps={c.num_warps} registers={c.registers:3} "
        f"spills={c.spills} shared={c.shared:6} blocks={c.blocks:2} occupancy={c.occupancy:4.0%} "
        f"matrix={c.matrix:3} tma={c.tma:2} {c.widths}  {c.case}"
    )
    return f"{text}: {', '.join(c.faults)}" if c.faults else text


def _as_data(c: Compiled) -> dict:
    return dataclasses.asdict(c) | {"blocks": c.blocks, "occupancy": c.occupancy, "faults": c.faults}


if __name__ == "__main__":
    raise SystemExit(main())
