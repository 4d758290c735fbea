"""What the launchers are called with: in CI every pair of values of any two axes, with FULL=1 every combination of those that
decide which code is compiled and which rows it meets."""

import itertools
import os

import pytest
import torch
from allpairspy import AllPairs

from allora_kernels.reference import NORMS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

AXES = {
    "arch": ["sm_80", "sm_90", "sm_100", "gfx942"],
    # Three multiprocessors: more tiles than programs, more segments than a program's one, sums that are not split.
    "few_sms": [False, True],
    # x's, the adapter's
    "dtypes": [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32)],
    # M, N, K, R: odd, aligned, a rank wider than a tile
    "shape": [(37, 53, 41, 3), (70, 64, 128, 16), (9, 45, 67, 136)],
    "norm": list(NORMS),
    "layout": ["rows", "columns", "apart"],
    # Rows of each sample: equal, one row each, ragged with empty ones, longer than a segment, none at all
    "lengths": [(23, 23, 24), (1,) * 9, (0, 1, 33, 0, 7, 2), (150, 0, 3), (0, 0)],
}

CROSSED = ("arch", "dtypes", "shape", "norm", "lengths")


def over(*names: str, **axes: list):
    """`pytest.mark.parametrize` over the `AXES` of these names and over `axes`."""
    axes = {name: AXES[name] for name in names} | axes
    found = every_combination(axes) if os.environ.get("FULL") == "1" else AllPairs(list(axes.values()))
    cases = [pytest.param(*values, id="-".join(map(_short, values))) for values in found]
    return pytest.mark.parametrize(list(axes), cases)


def every_combination(axes: dict[str, list]) -> list[list]:
    """Of the axes in `CROSSED`; the values of the others take turns."""
    crossed = {name: values for name, values in axes.items() if name in CROSSED}
    others = {name: values for name, values in axes.items() if name not in CROSSED}
    turns = itertools.cycle(itertools.product(*others.values()))
    found = [dict(zip((*crossed, *others), a + next(turns))) for a in itertools.product(*crossed.values())]
    return [[case[name] for name in axes] for case in found]


def _short(value) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_short, value))
    return str(value).removeprefix("torch.")


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """`t` with other strides."""
    if layout == "columns":
        return t.mT.contiguous().mT
    if layout == "apart":
        wide = torch.zeros(t.shape[0], 3 * t.shape[1] + 1, dtype=t.dtype, device=t.device)
        return wide[:, 1::3].copy_(t)
    return t


def down_project_in_order(x, a, dtype):
    """S as one multiply-add after another, which is how ttsem takes a dot: torch's order is kinder to a long fp32 sum."""
    s = torch.zeros(x.shape[0], a.shape[0])
    for column_x, column_a in zip(x.float().mT, a.float().mT):
        s = s.addcmul(column_x[:, None], column_a)
    return s.to(dtype)
