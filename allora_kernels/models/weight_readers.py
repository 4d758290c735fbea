"""Which modules take the weight of a layer below them and never call the layer, so that an adapter on it would have no effect,
as their source says. In doubt a layer is taken for one that is called."""

import ast
import functools
import inspect
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

_METADATA = frozenset(
    {"bias", "device", "dtype", "in_features", "is_meta", "ndim", "out_features", "requires_grad", "shape", "size"}
)
# What a weight may be handed to without its values being taken.
_LOOKS = frozenset({"hasattr", "isinstance", "to", "type", "type_as"})
_ANY = "*"
_EVERY_CHILD = frozenset({"_modules", "children", "modules", "named_children", "named_modules"})


class Use(NamedTuple):
    """What a module does with a layer below it, as far as its source is `known`: whether its forward pass takes the layer's
    weight for its values, and whether the layer may be called."""

    known: bool
    takes_weight: bool
    may_call: bool


class _ClassUse(NamedTuple):
    """What a class does with attributes of self: whose weight each method takes, which each mentions, methods among them; and
    which any method uses otherwise than for their weight, None where that may be any."""

    takes: dict[str, set[str]]
    methods: dict[str, set[str]]
    uses: set[str] | None


def use_of(parent: nn.Module, attribute: str) -> Use:
    """What `parent` does with the layer that is its `attribute`."""
    cls = type(parent)
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    sources = [_source(base.__module__) for base in bases]
    # Most modules are done with here, without a parser.
    if not any(f"self.{attribute}.weight" in source for source in sources):
        return Use(any(sources), False, True)
    found = [_uses_in_class(source, base.__qualname__) for source, base in zip(sources, bases)]
    if None in found:
        return Use(False, False, True)
    return Use(True, attribute in _taken_by_forward(found), any(c.uses is None or attribute in c.uses for c in found))


def _taken_by_forward(classes: list[_ClassUse]) -> set[str]:
    """The attributes whose weight `forward`, or a method that it calls, takes."""
    reached, taken = set(), set()
    waiting = ["forward"]
    while waiting:
        method = waiting.pop()
        if method not in reached:
            reached.add(method)
            for found in classes:
                taken |= found.takes.get(method, set())
                waiting += found.methods.get(method, set())
    return taken


def _source(module: str) -> str:
    """The source of a module as it is now, "" where there is none to be had."""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return _source_of(module, file, os.stat(file).st_mtime_ns)
    except (OSError, TypeError):
        return ""


@functools.lru_cache(maxsize=64)
def _source_of(module: str, file: str, changed: int) -> str:
    return inspect.getsource(sys.modules[module])


@functools.lru_cache(maxsize=64)
def _classes(source: str) -> dict[str, ast.ClassDef]:
    """The classes of a source, by their qualified names; those of functions are left out."""
    try:
        return dict(_classes_below(ast.parse(source), ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # It may have been changed since it was imported.
        return {}


def _classes_below(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from _classes_below(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _classes_below(child, prefix)


@functools.lru_cache(maxsize=1024)
def _uses_in_class(source: str, name: str) -> _ClassUse | None:
    """What the class of this name does; None where it is not found."""
    node = _classes(source).get(name)
    if node is None:
        return None
    parents = {child: above for above in ast.walk(node) for child in ast.iter_child_nodes(above)}
    found = _ClassUse({}, {}, set())
    for method in node.body:
        takes, methods = (kept.setdefault(getattr(method, "name", ""), set()) for kept in (found.takes, found.methods))
        for use in filter(_is_of_self, ast.walk(method)):
            methods.add(use.attr)
            if _takes_weight(use, parents):
                takes.add(use.attr)
            elif not _leaves_alone(use, parents):
                found.uses.add(use.attr)
    named = set(map(_named, ast.walk(node)))
    return found._replace(uses=None if _ANY in named else found.uses | named)


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _named(node: ast.AST) -> str:
    """The attribute of self that this names in another way than by a dot: ``getattr(self, "layer")``; `_ANY` where it may be
    any, as in ``getattr(self, name)`` and ``self.children()``; "" where it names none."""
    if _is_of_self(node):
        return _ANY if node.attr in _EVERY_CHILD else ""
    called = isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr" and len(node.args) > 1
    if not called or getattr(node.args[0], "id", None) != "self":
        return ""
    return node.args[1].value if isinstance(node.args[1], ast.Constant) else _ANY


def _takes_weight(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``self.layer`` is there for its weight's values."""
    weight = parents[node]
    if not (isinstance(weight, ast.Attribute) and weight.attr == "weight" and isinstance(weight.ctx, ast.Load)):
        return False
    above = parents[weight]
    if isinstance(above, ast.Attribute):
        return above.attr not in _METADATA
    return not _is_looked_at(weight, above)


def _leaves_alone(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``self.layer`` is there for something else than to be called or handed on."""
    above = parents[node]
    if isinstance(above, ast.Attribute):
        return above.attr == "weight" or above.attr in _METADATA
    return not isinstance(node.ctx, ast.Load) or _is_looked_at(node, above)


def _is_looked_at(node: ast.AST, above: ast.AST) -> bool:
    """Whether `node` is only compared, tested, or an argument of what takes no values."""
    if isinstance(above, ast.Call) and above.func is not node:
        return getattr(above.func, "id", getattr(above.func, "attr", None)) in _LOOKS
    tested = isinstance(above, (ast.If, ast.IfExp, ast.Assert)) and above.test is node
    return (
        tested
        or isinstance(above, (ast.Compare, ast.BoolOp))
        or (isinstance(above, ast.UnaryOp) and isinstance(above.op, ast.Not))
    )
