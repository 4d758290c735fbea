"""An adapter added to what another layer computes: ``y += S Bᵀ`` and ``dX += dS A``, in place.

The other layer stands between two nodes of the autograd graph. The later one adds to its output; its backward pass takes the
adapter's gradients and leaves dS for the earlier one, which adds to the gradient that the layer gives its input. So no tensor
of y's or x's size is made beside the layer's own, and its graph is autograd's to free, to checkpoint and to offload.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import backend as _backend
from .derivatives import break_graph_in_transform, once_differentiable, underivable
from .functional import adapter_gradients, as_exported, autocast_dtype, compute_dtype, no_autocast


class _Handover:
    """What the later node's backward pass leaves for the earlier one's: (graph task, backend, dS, lora_A)."""

    left: tuple[int, str, Tensor, Tensor] | None = None

    def take(self) -> tuple[str, Tensor, Tensor] | None:
        """(backend, dS, lora_A) of this backward pass; None where the later node is not part of it."""
        left, self.left = self.left, None
        return left[1:] if left is not None and left[0] == torch._C._current_graph_task_id() else None


def _rows_to_add_to(t: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """``(t [..., L] or a copy, its rows [-1, L])``, a copy where `t` is not the caller's `own` or its rows are not a view."""
    try:
        if own:
            return t, t.view(-1, t.shape[-1])
    except RuntimeError:
        pass
    t = t.clone(memory_format=torch.contiguous_format)
    return t, t.view(-1, t.shape[-1])


def _add_low_rank(backend: str, t: Tensor, own: bool, s: Tensor, b: Tensor) -> Tensor:
    """``t + S Bᵀ [..., L]``, in place where t is the caller's `own`."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # Under vmap S may be batched where t is not, which then could not be written to.
        return t + (s @ b.to(s.dtype).mT).to(t.dtype).view(t.shape)
    t, rows = _rows_to_add_to(t, own)
    _backend.steps(backend).low_rank_add(rows, s, b)
    return t


class _Input(torch.autograd.Function):
    """x as it is, for the layer; its backward pass adds ``dS A`` to the layer's dX."""

    @staticmethod
    def forward(ctx, x, handover, own):
        ctx.set_materialize_grads(False)
        ctx.settings = (handover, own)
        return x.detach()

    @staticmethod
    def backward(ctx, dx):
        handover, own = ctx.settings
        low_rank = handover.take()
        if dx is None:
            raise RuntimeError("the backward pass of the wrapped layer gave no gradient of its input")
        if low_rank is not None:
            backend, ds, lora_A = low_rank
            with torch.no_grad(), no_autocast(dx.device.type):
                dx = _add_low_rank(backend, dx, own, ds, lora_A.mT)
            if torch.is_grad_enabled():
                # dS and lora_A are copies, of what was differentiable.
                (dx,) = underivable((dx,), (dx.new_empty(0).requires_grad_(),))
        return dx, None, None


class _Add(torch.autograd.Function):
    """``y + S Bᵀ``, in place of `y` where it is `own`; S is an output only so that it can be saved.

    With a `handover` the gradient of x goes by way of the layer, else (under torch.compile and torch.func) it is returned here.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y, x, lora_A, lora_B, dtype, eta, norm, backend, sink, handover, own):
        # `dtype` is chosen with autocast in view.
        with no_autocast(y.device.type):
            s = _backend.steps(backend).down_project(x, lora_A, dtype)
            return _add_low_rank(backend, y.detach() if own else y, own, s, lora_B), s

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, lora_A, lora_B, dtype, eta, norm, backend, sink, handover, _ = inputs
        _, s = output
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lora_A, lora_B, x if needs_a else None, s if needs_a or needs_b else None)
        ctx.settings = (dtype, x.dtype, eta, norm, backend, sink, handover)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, g):
        with no_autocast(g.device.type):
            dx, da, db = _Add._gradients(ctx, saved, g.reshape(-1, g.shape[-1]))
        return g if ctx.needs_input_grad[0] else None, dx, da, db, *(None,) * 7

    @staticmethod
    def _gradients(ctx, saved, g):
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        lora_A, lora_B, x, s = saved
        dtype, x_dtype, eta, norm, backend, sink, handover = ctx.settings
        steps, need_ds = _backend.steps(backend), needs_x or handover is not None
        step = steps.adapter_grads if sink is None else functools.partial(sink, backend)
        needs = (need_ds, needs_a, needs_b)
        ds, da, db = adapter_gradients(steps, step, g, x, s, lora_A, lora_B, dtype, eta, norm, needs)
        dx = None
        if handover is not None:
            # A copy: an optimizer may step as soon as this node has given lora_A its gradient.
            handover.left = (torch._C._current_graph_task_id(), backend, ds, lora_A.clone())
        elif needs_x:
            dx = g.new_zeros(g.shape[0], lora_A.shape[1], dtype=x_dtype)
            dx = _add_low_rank(backend, dx, True, ds, lora_A.mT)
        return dx, da, db


def add_adapter(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    eta: float,
    norm: str | None,
    own: bool,
    sink: Callable | None = None,
) -> Tensor:
    """``layer(x) + (x Aᵀ) Bᵀ [..., N]`` in the dtype that `layer` returns, for x [..., K], lora_A [R, K] and lora_B [N, R];
    with ALLoRA's gradients of lora_A and lora_B, and for x the sum of the layer's own gradient and the adapter's.

    Args:
        own: whether nobody else holds what the layer returns, forward and backward, so that it can be written to. Else it is
            copied.
        sink: what takes the step `adapter_grads` over to see more of it.

    Raises:
        TypeError: the layer returns no floating-point tensor.
        ValueError: it returns another shape, or on another device.
        RuntimeError: x requires grad and the layer's output does not, so its gradient would be lost. From the backward pass:
            the layer gave no gradient of its input.
    """
    break_graph_in_transform()
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    wants_dx = torch.is_grad_enabled() and x.requires_grad and not transformed
    handover = _Handover() if wants_dx else None
    y = layer(_Input.apply(x, handover, own) if wants_dx else x)
    _check_output(y, x, lora_B, type(layer).__name__)
    if wants_dx and not y.requires_grad:
        raise RuntimeError(
            f"{type(layer).__name__} gave an output that does not require grad for an input that does, so the input's gradient "
            "would be lost: it has no backward pass in this mode, on this device or with these settings"
        )
    dtype = torch.promote_types(compute_dtype(x, lora_A, lora_B), y.dtype)
    choice = _backend.choose(x.device, dtype)
    if choice.fallback and not torch.compiler.is_compiling():
        _backend.warn_fallback(choice.reason)
    lora_A, lora_B = as_exported(lora_A, lora_B)
    rows = x if transformed else x.detach()
    if y.dtype == autocast_dtype(x.device.type, x.dtype):
        # As in nn.Linear. A layer that keeps to a wider dtype of its own under autocast has an adapter that does, too.
        dtype = y.dtype
        rows = rows.to(dtype)
    rows = rows.reshape(-1, rows.shape[-1])
    y, _ = _Add.apply(y, rows, lora_A, lora_B, dtype, eta, norm, choice.name, sink, handover, own and not transformed)
    return y


def _check_output(y: Tensor, x: Tensor, lora_B: Tensor, layer: str) -> None:
    shape = [*x.shape[:-1], lora_B.shape[0]]
    if not isinstance(y, Tensor) or not y.is_floating_point():
        found = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{layer} must return a floating-point Tensor, got {found}")
    if list(y.shape) != shape or y.device != x.device:
        raise ValueError(f"{layer} must return {shape} on {x.device}, got {list(y.shape)} on {y.device}")
