"""Several processes, and one list of checks that they run, so that starting them is paid for once."""

import faulthandler
import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version

SINCE_TORCH_2_13 = Version(torch.__version__).release >= (2, 13)
"""Whether torch is newer than 2.11, whose FSDP2 takes no integer parameters and whose compiler no DTensors of any length;
what lies between was not tried."""


def spawn(work, *args, nprocs: int) -> None:
    """Call `work(rank, *args)`, a function of a module, in `nprocs` processes and wait for them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of what one of them raised.
    """
    mp.spawn(_call, args=(work, *args), nprocs=nprocs)


def _call(rank: int, work, *args) -> None:
    faulthandler.enable()
    work(rank, *args)
    # Not through the interpreter's end: there a thread of gloo that lets go of a tensor aborts the process.
    os._exit(0)


def _work(rank: int, world: int, checks: dict, folder: Path) -> None:
    torch.set_num_threads(1)
    # Built for the interpreter now, as Triton was by whatever came first; checks of the kernels set the variable again.
    import quick_interpreter

    import csrc_triton  # noqa: F401

    quick_interpreter.install()
    del os.environ["TRITON_INTERPRET"]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    problems = {}
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(folder)
        except Exception:
            problems[name] = traceback.format_exc()
    torch.save(problems, folder / f"problems-{rank}")
    dist.destroy_process_group()


def run_checks(world: int, checks: dict, folder: Path) -> None:
    """Call each of `checks` (functions of a module, or `functools.partial`s of one) in `world` gloo processes, with a
    folder they share. Calls there take the eager backend until a check sets TRITON_INTERPRET.

    Raises:
        AssertionError: with the traceback of each check that failed in any of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spawn(_work, world, checks, folder, nprocs=world)
    problems = {}
    for rank in range(world):
        problems |= torch.load(folder / f"problems-{rank}")
    assert not problems, "\n".join(f"--- {name}\n{trace}" for name, trace in problems.items())
