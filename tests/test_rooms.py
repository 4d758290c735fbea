"""Imports run one way through the rooms, cost little, and work on a machine that has only torch."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import those above it. One that is not listed fails the test: find its place.
ROOMS = [
    "csrc_triton",
    "allora_kernels.reference",
    "allora_kernels.samples",
    "allora_kernels.sample_reference",
    "allora_kernels.vmap_rules",
    "allora_kernels.ops",
    "allora_kernels.sample_ops",
    "allora_kernels.backend",
    "allora_kernels.batch_invariance",
    "allora_kernels.explanation",
    "allora_kernels.functional",
    "allora_kernels.linear",
    "allora_kernels.forward_passes",
    "allora_kernels.recording",
    "allora_kernels.per_sample",
    "allora_kernels.selection",
    "allora_kernels.adapter_config",
    "allora_kernels.adapt",
    "allora_kernels.checkpoint",
    "allora_kernels",
    "allora_kernels.testing",
    "allora_kernels.timing",
    "allora_kernels.tune",
    "allora_kernels.layer_bench",
    "allora_kernels.integrations",
    "allora_kernels.integrations.opacus",
    "allora_kernels.data",
    "allora_kernels.finetune_config",
    "allora_kernels.base_model",
    "allora_kernels.loss_plot",
    "allora_kernels.progress",
    "allora_kernels.merged_model",
    "allora_kernels.doctor",
    "allora_kernels.finetune",
    "allora_kernels.cli",
]
LOADS_KERNELS = {
    "allora_kernels.batch_invariance",
    "allora_kernels.ops",
    "allora_kernels.vmap_rules",
    "allora_kernels.sample_ops",
    "allora_kernels.explanation",
    "allora_kernels.tune",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
            names = [s if (ROOT / s.replace(".", "/")).with_suffix(".py").exists() else base for s in submodules]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("allora_kernels", "csrc_triton"))


MODULES = [p for package in ("allora_kernels", "csrc_triton") for p in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path):
    module = module_name(path)
    room = "csrc_triton" if module.startswith("csrc_triton") else module
    assert room in ROOMS, f"{module} has no place in ROOMS"
    for name in our_imports(path):
        target = "csrc_triton" if name.startswith("csrc_triton") else name
        if target == "csrc_triton":
            assert room == "csrc_triton" or module in LOADS_KERNELS, f"{module} imports {name}"
        else:
            assert ROOMS.index(target) < ROOMS.index(room), f"{module} imports {name}, which stands below it"


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
