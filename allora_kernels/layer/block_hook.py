"""`BlockHook`: a module's hook for the length of a ``with`` block."""

from collections.abc import Callable


class BlockHook:
    """Calls `run`. A copy of the module, here or in another process, is in no block, and the copy of its hook does nothing."""

    def __init__(self, run: Callable | None) -> None:
        self.run = run

    def __call__(self, *args) -> None:
        if self.run is not None:
            self.run(*args)

    def __reduce__(self):
        return type(self), (None,)
