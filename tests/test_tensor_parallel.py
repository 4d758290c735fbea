"""Layers cut over two and four processes, by torch's own plans and otherwise, compute what one process computes."""

from functools import partial

import pytest
import torch
from torch import nn

from allora_kernels import FusedALLoRALinear, per_sample, reference
from allora_kernels.layer import functional

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import two_layers  # noqa: E402
from processes import SINCE_TORCH_2_13, run_checks  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from two_layers import whole  # noqa: E402

from allora_kernels.integrations.tensor_parallel import RowwiseALLoRA  # noqa: E402

# Four processes have 3, 3, 3 and 1 of N's ten rows. No two numbers of the same tensor are alike.
ROWS, K, HIDDEN, N, R = 6, 12, 20, 10, 3
assert_same = partial(two_layers.assert_same, rtol=1e-4, atol=1e-5)
FACTORS = ("0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B")
BACKENDS = ("eager", "triton")

PLANS = {
    "torch's": lambda: {"0": ColwiseParallel(), "2": RowwiseParallel()},
    "ours": lambda: {"0": ColwiseParallel(), "2": RowwiseALLoRA()},
    "each gathered": lambda: {
        "0": RowwiseALLoRA(input_layouts=Replicate()),
        "2": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    },
}


def make_model(norm, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, N)).to(dtype)
    for i in (0, 2):
        model[i] = FusedALLoRALinear.from_linear(model[i], R, norm=norm, adapter_dtype=torch.float32)
        nn.init.normal_(model[i].lora_B)
    return model


