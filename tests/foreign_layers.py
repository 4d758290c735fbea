"""Layers of no library that we know, each with its own way of holding on to the tensors that it returns."""

import torch
import torch.nn.functional as F
from torch import nn

from allora_kernels import WrappedALLoRALinear
from allora_kernels.testing import make_inputs

M, N, K, R = 24, 13, 11, 3


class Foreign(nn.Module):
    """``x Wᵀ + bias`` for weight [N, K] and bias [N], computed and returned in x's dtype."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("frozen", weight.clone())
        self.register_buffer("offset", bias.clone())

    def forward(self, x):
        return F.linear(x, self.frozen.to(x.dtype), self.offset.to(x.dtype))


class ReturnsAView(Foreign):
    """Of a tensor that it keeps."""

    def forward(self, x):
        y = super().forward(x)
        self.kept = torch.cat([y, y], dim=-1)
        return self.kept[..., : self.out_features]


class NeedsItsOutput(Foreign):
    """Its backward pass reads what it returned, and no version counter watches over that."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.y, ctx.kept = y, 2 * y
            return ctx.kept

        @staticmethod
        def backward(ctx, g):
            return g * (ctx.kept / ctx.y)

    def forward(self, x):
        return self.Twice.apply(super().forward(x) / 2)


class SavesItsOutput(Foreign):
    """Its backward pass reads what it returned, as that of ``exp`` does."""

    def forward(self, x):
        return super().forward(x).exp()


class RowsAreNoView(Foreign):
    def forward(self, x):
        return super().forward(x).mT.contiguous().mT


class Expanded(Foreign):
    """The weight is zero, and all rows of y are one in memory; so are those of dX."""

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, row):
            ctx.shape = x.shape
            return row.expand(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx, g):
            return g.new_zeros(()).expand(ctx.shape), None

    def __init__(self, weight, bias):
        super().__init__(torch.zeros_like(weight), bias)

    def forward(self, x):
        return self.Constant.apply(x, self.offset.to(x.dtype))


class PassesOn(Foreign):
    """The weight is the identity: y is x itself, and dX is dY itself."""

    def __init__(self, weight, bias):
        super().__init__(torch.eye(len(weight)), torch.zeros_like(bias))

    def forward(self, x):
        return x


class GivesNoGradient(Foreign):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class ForgetsItsGradient(Foreign):
    """Its output requires grad, but its backward pass gives none."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    def forward(self, x):
        return self.Nothing.apply(super().forward(x))


def wrapped(base=Foreign, norm="row", dtypes=(torch.float32,) * 2, size=(M, N, K, R)):
    """(an adapted `base`, the inputs it was made from)"""
    inputs = make_inputs(*size, *dtypes)
    layer = WrappedALLoRALinear(base(inputs.weight, inputs.bias), R, 1.5, norm, adapter_dtype=dtypes[1])
    with torch.no_grad():
        layer.lora_A.copy_(inputs.lora_A)
        layer.lora_B.copy_(inputs.lora_B)
    return layer, inputs
