"""``python -m bench.host``: what one layer's step costs the host, without a GPU.

The layer runs on CPU tensors as it would on an H100: its kernels are compiled for one, and Triton launches them by a CUDA
driver that does nothing (`null_driver.c`, which a C compiler builds). What is measured is Python, autograd and Triton's
launcher on this machine's CPU; what the driver, CUDA's allocator and autograd's thread for the GPU cost is missing. PEFT's
layer and the frozen one stand beside it, whose torch ops run on as good as empty tensors.
"""

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from allora_kernels.layer import backend, ops
from allora_kernels.testing import Inputs
from allora_kernels.tools.timing import dispatch
from csrc_triton import configs, launching, replay

from .cases import Case
from .providers import PROVIDERS, Provider, forward_backward
from .results import environment

ARCH, NUM_SMS = "sm_90", configs.NUM_SMS["sm_90"]
IN_A_ROW = 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class _AnyDevice:
    """The current device, whichever is asked about."""

    def __eq__(self, other: object) -> bool:
        return True


def load_null_driver(folder: Path) -> None:
    """Build the driver in `folder`; what looks for the CUDA driver in this process finds it."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("null_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    # What is loaded is found again by its name.
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """CPU tensors are taken for an H100's, and kernels are launched by the driver that is loaded."""

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    aten = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The vendor's GEMM: queued in no time.
        aten.impl("addmm_", lambda y, *_, **__: y, "CPU", allow_override=True)
    choice = backend.Choice("triton", "a pretended GPU")
    try:
        with (
            mock.patch.object(triton.runtime.driver, "_active", Driver()),
            mock.patch.object(torch.cuda, "current_device", _AnyDevice),
            mock.patch.object(launching, "_is_compiled", lambda kernel, device: True),
            mock.patch.object(configs, "arch_of", lambda device: ARCH),
            mock.patch.object(configs, "num_sms", lambda device: NUM_SMS),
            mock.patch.object(configs, "can_overlap", lambda device: True),
            mock.patch.object(ops, "_takes_replays", lambda t: True),
            mock.patch.object(backend, "choose", lambda *_: choice),
        ):
            yield
    finally:
        aten._destroy()
        replay.forget()


class _Unrecordable(dict):
    """Kinds of call of which none is replayed or recorded."""

    def get(self, *_) -> int:
        return replay._NEVER


def without_replay(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, of whose ops none is replayed."""
    unrecordable = _Unrecordable()

    def run() -> object:
        kinds, replay._kinds = replay._kinds, unrecordable
        try:
            return call()
        finally:
            replay._kinds = kinds

    return run


def in_a_row(call: Callable[[], object]) -> Callable[[], None]:
    """`call` some times in a row, as a model's layers are."""

    def run() -> None:
        for _ in range(IN_A_ROW):
            call()

    return run


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """us of a forward pass and of a forward and backward pass, by name; in a process that has loaded the null driver."""
    # Of the others the arithmetic must not count.
    small = Case(8, 8, 8, 1)
    with pretended_gpu():
        made = {
            name: (PROVIDERS[name], at.inputs("cpu"))
            for name, at in (("frozen", small), ("peft", small), ("ours", case))
        }
        passes = {name: _passes(spec.build(inputs), inputs) for name, (spec, inputs) in made.items()}
        passes["ours, no call replayed"] = {what: without_replay(call) for what, call in passes["ours"].items()}
        found = {name: {} for name in passes}
        for what in ("forward", "forward_backward"):
            calls = {name: in_a_row(timed[what]) for name, timed in passes.items()}
            for name, timing in dispatch(calls, rounds=rounds).items():
                found[name][what] = round(1e3 * timing.median_ms / IN_A_ROW, 1)
    return found


def _passes(provider: Provider, inputs: Inputs) -> dict[str, Callable[[], object]]:
    x = inputs.x.requires_grad_()
    return {
        "forward": lambda: provider.forward(x),
        "forward_backward": lambda: forward_backward(provider, x, inputs.g),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs=3, type=int, default=(512, 4096, 4096), metavar=("M", "N", "K"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, help="a JSON file to write what was measured to, too")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    # Memory that goes back to the system with each tensor would cost more than all the rest.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    case = Case(*options.shape, options.rank)
    with tempfile.TemporaryDirectory() as folder:
        load_null_driver(Path(folder))
        found = measure(case, options.rounds)
    print(f"{'us on the host, median':24} {'forward':>8} {'forward + backward':>19}")
    for name, us in found.items():
        print(f"{name:24} {us['forward']:8.0f} {us['forward_backward']:19.0f}")
    if options.output is not None:
        told = {"run": environment(torch.device("cpu")), "case": asdict(case), "rounds": options.rounds, "us": found}
        options.output.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
