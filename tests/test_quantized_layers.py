"""Adapters on the quantized layers of bitsandbytes and torchao, against fp64 with the weight that the layer multiplies by."""

import copy
import pickle

import pytest
import torch
from quantized import KINDS, K, N, R, check, plain_results, quantized, results, torchao, wrapped
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from allora_kernels import FusedALLoRALinear, WrappedALLoRALinear, apply_allora, disable_adapters, per_sample, reference
from allora_kernels.layer import bases

kinds = pytest.mark.parametrize("kind", KINDS)


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("kind", ["4bit nf4", "8bit", "int8"])
def test_every_rule(backend, kind, norm):
    check(wrapped(kind, norm), norm, torch.float32)


@kinds
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_every_kind_of_layer(kind, dtypes):
    check(wrapped(kind, "row", *dtypes), "row", dtypes[0])


@kinds
def test_it_is_written_to_in_place_and_says_so(kind):
    layer = wrapped(kind)
    kind_of = bases.kind_of(layer.base_layer)
    assert kind_of.split()[0] in ("bitsandbytes", "torchao")
    assert layer.explain().plan["y and dx"].startswith(f"{kind_of}, its own product")
    assert "in place" in str(layer.explain()) and f"on {kind_of}" in repr(layer)


@kinds
def test_a_new_adapter_changes_nothing(kind):
    base = quantized(kind, K, N)
    layer, x = WrappedALLoRALinear(copy.deepcopy(base), R), torch.randn(7, K)
    assert torch.equal(layer(x), base(x))
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), base(x))
    with disable_adapters(layer):
        assert torch.equal(layer(x), base(x))


@kinds
def test_what_would_read_the_quantized_weight_is_refused(kind):
    base = quantized(kind, K, N)
    with pytest.raises(TypeError, match="WrappedALLoRALinear"):
        FusedALLoRALinear.from_linear(base)
    model = nn.ModuleDict({"body": nn.Linear(K, K), "head": base})
    with pytest.raises(
        ValueError, match=r"modules_to_save: head has a .* whose weight is quantized and cannot be trained"
    ):
        apply_allora(model, modules_to_save=["head"])


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind, reentrant):
    layer, x, g = wrapped(kind), torch.randn(2, 7, K), torch.randn(2, 7, N)
    plain = plain_results(layer, x, g)
    x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(g)
    torch.testing.assert_close((y, x.grad, layer.lora_A.grad, layer.lora_B.grad), plain, rtol=0, atol=0)


@kinds
def test_autocast(kind):
    layer, x, g = wrapped(kind), torch.randn(2, 7, K), torch.randn(2, 7, N)
    exact = plain_results(layer, x, g)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype
    found = y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g.to(y.dtype))
    for ours, right in zip(found, exact):
        assert (ours.float() - right).norm() < 0.02 * right.norm()


