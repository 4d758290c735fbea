"""However A and B are written, the next gradient is that of the values they have then."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from allora_kernels import FusedALLoRALinear, reference
from allora_kernels.reference import WEIGHT_NORMS

X, G = torch.randn(4, 7), torch.randn(4, 5)


def make_layer(norm="row"):
    torch.manual_seed(0)
    layer = FusedALLoRALinear(7, 5, r=3, norm=norm)
    nn.init.normal_(layer.lora_B)
    return layer


def assert_fresh(layer):
    """The layer's gradients are those of a layer that never had other values."""
    layer.zero_grad()
    layer(X).backward(G)
    leaves = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B)]
    y = reference.allora_linear(X, layer.weight, layer.bias, *leaves, eta=layer.eta, norm=layer.norm)
    for ours, expected in zip((layer.lora_A.grad, layer.lora_B.grad), torch.autograd.grad(y, leaves, G)):
        torch.testing.assert_close(ours, expected)


def in_place(layer):
    with torch.no_grad():
        layer.lora_A.mul_(3)


def data_in_place(layer):
    layer.lora_B.data.add_(layer.lora_B.grad, alpha=-0.5)


def data_copied(layer):
    layer.lora_B.data.copy_(3 * layer.lora_B)


def data_replaced(layer):
    layer.lora_B.data = 3 * layer.lora_B.data


def storage_set(layer):
    with torch.no_grad():
        layer.lora_B.set_(3 * layer.lora_B)


def numpy_view(layer):
    layer.lora_B.detach().numpy()[:] *= 3


def state_dict_tensor(layer):
    layer.state_dict()["lora_B"].mul_(3)


def swapped(layer):
    torch.utils.swap_tensors(layer.lora_B, nn.Parameter(3 * layer.lora_B.detach()))


def replaced(layer):
    layer.lora_B = nn.Parameter(3 * layer.lora_B.detach())


def loaded(layer):
    layer.load_state_dict({name: 3 * t for name, t in layer.state_dict().items()})


def loaded_by_assignment(layer):
    layer.load_state_dict({name: 3 * t for name, t in layer.state_dict().items()}, assign=True)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)


def flat_vector(layer):
    """`vector_to_parameters` makes the parameters views of the vector, which is then updated in place."""
    parameters = [layer.lora_A, layer.lora_B]
    flat = nn.utils.parameters_to_vector(parameters).detach().clone()
    nn.utils.vector_to_parameters(flat, parameters)
    assert_fresh(layer)
    flat.mul_(3)


class ForeignOptimizer:
    """No `torch.optim.Optimizer`: torch's hooks do not see its steps."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        for p in self.parameters:
            p.data.sub_(0.5 * p.grad)


def foreign_optimizer(layer):
    ForeignOptimizer([layer.lora_A, layer.lora_B]).step()


def torch_optimizer(layer):
    torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.5).step()


def inference_mode_buffer(layer):
    with torch.inference_mode():
        layer.lora_B.data.mul_(3)


def other_dtype_and_back(layer):
    layer.to(torch.bfloat16).to(torch.float32)


def reset(layer):
    layer.reset_adapter()


def other_eta(layer):
    layer.eta = 0.3


WRITES = [
    in_place,
    data_in_place,
    data_copied,
    data_replaced,
    storage_set,
    numpy_view,
    state_dict_tensor,
    swapped,
    replaced,
    loaded,
    loaded_by_assignment,
    flat_vector,
    foreign_optimizer,
    torch_optimizer,
    inference_mode_buffer,
    other_dtype_and_back,
    reset,
    other_eta,
]


@pytest.mark.parametrize("norm", WEIGHT_NORMS)
@pytest.mark.parametrize("write", WRITES)
def test_any_write_reaches_the_next_gradient(write, norm):
    layer = make_layer(norm)
    assert_fresh(layer)
    for _ in range(2):
        write(layer)
        assert_fresh(layer)


def test_a_change_of_the_rule_reaches_the_next_gradient():
    layer = make_layer()
    for norm in (*reference.NORMS, "row"):
        layer.norm = norm
        assert_fresh(layer)


def test_a_collective_into_a_flat_buffer_reaches_the_next_gradient(tmp_path):
    """What sharding libraries do when they gather: the parameters view a buffer that a collective fills."""
    layer = make_layer()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        flat = torch.cat([layer.lora_A.detach().flatten(), layer.lora_B.detach().flatten()])
        layer.lora_A.data, layer.lora_B.data = flat[:21].view(3, 7), flat[21:].view(5, 3)
        assert_fresh(layer)
        torch.distributed.all_gather_into_tensor(flat, 3 * flat.clone())
        assert_fresh(layer)
    finally:
        torch.distributed.destroy_process_group()


def test_resharding_reaches_the_next_gradient(tmp_path):
    """FSDP2 frees and refills the gathered parameters around each pass, version counters untouched."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        layer, expected = make_layer(), make_layer()
        sharded = fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
        optimizers = [torch.optim.SGD([m.lora_A, m.lora_B], lr=0.5) for m in (sharded, expected)]
        for _ in range(3):
            for module, optimizer in zip((sharded, expected), optimizers):
                optimizer.zero_grad()
                module(X).backward(G)
                optimizer.step()
            for name in ("lora_A", "lora_B"):
                ours, plain = getattr(sharded, name), getattr(expected, name)
                torch.testing.assert_close(ours.grad.full_tensor(), plain.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_checkpointing_and_accumulation():
    layer, plain = make_layer(), make_layer()
    for reentrant in (False, True):
        x = X.clone().requires_grad_()
        for factor in (2, 0.5):
            for module in (layer, plain):
                module.lora_B.data.mul_(factor)
            checkpoint(layer, x, use_reentrant=reentrant).backward(G)
            plain(X).backward(G)
    torch.testing.assert_close(layer.lora_A.grad, plain.lora_A.grad)
    torch.testing.assert_close(layer.lora_B.grad, plain.lora_B.grad)


def test_a_copy_has_coefficients_of_its_own():
    layer = make_layer()
    assert_fresh(layer)
    other = copy.deepcopy(layer)
    in_place(other)
    assert_fresh(other)
    assert_fresh(layer)


@pytest.mark.parametrize("norm", reference.NORMS)
def test_it_is_computed_in_backward_passes_alone(norm, monkeypatch):
    calls, original = [], reference.weight_coefficient
    monkeypatch.setattr(reference, "weight_coefficient", lambda *args: calls.append(args) or original(*args))
    layer = make_layer(norm)
    y = layer(X)
    assert calls == []
    y.backward(G)
    assert len(calls) == (norm in WEIGHT_NORMS)
