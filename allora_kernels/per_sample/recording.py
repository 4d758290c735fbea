"""What `per_sample.record` keeps of a forward and backward pass, and when it refuses one."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .forward_passes import Forward, ForwardPasses
from .grouped import GroupSamples
from .kept import Call, Kept, in_order
from .samples import Rows, Samples
from .steps import sample_steps


class Part(NamedTuple):
    """What one adapter of a layer has of a call: of the `count` samples of `forward` those at `places`, or all (None), which
    are `samples` of rows that lie as `rows` says."""

    layer: nn.Module
    adapter: str
    forward: Forward
    count: int
    samples: Samples | GroupSamples
    places: tuple[int, ...] | None
    rows: Rows


class Recording:
    """The state of one ``with record(...)``, held by every layer of the model while it lasts."""

    def __init__(
        self,
        names: dict[nn.Module, str],
        cu_seqlens: Tensor | None,
        norms_only: bool,
        batch_dim: int | None,
        samples: int | None,
    ) -> None:
        self.names, self.norms_only, self.batch_dim, self.samples = names, norms_only, batch_dim, samples
        # By layer and by the name of its adapter.
        self._calls: dict[nn.Module, dict[str, dict[Forward, Call]]] = {layer: {} for layer in names}
        self._passes = ForwardPasses()
        # By forward pass: those that its latest backward pass reached, itself among them.
        self._groups: dict[Forward, list[Forward]] = {}
        self._ragged = None
        if cu_seqlens is not None:
            self.set_cu_seqlens(cu_seqlens)

    def set_cu_seqlens(self, cu_seqlens: Tensor | None) -> None:
        """Ranges of the next micro-batch: the samples of the forward passes from here on; None for x's leading dimension.

        Raises:
            TypeError, ValueError: as `Samples.ragged`.
        """
        self._ragged = None if cu_seqlens is None else Samples.ragged(cu_seqlens)
        self._passes.end()

    def enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the recorded model's forward pass; refuses a compiled one as `sink` does."""
        _refuse_compiled()
        self._passes.enter_model((args, kwargs))

    def leave_model(self, *_) -> None:
        """Hook after it."""
        _refuse_compiled()
        self._passes.leave_model()

    def sink(self, layer: nn.Module, adapter: str, x: Tensor) -> functools.partial:
        """What runs the step `adapter_grads` of this call of `layer` on x with its adapter of that name, and records it.

        Raises:
            RuntimeError: the layer runs inside a compiled graph, which would keep what is traced.
            ValueError: as `samples_of`.
        """
        _refuse_compiled()
        forward = self._passes.of_call()
        samples = self.samples_of(layer, x, forward)
        rows = Rows(tuple(x.shape[:-1]), 0 if self._ragged else self.batch_dim or 0)
        return functools.partial(self.adapter_grads, Part(layer, adapter, forward, samples.count, samples, None, rows))

    def sinks(self, layer: nn.Module, adapters: Sequence[str], numbers: Sequence[int], length: int) -> list:
        """`sink` of each of these adapters for its own samples: sample i, of `length` rows in succession, goes through the one
        of number ``numbers[i]``, or through none.

        Raises:
            RuntimeError: as `sink`.
            ValueError: the record has samples of another kind, or not as many.
        """
        _refuse_compiled()
        name = self.names[layer]
        if self._ragged is not None or self.batch_dim:
            raise ValueError(
                "adapter_rows names an adapter for each entry of the leading dimension, and these are the samples: record "
                "without cu_seqlens and batch_dim"
            )
        forward = self._passes.of_call()
        self._agree(name, f"of {length} rows each", len(numbers), forward)
        found = []
        for number, adapter in enumerate(adapters):
            places = tuple(i for i, n in enumerate(numbers) if n == number)
            samples = Samples.equal(len(places), length)
            part = Part(layer, adapter, forward, len(numbers), samples, places, Rows((samples.rows,), 0))
            found.append(functools.partial(self.adapter_grads, part))
        return found

    def routed(
        self, layers: Mapping[str, nn.Module], expert_of: Tensor, experts: int
    ) -> tuple[Tensor, Tensor, dict[str, functools.partial]]:
        """``(order [T * k], ends [experts], sinks)`` of tokens that are sent to several experts each, ``expert_of [T, k]``: how
        their rows are sorted by expert and, of one expert, by sample; where each expert's end (int32); and `sink` of each of
        `layers` for rows that lie so.

        Raises:
            RuntimeError: as `sink`.
            ValueError: which sample a token is of cannot be told.
        """
        _refuse_compiled()
        forward = self._passes.of_call()
        tokens, k = expert_of.shape
        count, sample = self._samples_of_tokens(next(iter(layers.values())), tokens, forward, expert_of.device)
        order, samples = GroupSamples.of(expert_of.reshape(-1), sample.repeat_interleave(k), experts, count)
        rows = Rows((tokens * k,), 0)
        parts = {n: Part(layer, layer.adapter_name, forward, count, samples, None, rows) for n, layer in layers.items()}
        sinks = {name: functools.partial(self.adapter_grads, part) for name, part in parts.items()}
        return order, samples.ends(experts), sinks

    def _samples_of_tokens(
        self, layer: nn.Module, tokens: int, forward: Forward, device: torch.device
    ) -> tuple[int, Tensor]:
        """How many samples there are, and which one each of `tokens` rows is of, where only the rows are left of a batch."""
        name = self.names[layer]
        if self._ragged is not None:
            self._check_rows(name, [tokens], tokens)
            every = torch.arange(self._ragged.count, device=device)
            return self._ragged.count, self._ragged.spread(every)
        dim, count = self.batch_dim or 0, forward.count
        batches = forward.batches if dim == 0 else ()
        if count is None:
            fitting = {b for b, length in batches if length is not None and b * length == tokens}
            count = fitting.pop() if len(fitting) == 1 else None
        if count is not None and dim < 2:
            length = tokens // max(count, 1)
            known = forward.lengths | {length for b, length in batches if b == count}
            if length * count == tokens and (length in known or tokens == 0):
                self._agree(name, f"{length} tokens each", count, forward)
                every = torch.arange(count, device=device)
                return count, every.repeat_interleave(length) if dim == 0 else every.repeat(length)
        raise ValueError(
            f"which sample each token is of cannot be told: {tokens} of them come to the experts of {name!r}, and neither the "
            "model's inputs nor the inputs of its layers before are as many in samples * tokens: record the whole model, or "
            "pass cu_seqlens"
        )

    def samples_of(self, layer: nn.Module, x: Tensor, forward: Forward) -> Samples:
        """The samples of this layer's input x [..., K] in this forward pass.

        Raises:
            ValueError: their number is unknown: x has no such dimension, or another size there than the model's inputs or than
                an earlier layer's in the same forward pass, or not as many rows as `cu_seqlens` ends at.
        """
        name = self.names[layer]
        if self._ragged is not None:
            self._check_rows(name, list(x.shape), x.shape[:-1].numel())
            return self._ragged
        dim = self.batch_dim or 0
        if x.dim() < dim + 2:
            missing = "leading dimension" if dim == 0 else f"dimension {dim} before its last"
            raise ValueError(
                f"the number of samples is unknown: the input of layer {name!r} is {list(x.shape)} and has no {missing}; "
                "record needs [b, ..., K], or cu_seqlens"
            )
        count = x.shape[dim]
        self._agree(name, str(list(x.shape)), count, forward)
        length = math.prod((*x.shape[:dim], *x.shape[dim + 1 : -1]))
        forward.lengths.add(length)
        return Samples.equal(count, length)

    def _check_rows(self, name: str, shape: list[int], rows: int) -> None:
        if rows != self._ragged.rows:
            raise ValueError(
                f"cu_seqlens must end at the number of rows, but it ends at {self._ragged.rows} and the input of layer "
                f"{name!r} is {shape}, which has {rows}"
            )

    def _agree(self, name: str, found: str, count: int, forward: Forward) -> None:
        """Note that layer `name` has `count` samples in this forward pass; ValueError unless that is what is known."""
        if forward.count not in (None, count):
            raise ValueError(
                f"the number of samples is unknown: layer {forward.layer!r} has inputs for {forward.count} of them, layer "
                f"{name!r} for {count} ({found}). Something between them mixes or drops samples (a loss or a pooling over the "
                "leading dimension, a flattened batch); keep the leading dimension or pass cu_seqlens"
            )
        if forward.count is None:
            self._check_count(name, found, count, forward)
            forward.count, forward.layer = count, name

    def _check_count(self, name: str, found: str, count: int, forward: Forward) -> None:
        """The first layer's number of samples against what else is known of it."""
        due = f"say which dimension of a layer's input runs over samples: record(model, batch_dim=...), here of {found}"
        if self.samples is not None and count > self.samples:
            raise ValueError(
                f"record was told of {self.samples} samples, but layer {name!r} has inputs for {count}: {due}"
            )
        if self.batch_dim is not None or self.samples is not None or not forward.sizes:
            return
        if count not in forward.sizes:
            raise ValueError(
                f"the number of samples is unknown: layer {name!r} has inputs for {count} ({found}), but no input of "
                f"the model has {count} as its leading dimension (they have {sorted(forward.sizes)}): {due}"
            )

    def adapter_grads(self, part: Part, backend, g, x, s, lora_B, c, eta, norm, need_ds, *dtypes):
        """`reference.adapter_grads`, and the samples' gradients or norms kept."""
        self._meet(part)
        steps, samples, rows = sample_steps(backend), part.samples, part.rows
        g, x, s = (None if t is None else rows.by_sample(t) for t in (g, x, s))
        common = (g, x, s, lora_B, c, eta, norm)
        call = Call(part.count, samples, part.places)
        if self.norms_only:
            ds, da, db, call.squares = steps.sample_squared_norms(*common, need_ds, *dtypes, samples)
            call.totals = tuple(t for t in (da, db) if t is not None)
            call.weigh = lambda weights: steps.weighted_grads(*common, weights, *dtypes, samples)
        else:
            ds, call.a, call.b = steps.sample_grads(*common, need_ds, *(t is not None for t in dtypes), samples)
            sums = zip((call.a, call.b), dtypes)
            da, db = (None if t is None else steps.weighted_sum(t, None, dtype) for t, dtype in sums)
        # A layer that ran several times in one forward pass: the gradients of its samples add up.
        calls = self._calls[part.layer].setdefault(part.adapter, {})
        before = calls.get(part.forward)
        calls[part.forward] = call if before is None else before.plus(call, self.names[part.layer])
        return ds if ds is None else rows.as_they_lay(ds), da, db

    def _meet(self, part: Part) -> None:
        layer, forward = part.layer, part.forward
        met = self._passes.meet(forward)
        if len(met) > 1 and self.samples is None:
            counts = [f.count for f in met]
            raise ValueError(
                f"one backward pass reached {len(met)} forward passes, of {counts} samples: call backward after each, or say "
                f"how many samples they are of: record(model, samples={sum(c or 0 for c in counts)}) where they are different "
                f"ones, samples={counts[0]} where they are the same"
            )
        again = forward in self._calls[layer].get(part.adapter, ())
        if again and not forward.whole and self.samples is None:
            raise ValueError(
                f"layer {self.names[layer]!r} ran more than once, not within a call of the recorded model: record the module "
                "that is called, or say how many samples there are: record(model, samples=...)"
            )
        for other in met:
            self._groups[other] = met

    def kept(self, layer: nn.Module) -> dict[str, Kept]:
        """What was kept of `layer`, by the name of its adapter, in the order of the forward passes.

        Raises:
            ValueError: `samples` were announced, and the forward passes that met in a backward pass had another number; or as
                `in_order`.
        """
        of_adapters, runs, done = self._calls[layer], [], set()
        counts_of = {forward: call.count for calls in of_adapters.values() for forward, call in calls.items()}
        forwards = sorted(counts_of, key=lambda forward: forward.index)
        for forward in forwards:
            if forward in done:
                continue
            together = [f for f in forwards if f in self._groups[forward] and f not in done]
            done.update(together)
            counts = [counts_of[f] for f in together]
            if self.samples is None or sum(counts) == self.samples:
                runs += [[f] for f in together]
            elif all(count == self.samples for count in counts):
                runs.append(together)
            else:
                raise ValueError(
                    f"record was told of {self.samples} samples a backward pass, but layer {self.names[layer]!r} had {counts}"
                )
        return in_order(of_adapters, runs, self.names[layer])


def _refuse_compiled() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("a compiled model cannot be recorded: record the module that was given to torch.compile")
