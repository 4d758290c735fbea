"""What the inputs of a model say of its batch, and where they cannot: whose rows come to a layer within."""

import functools
import inspect
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

_OF_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
"""What leads with the samples in models of transformers. What else such a call has may lead with images, or patches of them."""


class _Images:
    """The images of a batch: each sample's tokens [B, T], of which some stand for its images."""

    def __init__(self, ids: Tensor, token: int) -> None:
        self._ids, self._token = ids, token

    @functools.cached_property
    def are_unevenly_spread(self) -> bool:
        """Whether some sample has more of them than another. Waits for the device, once a batch."""
        counts = (self._ids == self._token).sum(dim=1)
        return bool((counts != counts[0]).any())


class Batch(NamedTuple):
    """Of one call of a model: the first two dimensions of its inputs, the second None where there is one; the leading ones of
    the inputs beside the tokens; and its images, as far as they and their places are known."""

    shapes: frozenset[tuple[int, int | None]] = frozenset()
    beside: frozenset[int] = frozenset()
    images: _Images | None = None

    @property
    def sizes(self) -> frozenset[int]:
        """The leading dimensions of what leads with the samples."""
        return frozenset(size for size, _ in self.shapes)

    def lengths(self, count: int) -> set[int]:
        """How many tokens `count` samples may have each."""
        return {length for size, length in self.shapes if size == count and length is not None}

    def misplaces_images(self, count: int, lead: tuple[int, ...]) -> bool:
        """Whether `count` rows of a layer's input, which lie in the dimensions `lead`, may be images that are not one of each
        sample."""
        if self.images is None or lead[0] != count or (len(lead) > 1 and lead[1] in self.lengths(count)):
            return False
        return self.images.are_unevenly_spread


def batch_of(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Batch:
    """The batch of this call of `module`, which may be in DistributedDataParallel.

    Raises:
        ValueError: an input is a PackedSequence.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    named = dict(zip(_parameters(type(module).forward), args)) | dict(kwargs)
    tokens = {name: t for name in _OF_TOKENS if isinstance(t := named.get(name), Tensor) and t.dim()}
    if not tokens:
        return Batch(_shapes(_tensors((args, kwargs))))
    others = {name: value for name, value in named.items() if name not in tokens}
    beside = frozenset(_size(t, 0) for t in _tensors(others))
    return Batch(_shapes(tokens.values()), beside, _images(module, tokens.get("input_ids"), others))


def _tensors(tree: Any) -> list[Tensor]:
    found = []
    for leaf in _pytree.tree_leaves(tree, is_leaf=lambda t: isinstance(t, PackedSequence)):
        if isinstance(leaf, PackedSequence):
            raise ValueError(
                "which sample each row is of cannot be told: an input is a PackedSequence, whose rows of one time step follow "
                "those of another: pad the samples, or lay their rows one after another and record with cu_seqlens"
            )
        if isinstance(leaf, Mapping):
            # BatchEncoding and its like are none of torch's trees.
            found += _tensors(dict(leaf))
        elif isinstance(leaf, Tensor) and leaf.dim():
            found.append(leaf)
    return found


def _shapes(tensors: Iterable[Tensor]) -> frozenset[tuple[int, int | None]]:
    return frozenset((_size(t, 0), _size(t, 1) if t.dim() > 1 else None) for t in tensors)


def _size(t: Tensor, dim: int) -> int:
    # A number also where torch.compile would have a symbol, which no set can hold.
    return operator.index(t.shape[dim])


@functools.cache
def _parameters(forward) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _images(module: nn.Module, ids: Tensor | None, others: Mapping[str, Any]) -> _Images | None:
    config = getattr(module, "config", None)
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    token = next((token for token in found if token is not None), None)
    there = any(name.startswith("pixel_values") and value is not None for name, value in others.items())
    return _Images(ids, token) if there and ids is not None and ids.dim() == 2 and isinstance(token, int) else None


_TENSOR_FIRST = r"\(\s*(?:[^(),\d\s-][^(),]*(?:\([^()]*\))?,\s*)?"
_TURNS = re.compile(
    rf"(?:transpose|swapaxes|swapdims|movedim|moveaxis){_TENSOR_FIRST}(?:0\s*,\s*1|1\s*,\s*0|-3\s*,\s*-2|-2\s*,\s*-3)\s*\)"
    rf"|permute{_TENSOR_FIRST}[(\[]?\s*1\s*,\s*0\b"
    # Of einsum, whose names are letters, and of einops.
    r"""|["'](?:[^"']*,)?\s*(?:([a-zA-Z])\s*([a-zA-Z])[^"',]*(?:,[^"']*)?->\s*\2\s*\1|(\w+)\s+(\w+)\b[^"']*->\s*\4\s+\3\b)"""
)
"""The first two dimensions of a tensor exchanged, as far as a line of source shows it."""


def may_turn(model: nn.Module) -> str | None:
    """A class of `model` whose source exchanges the first two dimensions of a tensor, or cannot be read; None where there is
    none."""
    for cls in {type(module) for module in model.modules()}:
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            if not base.__module__.startswith("torch.") and _turns(base):
                return base.__name__
    return None


@functools.cache
def _turns(cls: type) -> bool:
    own = [member for member in vars(cls).values() if inspect.isfunction(member)]
    try:
        # Of a class that was made without a source nothing can be read, but there may be nothing to read.
        return any(_TURNS.search(inspect.getsource(part)) for part in ([cls, *_helpers(own)] if own else ()))
    except (OSError, TypeError):
        return True


def _helpers(functions: Iterable[Any]) -> Iterator[Any]:
    """The functions of the same modules that these call by name."""
    for function in functions:
        for name in function.__code__.co_names:
            found = function.__globals__.get(name)
            if inspect.isfunction(found) and found.__module__ == function.__module__:
                yield found


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model`, by name, that may normalize each sample by the whole batch: see `uses_the_batch`."""
    kinds = nn.modules.batchnorm._BatchNorm
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def uses_the_batch(norm: nn.Module) -> bool:
    """Whether this one of the `batch_norms` does so now: while it trains, or always where it keeps no statistics."""
    return norm.training or norm.running_mean is None
