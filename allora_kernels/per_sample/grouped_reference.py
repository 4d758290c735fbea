"""Per-sample gradients of groups in plain torch: `reference`, group by group, and the eager backend.

Shapes as in `groups.reference`, rows sorted by group and, within one, by sample. A sample's gradients have one part for each
group. All of them read `samples.pieces` on the host.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .grouped import GroupSamples
from .reference import squared_norms, weighted_sum
from .samples import Samples

__all__ = ["sample_grads", "sample_squared_norms", "squared_norms", "weighted_grads", "weighted_sum"]


def _groups(
    g: Tensor, x: Tensor | None, s: Tensor, lora_B: Tensor, c: Tensor | None, samples: GroupSamples
) -> Iterator[tuple[tuple, Samples]]:
    """(g, x, s, lora_B and c, the samples) of every group."""
    for e in range(lora_B.shape[0]):
        pieces = samples.pieces[e * samples.count : (e + 1) * samples.count + 1]
        start, stop = pieces[[0, -1]].tolist()
        rows = slice(start, stop)
        own = (g[rows], None if x is None else x[rows], s[rows], lora_B[e], None if c is None else c[e])
        yield own, Samples.ragged(pieces - start)


def _whole(parts: tuple[Tensor | None, ...], rows: Tensor) -> Tensor | None:
    """dS of all rows, of which those after the groups are in none."""
    if parts[0] is None:
        return None
    done = torch.cat(parts)
    return torch.cat([done, done.new_zeros(rows.shape[0] - done.shape[0], done.shape[1])])


def _stacked(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts, dim)


def sample_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    need_da: bool,
    need_db: bool,
    samples: GroupSamples,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dS [M, R]`` in S's dtype, and of each sample ``dA [b, E, R, K]`` and ``dB [b, E, N, R]`` in fp32 or better; None where
    not needed."""
    needs = (need_ds, need_da, need_db)
    found = [
        reference.sample_grads(*own, eta, norm, *needs, part) for own, part in _groups(g, x, s, lora_B, c, samples)
    ]
    ds, da, db = zip(*found)
    return _whole(ds, s), _stacked(da, 1), _stacked(db, 1)


def sample_squared_norms(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    need_ds: bool,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    samples: GroupSamples,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dS; dA ``[E, R, K]`` and dB ``[E, N, R]`` as `grouped_adapter_grads` gives them; and the squared norm of each sample's
    gradient, all groups and the two together ``[b]``, in fp32 or better. None for what is not needed."""
    needs = (need_ds, dtype_a, dtype_b)
    found = [
        reference.sample_squared_norms(*own, eta, norm, *needs, part)
        for own, part in _groups(g, x, s, lora_B, c, samples)
    ]
    ds, da, db, squares = zip(*found)
    return _whole(ds, s), _stacked(da, 0), _stacked(db, 0), sum(squares)


def weighted_grads(
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    eta: float,
    norm: str | None,
    weights: Tensor,
    dtype_a: torch.dtype | None,
    dtype_b: torch.dtype | None,
    samples: GroupSamples,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB as `grouped_adapter_grads` gives them, the rows of each sample's G~ times its ``weights [b]``; None where not
    needed."""
    found = [
        reference.weighted_grads(*own, eta, norm, weights, dtype_a, dtype_b, part)
        for own, part in _groups(g, x, s, lora_B, c, samples)
    ]
    da, db = zip(*found)
    return _stacked(da, 0), _stacked(db, 0)