@kinds
def test_copies(kind):
    layer, x, g = wrapped(kind), torch.randn(2, 7, K), torch.randn(2, 7, N)
    plain = plain_results(layer, x, g)
    torch.testing.assert_close(plain_results(copy.deepcopy(layer), x, g), plain, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bit" in kind])
def test_pickles(kind):
    layer, x, g = wrapped(kind), torch.randn(2, 7, K), torch.randn(2, 7, N)
    plain = plain_results(layer, x, g)
    torch.testing.assert_close(plain_results(pickle.loads(pickle.dumps(layer)), x, g), plain, rtol=0, atol=0)


def test_a_weight_of_torchao_is_not_pickled():
    with pytest.raises((RuntimeError, AttributeError)):
        pickle.dumps(wrapped("int8"))


@kinds
@pytest.mark.parametrize("norm", ["row", "token"])
def test_accumulated_micro_batches_are_one_batch(kind, norm):
    layer, x, g = wrapped(kind, norm), torch.randn(6, K), torch.randn(6, N)
    _, _, *whole = plain_results(layer, x, g)
    for rows, dy in zip(x.split(2), g.split(2)):
        layer(rows).backward(dy)
    torch.testing.assert_close([layer.lora_A.grad, layer.lora_B.grad], whole, rtol=1e-4, atol=1e-4)


@kinds
def test_grad_scaler_skips_an_overflow_and_goes_on(kind):
    layer, x = wrapped(kind), torch.randn(6, K)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(factor):
        before = layer.lora_B.detach().clone()
        scaler.scale(layer(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return not torch.equal(layer.lora_B, before)

    assert step(1.0) and not step(float("inf")) and step(1.0)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("kind", ["4bit nf4", "8bit", "int8"])
def test_torch_compile_without_a_graph_break(kind):
    layer, x, g = wrapped(kind), torch.randn(2, 7, K), torch.randn(2, 7, N)
    plain = plain_results(layer, x, g)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    y = compiled(x)
    torch.testing.assert_close((y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)), plain)


@pytest.mark.parametrize("kind", ["4bit nf4", "8bit", "int8", "int8 in groups", "float8", "int4"])
def test_torch_func(kind):
    layer, x = wrapped(kind), torch.randn(4, 7, K)
    factors = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}
    gradients = grad(lambda factors, x: functional_call(layer, factors, (x,)).sum(), argnums=(0, 1))
    if "bit" in kind:
        with pytest.raises(RuntimeError, match="must override the setup_context staticmethod"):
            gradients(factors, x)
        return
    _, dx, da, db = plain_results(layer, x, torch.ones(4, 7, N))
    torch.testing.assert_close(gradients(factors, x), ({"lora_A": da, "lora_B": db}, dx))
    by_sample, _ = vmap(gradients, in_dims=(None, 0))(factors, x)
    torch.testing.assert_close({name: t.sum(0) for name, t in by_sample.items()}, {"lora_A": da, "lora_B": db})


@pytest.mark.parametrize("kind", ["4bit nf4", "8bit", "int8"])
def test_per_sample_gradients_add_up(kind):
    layer, x, g = wrapped(kind), torch.randn(6, 7, K), torch.randn(6, 7, N)
    with per_sample.record(layer):
        layer(x).backward(g)
    for p in (layer.lora_A, layer.lora_B):
        assert p.grad_sample.shape == (6, *p.shape)
        torch.testing.assert_close(p.grad_sample.sum(0), p.grad)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_every_kind_of_layer_on_a_gpu(kind, dtypes):
    if kind.startswith("8bit"):
        pytest.skip("there these layers round x to 8 bits, so their weight alone does not tell what they compute")
    layer = wrapped(kind, "row", *dtypes, device="cuda")
    assert layer.explain().backend == "triton"
    check(layer, "row", dtypes[0])


@pytest.mark.gpu
@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("kind", ["8bit", "8bit with outliers"])
def test_8bit_layers_on_a_gpu(kind, norm):
    layer = wrapped(kind, norm, torch.float16, device="cuda")
    x = torch.randn(3, 7, K, device="cuda", dtype=torch.float16)
    g = torch.randn(3, 7, N, device="cuda", dtype=torch.float16)
    a, b = layer.lora_A, layer.lora_B
    frozen, frozen_dx = plain_results(WrappedALLoRALinear(copy.deepcopy(layer.base_layer), 1), x, g)[:2]
    y, dx, da, db = plain_results(layer, x, g)
    low_rank = x.float() @ a.mT @ b.mT
    torch.testing.assert_close(y.float(), frozen.float() + low_rank, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(dx.float(), frozen_dx.float() + g.float() @ b @ a, rtol=2e-3, atol=2e-2)
    zero = torch.zeros(N, K, device="cuda")
    _, _, *exact = results(
        lambda x, a, b: reference.allora_linear(x, zero.to(x.dtype), None, a, b, eta=1.5, norm=norm),
        *(t.double() for t in (x, a, b, g)),
    )
    for ours, right in zip((da, db), exact):
        assert (ours.double() - right).norm() < 1e-3 * right.norm()


# --- what would lose a gradient without a word ----------------------------------------------------------------------


def test_evaluating_leaves_a_4bit_layer_its_backward_pass():
    layer, x, g = wrapped("4bit nf4"), torch.randn(2, 7, K), torch.randn(2, 7, N)
    plain = plain_results(layer, x, g)
    with torch.no_grad():
        layer.eval()(x)
    torch.testing.assert_close(plain_results(layer.train(), x, g), plain, rtol=0, atol=0)


def test_a_4bit_layer_that_is_packed_for_the_cpu_is_refused():
    base = quantized("4bit nf4", K, N)
    if not getattr(base, "support_avx512bf16_for_cpu", False):
        pytest.skip("this CPU, or this bitsandbytes, packs nothing")
    with torch.no_grad():
        base.eval()(torch.randn(2, K))
    with pytest.raises(ValueError, match="packed for this CPU"):
        WrappedALLoRALinear(base)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_packed_weight_that_was_cast_is_refused(enabled):
    layer = wrapped("4bit stored as bf16")
    layer.enabled = enabled
    x = torch.randn(2, K)
    layer(x)
    weight = layer.base_layer.weight
    weight.data = weight.data.half()
    with pytest.raises(
        RuntimeError, match=r"packed weight was cast from torch.bfloat16 to torch.float16, which destroys it"
    ):
        layer(x)
    with pytest.raises(ValueError, match="packed weight was cast"):
        WrappedALLoRALinear(layer.base_layer)


@pytest.mark.parametrize("enabled", [True, False])
def test_casting_back_does_not_mend_a_packed_weight(enabled):
    layer = wrapped("4bit stored as bf16")
    layer.enabled = enabled
    model = nn.Sequential(layer)
    copy.deepcopy(model).to("cpu")(torch.randn(2, K))
    model.half().bfloat16()
    for damaged in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=r"was cast from torch.bfloat16 to torch.float16, which destroys it"):
            damaged(torch.randn(2, K, dtype=torch.bfloat16))


def test_a_weight_packed_into_bytes_survives_casts():
    model, x = nn.Sequential(wrapped("4bit nf4")), torch.randn(2, K)
    plain = model(x)
    torch.testing.assert_close(model.bfloat16().float()(x), plain, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("enabled", [True, False])
def test_doubles_that_a_4bit_layer_would_compute_wrong_are_refused(enabled):
    layer, x = wrapped("4bit nf4"), torch.randn(2, K, dtype=torch.float64)
    layer.enabled = enabled
    with pytest.raises(ValueError, match=r"x is torch.float64, for which bitsandbytes Linear4bit computes garbage"):
        layer(x)
    told = wrapped("4bit stored as bf16")
    told.enabled = enabled
    torch.testing.assert_close(told(x), told(x.float()).double(), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_not_quantized_yet_is_quantized_by_moving_it():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[quantized]'")
    layer = WrappedALLoRALinear(bnb.nn.Linear4bit(K, N, quant_type="nf4"), R).to("cpu")
    assert layer.base_layer.weight.dtype == torch.uint8 and layer(torch.randn(2, K)).isfinite().all()


def test_a_layer_that_quantizes_its_input_too_is_refused():
    base = torchao(nn.Linear(K, N), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ValueError, match="torchao Int8Tensor weight that quantizes the activations too"):
        WrappedALLoRALinear(base)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_float32_whatever_holds_the_numbers(kind):
    assert WrappedALLoRALinear(quantized(kind, K, N), R).lora_A.dtype == torch.float32


class Block(nn.Module):
    """Residual, so that what a layer without a backward pass loses of the gradient is not missed."""

    def __init__(self, frozen):
        super().__init__()
        self.q, self.mlp = nn.Linear(K, K), frozen

    def forward(self, x):
        h = x + self.q(x)
        return h + torch.tanh(self.mlp(h))


def test_a_packed_layer_without_an_adapter_is_refused_too():
    model = Block(quantized("4bit nf4", K, K))
    model.mlp.support_avx512bf16_for_cpu = True
    model.mlp.weight.quant_state.packing_format_for_cpu = True
    message = (
        "no right gradient goes through mlp to the adapters in front: bitsandbytes Linear4bit that an inference pass"
    )
    with pytest.raises(ValueError, match=message):
        apply_allora(model, target_modules=["q"])
    assert type(model.q) is nn.Linear and model.q.weight.requires_grad and model.mlp.support_avx512bf16_for_cpu


def test_a_layer_without_an_adapter_that_quantizes_its_input_is_warned_of():
    model = Block(torchao(nn.Linear(K, K), "Int8DynamicActivationInt8WeightConfig"))
    message = (
        "no right gradient goes through mlp to the adapters in front: torchao Int8Tensor weight that quantizes the act"
    )
    with pytest.warns(UserWarning, match=message):
        apply_allora(model, target_modules=["q"])


def test_running_out_of_memory_leaves_4bit_layers_free_to_pack(monkeypatch):
    model = nn.Sequential(quantized("4bit nf4", K, K), nn.Linear(K, K), quantized("4bit nf4", K, K))
    for layer in (model[0], model[2]):
        layer.support_avx512bf16_for_cpu = True
    monkeypatch.setattr(FusedALLoRALinear, "from_linear", raises_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        apply_allora(model)
    assert model[0].support_avx512bf16_for_cpu and model[2].support_avx512bf16_for_cpu
    assert model[0].bias.requires_grad


def raises_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("out of memory")


def test_a_torchao_weight_without_a_backward_pass_is_left_alone():
    torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[quantized]'")
    int4 = pytest.importorskip("torchao.prototype.quantization.int4", reason="this torchao packs no int4 on the CPU")
    packed = nn.Sequential(nn.Linear(128, N))
    torchao.quantization.quantize_(packed, int4.PrototypeInt4WeightOnlyConfig(group_size=32))
    with pytest.raises(RuntimeError, match=r"derivative .* is not implemented"):
        packed(torch.randn(2, 128, requires_grad=True)).sum().backward()
    report = apply_allora(nn.ModuleDict({"packed": packed, "plain": nn.Linear(4, 4)}))
    assert list(report.adapted) == ["plain"]
    assert "none of those known to give the layer's input a gradient: quantize with" in report.skipped["packed.0"]
