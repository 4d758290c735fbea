"""PEFT's LoRA layers on quantized bases: stock PEFT's values and gradients, ALLoRA's rules, and the rest of PEFT as it is."""

import copy
import pickle
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from foreign_layers import Foreign
from packaging.version import Version
from peft import LoraConfig, PeftModel
from quantized import KINDS, dequantized, quantized, torchao
from test_wrapped import BigTensors
from tiny_models import randomised
from torch import nn

from allora_kernels import WrappedALLoRALinear, per_sample, reference, use_batch_invariant
from allora_kernels.integrations.peft import (
    ALLoRAConfig,
    accelerate_lora,
    explain,
    get_allora_model,
    load_allora_model,
    restore_lora,
)
from allora_kernels.layer import bases
from allora_kernels.testing import assert_close

N, K, R = 96, 64, 5
kinds = pytest.mark.parametrize("kind", KINDS)
one_of_each = pytest.mark.parametrize("kind", ["4bit nf4", "8bit", "int8"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'allora_eta', 'allora_norm'"),
    pytest.mark.filterwarnings("ignore:.*was instantiated without .get_apply_tensor_subclass"),
    pytest.mark.filterwarnings("ignore:Merge lora|Unmerge lora|Adapter cannot be set|Already unmerged"),
]


class Body(nn.Module):
    """Two quantized layers; the flags are those by which PEFT tells a model of bitsandbytes' layers."""

    def __init__(self, kind, dtype=torch.float32):
        super().__init__()
        self.up, self.down = quantized(kind, K, N, dtype), quantized(kind, N, K, dtype)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = "4bit" in kind, "8bit" in kind
        for layer in (self.up, self.down):
            # As in our layers, so that stock PEFT computes with the same weights in eval mode, too.
            bases.keep_backward(layer)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def lora(r=R, alpha=None, **settings):
    return LoraConfig(**{"r": r, "lora_alpha": alpha or r, "target_modules": ["up", "down"], **settings})


def stock(kind, dtype=torch.float32, autocast_adapter_dtype=True, **settings):
    if kind.startswith(("int", "float")) and Version(peft.__version__) < Version("0.19"):
        pytest.skip("this PEFT knows none of the weights of torchao >= 0.18")
    model = peft.get_peft_model(Body(kind, dtype), lora(**settings), autocast_adapter_dtype=autocast_adapter_dtype)
    return randomised(model).train()


def adapted(kind, norm="row", eta=0.7, **settings):
    return randomised(get_allora_model(Body(kind), lora(**settings), eta, norm)).train()


def layers(model):
    return model.base_model.model.up, model.base_model.model.down


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 7, K, generator=generator).to(dtype), torch.randn(3, 7, N, generator=generator).to(dtype)


def results(f, x, a, b, g):
    """y and the gradients of x and of the factors."""
    x = x.detach().requires_grad_()
    y = f(x)
    return y, *torch.autograd.grad(y, (x, a, b), g.to(y.dtype))


def of_layer(layer, x, g, adapter="default"):
    return results(layer, x, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, g)


def of(model):
    with torch.no_grad():
        return model(batch()[0])


def gradients(model):
    x = batch()[0].requires_grad_()
    model(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "x": x.grad}


# --- plain LoRA -----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
def test_an_accelerated_layer_is_no_farther_from_fp64_than_pefts(kind, dtypes):
    dtype, adapter_dtype = dtypes
    model = stock(kind, dtype, adapter_dtype == torch.float32, alpha=3 * R)
    layer, (x, g) = layers(model)[0], batch(dtype)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == (adapter_dtype if dtype != torch.float32 and "bit" not in kind else a.dtype)
    plain = of_layer(layer, x, g)
    assert len(accelerate_lora(model).ours) == 2
    ours = of_layer(layer, x, g)
    weight, bias = dequantized(layer.base_layer, dtype), layer.base_layer.bias.double()
    wide_a, wide_b = (t.detach().double().requires_grad_() for t in (a, b))
    exact = results(
        lambda x: x @ weight.mT + bias + 3 * (x @ wide_a.mT @ wide_b.mT), x.double(), wide_a, wide_b, g.double()
    )
    for name, *values in zip(("y", "dx", "da", "db"), ours, plain, exact):
        assert values[0].dtype == values[1].dtype, name
        assert_close(*values, name)


