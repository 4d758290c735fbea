"""Imports run one way through the rooms, cost little, and work on a machine that has only torch."""

import ast
import graphlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room, which is a folder or a file on top, may import those it maps to. `allora_kernels` is the names that users import.
ROOMS = {
    "csrc_triton": set(),
    "reference": set(),
    "testing": set(),
    "layer": {"reference"},
    "per_sample": {"layer", "reference"},
    "groups": {"layer", "reference"},
    "models": {"groups", "layer", "reference"},
    "allora_kernels": {"layer", "groups", "per_sample", "models"},
    "integrations": {"models", "per_sample", "layer", "reference"},
    "training": {"models", "layer", "reference"},
    "tools": {"training", "integrations", "models", "layer", "reference", "testing"},
}
LOADS_KERNELS = {
    "allora_kernels.layer.batch_invariance",
    "allora_kernels.layer.ops",
    "allora_kernels.layer.vmap_rules",
    "allora_kernels.groups.ops",
    "allora_kernels.layer.explanation",
    "allora_kernels.per_sample.grouped_ops",
    "allora_kernels.per_sample.ops",
    "allora_kernels.tools.tune",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def our_imports(path):
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            submodules = [f"{base}.{alias.name}" for alias in node.names]
            names = [s if is_module(s) else base for s in submodules]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("allora_kernels", "csrc_triton"))


MODULES = [p for package in ("allora_kernels", "csrc_triton") for p in sorted((ROOT / package).rglob("*.py"))]


def room_of(module):
    parts = module.split(".")
    return parts[0] if parts[0] == "csrc_triton" or len(parts) == 1 else parts[1]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path):
    module, room = module_name(path), room_of(module_name(path))
    assert room in ROOMS, f"{module} has no place in ROOMS"
    for name in our_imports(path):
        target = room_of(name)
        if target == "csrc_triton":
            assert room == "csrc_triton" or module in LOADS_KERNELS, f"{module} imports {name}"
        else:
            assert target == room or target in ROOMS[room], f"{module} imports {name}, whose room is not below its own"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module_name(path): set(our_imports(path)) - {module_name(path)} for path in MODULES}
    # A package's own imports are what its names are, and its modules do not use them.
    packages = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    order = graphlib.TopologicalSorter({m: found - packages for m, found in graph.items() if m not in packages})
    order.prepare()


def run(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    run(
        """
        import sys, torch
        before = set(sys.modules)
        import allora_kernels
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"triton", "transformers", "csrc_triton", "peft", "typer", "rich", "matplotlib", "datasets", "opacus"}
        heavy |= {"bitsandbytes", "torchao"}
        assert not new & heavy, new & heavy
        """
    )


def test_importing_the_package_is_quick():
    seconds = run(
        """
        import time, torch
        start = time.perf_counter()
        import allora_kernels
        print(time.perf_counter() - start)
        """
    )
    assert float(seconds) < 0.5


def test_the_package_works_where_only_torch_is_installed():
    run(
        """
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("triton", "transformers", "peft", "typer", "rich"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
        sys.meta_path.insert(0, Missing())
        import torch, allora_kernels
        layer = allora_kernels.FusedALLoRALinear(4, 3)
        layer(torch.randn(2, 4)).sum().backward()
        assert "not installed" in layer.explain().reason, layer.explain()
        """
    )


def test_importing_the_package_reads_no_environment_and_no_device():
    run(
        """
        import os, torch
        reads = []
        get = os._Environ.__getitem__
        os._Environ.__getitem__ = lambda self, key: reads.append(key) or get(self, key)
        torch.cuda.is_available = torch.cuda.get_device_properties = lambda *a: reads.append("cuda")
        import allora_kernels
        assert not reads, reads
        """
    )
