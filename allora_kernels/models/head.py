"""An adapter on a model's output head, which a loss computed from the head's weight would pass by: an error, not a silence.

TRL's trainers, Liger's and other fused cross-entropies multiply the hidden states by the head's weight themselves.
"""

from torch import nn

from ..layer.adapter import ALLoRALayer

_CALLED = "_allora_called"
"""Attribute of an adapted head: whether the model's forward pass that runs now has called it."""


def watch_head(model: nn.Module) -> None:
    """Make a forward pass of `model` that does not call its adapted output head an error. Nothing where that has no adapter."""
    head = _head(model)
    if head is None:
        return
    head.register_forward_pre_hook(_note)
    # A model whose adapters were merged is watched still.
    if _begin not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin)
        model.register_forward_hook(_end)


def _head(model: nn.Module) -> ALLoRALayer | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, ALLoRALayer) else None


def _note(head: nn.Module, args) -> None:
    setattr(head, _CALLED, True)


def _begin(model: nn.Module, args) -> None:
    if (head := _head(model)) is not None:
        setattr(head, _CALLED, False)


def _end(model: nn.Module, args, output) -> None:
    head = _head(model)
    if head is None or not head.enabled or getattr(head, _CALLED, True):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    raise RuntimeError(
        f"{name} has an adapter, but {type(model).__name__}'s forward pass did not call it: its result comes from the layer's "
        "frozen weight, past the adapter, which would not train (as in TRL's trainers and in fused losses): leave the head out "
        "of target_modules, or the fused loss off"
    )
