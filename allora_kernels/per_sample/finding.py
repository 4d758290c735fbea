"""Which samples the rows of a layer's input are of, in a recorded forward pass, and when that cannot be told."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..layer.routing import among_experts
from .forward_passes import Forward
from .samples import Samples


class SampleFinder:
    """Finds samples by what `record` was told, by what the model's inputs say and by what earlier layers of the same forward
    pass had.

    `names`: those of the recorded layers. `batch_dim` and `samples`: as in `record`. `turns`: what in the model that runs may
    exchange samples and tokens, if anything does.
    """

    def __init__(self, names: Mapping[nn.Module, str], batch_dim: int | None, samples: int | None) -> None:
        self.names, self.batch_dim, self.samples = names, batch_dim, samples
        self.turns: Callable[[], str | None] = lambda: None

    def of_input(self, layer: nn.Module, x: Tensor, forward: Forward) -> Samples:
        """The samples of this layer's input x [..., K] in this forward pass.

        Raises:
            ValueError: their number is unknown: x has no such dimension, or another size there than the model's inputs or than
                an earlier layer's in the same forward pass, or not as many rows as `cu_seqlens` ends at. Or the layer may
                be an expert that rows are routed to.
        """
        name = self.names[layer]
        if self.batch_dim is None and forward.ragged is None and forward.of_one_sample:
            rows = math.prod(x.shape[:-1])
            self.agree(name, str(list(x.shape)), 1, forward)
            forward.lengths.add(rows)
            return Samples.equal(1, rows)
        if self.batch_dim is None and among_experts(name) and x.dim() == 2:
            raise ValueError(
                f"which sample each row is of cannot be told: the input of layer {name!r} is {list(x.shape)}, and rows may "
                "have been routed to an expert of a mixture. Where every expert sees all rows in their order, say so by "
                "record(model, batch_dim=0)"
            )
        self._check_order(name, x, forward)
        if forward.ragged is not None:
            _check_rows(forward, name, list(x.shape[:-1]))
            return forward.ragged
        dim = self.batch_dim or 0
        if x.dim() < dim + 2:
            missing = "leading dimension" if dim == 0 else f"dimension {dim} before its last"
            raise ValueError(
                f"the number of samples is unknown: the input of layer {name!r} is {list(x.shape)} and has no {missing}; "
                "record needs [b, ..., K], or cu_seqlens"
            )
        count = x.shape[dim]
        self._check_count(name, str(list(x.shape)), count, forward)
        self.agree(name, str(list(x.shape)), count, forward)
        length = math.prod((*x.shape[:dim], *x.shape[dim + 1 : -1]))
        forward.lengths.add(length)
        return Samples.equal(count, length)

    def of_tokens(self, layer: nn.Module, tokens: int, forward: Forward, device: torch.device) -> tuple[int, Tensor]:
        """How many samples there are, and which one each of `tokens` rows is of, where only the rows are left of a batch."""
        name = self.names[layer]
        if (ragged := forward.ragged) is not None:
            _check_rows(forward, name, [tokens])
            return ragged.count, ragged.spread(torch.arange(ragged.count, device=device))
        if self.batch_dim is None and forward.of_one_sample:
            self.agree(name, f"{tokens} tokens", 1, forward)
            return 1, torch.zeros(tokens, dtype=torch.int64, device=device)
        dim, count = self.batch_dim or 0, forward.count
        batches = forward.batch.shapes if dim == 0 else ()
        if count is None:
            fitting = {b for b, length in batches if length is not None and b * length == tokens}
            count = fitting.pop() if len(fitting) == 1 else None
        if count is not None and dim < 2:
            length = tokens // max(count, 1)
            given = {length for b, length in batches if b == count}
            # Of the inputs only where they agree: one may be as long as what was left of another.
            known = forward.lengths or (given if len(given) == 1 else ())
            if length * count == tokens and (length in known or tokens == 0):
                self._check_count(name, f"{length} tokens each", count, forward)
                self.agree(name, f"{length} tokens each", count, forward)
                every = torch.arange(count, device=device)
                return count, every.repeat_interleave(length) if dim == 0 else every.repeat(length)
        raise ValueError(
            f"which sample each token is of cannot be told: {tokens} of them come to the experts of {name!r}, and neither the "
            "model's inputs nor the inputs of its layers before are as many in samples * tokens: record the whole model, or "
            "pass cu_seqlens"
        )

    def _check_order(self, name: str, x: Tensor, forward: Forward) -> None:
        """ValueError where the rows of x may lie otherwise than by sample, and nobody has said that they do not."""
        lead = tuple(x.shape[:-1])
        if self.batch_dim is not None or not lead:
            return
        if forward.ragged is None and forward.batch.misplaces_images(lead[0], lead):
            raise ValueError(
                f"which sample each row is of cannot be told: the input of layer {name!r} is {list(x.shape)}, as many images "
                "as samples, but not one of each: adapt the language model alone, or record batches with one image a sample"
            )
        if len(lead) == 1:
            return
        if forward.ragged is not None and forward.batch.sizes and lead[0] not in forward.batch.sizes | {1}:
            raise ValueError(
                f"cu_seqlens cuts the rows as they lie, but those of layer {name!r} do not lie as in the model's inputs: its "
                f"own is {list(x.shape)}, and these lead with {sorted(forward.batch.sizes)}"
            )
        either = lead[0] == lead[1] > 1 or (lead[0] != lead[1] and {*lead[:2]} <= forward.batch.sizes)
        if either and (turning := self.turns()):
            raise ValueError(
                f"the input of layer {name!r} is {list(x.shape)}, and {turning} may exchange samples and tokens (or its source "
                "cannot be read), so that either of its first two dimensions may be the samples: say which by "
                "record(model, batch_dim=0) or 1"
            )

    def agree(self, name: str, found: str, count: int, forward: Forward) -> None:
        """Note that layer `name` has `count` samples in this forward pass; ValueError unless that is what is known."""
        if forward.count not in (None, count):
            raise ValueError(
                f"the number of samples is unknown: layer {forward.layer!r} has inputs for {forward.count} of them, layer "
                f"{name!r} for {count} ({found}). Something between them mixes or drops samples (a loss or a pooling over the "
                "leading dimension, a flattened batch); keep the leading dimension, or pass cu_seqlens where the rows of all "
                "layers lie by sample"
            )
        if forward.count is None:
            forward.count, forward.layer = count, name

    def _check_count(self, name: str, found: str, count: int, forward: Forward) -> None:
        """The number of samples of the first layer that has any, against what else is known of it."""
        if forward.count is not None:
            return
        due = f"say which dimension of a layer's input runs over samples: record(model, batch_dim=...), here of {found}"
        if self.samples is not None and count > self.samples:
            raise ValueError(
                f"record was told of {self.samples} samples, but layer {name!r} has inputs for {count}: {due}"
            )
        sizes = forward.batch.sizes
        if self.batch_dim is None and sizes and count not in sizes:
            raise ValueError(
                f"the number of samples is unknown: layer {name!r} has inputs for {count} ({found}), but no input of "
                f"the model has {count} as its leading dimension (they have {sorted(sizes)}): {due}"
            )


def _check_rows(forward: Forward, name: str, shape: list[int]) -> None:
    """Of a forward pass that cannot be told nothing is kept, and its samples may have been others."""
    rows = math.prod(shape)
    if forward.known and rows != forward.ragged.rows:
        raise ValueError(
            f"cu_seqlens must end at the number of rows, but it ends at {forward.ragged.rows} and the input of layer {name!r} "
            f"has {rows} ({shape})"
        )
