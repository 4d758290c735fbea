"""Per-sample gradients of groups in plain torch: `reference`, group by group, and the eager backend.

Shapes as in `groups.reference`, rows sorted by group and, within one, by sample. A sample's gradients have one part for each
group. All of them read `samples.pieces` on the host.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .grouped import GroupSamples
from .reference import squared_norms, weighted_sum
from .samples import Samples

__all__ = ["sample_grads", "sample_squared_norms", "squared_norms", "weighted_grads", "weighted_sum"]


def _by_group(
    step: Callable,
    g: Tensor,
    x: Tensor | None,
    s: Tensor,
    lora_B: Tensor,
    c: Tensor | None,
    settings: tuple,
    samples: GroupSamples,
) -> list[tuple[Tensor | None, ...]]:
    """Each result of `step` (of `reference`), group by group. `settings`: its arguments from eta on."""
    found = []
    for e in range(lora_B.shape[0]):
        pieces = samples.pieces[e * samples.count : (e + 1) * samples.count + 1]
        rows = slice(*pieces[[0, -1]].tolist())
        own = (g[rows], None if x is None else x[rows], s[rows], lora_B[e], None if c is None else c[e])
        found.append(step(*own, *settings, Samples.ragged(pieces - pieces[0])))
    return list(zip(*found))


def _stacked(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    return None if parts[0] is None else torch.stack(parts, dim)


def _whole(parts: tuple[Tensor | None, ...], rows: int) -> Tensor | None:
    """dS of all rows, of which those after the groups are in none."""
    if parts[0] is None:
        return None
    done = torch.cat(parts)
    return torch.cat([done, done.new_zeros(rows - done.shape[0], done.shape[1])])


def sample_grads(g, x, s, lora_B, c, eta, norm, need_ds, need_da, need_db, samples):
    """``dS [M, R]``, and of each sample ``dA [b, E, R, K]`` and ``dB [b, E, N, R]``. Arguments as for
    `reference.sample_grads`, with groups in front of those of lora_B and c, and `GroupSamples`; also of the functions below."""
    settings = (eta, norm, need_ds, need_da, need_db)
    ds, da, db = _by_group(reference.sample_grads, g, x, s, lora_B, c, settings, samples)
    return _whole(ds, g.shape[0]), _stacked(da, 1), _stacked(db, 1)


def sample_squared_norms(g, x, s, lora_B, c, eta, norm, need_ds, dtype_a, dtype_b, samples):
    """dS; dA ``[E, R, K]`` and dB ``[E, N, R]`` as `grouped_adapter_grads` gives them; and the squared norm of each sample's
    gradient, all groups and both factors together ``[b]``."""
    settings = (eta, norm, need_ds, dtype_a, dtype_b)
    ds, da, db, squares = _by_group(reference.sample_squared_norms, g, x, s, lora_B, c, settings, samples)
    return _whole(ds, g.shape[0]), _stacked(da, 0), _stacked(db, 0), sum(squares)


def weighted_grads(g, x, s, lora_B, c, eta, norm, weights, dtype_a, dtype_b, samples):
    """dA and dB as `grouped_adapter_grads` gives them, the rows of each sample's G~ times its weight."""
    settings = (eta, norm, weights, dtype_a, dtype_b)
    da, db = _by_group(reference.weighted_grads, g, x, s, lora_B, c, settings, samples)
    return _stacked(da, 0), _stacked(db, 0)