@one_of_each
@pytest.mark.parametrize("settings", [{"alpha": 12}, {"alpha": 2, "use_rslora": True}, {"alpha": 7, "bias": "all"}])
def test_an_accelerated_model_is_the_one_it_was(backend, kind, settings):
    model = stock(kind, **settings)
    values, want = of(model), gradients(model)
    classes = [type(layer) for layer in layers(model)]
    keys, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    report = accelerate_lora(model)
    kind_of = bases.kind_of(layers(model)[0].base_layer)
    assert len(report.ours) == 2 and not report.pefts
    assert f", on {kind_of}, backend='{backend}'" in repr(layers(model)[0])
    added = f"not fused: {kind_of} computes y and dx"
    # 2,048 rows are explained, of which the kernels would take the product in 4 bits.
    taken = backend == "triton" and kind == "4bit nf4" and "bias" not in settings
    assert len(report.fused) == (2 if taken else 0)
    assert all(("fused: TRITON_INTERPRET=1" if taken else added) in what for what in report.ours.values())
    assert all(isinstance(layer, cls) and type(layer) is not cls for layer, cls in zip(layers(model), classes))
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, ids)
    torch.testing.assert_close(of(model), values, rtol=1e-4, atol=1e-4)
    # An int8 layer rounds its input to 127 steps: what differs in the last bit may be rounded to the next one.
    step = max(t.abs().max().item() for t in want.values()) / 127 if kind == "8bit" else 0.0
    torch.testing.assert_close(gradients(model), want, rtol=1e-3, atol=max(1e-3, step))
    assert any("bias" in name for name in want) == ("bias" in settings)
    assert accelerate_lora(model) == report
    restore_lora(model)
    assert [type(layer) for layer in layers(model)] == classes
    torch.testing.assert_close(of(model), values, rtol=0, atol=0)


@one_of_each
def test_in_place_unless_a_hook_may_keep_it(kind):
    model = stock(kind)
    accelerate_lora(model)
    layer, (x, g) = layers(model)[0], batch()
    plain = of_layer(layer, x, g)
    assert "in place" in str(layer.explain()) and "y and dx" in layer.explain().plan
    kept = []
    layer.base_layer.register_forward_hook(lambda module, args, y: kept.append(y))
    assert "copy" in str(layer.explain()) and "PEFT's own" not in repr(layer)
    torch.testing.assert_close(of_layer(layer, x, g), plain)
    assert torch.equal(kept[0], layer.base_layer(x))


