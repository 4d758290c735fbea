"""The two files of an adapter in a folder that may hold others, replaced together by one rename; and what tensors are called.

A save writes both into a hidden folder and flushes them, and the rename of that folder to `_COMMITTED` is the save. Moving the
files to their places comes after. A save cut short before the rename changed nothing. One cut short after it left the new
pair for `adapter_file` to find and for the next save to move. In between the tensors are not in their place, so that a reader
that knows nothing of this finds an incomplete adapter, and never a new config beside old tensors.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..layer.adapter import FACTORS
from .whole_folder import whole_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What the names of all tensors begin with."""
_FACTOR = re.compile(rf"(.+)\.({'|'.join(FACTORS)})\.weight")
_COMMITTED = ".saved-adapter"
_UNFINISHED = ".saving-"


def factor_key(layer: str, factor: str) -> str:
    """What `factor`, lora_A or lora_B, of a layer is called after the `PREFIX`."""
    return f"{layer}.{factor}.weight"


def split_key(key: str) -> tuple[str, str] | None:
    """The layer and the factor of a `factor_key`; None of another tensor's key."""
    match = _FACTOR.fullmatch(key)
    return match and match.groups()


def adapter_file(folder: Path, name: str) -> Path:
    """Where the file `name` of the adapter in `folder` is: one of `CONFIG_FILE` and `WEIGHTS_FILE`, there or not."""
    committed = folder / _COMMITTED / name
    return committed if committed.exists() else folder / name


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: str) -> None:
    """Make these the adapter in `folder`. What interrupts it, a full disk, an exception or a power cut, leaves the former
    adapter or this one.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        _move_into_place(folder)
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        with whole_folder(folder / _COMMITTED, _UNFINISHED) as aside:
            save_file(dict(tensors), aside / WEIGHTS_FILE, metadata={"format": "pt"})
            (aside / CONFIG_FILE).write_text(config, encoding="utf-8")
            # safetensors makes files that only their owner can read, whatever the umask.
            shutil.copymode(aside / CONFIG_FILE, aside / WEIGHTS_FILE)
            for path in (aside / WEIGHTS_FILE, aside / CONFIG_FILE, aside):
                _flush(path)
        _flush(folder)
        _move_into_place(folder)


def _move_into_place(folder: Path) -> None:
    """Move what a save committed. Each step is on disk before the next, and the steps can be repeated from any point."""
    committed = folder / _COMMITTED
    if not committed.exists():
        return
    if (committed / CONFIG_FILE).exists():
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        _flush(folder)
        os.replace(committed / CONFIG_FILE, folder / CONFIG_FILE)
        _flush(folder)
    if (committed / WEIGHTS_FILE).exists():
        os.replace(committed / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        _flush(folder)
    committed.rmdir()


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Processes that save into one folder, as all those of a run may, do it one by one where the system can lock it."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
