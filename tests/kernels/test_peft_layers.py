"""PEFT models on the Triton backend: the same results, and no copy of x in the adapter's dtype."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import csrc_triton

peft = pytest.importorskip("peft")

from tiny_models import VOCAB, llama, randomised  # noqa: E402

from allora_kernels.integrations.peft import accelerate_lora, explain, get_allora_model, restore_lora  # noqa: E402


def lora(alpha=4, target="up_proj"):
    return peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=[target])


def results(model, device):
    ids = (torch.arange(14).reshape(2, 7) * 5 % VOCAB).to(device)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_an_accelerated_model_is_the_one_it_was(device):
    model = randomised(peft.get_peft_model(llama().to(device), lora(alpha=10))).train()
    want = results(model, device)
    report = accelerate_lora(model)
    assert len(report.fused) == 2 and report.ours == report.fused and not report.pefts
    torch.testing.assert_close(results(model, device), want, rtol=1e-3, atol=1e-4)


def test_an_allora_model_is_the_eager_one(device, monkeypatch):
    model = randomised(get_allora_model(llama().to(device), lora(target="q_proj"), 0.7)).train()
    assert all("eta=0.7, norm='row', fused: " in what for what in explain(model).fused.values())
    assert len(explain(model).fused) == 2
    ours = results(model, device)
    model = model.cpu()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    eager = results(model, "cpu")
    torch.testing.assert_close([t.cpu() for t in ours], eager, rtol=1e-3, atol=1e-4)


class Makes(TorchDispatchMode):
    """The dtype and shape of every tensor made inside, by our ops' own code too."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "allora":
            with self:
                return getattr(csrc_triton, func._opname)(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, (tuple, list)) else (out,)
        self.made |= {(t.dtype, tuple(t.shape)) for t in parts if isinstance(t, torch.Tensor)}
        return out


def test_x_is_not_copied_to_the_adapters_dtype(device):
    model = randomised(peft.get_peft_model(llama().to(device, torch.bfloat16), lora(alpha=8)))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(64, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    copies = {(torch.float32, (64, 16)), (torch.float32, (64, 32))}
    found = {}
    for name, switch in (("peft", restore_lora), ("ours", accelerate_lora)):
        switch(model)
        with Makes() as mode:
            y = layer(x)
        assert y.dtype == torch.bfloat16 and (torch.bfloat16, (64, 32)) in mode.made
        with mode:
            y.sum().backward()
        found[name] = mode.made & copies
    assert found == {"peft": copies, "ours": set()}
