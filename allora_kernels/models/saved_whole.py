"""`ModuleOfEachAdapter`: a module that is trained whole, once for each of several adapters."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layer import switching
from ..layer.adapter import CallState, forget_adapter, removed_since


class ModuleOfEachAdapter(nn.Module):
    """In the place of a module in `modules_to_save` while a model has several adapters: a copy of it for each.

    Its attributes are those of the active adapter's copy; in a batch whose samples name their adapters each copy computes its
    own samples.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.copies = nn.ModuleDict({name: module})
        self._state = CallState(adapter=name)
        # Not train(): parts of the module may be in another mode.
        self.training = module.training

    @property
    def active(self) -> nn.Module:
        """The active adapter's copy."""
        return self.copies[self._state.adapter]

    def forward(self, *args, **kwargs):
        _, name, rows = switching.state_of_call(self, self._state)
        if rows is not None:
            return rows.each(self, self.copies, args, kwargs)
        if name not in self.copies:
            raise removed_since(name)
        return self.copies[name](*args, **kwargs)

    def remove(self, name: str) -> None:
        """Remove the copy of an adapter that is not active."""
        forget_adapter(self, name)
        del self.copies[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "copies" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.active, name)


def copies_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of `modules`, with parameters of their own; what two of them share, their copies share."""
    memo: dict[int, Any] = {}
    return {name: copy.deepcopy(module, memo) for name, module in modules.items()}