@one_of_each
def test_no_tensor_of_the_size_of_x_or_y_is_made_beside_the_bases_own(kind, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = stock(kind, alpha=3 * R)
    layer, (x, g) = layers(model)[0], batch()
    # As many rows as make x and y larger than anything else.
    x, g = x.repeat(8, 1, 1).requires_grad_(), g.repeat(8, 1, 1)

    def big_tensors(f):
        with BigTensors(x.numel()) as mode:
            torch.autograd.grad(f(x), x, g)
        return len(mode.seen - {t.untyped_storage().data_ptr() for t in (x, g)})

    plain = big_tensors(layer)
    accelerate_lora(model)
    assert big_tensors(layer) == big_tensors(layer.base_layer) < plain


def test_other_bases_stay_pefts_and_say_why():
    model = stock("4bit nf4")
    layers(model)[0].base_layer = Foreign(torch.zeros(N, K), torch.zeros(N))
    packed = layers(model)[1]
    packed.base_layer.weight.quant_state.packing_format_for_cpu = True
    report = accelerate_lora(model)
    assert not report.ours and [type(layer).__name__ for layer in layers(model)] == ["Linear4bit"] * 2
    up, down = report.pefts.values()
    assert up == "the base layer is a Foreign" and "bitsandbytes Linear4bit that an inference pass" in down


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", reference.NORMS)
@one_of_each
def test_every_rule_is_our_own_layers(backend, kind, norm):
    model = adapted(kind, norm)
    layer, (x, g) = layers(model)[0], batch()
    assert isinstance(model, PeftModel) and explain(model).pefts == {}
    own = WrappedALLoRALinear(copy.deepcopy(layer.base_layer), R, 0.7, norm)
    with torch.no_grad():
        own.lora_A.copy_(layer.lora_A["default"].weight)
        own.lora_B.copy_(layer.lora_B["default"].weight)
    want = results(own, x, own.lora_A, own.lora_B, g)
    found = of_layer(layer, x, g)
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    if norm is not None:
        own.norm = None
        assert not torch.allclose(results(own, x, own.lora_A, own.lora_B, g)[2], found[2], rtol=1e-2)


@kinds
def test_every_kind_trains_and_says_what_it_is(kind):
    model = get_allora_model(Body(kind), lora())
    assert torch.equal(of(model), of(Body(kind)))
    kind_of = bases.kind_of(layers(model)[0].base_layer)
    name = {"Linear4bit": "Linear4bit", "Linear8bitLt": "Linear8bitLt"}.get(kind_of.split()[1], "TorchaoLoraLinear")
    for layer in layers(model):
        assert name in [cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith("peft.")]
        assert f"eta=2.0, norm='row', on {kind_of}, backend='eager'" in repr(layer)
        assert layer.explain().plan["y and dx"].startswith(f"{kind_of}, its own product")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{layer}.lora_{f}.default.weight" for layer in ("up", "down") for f in "AB"
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(batch()[0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_targets_without_a_backward_pass_are_refused():
    model = nn.ModuleDict(
        {"up": quantized("int8", K, N), "down": torchao(nn.Linear(N, K), "Int8DynamicActivationInt8WeightConfig")}
    )
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"cannot be ALLoRA \(torchao Int8Tensor weight that quantizes the act"):
        get_allora_model(model, lora())
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == flags


def test_a_4bit_layer_keeps_its_backward_pass_and_a_packed_one_is_refused():
    body = Body("4bit nf4")
    body.up.support_avx512bf16_for_cpu = body.down.support_avx512bf16_for_cpu = True
    model = randomised(get_allora_model(body, lora())).train()
    want = gradients(model)
    of(model.eval())
    torch.testing.assert_close(gradients(model.train()), want, rtol=0, atol=0)
    for layer in layers(accelerated := stock("4bit nf4")):
        layer.base_layer.support_avx512bf16_for_cpu = True
    accelerate_lora(accelerated)
    assert not any(layer.base_layer.support_avx512bf16_for_cpu for layer in layers(accelerated))
    restore_lora(accelerated)
    assert all(layer.base_layer.support_avx512bf16_for_cpu for layer in layers(accelerated))
    assert not any("_base_packed" in vars(layer) for layer in layers(accelerated))
    packed = Body("4bit nf4")
    packed.up.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"cannot be ALLoRA .*packed for this CPU"):
        get_allora_model(packed, lora())


class Beside(Body):
    """A quantized layer without an adapter between those with one."""

    def __init__(self):
        super().__init__("4bit nf4")
        self.between = quantized("4bit nf4", N, N)
        self.between.support_avx512bf16_for_cpu = True

    def forward(self, x):
        h = self.up(x)
        return x + self.down(h + torch.tanh(self.between(h)))


def test_an_accelerated_model_keeps_the_backward_pass_of_all_its_layers():
    model = randomised(peft.get_peft_model(Beside(), lora())).train()
    accelerate_lora(model)
    between = model.base_model.model.between
    assert not between.support_avx512bf16_for_cpu
    want = gradients(model)
    of(model.eval())
    torch.testing.assert_close(gradients(model.train()), want, rtol=0, atol=0)
    accelerate_lora(model)
    restore_lora(model)
    assert between.support_avx512bf16_for_cpu and set(vars(between)) == set(vars(Beside().between))


def test_a_packed_layer_without_an_adapter_is_refused_or_warned_of():
    body = Beside()
    body.between.weight.quant_state.packing_format_for_cpu = True
    before = dict(vars(body.up))
    message = (
        "no right gradient goes through .*between to the adapters in front: bitsandbytes Linear4bit that an inference"
    )
    with pytest.raises(ValueError, match=message):
        get_allora_model(body, lora())
    assert vars(body.up) == before and body.between.support_avx512bf16_for_cpu
    with pytest.warns(UserWarning, match=message):
        accelerate_lora(peft.get_peft_model(body, lora()))


@pytest.mark.parametrize("back", [True, False])
def test_a_packed_weight_that_was_cast_does_not_train(back):
    model = adapted("4bit stored as bf16")
    model.half()
    if back:
        model.bfloat16()
    with pytest.raises(
        RuntimeError, match=r"by ALLoRA's rule.*packed weight was cast from torch.bfloat16 to torch.float16"
    ):
        model(batch(torch.bfloat16)[0])


def test_a_refusal_leaves_a_4bit_layer_free_to_pack():
    model = Body("4bit nf4")
    model.up.support_avx512bf16_for_cpu = True
    model.down.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="cannot be ALLoRA"):
        get_allora_model(model, lora())
    assert model.up.support_avx512bf16_for_cpu


