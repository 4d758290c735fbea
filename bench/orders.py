"""Orders of operations, written here to be compared with: LoRA in two that known fused implementations take, ALLoRA in two
of plain torch.

The first two are plain LoRA (C = 1): they do less than `ours`. S is saved and dS computed once in both, which not every
implementation does.
"""

import torch
import torch.nn.functional as F

from allora_kernels import reference

ETA = 2.0
"""η of every provider that trains by ALLoRA."""


class AddmmInPlace(torch.autograd.Function):
    """The vendor's GEMM, then the rank-R product added to y, and to dX, in place: each is read and written once more."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B):
        y = F.linear(x, weight, bias)
        s = x.to(lora_A.dtype) @ lora_A.T
        y.addmm_(s.to(y.dtype), lora_B.T.to(y.dtype))
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        return y

    @staticmethod
    def backward(ctx, g):
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        wide = g.to(lora_B.dtype)
        ds = wide @ lora_B
        dx = g @ weight
        dx.addmm_(ds.to(dx.dtype), lora_A.to(dx.dtype))
        return dx, None, None, ds.T @ x.to(ds.dtype), wide.T @ s


class EpilogueAtomics(torch.autograd.Function):
    """The rank-R product in the epilogue of the GEMMs for y and dX; dS, dB and dA by fp32 atomics."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B):
        import csrc_triton

        s = x.to(lora_A.dtype) @ lora_A.T
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        return csrc_triton.fused_linear(x, weight, bias, s, lora_B, _epilogue_plan(x, weight, s))

    @staticmethod
    def backward(ctx, g):
        import csrc_triton

        from .atomics import adapter_grads

        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        ds, da, db = adapter_grads(g, x, s, lora_B)
        dx = csrc_triton.fused_linear(g, weight.mT, None, ds, lora_A.mT, _epilogue_plan(g, weight.mT, ds))
        return dx, None, None, da.to(lora_A.dtype), db.to(lora_B.dtype)


def _epilogue_plan(x, weight, s):
    """The plan that `fused_linear` would choose, were the vendor's GEMM none."""
    from csrc_triton import configs, describable, plans

    call = plans.Call("fused_linear", len(x), *weight.shape, s.shape[1], x.dtype, s.dtype)
    arch = configs.arch_of(x.device)
    fused = [plan for plan in plans.options(call, arch, describable(x, weight)) if plan.way != "vendor"]
    return min(fused, key=lambda plan: plans.estimate(call, plan, arch))


class EagerALLoRA(torch.autograd.Function):
    """ALLoRA by rule "row" as the paper writes it: BA is made in fp32 for its norms, and all of G is scaled."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B):
        s = x.to(lora_A.dtype) @ lora_A.T
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        return F.linear(x, weight, bias) + (s @ lora_B.T).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        c = reference.coefficient((lora_B.float() @ lora_A.float()).norm(dim=1), ETA)
        wide = g.to(lora_A.dtype)
        scaled = (c * wide).to(wide.dtype)
        dx = g @ weight + (wide @ lora_B @ lora_A).to(x.dtype)
        return dx, None, None, (scaled @ lora_B).T @ x.to(wide.dtype), scaled.T @ s


class GramALLoRA(torch.autograd.Function):
    """ALLoRA in the order of this library's own reference: norms by A's Gram matrix, and C on rows of B and of dB, not on G."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B):
        y, s = reference.adapted_linear(x, weight, bias, lora_A, lora_B, lora_A.dtype)
        ctx.save_for_backward(x, s, weight, lora_A, lora_B)
        return y

    @staticmethod
    def backward(ctx, g):
        x, s, weight, lora_A, lora_B = ctx.saved_tensors
        dx, da, db = reference.layer_grads(g, x, s, weight, lora_A, lora_B, ETA, "row")
        return dx, None, None, da, db
