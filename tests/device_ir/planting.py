"""Faults put into copies of the kernels' sources, for tests of the tests."""

import importlib
import importlib.util
import inspect
import itertools


def module(name):
    # The package has functions of its modules' names.
    return importlib.import_module(f"csrc_triton.{name}")


_copies = itertools.count()


def plant(name, old, new, folder, monkeypatch):
    """Put those of a copy in the place of module `name`'s kernels and launchers; in it `old` is `new` (or each of several)."""
    original = module(name)
    source = inspect.getsource(original)
    for before, after in [(old, new)] if isinstance(old, str) else zip(old, new):
        assert source.count(before) == 1, f"{before!r} has to be found once"
        source = source.replace(before, after)
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"csrc_triton._planted_{next(_copies)}", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    for key, value in vars(copy).items():
        if getattr(value, "__module__", None) == spec.name:
            monkeypatch.setattr(original, key, value)