@one_of_each
def test_a_call_that_is_pefts_trains_no_adapter_with_a_rule(kind):
    model = adapted(kind)
    model.add_adapter("second", ALLoRAConfig(r=2, lora_alpha=2, target_modules=["up"], allora_norm="token"))
    randomised(model).train()
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match=r"cannot train default, second by ALLoRA's rule.*2 active adapters"):
        model(batch()[0])
    y = model.eval()(batch()[0])
    with pytest.raises(RuntimeError, match="by ALLoRA's rule"):
        y.sum().backward()
    model.base_model.set_adapter("default")
    layers(model)[0].lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="hooks on a module inside"):
        model.train()(batch()[0])


@one_of_each
def test_a_scaled_adapter_does_not_train(kind):
    model = adapted(kind)
    layers(model)[0].set_scale("default", 0.5)
    with pytest.raises(RuntimeError, match=r"'default' is scaled by 0\.5 while it is trained"):
        model(batch()[0])


# --- what PEFT does with its layers ---------------------------------------------------------------------------------


def disabled(model, folder):
    with model.disable_adapter():
        off = of(model)
    return off, of(model)


def merged(model, folder):
    model.merge_adapter()
    on = of(model)
    model.unmerge_adapter()
    return on, of(model)


def switched(model, folder):
    model.set_adapter("second")
    return of(model)


def both_active(model, folder):
    model.base_model.set_adapter(["default", "second"])
    return of(model)


def mixed_batch(model, folder):
    names = ["default", "second", "__base__"]
    with torch.no_grad():
        return tuple(layer(torch.ones(3, 2, layer.in_features), adapter_names=names) for layer in layers(model))


def deleted(model, folder):
    model.delete_adapter("default")
    return of(model)


def merged_and_unloaded(model, folder):
    base = model.merge_and_unload()
    assert bases.kind_of(base.up)
    return of(base)


def saved(model, folder):
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(Body(model.kind), folder)
    return of(again.eval())


def copied(model, folder):
    # torchao's weights cannot be pickled, with an adapter or without.
    twin = copy.deepcopy(model) if model.kind == "int8" else pickle.loads(pickle.dumps(model))
    return of(copy.deepcopy(model)), of(twin)


