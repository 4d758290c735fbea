"""What `per_sample.record` keeps of a forward and backward pass, and when it refuses one."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from ..layer import backend as _backend
from ..layer.batches import Batch, batch_of, may_turn, uses_the_batch
from ..layer.graph_tasks import in_backward
from .finding import SampleFinder
from .forward_passes import Forward, ForwardPasses
from .grouped import GroupSamples
from .kept import Block, Call, Kept, Run, Weighing, in_order
from .samples import Rows, Samples
from .steps import sample_steps


@dataclass(frozen=True)
class Part:
    """What one adapter of a layer has of a call: of the `count` samples of `forward` those at `places`, or all (None), which
    are `samples` of rows that lie as `rows` says. Called in the place of the step `adapter_grads`, it records them."""

    recording: "Recording"
    layer: nn.Module
    adapter: str
    forward: Forward
    count: int
    samples: Samples | GroupSamples
    places: tuple[int, ...] | None
    rows: Rows

    def __call__(self, backend, *args) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.recording.adapter_grads(self, backend, *args)


class Recording:
    """The state of one ``with record(...)``, held by every layer of the model while it lasts."""

    def __init__(
        self,
        names: dict[nn.Module, str],
        cu_seqlens: Tensor | None,
        norms_only: bool,
        batch_dim: int | None,
        samples: int | None,
        batch_norms: Mapping[str, nn.Module],
    ) -> None:
        self.batch_norms = batch_norms
        self.names, self.norms_only, self.samples = names, norms_only, samples
        self._finder = SampleFinder(names, batch_dim, samples)
        # By layer and by the name of its adapter.
        self._calls: dict[nn.Module, dict[str, dict[Forward, Call]]] = {layer: {} for layer in names}
        self._passes = ForwardPasses()
        # By forward pass: those that its latest backward pass reached, itself among them.
        self._groups: dict[Forward, list[Forward]] = {}
        self._in_model = False
        # The outermost module that runs now, where the recorded model does not, and what its inputs say.
        self._part: tuple[nn.Module, Batch] | None = None
        self.block = Block()
        self._ragged = None
        if cu_seqlens is not None:
            self.set_cu_seqlens(cu_seqlens)

    def __reduce__(self):
        # A copy of the model is not in the block that this belongs to.
        return type(None), ()

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
        self._check_batch_norms()
        self._finder.turns = functools.partial(may_turn, module)
        self._passes.enter_model(batch_of(module, args, kwargs))
        self._in_model = True

    def leave_model(self, *_) -> None:
        """Hook after it."""
        _refuse_compiled()
        self._passes.leave_model()
        self._in_model = False

    def enter_part(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the forward pass of a module of the recorded model that has adapted layers: called by itself, its inputs
        are what there is to know of the batch."""
        if not (self._in_model or self._part or torch.compiler.is_compiling() or in_backward()):
            self._finder.turns = functools.partial(may_turn, module)
            self._part = module, batch_of(module, args, kwargs)

    def leave_part(self, module: nn.Module, *_) -> None:
        """Hook after it."""
        if self._part is not None and self._part[0] is module:
            self._part, self._finder.turns = None, lambda: None

    def _check_batch_norms(self) -> None:
        for name, norm in self.batch_norms.items() if torch.is_grad_enabled() else ():
            if uses_the_batch(norm):
                raise ValueError(
                    f"{name} ({type(norm).__name__}) normalizes each sample by the whole batch, so that no sample has a "
                    "gradient of its own: call its eval(), or put a GroupNorm in its place where it keeps no statistics"
                )

    def _forward(self) -> Forward:
        """The forward pass that the call now made is part of. It keeps the ranges that held when its first layer ran."""
        _refuse_compiled()
        forward = self._passes.of_call()
        if not forward.began:
            forward.began, forward.ragged = True, self._ragged
            self._check_batch_norms()
        if not forward.whole:
            forward.batch = Batch() if self._part is None else self._part[1]
        return forward

    def sink(self, layer: nn.Module, adapter: str, x: Tensor) -> Part:
        """What runs the step `adapter_grads` of this call of `layer` on x with its adapter of that name, and records it.

        Raises:
            RuntimeError: the layer runs inside a compiled graph, which would keep what is traced.
            ValueError: as `SampleFinder.of_input`.
        """
        forward = self._forward()
        samples = self._finder.of_input(layer, x, forward)
        rows = Rows(tuple(x.shape[:-1]), 0 if forward.ragged else self._finder.batch_dim or 0)
        return Part(self, layer, adapter, forward, samples.count, samples, None, rows)

    def sinks(self, layer: nn.Module, adapters: Sequence[str], numbers: Sequence[int], length: int) -> list[Part]:
        """`sink` of each of these adapters for its own samples: sample i, of `length` rows in succession, goes through the one
        of number ``numbers[i]``, or through none.

        Raises:
            RuntimeError: as `sink`.
            ValueError: the record has samples of another kind, or not as many; or none has an adapter, and gradients are on.
        """
        forward, name = self._forward(), self.names[layer]
        if forward.ragged is not None or self._finder.batch_dim:
            raise ValueError(
                "adapter_rows names an adapter for each entry of the leading dimension, and these are the samples: record "
                "without cu_seqlens and batch_dim"
            )
        if not adapters and torch.is_grad_enabled():
            raise ValueError(
                "no sample of this batch goes through an adapter, so that a record cannot see its backward pass: run such a "
                "batch outside of record, or under torch.no_grad()"
            )
        self._finder.agree(name, f"of {length} rows each", len(numbers), forward)
        found = []
        for number, adapter in enumerate(adapters):
            places = tuple(i for i, n in enumerate(numbers) if n == number)
            samples = Samples.equal(len(places), length)
            rows = Rows((samples.rows,), 0)
            found.append(Part(self, layer, adapter, forward, len(numbers), samples, places, rows))
        return found

    def routed(
        self, layers: Mapping[str, nn.Module], expert_of: Tensor, experts: int
    ) -> tuple[Tensor, Tensor, dict[str, Part]]:
        """``(order [T * k], ends [experts], sinks)`` of tokens that are sent to several experts each, ``expert_of [T, k]``: how
        their rows are sorted by expert and, of one expert, by sample; where each expert's end (int32); and `sink` of each of
        `layers` for rows that lie so.

        Raises:
            RuntimeError: as `sink`.
            ValueError: which sample a token is of cannot be told.
        """
        forward = self._forward()
        tokens, k = expert_of.shape
        if forward.known or self._finder.batch_dim:
            count, sample = self._finder.of_tokens(next(iter(layers.values())), tokens, forward, expert_of.device)
        else:
            # Run again for its values alone. Samples that lie one after the other change nothing in the order of the rows.
            count, sample = 1, expert_of.new_zeros(tokens)
        order, samples = GroupSamples.of(expert_of.reshape(-1), sample.repeat_interleave(k), experts, count)
        rows = Rows((tokens * k,), 0)
        parts = {
            name: Part(self, layer, layer.adapter_name, forward, count, samples, None, rows)
            for name, layer in layers.items()
        }
        return order, samples.ends(experts), parts

    def adapter_grads(self, part: Part, backend, g, x, s, lora_B, c, eta, norm, need_ds, *dtypes):
        """`reference.adapter_grads`, and the samples' gradients or norms kept, where they are added to a parameter's `grad`."""
        if not _is_accumulated():
            steps = _backend.steps(backend) if isinstance(backend, str) else backend
            return steps.adapter_grads(g, x, s, lora_B, c, eta, norm, need_ds, *dtypes)
        self._meet(part)
        steps, samples, rows = sample_steps(backend), part.samples, part.rows
        g, x, s = (None if t is None else rows.by_sample(t) for t in (g, x, s))
        common = (g, x, s, lora_B, c, eta, norm)
        call = Call(part.count, samples, part.places)
        if self.norms_only:
            ds, da, db, call.squares = steps.sample_squared_norms(*common, need_ds, *dtypes, samples)
            call.totals = da, db
            # A fused optimizer writes to it without a trace, and FSDP2 frees what it gathered for a pass.
            kept = (g, x, s, lora_B.clone(), c)
            call.weighing = Weighing(lambda w: steps.weighted_grads(*kept, eta, norm, w, *dtypes, samples), kept)
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

    def kept(self) -> dict[nn.Module, dict[str, Kept]]:
        """What was kept of each layer, by the name of its adapter: the samples of all forward passes in their order.

        Raises:
            ValueError: `samples` were announced, and the forward passes that met in a backward pass had another number; or as
                `in_order`.
        """
        # A layer that took no part in some of them has the places of its samples among all.
        of_forward: dict[Forward, tuple[int, str]] = {}
        for layer, of_adapters in self._calls.items():
            for forward, call in itertools.chain.from_iterable(calls.items() for calls in of_adapters.values()):
                of_forward.setdefault(forward, (call.count, self.names[layer]))
        runs: list[Run] = []
        forwards, done = sorted(of_forward, key=lambda forward: forward.index), set()
        for forward in forwards:
            if forward in done:
                continue
            together = [f for f in forwards if f in self._groups[forward] and f not in done]
            done.update(together)
            counts = [of_forward[f][0] for f in together]
            if self.samples is None or sum(counts) == self.samples:
                runs += [Run((f,), count) for f, count in zip(together, counts)]
            elif all(count == self.samples for count in counts):
                runs.append(Run(tuple(together), self.samples))
            else:
                layer = of_forward[forward][1]
                raise ValueError(
                    f"record was told of {self.samples} samples a backward pass, but layer {layer!r} had {counts}"
                )
        return {layer: in_order(calls, runs, self.names[layer]) for layer, calls in self._calls.items()}

    def forget(self) -> None:
        """Drop what the passes left."""
        for calls in self._calls.values():
            calls.clear()


def _is_accumulated() -> bool:
    """Whether the running backward pass reaches the adapter of the running node, and not only what lies behind it, as
    ``autograd.grad(loss, x)`` and ``backward(inputs=...)`` may."""
    nodes = (node for node, _ in torch._C._current_autograd_node().next_functions if node is not None)
    leaves = [node for node in nodes if "AccumulateGrad" in node.name()]
    try:
        return not leaves or any(map(torch._C._will_engine_execute_node, leaves))
    except RuntimeError:
        # A leaf is asked for by autograd.grad itself.
        return True


def _refuse_compiled() -> None:
    # After a graph break Dynamo calls what it could not trace, and compiles its parts.
    if torch.compiler.is_compiling() or get_eval_frame_callback():
        raise RuntimeError("a compiled model cannot be recorded: record the module that was given to torch.compile")
