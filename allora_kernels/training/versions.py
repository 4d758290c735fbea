"""What is installed, for the record of a run."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "allora-kernels",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
)


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide a result; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