@one_of_each
@pytest.mark.parametrize("made", ["allora", "accelerated"])
@pytest.mark.parametrize(
    "act",
    [disabled, merged, switched, both_active, mixed_batch, deleted, merged_and_unloaded, saved, copied],
)
def test_results_are_pefts(kind, made, act, tmp_path):
    theirs = stock(kind)
    theirs.add_adapter("second", lora(2, target_modules=["up"]))
    randomised(theirs).eval()
    if made == "accelerated":
        ours = copy.deepcopy(theirs)
        accelerate_lora(ours)
    else:
        ours = get_allora_model(Body(kind), lora())
        ours.add_adapter("second", ALLoRAConfig(r=2, lora_alpha=2, target_modules=["up"]))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if q.dtype == torch.float32:
                p.data = q.data.clone()
        ours.eval()
    theirs.kind = ours.kind = kind
    torch.testing.assert_close(of(ours), of(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(of(theirs), of(Body(kind).eval()), atol=1e-1)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    if kind == "int8" and "merged" in act.__name__:
        # PEFT was not told how to quantize the sum again.
        for model in (theirs, ours):
            with pytest.raises(ValueError, match=r"get_apply_tensor_subclass|nothing says how it was quantized"):
                act(model, tmp_path)
        assert not layers(ours)[0].merged
        return torch.testing.assert_close(of(ours), of(theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(act(ours, tmp_path / "ours"), act(theirs, tmp_path / "theirs"), rtol=1e-4, atol=1e-4)


def test_a_merge_that_could_not_be_quantized_again_is_refused_and_changes_nothing():
    model = adapted("int8")
    want = gradients(model)
    with pytest.raises(ValueError, match=r"cannot merge into a weight of torchao's.*TorchAoConfig"):
        model.merge_adapter()
    torch.testing.assert_close(gradients(model), want, rtol=0, atol=0)


@one_of_each
def test_a_loaded_adapter_trains_on_as_the_one_saved(kind, tmp_path):
    model = adapted(kind, "token")
    model.save_pretrained(tmp_path)
    resumed = load_allora_model(Body(kind), tmp_path, is_trainable=True).train()
    assert explain(resumed) == explain(model)
    torch.testing.assert_close(gradients(resumed), gradients(model), rtol=0, atol=0)


# --- with the rest of PyTorch ---------------------------------------------------------------------------------------


@one_of_each
def test_torch_compile_without_a_graph_break(kind):
    layer, (x, g) = layers(adapted(kind))[0], batch()
    plain = of_layer(layer, x, g)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(results(compiled, x, a, b, g), plain)


@one_of_each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind, reentrant):
    model = adapted(kind)
    plain = gradients(model)
    call = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    x = batch()[0].requires_grad_()
    call(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    torch.testing.assert_close(found, plain, rtol=0, atol=0)


@one_of_each
def test_autocast_with_a_scaling(kind):
    model = stock(kind, alpha=2 * R)
    exact = gradients(model)
    accelerate_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    for name, g in found.items():
        assert g.dtype == torch.float32 and (g - exact[name]).norm() < 0.03 * exact[name].norm(), name


@one_of_each
def test_what_our_own_layers_refuse_is_refused(kind):
    model = adapted(kind)
    with pytest.raises(ValueError, match=r"up.*PEFT"), per_sample.record(model):
        pass
    use_batch_invariant(True)
    try:
        with pytest.raises(RuntimeError, match="use_batch_invariant is on, but"):
            model(batch()[0])
    finally:
        use_batch_invariant(False)


def test_no_library_is_imported_for_layers_that_are_not_its():
    code = """
        import importlib.util, sys
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name in ("bitsandbytes", "torchao") else find_spec(name, *args)
        for name in ("bitsandbytes", "torchao"):
            sys.modules[name] = None
        import peft, torch
        from torch import nn
        from allora_kernels.integrations.peft import accelerate_lora, get_allora_model
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
        model = get_allora_model(nn.Sequential(nn.Linear(4, 4)), config)
        model(torch.randn(2, 4)).sum().backward()
        print(model, accelerate_lora(peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)))
        assert "allora_kernels.integrations.peft.bnb" not in sys.modules
        assert "peft.tuners.lora.bnb" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