def make_x(dtype=torch.float32):
    return torch.randn(ROWS // 2, 2, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model, x):
    """y, and after one optimizer step every gradient and the factors, whole."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    parameters = dict(model.named_parameters())
    torch.optim.AdamW([parameters[name] for name in FACTORS], lr=0.1).step()
    found = {"y": y, "dx": x.grad}
    for name in FACTORS:
        found |= {f"d{name}": parameters[name].grad, name: parameters[name]}
    return {name: whole(t) for name, t in found.items()}


def use(backend, patch):
    """Let the calls of this process take `backend`."""
    patch.setenv("TRITON_INTERPRET", str(int(backend == "triton")))


# --- what the processes check; each takes a folder they share --------------------------------------------------------


def check_plan(backend, norm, plan, _):
    with pytest.MonkeyPatch.context() as patch:
        use("eager", patch)
        expected = step(make_model(norm), make_x())
        use(backend, patch)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = parallelize_module(make_model(norm), mesh, PLANS[plan]())
        explanation = model[0].explain()
        assert explanation.backend == backend
        n, k = model[0].weight.to_local().shape
        assert explanation.plan == FusedALLoRALinear(k, n, r=R, norm=norm).explain().plan
        assert_same(step(model, make_x()), expected)


def check_16_bit_base(backend, autocast, _):
    dtype = torch.float32 if autocast else torch.bfloat16
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = []
    with pytest.MonkeyPatch.context() as patch:
        use(backend, patch)
        for plan in (None, PLANS["ours"]()):
            model = make_model("row", dtype)
            model = model if plan is None else parallelize_module(model, mesh, plan)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append(step(model, make_x(dtype)))
    expected, ours = results
    # AdamW's first step is a sign; the factors after it say nothing of how near the two are.
    for name in ("y", "dx", *(f"d{name}" for name in FACTORS)):
        assert ours[name].dtype == expected[name].dtype
        assert (ours[name] - expected[name]).double().norm() < 0.03 * expected[name].double().norm(), name


def check_compiled(backend, _):
    with pytest.MonkeyPatch.context() as patch:
        use("eager", patch)
        expected = step(make_model("row"), make_x())
        use(backend, patch)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = parallelize_module(make_model("row"), mesh, PLANS["ours"]())
        model.compile(backend="aot_eager", fullgraph=True)
        assert_same(step(model, make_x()), expected)


def check_rows(backend, norm, _):
    """Weights whole and the rows of x cut; of four processes the last has none."""
    with pytest.MonkeyPatch.context() as patch:
        use("eager", patch)
        expected = step(make_model(norm), make_x())
        use(backend, patch)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = parallelize_module(make_model(norm), mesh, {})
        for layer in (model[0], model[2]):
            spread(layer, mesh, {})
        found = step(model, distribute_tensor(make_x(), mesh, [Shard(0)]))
        assert_same(found, expected)


def spread(layer, mesh, placements):
    """Make DTensors of the layer's parameters, those without an entry whole everywhere."""
    for name, p in list(layer.named_parameters()):
        t = distribute_tensor(p.detach(), mesh, placements.get(name, [Replicate()] * mesh.ndim))
        setattr(layer, name, nn.Parameter(t, requires_grad=p.requires_grad))


def check_a_bias_that_is_cut_otherwise(_):
    """As torch's ColwiseParallel leaves the layers of GPT-2, whose weights it cuts over K."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model("row")
    for layer in (model[0], model[2]):
        spread(layer, mesh, {"weight": [Shard(1)], "lora_A": [Shard(1)], "bias": [Shard(0)]})
    assert_same(step(model, distribute_tensor(make_x(), mesh, [Replicate()])), step(make_model("row"), make_x()))


def check_a_mesh_of_two_dimensions(backend, norm, _):
    with pytest.MonkeyPatch.context() as patch:
        use("eager", patch)
        expected = step(make_model(norm), make_x())
        use(backend, patch)
        mesh = init_device_mesh("cpu", (2, 2))
        model = make_model(norm)
        by_n, by_k = [Shard(0), Replicate()], [Replicate(), Shard(1)]
        spread(model[0], mesh, {"weight": [Shard(0), Shard(1)], "lora_A": by_k, "lora_B": by_n, "bias": by_n})
        spread(model[2], mesh, {"weight": by_k, "lora_A": by_k})
        assert_same(step(model, distribute_tensor(make_x(), mesh, [Replicate(), Shard(2)])), expected)


def check_sharded_data_parallel_beside_it(norm, _):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    expected = step(make_model(norm), torch.cat([make_x()] * 2))
    model = parallelize_module(make_model(norm), mesh["tensor"], PLANS["ours"]())
    fully_shard(model, mesh=mesh["data"])
    found = step(model, make_x())
    # Each of the two has half of the rows, and gradients are averaged.
    for name in FACTORS:
        torch.testing.assert_close(2 * found[f"d{name}"], expected[f"d{name}"], rtol=1e-4, atol=1e-5)


class Collectives(TorchDispatchMode):
    """The sizes of what crosses between processes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and not func.__name__.startswith(("wait", "_wrap")):
            self.sizes.append(args[0].numel())
        elif func.namespace == "c10d":
            self.sizes += [t.numel() for t in args[0]]
        return func(*args, **(kwargs or {}))


def check_what_crosses(norm, rowwise, expected, _):
    """Forward and backward of one layer, y and dX left as the parts they are made in."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = FusedALLoRALinear(K, HIDDEN, r=R, norm=norm)
    layouts = {"output_layouts": Partial()} if rowwise else {}
    style = (RowwiseALLoRA if rowwise else ColwiseParallel)(use_local_output=False, **layouts)
    parallelize_module(layer, mesh, style)
    if not rowwise:
        layer.lora_A = nn.Parameter(layer.lora_A.detach().redistribute(placements=[Replicate()]))
    x = distribute_tensor(make_x().flatten(0, 1), mesh, style.desired_input_layouts).requires_grad_()
    g = distribute_tensor(torch.ones(ROWS, HIDDEN), mesh, [Replicate() if rowwise else Shard(1)])
    with Collectives() as seen:
        y = layer(x)
        torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], g)
    assert sorted(seen.sizes) == sorted(expected), seen.sizes


def check_torchs_columns_send_no_more(norm, _):
    """ColwiseParallel cuts lora_A too, between its rows: they are gathered, and their gradients' sums cut again."""
    world = dist.get_world_size()
    layer = FusedALLoRALinear(K, HIDDEN, r=R, norm=norm)
    parallelize_module(layer, init_device_mesh("cpu", (world,)), ColwiseParallel())
    with Collectives() as seen:
        layer(make_x()).sum().backward()
    assert 0 < max(seen.sizes) <= K * world * -(-R // world)


def check_mistakes(_):
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    layer = parallelize_module(FusedALLoRALinear(K, HIDDEN, r=R), mesh, ColwiseParallel())
    whole_x = distribute_tensor(make_x(), mesh, [Replicate()])

    def call(x=whole_x, sink=None, **changed):
        tensors = dict(layer.named_parameters()) | changed
        return functional.apply(x, *tensors.values(), 2.0, "row", sink=sink)

    with pytest.raises(ValueError, match="x must be a DTensor as weight, bias, lora_A, lora_B are: parallelize_module"):
        call(x=make_x())
    plain = {name: p.full_tensor().detach() for name, p in layer.named_parameters()}
    with pytest.raises(ValueError, match="weight, bias, lora_A, lora_B must be a DTensor as x are"):
        call(**plain)
    with pytest.raises(ValueError, match=r"lora_A is on .* but weight is on .*; use one mesh"):
        other = init_device_mesh("cpu", (1, world))
        call(lora_A=distribute_tensor(plain["lora_A"], other, [Replicate()] * 2))
    with pytest.raises(ValueError, match=r"weight must be placed by Shard\(0\), Shard\(1\) or Replicate\(\), got P"):
        call(weight=DTensor.from_local(plain["weight"], mesh, [Partial()]))
    narrow = parallelize_module(FusedALLoRALinear(K, world - 1, r=R), mesh, ColwiseParallel())
    with pytest.raises(ValueError, match=rf"weight \[{world - 1}, {K}\] cannot be cut along dimension 0 .*no part"):
        narrow(make_x())
    several = FusedALLoRALinear(K, HIDDEN, r=R)
    several.add_named_adapter("b", R, 2.0, "row")
    for style in (ColwiseParallel(), RowwiseParallel(), RowwiseALLoRA()):
        with pytest.raises(ValueError, match="'default', 'b' cannot be cut by tensor parallelism: use DistributedData"):
            parallelize_module(several, mesh, style)
        several(torch.ones(1, K))
    with (
        pytest.raises(ValueError, match=r"per_sample.record takes no gradients of DTensors"),
        per_sample.record(nn.Sequential(layer)) as _,
    ):
        layer(make_x())
    with pytest.raises(
        TypeError, match="RowwiseALLoRA is for FusedALLoRALinear, got Linear: for a plain layer use torch's Rowwise"
    ):
        parallelize_module(nn.Linear(K, N), mesh, RowwiseALLoRA())


# How many numbers a process sends; the same for any number of processes.
COLUMNS = {"row": [], "matrix": [R * R], "factor": [], "entry": [], "token": [R * R], None: []}
ROWWISE = {"row": [R * R], "matrix": [R * R], "factor": [R], "entry": [], "token": [], None: []}
TWO = {
    "mistakes": check_mistakes,
    "a bias cut otherwise": check_a_bias_that_is_cut_otherwise,
    **{f"{b}, compiled": partial(check_compiled, b) for b in BACKENDS if SINCE_TORCH_2_13},
    **{f"{b}, autocast={a}": partial(check_16_bit_base, b, a) for b in BACKENDS for a in (False, True)},
    **{f"crosses rowwise, {n}": partial(check_what_crosses, n, True, [ROWS * R, *c]) for n, c in ROWWISE.items()},
    **{f"crosses columnwise, {n}": partial(check_what_crosses, n, False, [R * K, *c]) for n, c in COLUMNS.items()},
    "crosses torch's columnwise": partial(check_torchs_columns_send_no_more, "token"),
    **{f"eager, {n}, {p} plan": partial(check_plan, "eager", n, p) for n in reference.NORMS for p in PLANS},
    **{f"triton, {n}, our plan": partial(check_plan, "triton", n, "ours") for n in reference.NORMS},
}
FOUR = {
    **{f"eager, {n}, {p} plan": partial(check_plan, "eager", n, p) for n in ("row", "token") for p in PLANS},
    **{f"triton, {n}, torch's plan": partial(check_plan, "triton", n, "torch's") for n in reference.NORMS[::2]},
    **{f"{b}, rows of x": partial(check_rows, b, "token") for b in BACKENDS},
    **{f"{b}, 2 x 2": partial(check_a_mesh_of_two_dimensions, b, "factor") for b in BACKENDS},
    "eager, 2 x 2, matrix": partial(check_a_mesh_of_two_dimensions, "eager", "matrix"),
    "data x tensor": partial(check_sharded_data_parallel_beside_it, "row"),
}


@pytest.mark.parametrize("world, checks", [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_what_the_processes_compute_is_what_one_does(world, checks, tmp_path):
    run_checks(world, checks, tmp_path)
