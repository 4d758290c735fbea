"""A model without its adapters for a while: the frozen model's own forward pass."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..layer import switching
from .adapted import layers_or_raise
from .names import unwrap


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch every adapter of `model` on or off, until it is switched again.

    A disabled layer computes as its frozen one alone, to the same bits; its adapter gets no gradient and stays as it is.
    `layer.enabled` does the same for one layer.

    Raises:
        ValueError: the model has no adapters.
        TypeError: `enabled` is no bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
    for layer in layers_or_raise(unwrap(model)).values():
        layer.enabled = enabled


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes as its frozen base: for the reference log-probabilities of DPO, GRPO and the like.

    Can be nested; afterwards each layer is as it was before, also after an exception. A forward pass keeps its state where
    checkpointing runs it again later.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = layers_or_raise(unwrap(model))
    before = [(layer, switching.switch(layer, enabled=False)) for layer in layers.values()]
    try:
        yield
    finally:
        for layer, state in before:
            switching.switch_back(layer, state)
