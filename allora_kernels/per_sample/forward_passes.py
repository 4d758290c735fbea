"""Which forward pass a layer's call is part of, and which backward pass reaches it: calls of one forward pass are of the same
samples.

Re-entrant checkpointing runs layers again in backward passes nested in the one the user called, so neither torch's
current graph task nor the order of calls says it alone.
"""

from dataclasses import dataclass, field

import torch

from ..layer.batches import Batch
from ..layer.graph_tasks import GraphTasks, in_backward
from .samples import Samples

_UNKNOWN = -1


@dataclass(eq=False)
class Forward:
    """Forward pass number `index` of the recorded model, or (`whole` False) of layers called one by one.

    `batch`: what the model's inputs say of it. `node`: the number of the next node of autograd's when it began. `count`
    samples, as `layer`, the first to run, saw them; `lengths`: how many rows each has in a layer. `ragged`: its samples where
    they are, known when the first layer runs and it `began`.
    """

    index: int
    whole: bool
    batch: Batch = field(default_factory=Batch)
    node: int = 0
    count: int | None = None
    layer: str = ""
    lengths: set[int] = field(default_factory=set)
    began: bool = False
    ragged: Samples | None = None

    @property
    def known(self) -> bool:
        """Whether it can be told which one it is."""
        return self.index != _UNKNOWN

    @property
    def of_one_sample(self) -> bool:
        """Whether the model's inputs have one sample, so that all rows within are its."""
        return self.batch.sizes == {1}


class ForwardPasses:
    """The forward passes of a recording, told apart as they happen."""

    def __init__(self) -> None:
        self._current: Forward | None = None
        self._count = 0
        # Those whose backward pass has not ended.
        self._pending: list[Forward] = []
        # Those that ran without gradients: re-entrant checkpointing may run them again, with gradients, in a backward pass.
        self._without_gradients: list[Forward] = []
        self._run_again: Forward | None = None
        self._tasks = GraphTasks()
        self._met: list[Forward] = []
        self._first: Forward | None = None

    def enter_model(self, batch: Batch) -> None:
        """The recorded model is called, on `batch`, or is called again by a backward pass."""
        if in_backward():
            self._note_task()
            self._run_again = self._checkpointed()
            return
        self._start(Forward(self._count, True, batch, torch.autograd._get_sequence_nr()), torch.is_grad_enabled())

    def leave_model(self) -> None:
        """The call of the recorded model has ended: what runs next is not part of it."""
        self._run_again = None
        if not in_backward():
            self._current = None

    def _checkpointed(self) -> Forward | None:
        """The forward pass, in a re-entrant checkpoint as a whole, that is now run again; one of no number where none is known.
        None where another kind of checkpoint calls the model: its first run is pending."""
        node = torch._C._current_autograd_node()
        if "CheckpointFunction" not in node.name():
            return None
        # The checkpoint's node was made just before its first run.
        for forward in self._without_gradients:
            if forward.node > node._sequence_nr():
                self._without_gradients.remove(forward)
                self._pending.append(forward)
                return forward
        return self._only() or Forward(_UNKNOWN, True)

    def _only(self) -> Forward | None:
        """The forward pass, if there has been one: a second backward pass through it is no other's."""
        return self._first if self._count == 1 else None

    def end(self) -> None:
        """What runs next is another forward pass."""
        self._current = None

    def of_call(self) -> Forward:
        """The forward pass that the layer now called is part of, or is recomputed for; where a backward pass recomputes one of
        several, one of no number: `meet` refuses it. (Without re-entrance it is not met.)"""
        if not in_backward():
            if self._current is None:
                # Under re-entrant checkpointing without gradients, though they are wanted.
                self._start(Forward(self._count, False), True)
            return self._current
        if self._run_again is not None:
            return self._run_again
        self._note_task()
        found = self._pending or self._met[-1:]
        return found[0] if len(found) == 1 else self._only() or Forward(_UNKNOWN, True)

    def meet(self, forward: Forward) -> list[Forward]:
        """A backward pass has reached a call of `forward`: the forward passes that it has reached so far, in order.

        Raises:
            ValueError: re-entrant checkpointing recomputes one of several forward passes, and which one cannot be told.
        """
        if not forward.known:
            raise ValueError(
                "re-entrant checkpointing recomputes one of several forward passes, and which one cannot be told: pass "
                "use_reentrant=False to checkpoint, or call backward after each forward pass"
            )
        self._note_task()
        if forward not in self._met:
            self._met.append(forward)
        self._current = None
        return self._met

    def _start(self, forward: Forward, differentiated: bool) -> None:
        self._tasks.open.clear()
        self._current = forward
        self._first = self._first or forward
        self._count += 1
        (self._pending if differentiated else self._without_gradients).append(forward)

    def _note_task(self) -> None:
        if not self._tasks.open:
            self._met = []
        self._tasks.enter(self._drop_met)

    def _drop_met(self) -> None:
        self._pending = [forward for forward in self._pending if forward not in self._met]
