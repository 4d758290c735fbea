"""The folder that `hub/build.py` makes is a package by itself, works beside the installed library, and `kernels` loads it."""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
build = runpy.run_path(str(ROOT / "hub" / "build.py"))["build"]

# How the loader imports: from the path, under the metadata's id, with none of our packages to be found elsewhere.
ALONE = """
    import importlib.util, json, sys
    from pathlib import Path

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("allora_kernels", "csrc_triton", "safetensors", "transformers", "peft"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def load(variant):
        name = json.loads((Path(variant) / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, Path(variant) / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]
"""
CHECK = """
    import torch

    def check(package, backend):
        torch.manual_seed(0)
        layer = package.FusedALLoRALinear(24, 20, r=4)
        torch.nn.init.normal_(layer.lora_B)
        assert layer.explain(8).backend == backend, layer.explain(8)
        x = torch.randn(3, 8, 24, requires_grad=True)
        with package.per_sample.record(layer) as recorded:
            y = layer(x)
            y.square().sum().backward()
        y_alone = torch.nn.functional.linear(x, layer.weight + layer.lora_B @ layer.lora_A, layer.bias)
        torch.testing.assert_close(y, y_alone, rtol=1e-4, atol=1e-4)
        samples = [p.grad_sample for p in (layer.lora_A, layer.lora_B)]
        for p, grads in zip((layer.lora_A, layer.lora_B), samples):
            torch.testing.assert_close(grads.sum(0), p.grad, rtol=1e-3, atol=1e-3)
        plain = package.allora_linear(
            x.detach(), layer.weight, layer.bias, layer.lora_A, layer.lora_B, eta=layer.eta, norm=layer.norm
        )
        assert torch.equal(plain, y)
"""


def run(code, folder=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder)
    return folder


def test_each_variant_says_what_it_is(folder):
    ids = set()
    for backend in ("cuda", "rocm", "cpu"):
        metadata = json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["name"] == "allora-kernels"
        ids.add(metadata["id"])
    assert len(ids) == 3 and all(name.isidentifier() for name in ids)


def test_modules_import_each_other_relatively_and_nothing_but_torch_and_triton(folder):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((folder / "build" / "torch-cuda").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path}: {names}"


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_it_works_where_the_library_is_not_installed(folder, backend):
    variant = folder / "build" / "torch-cpu"
    code = f"sys.meta_path.insert(0, Missing())\ncheck(load({str(variant)!r}), {backend!r})"
    run(textwrap.dedent(ALONE) + textwrap.dedent(CHECK) + code, TRITON_INTERPRET=str(int(backend == "triton")))


def test_two_builds_and_the_installed_library_live_in_one_process(folder):
    code = f"""
import allora_kernels
packages = [allora_kernels, *(load({str(folder)!r} + f"/build/torch-{{name}}") for name in ("cpu", "cuda"))]
for package in packages:
    check(package, "triton")
assert len({{package.FusedALLoRALinear for package in packages}}) == 3
assert len([name for name in sys.modules if name.split(".")[-1] == "csrc_triton"]) == 3
"""
    run(textwrap.dedent(ALONE) + textwrap.dedent(CHECK) + code, TRITON_INTERPRET="1")


# After the snippets of docs/hub.md.
KERNELIZED = """
    check(allora, "triton")
    plain = Adapted()
    model[0].load_state_dict(plain.state_dict())
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    for module in (model, plain):
        module(x).square().sum().backward()
    # The rule is in the gradients: row i of dB is plain LoRA's times C_i.
    c = ((plain.lora_B @ plain.lora_A).norm(dim=1) + 1 / 4).rsqrt()
    torch.testing.assert_close(model[0].lora_B.grad, c[:, None] * plain.lora_B.grad, rtol=1e-3, atol=1e-3)
"""


def test_the_kernels_library_loads_it_and_kernelizes_by_it(tmp_path):
    # An import would find the folder tests/kernels.
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kernels is not installed: make test-hub brings it")
    build(tmp_path / "dist" / "hub")
    snippets = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "hub.md").read_text(), re.DOTALL | re.MULTILINE)
    code = "".join(map(textwrap.dedent, (CHECK, *snippets, KERNELIZED)))
    assert run(code, tmp_path, TRITON_INTERPRET="1") == "triton\n"
