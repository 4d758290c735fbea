"""`multi_adapter_linear`: one frozen weight, and for every row the adapter that it names."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer import functional
from ..layer.backend import steps as steps_of_a_layer
from ..layer.dequantizing import PackedWeight
from ..layer.derivatives import break_graph_in_transform, once_differentiable
from ..reference import WEIGHT_NORMS
from .linear import steps_of
from .packing import Layout, Rule, check_indices


class Adapter(NamedTuple):
    """``lora_A [R, K]`` and ``lora_B [N, R]`` of any floating dtype, and the rule they train under (see `allora_linear`)."""

    lora_A: Tensor
    lora_B: Tensor
    eta: float = 2.0
    norm: str | None = "row"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise ValueError("adapters is empty: give at least one Adapter, or call torch.nn.functional.linear")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Adapter):
            raise TypeError(f"adapters[{i}] must be an allora_kernels.Adapter, got {type(adapter).__name__}")
        try:
            functional.check_tensors(x, weight, bias, adapter.lora_A, adapter.lora_B)
            functional.check_rule(adapter.lora_A.shape[0], adapter.eta, adapter.norm)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapters[{i}]: {error}") from None


def _check_row_adapter(x: Tensor, row_adapter: Tensor, count: int) -> None:
    """The values on a GPU without waiting for it."""
    if row_adapter.device != x.device:
        raise ValueError(f"row_adapter is on {row_adapter.device} but x is on {x.device}; move them to one device")
    if row_adapter.shape != x.shape[:-1]:
        raise ValueError(
            f"row_adapter must be {list(x.shape[:-1])}, a number for each row of x {list(x.shape)}, got "
            f"{list(row_adapter.shape)}"
        )
    in_range = ((row_adapter >= -1) & (row_adapter < count)).all()
    if torch.compiler.is_compiling() or row_adapter.device.type != "cpu":
        torch._assert_async(
            in_range, "multi_adapter_linear: row_adapter must be from -1 to the number of adapters less one"
        )
    elif not in_range:
        raise ValueError(
            f"row_adapter must be from 0 to {count - 1} for {count} adapters, or -1 for none; got values from "
            f"{int(row_adapter.min())} to {int(row_adapter.max())}"
        )


class _MultiAdapterLinear(torch.autograd.Function):
    """``y[m] = x[m] Wᵀ + bias + S[m] B_eᵀ``. Saves x, S and the parameters themselves, and packs them again in the backward
    pass; S is an output only so that it can be saved. Differentiable once, as `allora_linear`. W is a Tensor, or a
    `PackedWeight` that is made dense once for each pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, order, ends, dtype, layout, backend, shares, *factors):
        steps = steps_of(backend)
        a, b = layout.pack(factors[::2], factors[1::2])
        s = steps.grouped_down_project(x, a, ends, dtype, order)
        dense = weight if isinstance(weight, Tensor) else weight.dense()
        return steps.grouped_fused_linear(x, dense, bias, s, b, ends, order), s

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, order, ends, dtype, layout, backend, shares, *factors = inputs
        _, s = output
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[9:]
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        x, s = x if any(needs[::2]) else None, s if any(needs) else None
        weight, packed = (weight, None) if isinstance(weight, Tensor) else (None, weight)
        ctx.save_for_backward(weight if needs_x else None, x, s, order, ends, *factors)
        ctx.settings = (dtype, layout, backend, shares, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, g):
        with functional.no_autocast(g.device.type):
            dx, grads = _gradients(ctx, saved, g)
        return dx, *(None,) * 8, *grads


