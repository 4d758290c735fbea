"""``python hub/build.py FOLDER``: the layer and its kernels as a folder that the `kernels` library loads.

A package of the hub is imported from its path under a name of its own, several versions of it in one process. So its modules
import each other relatively, and the namespace of its `torch.library` ops is of this build alone. Both are written into the
copies; everything else is the source as it is. The rooms `models`, `training`, `tools` and `integrations`, which need more
than torch and Triton, stay out.
"""

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = {
    "allora_kernels/reference.py": "reference.py",
    "allora_kernels/layer": "layer",
    "allora_kernels/per_sample": "per_sample",
    "csrc_triton": "csrc_triton",
    "hub/package/__init__.py": "__init__.py",
    "hub/package/layers.py": "layers.py",
}
# The kernels run on the first two; on "cpu" the layer is eager torch.
BACKENDS = ("cuda", "rocm", "cpu")
# What `kernels` asks get_kernel for: raised when a name of hub/package/__init__.py goes or changes its meaning.
VERSION = 1


def sources() -> dict[str, str]:
    """The text of each module, by its path in the package."""
    found = {}
    for source, target in PARTS.items():
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            found[str(Path(target) / file.relative_to(path))] = file.read_text(encoding="utf-8")
    return found


def of_this_build(text: str, namespace: str) -> str:
    """A module's text, with the kernels imported from beside its folder and the ops in `namespace`."""
    text = re.sub(r"^(\s*)import csrc_triton$", r"\1from .. import csrc_triton", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)from csrc_triton\b", r"\1from ..csrc_triton", text, flags=re.MULTILINE)
    return re.sub(r'(?<=torch\.ops\.)allora\b|(?<=")allora(?="|::)', namespace, text)


def build(folder: Path) -> None:
    """Write ``build/torch-<backend>/`` under `folder`, in the place of what is there."""
    modules = sources()
    digest = hashlib.sha256(json.dumps(modules).encode()).hexdigest()[:10]
    for backend in BACKENDS:
        name = f"_allora_kernels_{backend}_{digest}"
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        for path, text in modules.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_text(of_this_build(text, name), encoding="utf-8")
        metadata = {"name": "allora-kernels", "id": name, "version": VERSION, "license": "Apache-2.0"}
        metadata |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
