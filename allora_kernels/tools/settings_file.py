"""A command's settings from a YAML or TOML file."""

import difflib
import re
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any


def read_settings(path: str, known: Collection[str]) -> dict[str, Any]:
    """The settings of a ``.yaml``, ``.yml`` or ``.toml`` file, one a key; a key may have dashes for underscores.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, cannot be read, is no mapping, or has a key that is not `known`, or one twice.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such settings file: {path}")
    if file.suffix in (".yaml", ".yml"):
        found = _yaml(file)
    elif file.suffix == ".toml":
        found = _toml(file)
    else:
        raise ValueError(f"a settings file must end in .yaml, .yml or .toml, got {path}")
    return check_settings(found, known, path)


def check_settings(found: Any, known: Collection[str], where: str) -> dict[str, Any]:
    """`found` with underscores for the dashes of its keys; ValueError as `read_settings`, saying `where`."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} must have one setting a line, such as 'r: 16'")
    settings = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"{where}: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if name in settings:
            raise ValueError(f"{where} has {name!r} twice")
        settings[name] = value
    return settings


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from None


def _yaml(file: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if repeated := [key for key, count in keys.items() if count > 1]:
                raise ValueError(f"{file} has {repeated[0]!r} twice")
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 1e-3 for a word.
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(_text(file), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None


def _toml(file: Path) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise ValueError(f"{file}: TOML needs Python 3.11; write it as YAML")
    import tomllib

    try:
        return tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
