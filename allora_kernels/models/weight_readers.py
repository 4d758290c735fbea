"""What a module does with a layer below it, as its source says. Where it reads the layer's weight and does not call the layer,
an adapter on that would have no effect."""

import ast
import functools
import inspect
import sys
from typing import NamedTuple

from torch import nn

_OF_ITS_METADATA = frozenset({"device", "dtype", "is_meta", "ndim", "requires_grad", "shape", "size"})
_QUESTIONS = frozenset({"hasattr", "isinstance", "type"})


class Use(NamedTuple):
    """What a module's code does with a layer below it, as far as it is `known`: whether it takes the layer's weight for its
    values, but for when it initialises it, and whether it calls the layer, or hands it on to what may."""

    known: bool
    reads_weight: bool
    calls: bool


def use_of(parent: nn.Module, attribute: str) -> Use:
    """What `parent` does with the layer that is its `attribute`."""
    known, read, called = False, False, False
    cls = type(parent)
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        source = _source(base.__module__)
        known = known or bool(source)
        # Most classes are done with here, without a parser.
        if f"self.{attribute}.weight" in source:
            of_base = _uses_in_class(base.__module__, base.__qualname__)
            read, called = read or attribute in of_base[0], called or attribute in of_base[1]
    return Use(known, read, called)


@functools.lru_cache(maxsize=64)
def _source(module: str) -> str:
    """The source of a module, "" where there is none to be had."""
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


@functools.lru_cache(maxsize=64)
def _classes(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(_source(module)).body if isinstance(node, ast.ClassDef)}


@functools.lru_cache(maxsize=1024)
def _uses_in_class(module: str, name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The attributes of self whose weight the methods of a class read, and those that they use as a whole."""
    read, called = set(), set()
    methods = _classes(module)[name].body if name in _classes(module) else []
    for method in methods:
        if isinstance(method, ast.FunctionDef) and "init" not in method.name and "tie" not in method.name:
            parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
            for node in parents:
                if _is_attribute_of_self(node):
                    _note_use(node, parents, read, called)
    return frozenset(read), frozenset(called)


def _is_attribute_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _note_use(node: ast.Attribute, parents: dict, read: set[str], called: set[str]) -> None:
    user = parents[node]
    if isinstance(user, ast.Attribute):
        of_metadata = getattr(parents[user], "attr", None) in _OF_ITS_METADATA
        if user.attr == "weight" and isinstance(user.ctx, ast.Load) and not of_metadata:
            read.add(node.attr)
    elif not (isinstance(user, ast.Call) and getattr(user.func, "id", None) in _QUESTIONS):
        called.add(node.attr)
