"""What the modules of a model are called, where they hang, and which of their names a user's patterns match."""

import re
from collections.abc import Callable, Collection, Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """`model` without torch.compile's, data parallelism's, Opacus's and averaging's wrappers, whose prefixes do not belong in
    names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif type(model).__name__.startswith("GradSampleModule") and isinstance(model._module, nn.Module):
            model = model._module
        else:
            return model


def clean_name(name: str) -> str:
    """A module's or parameter's name without what compiling, checkpointing or sharding a part of the model puts in."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module but `model` itself: all the names it can be reached by, cleaned."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module is not model and clean_name(name) not in names.setdefault(module, []):
            names[module].append(clean_name(name))
    return names


def matcher(names: str | Collection[str], argument: str) -> Callable[[str], bool]:
    """Whether a name is one of `names` or ends in one, or is matched by the regular expression `names`."""
    if isinstance(names, str):
        pattern = _compile(names, argument)
        return lambda name: pattern.fullmatch(name) is not None
    names = name_list(names, argument)
    return lambda name: any(name == n or name.endswith(f".{n}") for n in names)


def name_list(names: Collection[str], argument: str) -> tuple[str, ...]:
    """`names` in a tuple; TypeError or ValueError where they cannot be names."""
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a list of module names, got {names!r}")
    if "" in names:
        raise ValueError(f"{argument} must not contain an empty name, got {names!r}")
    return tuple(names)


def is_excluded(exclude_modules: str | Collection[str] | None, names: Collection[str]) -> bool:
    """Whether `exclude_modules` names one of `names`."""
    return any(map(matcher(exclude_modules if exclude_modules is not None else (), "exclude_modules"), names))


def _compile(pattern: str, argument: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression: {error}") from None


def matches_end(pattern: str, name: str, argument: str) -> bool:
    """Whether the regular expression `pattern` matches all of `name`, or what follows one of its dots."""
    _compile(pattern, argument)
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_value(patterns: Mapping[str, object] | None, name: str, default, argument: str):
    """The value of the first of `patterns` that matches the end of a module's name, as PEFT reads rank_pattern."""
    if patterns is not None and not isinstance(patterns, Mapping):
        raise TypeError(f"{argument} must map regular expressions to values, got {type(patterns).__name__}")
    for pattern, value in (patterns or {}).items():
        if matches_end(pattern, name, argument):
            return value
    return default


def some(names: Collection[str], most: int = 6, separator: str = ", ") -> str:
    """The first `most` of `names`, for a message."""
    names = list(names)
    return separator.join(names[:most]) + (f"{separator}... ({len(names)} in all)" if len(names) > most else "")


def module_slots(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Each module below `model`: every (parent, attribute) it hangs at."""
    slots: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                slots.setdefault(child, []).append((parent, attribute))
    return slots
