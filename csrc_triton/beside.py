"""Whether a pass over rows finds room beside the persistent GEMM that waits for what it writes, and how the GEMM waits.

The pass is launched first, one small program to a multiprocessor, and the GEMM right behind it. If two of its programs stood on
one, the GEMM would be held off there until one has ended. So of many rows the pass works in rounds, and the GEMM, which begins
with the first rows, waits for the round that has its tile's.
"""

from typing import NamedTuple

import torch

from . import configs, plans
from .chain import Counted, counts
from .configs import Config


class Beside(NamedTuple):
    """The pass's configuration, in how many rounds it works, and how its programs are counted, if they are."""

    config: Config
    rounds: int
    counted: Counted | None

    @property
    def awaited(self) -> Counted | None:
        """By what the GEMM waits for a round; None where there is one, and it waits for the kernel in front."""
        return self.counted if self.rounds > 1 else None


def room(
    plan: plans.Plan,
    M: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    low_rank_dtype: torch.dtype,
    device: torch.device,
    products: int = 1,
) -> Beside | None:
    """How a pass over M rows of K elements for R sums each, or for two `products`, runs beside the GEMM of `plan`, uncounted;
    None where it does not."""
    if plan.way not in plans.PERSISTENT or not configs.can_overlap(device):
        return None
    arch = configs.arch_of(device)
    config = configs.beside(K, R, dtype, arch, low_rank_dtype, products)
    if config is None:
        return None
    # Now, as a later call that needs them may be captured.
    counts(device)
    rounds = plans.rounds_beside(plan.way, M, config.BLOCK_M, arch)
    return Beside(config, rounds, None) if rounds else None


def counted(beside: Beside | None, device: torch.device) -> Beside | None:
    """`beside`, its programs counted; None where there is nothing to count on."""
    under_way = None if beside is None else counts(device)
    if under_way is None:
        return None
    rows = configs.num_sms(device) * beside.config.BLOCK_M
    return beside._replace(counted=Counted(under_way, beside.rounds, rows))
