"""Triton's interpreter without the work that it repeats, and without a fault of version 3.9's.

For a launch it replaces what triton.language does by its own, and at every call of a device function it searches the whole
language again for what is left to replace: a third and more of the time of a kernel test. Here a launch searches once for
each module its functions are from.
"""

from triton.runtime import interpreter


def install() -> None:
    """For the rest of the process."""
    patch_language, run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    searched = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in searched:
            return interpreter._LangPatchScope()
        searched.add(module)
        return patch_language(function)

    def run_and_forget(self, *args, **kwargs):
        searched.clear()
        try:
            return run_grid(self, *args, **kwargs)
        finally:
            searched.clear()

    splat = interpreter.InterpreterBuilder.create_splat

    def splat_bool(self, shape, scalar):
        # Triton 3.9 makes integers of a condition, and then takes no integers for a mask.
        block = splat(self, shape, scalar)
        block.data = block.data.astype(scalar.data.dtype, copy=False)
        return block

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_and_forget
    interpreter.InterpreterBuilder.create_splat = splat_bool
