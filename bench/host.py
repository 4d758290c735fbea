"""``python -m bench.host``: what one layer's step costs the host, without a GPU.

The layer runs on CPU tensors as it would on an H100: its kernels are compiled for one, and Triton launches them by a CUDA
driver that does nothing (`null_driver.c`, which a C compiler builds). What is measured is Python, torch's dispatcher, autograd
and Triton's launcher on this machine's CPU; what the driver, CUDA's allocator and autograd's thread for the GPU cost is
missing. PEFT's layer and the frozen one stand beside it, whose torch ops run on as good as empty tensors.
"""

import argparse
import contextlib
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

ARCH, NUM_SMS = "sm_90", 132
RANK = 16
WARM_UP, IN_A_ROW = 5, 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class _AnyDevice:
    """The current device, whichever is asked about."""

    def __eq__(self, other: object) -> bool:
        return True


def load_null_driver(folder: Path) -> None:
    """Build the driver in `folder`; what looks for the CUDA driver in this process finds it."""
    from triton import knobs

    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("null_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    # What is loaded is found again by its name.
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """CPU tensors are taken for an H100's, and kernels are launched by the driver that is loaded."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    import csrc_triton
    from allora_kernels.layer import backend, ops
    from csrc_triton import configs, launching

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    names = [
        name
        for name in vars(ops)
        if hasattr(csrc_triton, name) and isinstance(getattr(ops, name), torch._ops.OpOverload)
    ]
    library, aten = torch.library.Library("allora", "IMPL"), torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            launcher = torch.compiler.disable(csrc_triton.replayed(getattr(csrc_triton, name)))
            library.impl(name, launcher, "CPU", allow_override=True)
        # The vendor's GEMM: queued in no time.
        aten.impl("addmm_", lambda y, *_, **__: y, "CPU", allow_override=True)
    choice = backend.Choice("triton", "a pretended GPU")
    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver()),
        mock.patch.object(torch.cuda, "current_device", _AnyDevice),
        mock.patch.object(launching, "_is_compiled", lambda kernel, device: True),
        mock.patch.object(configs, "arch_of", lambda device: ARCH),
        mock.patch.object(configs, "num_sms", lambda device: NUM_SMS),
        mock.patch.object(configs, "can_overlap", lambda device: True),
        mock.patch.object(backend, "choose", lambda *_: choice),
    ):
        yield
    library._destroy()
    aten._destroy()


@contextlib.contextmanager
def no_replay() -> Iterator[None]:
    """No call is replayed, and none is recorded."""
    from csrc_triton import replay

    class Unrecordable(dict):
        def get(self, *_) -> int:
            return replay._NEVER

    with mock.patch.object(replay, "_kinds", Unrecordable()):
        yield


class Timed(NamedTuple):
    """A call that is timed, within a context of its own."""

    call: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def medians(calls: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """us of each call: the median over rounds, in which each is called some times in a row, as a model's layers are. What slows
    this machine down for a while slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + rounds):
        for name, (call, context) in calls.items():
            with context():
                start = time.perf_counter()
                for _ in range(IN_A_ROW):
                    call()
                times[name].append((time.perf_counter() - start) / IN_A_ROW)
    return {name: statistics.median(found[WARM_UP:]) * 1e6 for name, found in times.items()}


def forward_and_step(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward pass; a forward and backward pass, of which no gradient is left."""
    x = x.clone().requires_grad_()

    def step() -> None:
        layer(x).backward(g)
        x.grad = None
        for p in layer.parameters():
            p.grad = None

    return lambda: layer(x), step


def ours(rows: int, out_features: int, in_features: int, rank: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer in bf16, x and g."""
    from allora_kernels import FusedALLoRALinear

    bf16 = torch.bfloat16
    linear = nn.Linear(in_features, out_features, bias=False, dtype=bf16)
    return (
        FusedALLoRALinear.from_linear(linear, r=rank),
        torch.empty(rows, in_features, dtype=bf16),
        torch.empty(rows, out_features, dtype=bf16),
    )


def as_good_as_empty(peft: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The frozen layer, or PEFT's LoRA on it, of eight features in bf16, x and g."""
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    if peft:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        layer = get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).base_model.model[0]
        layer = layer.to(torch.bfloat16)
    x = torch.zeros(8, 8, dtype=torch.bfloat16)
    return layer, x, x.clone()


def measure(rows: int, out_features: int, in_features: int, rank: int, rounds: int) -> dict[str, tuple[float, float]]:
    """us of a forward pass and of a step, by name; in a process that has loaded the null driver."""
    frozen, peft = (forward_and_step(*as_good_as_empty(peft)) for peft in (False, True))
    allora = forward_and_step(*ours(rows, out_features, in_features, rank))
    with pretended_gpu():
        found = [
            medians(
                {
                    "frozen layer": Timed(frozen[i]),
                    "peft": Timed(peft[i]),
                    "allora": Timed(allora[i]),
                    "allora, no call replayed": Timed(allora[i], no_replay),
                },
                rounds,
            )
            for i in (0, 1)
        ]
    return {name: (found[0][name], found[1][name]) for name in found[0]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs=3, type=int, default=(512, 4096, 4096), metavar=("M", "N", "K"))
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    # Memory that goes back to the system with each tensor would cost more than all the rest.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    with tempfile.TemporaryDirectory() as folder:
        load_null_driver(Path(folder))
        print(f"{'us on the host, median':28} {'forward':>8} {'forward + backward':>19}")
        for name, (forward, step) in measure(*options.shape, options.rank, options.rounds).items():
            print(f"{name:28} {forward:8.0f} {step:19.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
