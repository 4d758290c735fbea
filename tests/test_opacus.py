"""Opacus trains our layer in its own modes, with the numbers it gets from eager autograd and from `per_sample`."""

import contextlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

opacus = pytest.importorskip("opacus")
from opacus.validators.errors import UnsupportedModuleError  # noqa: E402

import allora_kernels.integrations.opacus  # noqa: E402
from allora_kernels import FusedALLoRALinear, WrappedALLoRALinear, apply_allora, per_sample, reference  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
]
B, T, K, N, R = 6, 3, 11, 5, 3
NOISE, MAX_NORM = 0.7, 0.9


class EagerALLoRA(nn.Module):
    """The layer as plain torch, which Opacus differentiates by itself (functorch)."""

    def __init__(self, like: FusedALLoRALinear):
        super().__init__()
        self.norm = like.norm
        self.frozen = [like.weight.detach(), like.bias.detach()]
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().clone()) for p in (like.lora_A, like.lora_B))

    def forward(self, x):
        return reference.allora_linear(x, *self.frozen, self.lora_A, self.lora_B, eta=1.5, norm=self.norm)


def layer(norm="row"):
    torch.manual_seed(0)
    made = FusedALLoRALinear(K, N, r=R, norm=norm, eta=1.5)
    nn.init.normal_(made.lora_B)
    return made


def data(rows=B):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, T, K, generator=generator), torch.randn(rows, T, N, generator=generator))


class Squares(nn.Module):
    """The mean over samples of the sum over a sample's entries; Opacus asks for it unreduced in the mode "ghost"."""

    reduction = "mean"

    def forward(self, y, target):
        per_sample_loss = ((y - target) ** 2).flatten(1).sum(1)
        return per_sample_loss if self.reduction == "none" else per_sample_loss.sum() / max(len(y), 1)


def loss_of(y, target):
    return Squares()(y, target)


def private_gradients(model, mode):
    """Clipped, noised gradients of one step of Opacus on all of `data`, by name."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = opacus.PrivacyEngine()
    kwargs = {"criterion": Squares()} if mode == "ghost" else {}
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(data(), batch_size=B), noise_multiplier=NOISE,
        max_grad_norm=MAX_NORM, poisson_sampling=False, grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(5), **kwargs,
    )  # fmt: skip
    wrapped, optimizer = made[0], made[1]
    x, target = data().tensors
    if mode == "ghost":
        made[2](wrapped(x), target).backward()
    else:
        loss_of(wrapped(x), target).backward()
    optimizer.pre_step()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def our_private_gradients(model, norms_only):
    """The same by `per_sample`: clip, add the noise that Opacus would draw, divide by the batch."""
    x, target = data().tensors
    with per_sample.record(model, norms_only=norms_only):
        # A sum, as DP bounds one sample's gradient and not its share of a mean.
        (loss_of(model(x), target) * B).backward()
    per_sample.clip_(model, MAX_NORM)
    generator = torch.Generator().manual_seed(5)
    return {
        name: (p.grad + torch.normal(0, NOISE * MAX_NORM, p.shape, generator=generator)) / B
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("norm", reference.NORMS)
def test_private_gradients_are_those_of_the_eager_layer(norm):
    expected = private_gradients(EagerALLoRA(layer(norm)), "functorch")
    found = {
        "hooks": private_gradients(layer(norm), "hooks"),
        "ghost": private_gradients(layer(norm), "ghost"),
        "clip_": our_private_gradients(layer(norm), False),
        "norms only": our_private_gradients(layer(norm), True),
    }
    for mode, grads in found.items():
        for name in expected:
            torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-5, msg=f"{mode} {name}")
    raw = layer(norm)
    with per_sample.record(raw):
        (loss_of(raw(data().tensors[0]), data().tensors[1]) * B).backward()
    assert (per_sample.norms(raw) > MAX_NORM).any(), "nothing was clipped, so nothing was tested"


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_wrapped_layer_has_the_fused_ones_private_gradients(mode):
    fused = layer()
    frozen = nn.Linear(K, N)
    frozen.load_state_dict({"weight": fused.weight, "bias": fused.bias})
    wrapped = WrappedALLoRALinear(frozen, R, 1.5)
    wrapped.load_state_dict({"lora_A": fused.lora_A, "lora_B": fused.lora_B}, strict=False)
    found = private_gradients(wrapped, mode)
    for name, expected in private_gradients(fused, mode).items():
        torch.testing.assert_close(found[name], expected)


def train(model, dataset, mode, criterion, forward):
    """One epoch of Poisson batches; the sizes they had."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    engine = opacus.PrivacyEngine()
    kwargs = {"criterion": criterion} if mode == "ghost" else {}
    wrapped, optimizer, *rest, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(dataset, batch_size=2), noise_multiplier=0.5,
        max_grad_norm=1.0, grad_sample_mode=mode, **kwargs,
    )  # fmt: skip
    criterion = rest[0] if rest else criterion
    sizes = []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    for x, target in loader:
        sizes.append(len(x))
        optimizer.zero_grad()
        criterion(forward(wrapped, x), target).backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in model.parameters())
    assert engine.get_epsilon(1e-3) > 0
    return sizes


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_real_model_trains(mode):
    from tiny_models import bert

    model = bert().train()
    apply_allora(model, r=2)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    ids = torch.randint(3, 30, (24, 6))

    def forward(model, x):
        # transformers' BERT itself cannot run on an empty batch: such a step sees one sample instead.
        return model(input_ids=x if len(x) else ids[:1]).logits[: len(x)]

    train(model, TensorDataset(ids, ids[:, 0] % 3), mode, nn.CrossEntropyLoss(), forward)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_poisson_sampling_with_empty_batches(mode):
    model = nn.Sequential(FusedALLoRALinear(K, 8, r=R), nn.Tanh(), FusedALLoRALinear(8, N, r=R)).train()
    sizes = train(model, data(40), mode, Squares(), lambda model, x: model(x))
    assert 0 in sizes and max(sizes) > 1, sizes


