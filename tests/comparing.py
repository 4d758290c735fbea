"""What tests of the kernels share, with an interpreter, on a GPU and of the compiled IR: the inputs and the reference of a
backward pass, and results against it. `allora_kernels.testing` has what a benchmark needs of it, too."""

import itertools

import torch

from allora_kernels import reference
from allora_kernels.testing import assert_close

ETA = 1.3


def doubles(*tensors):
    """The tensors in float64, whole numbers and None as they are."""
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in tensors)


def assert_all_close(names, ours, eager, exact, close=assert_close):
    """`assert_close` of each of the results, by its name: ``"y dx da db"``."""
    for name, *values in zip(names.split(), ours, eager, exact, strict=True):
        close(*values, name)


def backward_arguments(inputs, norm):
    """(g, x, s, lora_B, c) of `adapter_grads`."""
    s = reference.down_project(inputs.x, inputs.lora_A, torch.promote_types(inputs.x.dtype, inputs.lora_A.dtype))
    c = None
    if norm in reference.WEIGHT_NORMS:
        c = reference.weight_coefficient(inputs.lora_A, inputs.lora_B, ETA, norm)
    return inputs.g, inputs.x, s, inputs.lora_B, c


def sample_by_sample(tensors, cuts, norm, dtype):
    """(dA [b, R, K], dB [b, N, R]): `reference.adapter_grads` of the rows from each of the b + 1 `cuts` to the next."""
    g, x, s, b, c = tensors
    da = torch.zeros(len(cuts) - 1, s.shape[1], x.shape[1], dtype=dtype, device=g.device)
    db = torch.zeros(len(cuts) - 1, *b.shape, dtype=dtype, device=g.device)
    for i, pair in enumerate(itertools.pairwise(cuts)):
        rows = slice(*pair)
        _, da[i], db[i] = reference.adapter_grads(g[rows], x[rows], s[rows], b, c, ETA, norm, False, dtype, dtype)
    return da, db


def group_by_group(tensors, pieces, samples, norm, dtype):
    """(dA [b, E, R, K], dB [b, E, N, R]): `sample_by_sample` of each group, whose b `samples` lie between its `pieces`."""
    g, x, s, b, c = tensors
    grads = []
    for e in range(len(b)):
        cuts = pieces[e * samples : (e + 1) * samples + 1].tolist()
        own = (g, x, s, b[e], None if c is None else c[e])
        grads.append(sample_by_sample(own, cuts, norm, dtype))
    return tuple(torch.stack(parts, 1) for parts in zip(*grads))