def _gradients(ctx, saved: tuple[Tensor | None, ...], g: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """dX, and dA and dB of each adapter in turn, as far as they are needed."""
    weight, x, s, order, ends, *factors = saved
    dtype, layout, backend, shares, packed = ctx.settings
    needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[9:]
    steps = steps_of(backend)
    a, b = layout.pack(factors[::2], factors[1::2])
    ds, grads = None, [None] * len(factors)
    if shares is not None and any(needs):
        ds, grads = _adapter_by_adapter(backend, layout, shares, g, x, s, order, factors, dtype, needs_x, needs)
    elif any(needs):
        ds, grads = _rule_by_rule(backend, layout, g, x, s, order, ends, a, b, factors, needs_x, needs)
    if not needs_x:
        return None, grads
    if ds is None:
        ds = steps.grouped_down_project(g, b.mT, ends, dtype, order)
    if packed is not None:
        weight = packed.dense()
    return steps.grouped_fused_linear(g, weight.mT, None, ds, a.mT, ends, order), grads


def _rule_by_rule(
    backend, layout, g, x, s, order, ends, a, b, factors, needs_x, needs
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dS where one sweep gives it and it is needed, and each factor's gradient."""
    steps, found, ds = steps_of(backend), [], None
    dtypes = tuple(layout.dtype if any(part) else None for part in (needs[::2], needs[1::2]))
    alone = len(layout.rules) == 1
    for rule in layout.rules:
        rows = (order, ends, s) if alone else _rows_of(rule, order, ends, s)
        own_order, own_ends, own_s = rows
        own = slice(rule.start, rule.stop)
        # In the eager backend's doubles, too, η is what was asked for.
        table = rule.inv_etas_squared(g.device, torch.float64 if backend == "eager" else torch.float32)
        args = (rule.etas[0], rule.norm)
        c = steps.weight_coefficient(a[own], b[own], *args, table) if rule.norm in WEIGHT_NORMS else None
        grads = steps.grouped_adapter_grads(
            g, x, own_s, b[own], c, own_ends, *args, needs_x and alone, *dtypes, own_order, table
        )
        ds = grads[0] if alone and needs_x else None
        found.append(grads[1:])
    return ds, _unpacked(layout, found, factors, needs)


def _adapter_by_adapter(
    backend, layout, shares, g, x, s, order, factors, dtype, needs_x, needs
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dS and each factor's gradient by the steps of a single layer, the last of which is the adapter's share's own."""
    steps, start = steps_of_a_layer(backend), 0
    ds = s.new_zeros(s.shape) if needs_x else None
    grads: list[Tensor | None] = [None] * len(factors)
    for e in sorted(range(len(shares)), key=layout.slots.__getitem__):
        share, r = shares[e], layout.ranks[e]
        places = slice(start, start + share.samples.rows)
        rows, start = order[places], places.stop
        x_e = None if x is None else x[rows]
        both = slice(2 * e, 2 * e + 2)
        found = functional.adapter_gradients(
            steps,
            functools.partial(share, backend),
            *(g[rows], x_e, s[places, :r], *factors[both], dtype, *layout.rule_of(e)),
            (needs_x, *needs[both]),
        )
        if needs_x:
            ds[places, :r] = found[0]
        grads[both] = found[1:]
    return ds, grads


def _rows_of(rule: Rule, order: Tensor, ends: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `ends` and s with the rows of this rule first and all others in no group."""
    before = ends[rule.start - 1] if rule.start else torch.zeros_like(ends[0])
    places = (torch.arange(len(order), device=order.device) + before) % max(len(order), 1)
    return order[places], ends[rule.start : rule.stop] - before, s[places]


def _unpacked(layout: Layout, found: list, factors: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Each factor's gradient in its own dtype out of those of every rule's groups."""
    where = {}
    for rule, pair in zip(layout.rules, found):
        where |= {slot: (pair, slot - rule.start) for slot in range(rule.start, rule.stop)}
    grads: list[Tensor | None] = []
    for i, (factor, needed) in enumerate(zip(factors, needs)):
        if not needed:
            grads.append(None)
            continue
        (da, db), group = where[layout.slots[i // 2]]
        r = layout.ranks[i // 2]
        grads.append((db[group, :, :r] if i % 2 else da[group, :r]).to(factor.dtype))
    return grads


def multi_adapter_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    row_adapter: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """`allora_linear` of every row with the adapter that the row names, for several adapters trained in one batch.

    ``y[m] = x[m] Wᵀ + bias + (x[m] A_eᵀ) B_eᵀ`` with ``e = row_adapter[m]``; a row of -1 has no adapter, and is what the frozen
    layer computes. Each adapter gets the gradients that its own rows alone would give it, under its own rule; an adapter
    without rows gets zeros.

    Args:
        x: ``[..., K]``, the weight's dtype (under autocast: any).
        weight: ``[N, K]``, frozen.
        bias: ``[N]`` or None, frozen.
        adapters: one `Adapter` or more; ranks, etas, rules and dtypes may differ.
        row_adapter: ``[...]`` as x, int32 or int64: the number of each row's adapter, -1 for none; in any order. The kernels
            read it on the device.
        backend: as for `allora_linear`. ``"eager"`` reads `row_adapter` on the host.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: no adapters, a number in `row_adapter` that names none (compiled: RuntimeError; on a GPU: a device
            assertion, later), and for each adapter what `allora_linear` raises it for.
        RuntimeError: `use_batch_invariant` is on and the backend is eager.
        TypeError: something that is no tensor of the dtype due, or no `Adapter`.
    """
    if not isinstance(row_adapter, Tensor):
        raise TypeError(f"row_adapter must be a Tensor, got {type(row_adapter).__name__}")
    check_indices("row_adapter", row_adapter)

    def rows_of(layout: Layout) -> tuple[Tensor, Tensor]:
        _check_row_adapter(x, row_adapter, len(adapters))
        return layout.rows(row_adapter.reshape(-1))

    return apply(x, weight, bias, adapters, rows_of, backend)


def apply(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    rows_of: Callable[[Layout], tuple[Tensor, Tensor]],
    backend: str | None = None,
    shares: Sequence[Callable] | None = None,
) -> Tensor:
    """`multi_adapter_linear` of x with the rows of each adapter where `rows_of` says, as `Layout.rows` does; and, where their
    gradients are recorded, the `shares` of all adapters: each takes the step `adapter_grads` over and has `samples.rows`."""
    _check(x, weight if isinstance(weight, Tensor) else weight.stand_in(), bias, adapters)
    factors = [t for adapter in adapters for t in (adapter.lora_A, adapter.lora_B)]
    layout = Layout.of(adapters)
    as_one = x.new_empty(0, dtype=layout.dtype)
    widest = functional.compute_dtype(x, as_one, as_one)
    rows, weight, bias, dtype = functional.in_one_dtype(x, weight, bias, as_one, as_one)
    name = functional.choose_backend(x, widest, backend)
    order, ends = rows_of(layout)
    rows = rows.reshape(-1, x.shape[-1])
    break_graph_in_transform()
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *factors))
    # Without a gradient torch.compile hands `apply`'s arguments on shifted by one.
    run = _MultiAdapterLinear.apply if trains else _MultiAdapterLinear.forward
    y, _ = run(rows, weight, bias, order, ends, dtype, layout, name, shares, *factors)
    return y.reshape(*x.shape[:-1], weight.shape[0])
