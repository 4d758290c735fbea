"""What a layer's call computes with (whether its adapter takes part, which one, whose rows): the state that is set, or in a
call that checkpointing runs again, the state that the first run had. States are compared by ``==``.

A call that a backward pass runs again is asked for by a node of the first run's graph. Nodes are numbered as they are made, so
the node's number against the numbers at which the layer was switched tells the state then.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .graph_tasks import GraphTasks, in_backward

State = TypeVar("State")

_KEPT = 64

# By layer, the latest switches: (number of the first node after it, what held before). Not on the layer, because the numbers
# mean nothing in a copy or in another process.
_switches: WeakKeyDictionary[nn.Module, deque[tuple[int, Any]]] = WeakKeyDictionary()
# By layer, the state that a switch inside a backward pass gave it, and the innermost graph task then.
_inside: WeakKeyDictionary[nn.Module, tuple[int, Any]] = WeakKeyDictionary()
# By layer, the state found last for a call run again.
_found: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
# Those that called a layer since the last call outside; and whether a layer was switched in them.
_tasks = GraphTasks()
_switched_in_task = False


def _enter_task() -> bool:
    global _switched_in_task
    if not _tasks.open:
        _switched_in_task = False
    return _tasks.enter(_inside.clear)


def change(layer: nn.Module, **fields) -> None:
    """Set these fields of `layer`'s state, for the calls from here on."""
    before, after = layer._state, layer._state._replace(**fields)
    _note_switch(layer, before, after)
    layer._state = after


def _note_switch(layer: nn.Module, before: State, after: State) -> None:
    global _switched_in_task
    if in_backward():
        # Part of what is run again, which replays it: it counts for the calls after it there and for nothing else.
        _enter_task()
        _switched_in_task = True
        _inside[layer] = (torch._C._current_graph_task_id(), after)
    elif before != after:
        _switches.setdefault(layer, deque(maxlen=_KEPT)).append((torch.autograd._get_sequence_nr(), before))


def rewrite_past(layer: nn.Module, change: Callable[[State], State]) -> None:
    """Let the states that `layer` had before be what `change` makes of them."""
    past = _switches.get(layer, ())
    for i, (first, before) in enumerate(past):
        past[i] = first, change(before)


def switch(layer: nn.Module, **fields) -> tuple:
    """Set these fields of `layer`'s state; what `switch_back` takes."""
    before = ({name: getattr(layer._state, name) for name in fields}, _inside.get(layer))
    change(layer, **fields)
    return before


def switch_back(layer: nn.Module, before: tuple) -> None:
    """Undo a `switch`."""
    fields, inside = before
    change(layer, **fields)
    if inside is not None:
        _inside[layer] = inside
    else:
        # What is run again from here on has the state of its first run, which need not be the one set now.
        _inside.pop(layer, None)


def state_of_call(layer: nn.Module, now: State) -> State:
    """The state for a call of `layer`, where it is `now`.

    Raises:
        RuntimeError: which state the first run had cannot be told: see the messages.
    """
    if torch.compiler.is_compiling():
        return now
    if not in_backward():
        if _tasks.open:
            _tasks.open.clear()
            _inside.clear()
        return now
    if layer not in _switches and layer not in _inside:
        return now
    nested = _enter_task()
    task, state = _inside.get(layer, (-1, now))
    if task != torch._C._current_graph_task_id():
        state = _state_then(layer, torch._C._current_autograd_node()._sequence_nr(), now)
    # Inside another task the node was made when the outer checkpoint was run again, and its number says nothing; but that run
    # has just called each layer of the inner one. After a task that failed it is the other way round. Both must agree.
    if nested and (_switched_in_task or state != _found.get(layer, now)):
        raise RuntimeError(
            "adapters were switched between a forward pass and this backward pass, and which state they had in what is run "
            "again cannot be told, inside another backward pass (of re-entrant checkpoints inside one another: pass "
            "use_reentrant=False) or after one that failed (call the model first)"
        )
    _found[layer] = state
    return state


def _state_then(layer: nn.Module, number: int, now: State) -> State:
    switches = _switches.get(layer, ())
    if len(switches) == _KEPT and number < switches[0][0]:
        raise RuntimeError(
            f"a checkpointed forward pass is run again after {_KEPT} or more switches of its adapters: which state it had is "
            "forgotten; call backward earlier"
        )
    return next((before for first, before in switches if number < first), now)
