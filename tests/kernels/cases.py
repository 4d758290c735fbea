"""The shapes, dtypes and layouts every kernel is tested on."""

import pytest
import torch

SHAPES = [
    # M, N, K, R: nothing is a multiple of a tile, some are smaller than one, one is empty
    (0, 41, 53, 3),
    (1, 1, 1, 1),
    (1, 257, 41, 40),
    (37, 53, 41, 3),
    (37, 1, 257, 16),
    (130, 41, 1, 40),
    (130, 41, 53, 1),
    (130, 257, 53, 40),
    (37, 257, 257, 16),
    # K and N are multiples of every tile: the loops without a mask
    (70, 64, 128, 16),
]
WIDE_RANK = (70, 45, 67, 200)

# x's dtype, the adapter's
DTYPES = [
    pytest.param((torch.float32, torch.float32), id="fp32"),
    pytest.param((torch.float16, torch.float16), id="fp16"),
    pytest.param((torch.bfloat16, torch.bfloat16), id="bf16"),
    pytest.param((torch.bfloat16, torch.float32), id="bf16-fp32"),
    pytest.param((torch.float16, torch.float32), id="fp16-fp32"),
]


def _columns_apart(t):
    wide = torch.zeros(t.shape[0], 3 * t.shape[1] + 1, dtype=t.dtype, device=t.device)
    view = wide[:, 1::3]
    return view.copy_(t)


LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "columns": lambda t: t.mT.contiguous().mT,
    "apart": _columns_apart,
}


def shape_id(shape):
    return "x".join(map(str, shape))


shapes = pytest.mark.parametrize("shape", [*SHAPES, WIDE_RANK], ids=shape_id)
dtypes = pytest.mark.parametrize("dtypes", DTYPES)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
