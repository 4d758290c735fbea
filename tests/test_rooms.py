"""Imports run one way through the rooms, cost little, and work on a machine without triton and what is optional."""

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


def test_importing_the_package_costs_little():
    """It loads nothing but itself and what reads its files, and asks neither the environment nor a device."""
    run(
        """
        import os, sys, torch
        before, reads = set(sys.modules), []
        get = os._Environ.__getitem__
        os._Environ.__getitem__ = lambda self, key: reads.append(key) or get(self, key)
        torch.cuda.is_available = torch.cuda.get_device_properties = lambda *a: reads.append("cuda")
        import allora_kernels
        assert not reads, reads
        loaded = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
        assert loaded == {"allora_kernels", "safetensors"}, loaded
        """
    )


def test_the_package_works_where_only_its_needs_but_triton_are_installed(tmp_path):
    """As on a Mac: models are adapted, trained, saved and loaded, with several adapters, in groups and per sample."""
    run(
        f"""
        import importlib.util, sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("triton", "transformers", "peft", "typer", "rich"):
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
        sys.meta_path.insert(0, Missing())
        import torch, allora_kernels as ours

        def model():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

        trained, x, target = model(), torch.randn(4, 6), torch.randn(4, 3)
        ours.apply_allora(trained, r=2)
        ours.add_adapter(trained, "b", r=3)
        factors = ours.adapter_parameters(trained, "default") + ours.adapter_parameters(trained, "b")
        optimizer, losses = torch.optim.AdamW(factors, lr=0.02), []
        for _ in range(10):
            with ours.per_sample.record(trained), ours.adapter_rows(trained, ["default", "b", "b", None]):
                loss = (trained(x) - target).square().mean()
                loss.backward()
            assert ours.per_sample.norms(trained).shape == (4,)
            ours.per_sample.clip_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], losses
        assert "not installed" in trained[0].explain().reason, trained[0].explain()

        ours.save_adapter(trained, {str(tmp_path)!r}, adapter="default")
        loaded = model()
        ours.load_adapter(loaded, {str(tmp_path)!r})
        assert torch.equal(loaded(x), trained(x)) and not torch.equal(loaded(x), model()(x))

        weight, a, b = (torch.randn(2, *size, requires_grad=True) for size in ((3, 6), (2, 6), (3, 2)))
        ours.grouped_linear(x, weight.detach(), None, a, b, torch.tensor([1, 4], dtype=torch.int32)).sum().backward()
        assert a.grad.any() and b.grad.any()
        assert not {{"triton", "csrc_triton"}} & set(sys.modules)
        """
    )
