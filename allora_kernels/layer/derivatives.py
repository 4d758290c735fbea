"""What the layers' backward passes must not be taken for. A rescaled gradient is the gradient of no function: it has no
derivative to give, and who leaves the Functions' backward passes out has lost the rule."""

from collections.abc import Callable

import torch
from torch import Tensor


def break_graph_in_transform() -> None:
    """Where torch.compile traces a transform of torch.func, it would take the derivative of a Function's forward pass for its
    backward pass: what calls a Function then is not compiled. An error under ``fullgraph=True``."""
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        torch._dynamo.graph_break(
            msg="a transform of torch.func over ALLoRA's layers cannot be compiled: torch.compile would lose their rule. "
            "Compile without fullgraph=True, or call the transform uncompiled"
        )


class _Underivable(torch.autograd.Function):
    """The first n of the tensors as they are; a derivative of them by any of the tensors is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(n, *tensors):
        return tuple(t.detach() for t in tensors[:n])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "a rescaled gradient has no derivative: ALLoRA's layers are differentiable once, so no gradient penalty and no "
            "Hessian goes through them, also where norm is None"
        )


def underivable(gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients, made without autograd out of `sources`, with an error for their derivative. (torch's
    `once_differentiable` asks which gradients come in and not what else there is to differentiate by.)"""
    places = [i for i, t in enumerate(gradients) if t is not None]
    if not places:
        return gradients
    sources = (t for t in sources if t is not None)
    found = dict(zip(places, _Underivable.apply(len(places), *(gradients[i] for i in places), *sources)))
    return tuple(map(found.get, range(len(gradients))))


def once_differentiable(gradients: Callable) -> Callable:
    """The backward pass of a Function whose inputs get ``gradients(ctx, saved_tensors, g)`` where its first output has the
    gradient g."""

    def backward(ctx, g, *_):
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        # Asked for once: what is checkpointed is given out once.
        saved = ctx.saved_tensors
        # Grad is off in a backward pass but for create_graph=True and torch.func, and the rest costs some microseconds.
        if not torch.is_grad_enabled():
            return gradients(ctx, saved, g)
        with torch.no_grad():
            found = gradients(ctx, saved, g)
        return found if torch.compiler.is_compiling() else underivable(found, (g, *saved))

    return backward
