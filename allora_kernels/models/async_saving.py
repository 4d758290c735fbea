"""Saving adapters while training goes on: the values are copied at once, a thread writes them."""

import atexit
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..layer.sharding import reshard
from .adapted import adapter_names, known_adapter
from .adapter_files import write_adapter
from .names import unwrap
from .saving import prepare_save, values_in_file
from .sharded import in_pieces

_lock = threading.Lock()
# The thread that began last: the next one waits for it, so that of two saves into one folder the later one stays.
_last: threading.Thread | None = None
# Saves that nobody has waited for: what went wrong in them is said when Python ends.
_unclaimed: "set[PendingSave]" = set()


class PendingSave:
    """What `save_adapters_async` began. A context manager, too, which waits at its end."""

    def __init__(self, files: list[tuple[str, Path, dict[str, Tensor], str]]) -> None:
        global _last
        self._files, self._problems = files, []
        with _lock:
            if _last is None:
                atexit.register(_say_what_was_lost)
            self._thread = threading.Thread(target=self._write, args=(_last,), name="save_adapters_async")
            _unclaimed.add(self)
            self._thread.start()
            _last = self._thread

    def _write(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        while self._files:
            name, folder, tensors, config = self._files.pop(0)
            try:
                write_adapter(folder, tensors, config)
            except BaseException as error:
                self._problems.append((f"adapter {name!r} was not saved into {folder}: {error}", error))

    @property
    def done(self) -> bool:
        """Whether nothing is left to write; `wait` then returns, or raises, at once."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when all folders are on disk. May be called again.

        Raises:
            OSError: an adapter could not be written, and which; the others are.
        """
        self._thread.join()
        with _lock:
            _unclaimed.discard(self)
        if self._problems:
            raise OSError("; ".join(text for text, _ in self._problems)) from self._problems[0][1]

    def __enter__(self) -> "PendingSave":
        return self

    def __exit__(self, *_) -> None:
        self.wait()


def save_adapters_async(
    model: nn.Module, folders: Mapping[str, str | os.PathLike], *, base_model_name_or_path: str | None = None
) -> PendingSave:
    """Save adapters of `model`, each into a folder of its own as `save_adapter` does, while training goes on.

    The values are copied to main memory before this returns, so that they are those of now whatever happens to the parameters
    next; a thread writes them. Each folder has the former adapter or the new one, whenever it is interrupted. Saves are written
    in the order in which they began. Python ends when they are written, and says then what went wrong in those that nobody
    waited for.

    Args:
        model: a model with one adapter or several.
        folders: the folder for each adapter, by its name.
        base_model_name_or_path: as in `save_adapter`.

    Returns:
        PendingSave: call its `wait()`, or use it in a ``with``.

    Raises:
        ValueError: as `save_adapter`; no folders, or one for two adapters; adapters are sharded. Nothing is written then.
        TypeError: `folders` is no mapping.
    """
    root = unwrap(model)
    if not isinstance(folders, Mapping):
        raise TypeError(f"folders must map adapters' names to folders, got {type(folders).__name__}")
    if not folders:
        raise ValueError(f"folders is empty: give a folder for each adapter to save, of {list(adapter_names(root))}")
    places: dict[Path, str] = {}
    for name, folder in folders.items():
        known_adapter(root, name)
        if (other := places.setdefault(Path(os.path.abspath(folder)), name)) != name:
            raise ValueError(f"adapters {other!r} and {name!r} cannot both be saved into {folder}: a folder holds one")
    reshard(root)
    prepared = [
        (name, Path(folder), *prepare_save(root, Path(folder), name, base_model_name_or_path))
        for name, folder in folders.items()
    ]
    for name, _, _, tensors in prepared:
        if any(map(in_pieces, tensors.values())):
            raise ValueError(
                f"adapter {name!r} is sharded, and all processes must gather it together: use save_adapter"
            )
    return PendingSave(
        [(name, folder, values_in_file(root, tensors), config) for name, folder, config, tensors in prepared]
    )


def _say_what_was_lost() -> None:
    problems = []
    for save in list(_unclaimed):
        try:
            save.wait()
        except OSError as error:
            problems.append(str(error))
    if problems:
        raise OSError("; ".join(problems))
