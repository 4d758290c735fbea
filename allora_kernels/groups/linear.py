"""`grouped_linear`: one call for rows in groups, each with a frozen weight and an adapter of its own."""

from types import ModuleType

import torch
from torch import Tensor

from ..layer import functional
from . import reference
from .packing import check_indices


class GroupedSteps:
    """The steps of one backend with the groups' ends filled in: `reference`'s functions by name."""

    def __init__(self, backend: str, ends: Tensor) -> None:
        self.backend, self._steps, self._ends = backend, steps_of(backend), ends
        self.weight_coefficient = self._steps.weight_coefficient

    def adapted_linear(self, x, weight, bias, lora_A, lora_B, dtype):
        s = self.down_project(x, lora_A, dtype)
        return self.fused_linear(x, weight, bias, s, lora_B), s

    def down_project(self, x, lora_A, dtype):
        return self._steps.grouped_down_project(x, lora_A, self._ends, dtype)

    def fused_linear(self, x, weight, bias, s, lora_B):
        return self._steps.grouped_fused_linear(x, weight, bias, s, lora_B, self._ends)

    def adapter_grads(self, g, x, s, lora_B, c, *settings):
        return self._steps.grouped_adapter_grads(g, x, s, lora_B, c, self._ends, *settings)


def steps_of(backend: str) -> ModuleType:
    """The module whose functions are the steps of groups on a backend: `reference`, or the ops (loaded on first use)."""
    if backend == "eager":
        return reference
    from . import ops

    return ops


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, offsets: Tensor) -> None:
    named = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "offsets": offsets}
    for name, t in named.items():
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move them to one device")
        if name != "offsets" and not t.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {t.dtype}")
    check_indices("offsets", offsets)
    if x.dim() != 2 or weight.dim() != 3 or lora_A.dim() != 3 or lora_B.dim() != 3 or offsets.dim() != 1:
        raise ValueError(
            "x must be [M, K], weight [E, N, K], lora_A [E, R, K], lora_B [E, N, R] and offsets [E]; got x "
            f"{list(x.shape)}, weight {list(weight.shape)}, lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)} and "
            f"offsets {list(offsets.shape)}"
        )
    groups, n, k = weight.shape
    r = lora_A.shape[1]
    if min(groups, n, k) < 1:
        raise ValueError(f"weight must have at least one group, row and column, got {[groups, n, k]}")
    expected = {"lora_A": (groups, r, k), "lora_B": (groups, n, r), "offsets": (groups,), "bias": (groups, n)}
    for name, shape in expected.items():
        if named[name] is not None and tuple(named[name].shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for weight {[groups, n, k]}, got {list(named[name].shape)}")
    if x.shape[1] != k:
        raise ValueError(f"x must be [M, K] with K = {k} as in weight {[groups, n, k]}, got {list(x.shape)}")
    if torch.is_grad_enabled():
        for name in ("weight", "bias"):
            if named[name] is not None and named[name].requires_grad:
                raise ValueError(f"{name} is frozen in ALLoRA and gets no gradient: call {name}.requires_grad_(False)")


def _ends(offsets: Tensor, rows: int) -> Tensor:
    """A copy of `offsets` in int32 that nothing changes before the backward pass; checked, on a GPU without waiting for it."""
    ends = offsets.detach().to(torch.int32, copy=True).contiguous()
    in_order = (ends.diff() >= 0).all() & (ends[0] >= 0) & (ends[-1] <= rows)
    if torch.compiler.is_compiling() or ends.device.type != "cpu":
        torch._assert_async(in_order, "grouped_linear: offsets must not be negative, fall, nor pass the rows of x")
    elif not in_order:
        raise ValueError(
            f"offsets are where each group ends: from 0 to the {rows} rows of x, none less than the one before; got "
            f"{offsets.tolist()}"
        )
    return ends


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    *,
    eta: float = 2.0,
    norm: str | None = "row",
    backend: str | None = None,
) -> Tensor:
    """`allora_linear` of every group of rows with the group's own weight and adapter, as for the experts of a mixture.

    ``y[m] = x[m] W_eᵀ + bias_e + (x[m] A_eᵀ) B_eᵀ`` for the rows m of group e, which are those from ``offsets[e - 1]`` (0 for
    the first) to ``offsets[e]``. The gradients of lora_A and lora_B are ALLoRA's, group by group; a group without rows gets
    zeros. Rows after the last end belong to no group: their y is zero and nothing gets a gradient from them.

    Args:
        x: ``[M, K]``, sorted by group, the weight's dtype (under autocast: any).
        weight: ``[E, N, K]`` of any strides, so also a transposed ``[E, K, N]``; frozen.
        bias: ``[E, N]`` or None, frozen.
        lora_A: ``[E, R, K]``, 1 <= R <= 256, any floating dtype.
        lora_B: ``[E, N, R]``, any floating dtype.
        offsets: ``[E]``, int32 or int64, where each group ends, as `torch._grouped_mm` has them. The kernels read them on the
            device.
        eta: as for `allora_linear`.
        norm: as for `allora_linear`.
        backend: as for `allora_linear`. ``"eager"`` reads the offsets on the host.

    Returns:
        ``[M, N]`` in x's dtype.

    Raises:
        ValueError: shapes that do not fit, offsets that fall or pass M (compiled: RuntimeError; on a GPU: a device assertion,
            later), and what `allora_linear` raises it for.
        RuntimeError: `use_batch_invariant` is on and the backend is eager.
        TypeError: something that is no tensor of the dtype due.
    """
    return apply(x, weight, bias, lora_A, lora_B, offsets, eta, norm, backend)


def apply(x, weight, bias, lora_A, lora_B, offsets, eta, norm, backend=None, sink=None) -> Tensor:
    """`grouped_linear`, and what takes the step `adapter_grads` over to see more of it."""
    _check(x, weight, bias, lora_A, lora_B, offsets)
    functional.check_rule(lora_A.shape[1], eta, norm)
    widest = functional.compute_dtype(x, lora_A, lora_B)
    x, weight, bias, dtype = functional.in_one_dtype(x, weight, bias, lora_A, lora_B)
    name = functional.choose_backend(x, widest, backend)
    steps = GroupedSteps(name, _ends(offsets, x.shape[0]))
    return functional.apply_function(x, weight, bias, lora_A, lora_B, dtype, eta, norm, steps, sink)
