"""What a layer's call computes with (whether its adapter takes part, which one, whose rows): the state that is set, or in a
call that checkpointing runs again, the state that the first run had. States are compared by ``==``.

A call that a backward pass runs again is asked for by a node of the first run's graph. Each thread numbers its nodes as it
makes them, so the node's number against those at which its thread switched the layer tells the state then.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .graph_tasks import GraphTasks, in_backward

State = TypeVar("State")

_KEPT = 64


class _Thread:
    """What a thread's backward passes do to layers."""

    def __init__(self) -> None:
        # By layer, the state that a switch inside a backward pass gave it, and the innermost graph task then.
        self.inside: WeakKeyDictionary[nn.Module, tuple[int, Any]] = WeakKeyDictionary()
        # By layer, the state found last for a call run again.
        self.found: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        # Those that called a layer; and whether one was switched in them.
        self.tasks = GraphTasks()
        self.switched = False


class _Running(threading.local):
    # The threads of autograd's devices, which call layers in backward passes alone, share one: a graph task may run in several
    # of them, and none of them says whose task it is.
    thread = _Thread()


_running = _Running()
_OF_DEVICES = _running.thread

# By layer, the latest switches by each thread that called it since it was switched first: (number of the thread's first node
# after it, what held before). Not on the layer, because the numbers mean nothing in a copy or in another process.
_switches: WeakKeyDictionary[nn.Module, WeakKeyDictionary[_Thread, deque[tuple[int, Any]]]] = WeakKeyDictionary()


def _outside() -> _Thread:
    """The running thread, which runs no backward pass now."""
    if _running.thread is _OF_DEVICES:
        _running.thread = _Thread()
    return _running.thread


def _enter_task(thread: _Thread) -> bool:
    """Note the running graph task; True if it runs inside another one."""
    if not thread.tasks.open:
        # Of tasks that ended in an error.
        thread.inside.clear()
        thread.switched = False
    return thread.tasks.enter(thread.inside.clear)


def change(layer: nn.Module, **fields) -> None:
    """Set these fields of `layer`'s state, for the calls from here on."""
    before, after = layer._state, layer._state._replace(**fields)
    _note_switch(layer, before, after)
    layer._state = after


def _note_switch(layer: nn.Module, before: State, after: State) -> None:
    if in_backward():
        # Part of what is run again, which replays it: it counts for the calls after it there and for nothing else.
        thread = _running.thread
        _enter_task(thread)
        thread.switched = True
        thread.inside[layer] = (torch._C._current_graph_task_id(), after)
    elif before != after:
        by_thread = _switches.setdefault(layer, WeakKeyDictionary())
        by_thread.setdefault(_outside(), deque(maxlen=_KEPT)).append((torch.autograd._get_sequence_nr(), before))


def rewrite_past(layer: nn.Module, rewritten: Callable[[State], State]) -> None:
    """Let the states that `layer` had before be what `rewritten` makes of them."""
    for past in _switches.get(layer, {}).values():
        for i, (first, before) in enumerate(past):
            past[i] = first, rewritten(before)


def switch(layer: nn.Module, **fields) -> tuple:
    """Set these fields of `layer`'s state; what `switch_back` takes."""
    before = ({name: getattr(layer._state, name) for name in fields}, _running.thread.inside.get(layer))
    change(layer, **fields)
    return before


def switch_back(layer: nn.Module, before: tuple) -> None:
    """Undo a `switch`."""
    fields, inside = before
    change(layer, **fields)
    if inside is not None:
        _running.thread.inside[layer] = inside
    else:
        # What is run again from here on has the state of its first run, which need not be the one set now.
        _running.thread.inside.pop(layer, None)


def state_of_call(layer: nn.Module, now: State) -> State:
    """The state for a call of `layer`, where it is `now`.

    Raises:
        RuntimeError: which state the first run had cannot be told: see the messages.
    """
    if torch.compiler.is_compiling():
        return now
    if not in_backward():
        thread = _outside()
        if layer in _switches:
            _switches[layer].setdefault(thread, deque(maxlen=_KEPT))
        return now
    thread = _running.thread
    if layer not in _switches and layer not in thread.inside:
        return now
    nested = _enter_task(thread)
    task, state = thread.inside.get(layer, (-1, now))
    if task != torch._C._current_graph_task_id():
        state = _state_then(layer, thread, torch._C._current_autograd_node()._sequence_nr(), now)
    # Inside another task the node was made when the outer checkpoint was run again, and its number says nothing; but that run
    # has just called each layer of the inner one. Both must agree.
    if nested and (thread.switched or state != thread.found.get(layer, now)):
        raise RuntimeError(
            "adapters were switched between a forward pass and this backward pass, and which state they had in what is run "
            "again cannot be told inside another backward pass (of re-entrant checkpoints inside one another: pass "
            "use_reentrant=False)"
        )
    thread.found[layer] = state
    return state


def _state_then(layer: nn.Module, thread: _Thread, number: int, now: State) -> State:
    by_thread = _switches.get(layer, {})
    # A thread that calls the layer runs its own passes again. A device's may run any thread's.
    pasts = [by_thread[thread]] if thread in by_thread else list(by_thread.values())
    states = []
    for past in pasts:
        if len(past) == _KEPT and number < past[0][0]:
            raise RuntimeError(
                f"a checkpointed forward pass is run again after {_KEPT} or more switches of its adapters: which state it had "
                "is forgotten; call backward earlier"
            )
        states.append(next((before for first, before in past if number < first), now))
    if any(state != states[0] for state in states):
        raise RuntimeError(
            f"{len(states)} threads call one model whose adapters were switched between a forward pass and this backward pass, "
            "and which of them made what is run again cannot be told: call backward before you switch, in the thread of the "
            "forward pass"
        )
    return states[0] if states else now