def refused(model, match):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModuleError, match=match):
        opacus.PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=DataLoader(data(), batch_size=B), noise_multiplier=1.0,
            max_grad_norm=1.0,
        )  # fmt: skip
    assert all(not hasattr(p, "grad_sample") for p in model.parameters())


def test_a_model_whose_adapters_would_silently_get_nothing_is_refused():
    model = nn.Sequential(layer(), nn.Tanh(), FusedALLoRALinear(N, N, r=R))
    model[2].eval()
    refused(model, "'2' is in eval mode")

    model = nn.Sequential(FusedALLoRALinear(K, K, r=R), FusedALLoRALinear(K, K, r=R))
    model[1].lora_B = model[0].lora_B
    refused(model, "layers '0' and '1' share an adapter")

    model = nn.Sequential(layer())
    model.gradient_checkpointing = True
    refused(model, "gradient checkpointing")

    class ReadsWeights(nn.Linear):
        def __init__(self):
            super().__init__(K, N)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(K, R, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(R, N, bias=False)})

        def forward(self, x):
            return super().forward(x) + x @ self.lora_A["default"].weight.T @ self.lora_B["default"].weight.T

    refused(nn.Sequential(ReadsWeights()), "ReadsWeights.*hooks on them never run")

    for norm in (nn.BatchNorm1d(T, affine=False), nn.BatchNorm1d(T, affine=False, track_running_stats=False).eval()):
        refused(nn.Sequential(layer(), norm), r"'1' \(BatchNorm1d\) normalizes each sample by the whole batch")

    class Above(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.position = layer(), nn.Parameter(torch.zeros(T, K))

        def forward(self, x):
            return self.layer(x + self.position)

    refused(
        Above(),
        "the model trains 'position' itself, so that Opacus would run all of it by functorch, layer 'layer' too",
    )

    class Another(FusedALLoRALinear):
        pass

    refused(nn.Sequential(Another(K, N, r=R)), "no grad sampler for Another, the class of layer '0'")


def private(model):
    return opacus.PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(data(), batch_size=B), noise_multiplier=NOISE, max_grad_norm=MAX_NORM, poisson_sampling=False,
    )[0]  # fmt: skip


def test_an_input_that_all_samples_share_is_refused_in_the_backward_pass():
    class WithPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer()

        def forward(self, x):
            return self.layer(x) + self.layer(x[:1] * 0 + 1)

    model = private(WithPositions())
    with pytest.raises(
        ValueError, match=rf"called on {B} samples and on an input that leads with 1 \(\[1, {T}, {K}\]\)"
    ):
        model(data().tensors[0]).square().sum().backward()


def test_adapter_rows_are_refused_in_the_backward_pass():
    model = nn.Sequential(nn.Linear(K, N))
    apply_allora(model, r=R, target_modules=["0"])
    wrapped = private(model)
    with allora_kernels.adapter_rows(model, ["default", None] * (B // 2)):
        y = wrapped(data().tensors[0])
        with pytest.raises(RuntimeError, match="Opacus sees no adapter_rows"):
            y.square().sum().backward()


def test_a_private_model_is_not_recorded_but_saved(tmp_path):
    model = nn.Sequential(nn.Linear(K, N))
    apply_allora(model, r=R, target_modules=["0"])
    wrapped = private(model)
    with pytest.raises(RuntimeError, match="is in a model that Opacus has made private"), per_sample.record(model):
        pass
    wrapped(data().tensors[0]).square().sum().backward()  # As before.
    allora_kernels.save_adapter(wrapped, tmp_path)
    other = nn.Sequential(nn.Linear(K, N))
    allora_kernels.load_adapter(other, tmp_path)
    assert torch.equal(other[0].lora_A, model[0].lora_A)


def test_the_package_does_not_import_opacus():
    code = "import sys, allora_kernels, allora_kernels.integrations; assert 'opacus' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("sampler", ["grad_sample", "norm_sample"])
def test_a_pass_with_the_adapter_disabled_has_no_per_sample_gradient(sampler):
    x, g = torch.randn(B, T, K, requires_grad=True), torch.randn(B, T, N)
    sample = getattr(allora_kernels.integrations.opacus, sampler)
    for enabled in (True, False):
        model, found = layer(), []
        model.max_batch_len = B  # As Opacus sets it in front of its samplers.
        with contextlib.nullcontext() if enabled else allora_kernels.disable_adapters(nn.ModuleList([model])):
            y = model(x)
        # As Opacus does, in a hook of the backward pass, which runs after the switch was taken back.
        y.register_hook(lambda _, found=found, model=model: found.append(sample(model, [x.detach()], g)))
        y.sum().backward()
        shapes = {p.shape for p in found[0].values()}
        assert len(found[0]) == 2 and all(shape[0] == B for shape in shapes)
        assert all(bool(t.any()) == enabled for t in found[0].values())
