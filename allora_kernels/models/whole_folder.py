"""A folder that is there with all that belongs into it, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(target: Path, prefix: str) -> Iterator[Path]:
    """A new folder beside `target`, its name with this `prefix`, to be filled inside; it takes `target`'s place by one rename,
    or where filling it fails is removed."""
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield aside
        # mkdtemp makes folders that only their owner can enter; this one may stay for others to read.
        aside.chmod(0o777 & ~_umask())
        os.replace(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
