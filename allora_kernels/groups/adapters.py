"""`multi_adapter_linear`: one frozen weight, and for every row the adapter that it names."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer import functional
from . import reference


class Adapter(NamedTuple):
    """``lora_A [R, K]`` and ``lora_B [N, R]`` of any floating dtype, and the rule they train under (see `allora_linear`)."""

    lora_A: Tensor
    lora_B: Tensor
    eta: float = 2.0
    norm: str | None = "row"


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], row_adapter: Tensor) -> None:
    if not isinstance(row_adapter, Tensor):
        raise TypeError(f"row_adapter must be a Tensor, got {type(row_adapter).__name__}")
    if row_adapter.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"row_adapter must be int32, got {row_adapter.dtype}")
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
    if row_adapter.device != x.device:
        raise ValueError(f"row_adapter is on {row_adapter.device} but x is on {x.device}; move them to one device")
    if row_adapter.shape != x.shape[:-1]:
        raise ValueError(
            f"row_adapter must be {list(x.shape[:-1])}, a number for each row of x {list(x.shape)}, got "
            f"{list(row_adapter.shape)}"
        )


def _check_values(row_adapter: Tensor, count: int) -> None:
    """On a GPU without waiting for it."""
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
        row_adapter: ``[...]`` as x, int32: the number of each row's adapter, -1 for none; in any order. The kernels read it
            on the device.
        backend: as for `allora_linear`. ``"eager"`` reads `row_adapter` on the host.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: no adapters, a number in `row_adapter` that names none (compiled: RuntimeError; on a GPU: a device
            assertion, later), and for each adapter what `allora_linear` raises it for.
        RuntimeError: `use_batch_invariant` is on and the backend is eager.
        TypeError: something that is no tensor of the dtype due, or no `Adapter`.
    """
    _check(x, weight, bias, adapters, row_adapter)
    _check_values(row_adapter, len(adapters))
    rows = x.reshape(-1, x.shape[-1])
    y = reference.multi_adapter_linear(rows, weight, bias, adapters, row_adapter.reshape(-1))
    return y.reshape(*x.shape[:-1], weight.shape[0])
