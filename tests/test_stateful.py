"""Calls in any order: after each of them a model is what a float64 oracle of its adapters says, and trains as that does."""

import contextlib
import copy
import math
import pickle
import tempfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from tiny_models import photograph
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import allora_kernels as ak
from allora_kernels.reference import NORMS, allora_linear

LAYERS, FACTORS = ("first", "turned", "shared"), ("lora_A", "lora_B")
NAMES = ("default", "b", "c")
RULE = st.fixed_dictionaries(
    {"r": st.integers(1, 4), "eta": st.sampled_from([1.0, 4.0]), "norm": st.sampled_from(NORMS)}
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.turned = nn.Linear(5, 6), Conv1D(6, 6)
        self.shared, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.turned.weight.data.normal_()

    def forward(self, x):
        h = self.turned(self.first(x).tanh()).tanh()
        return self.head(self.shared(self.shared(h).tanh()).tanh())


class Sequences(RuleBasedStateMachine):
    """`own` is the oracle: of each adapter by name, a leaf tensor for each of its parameters, and the rule of its layers."""

    @initialize(how=RULE, whole=st.sampled_from([False, False, True]), seed=st.integers(0, 9))
    def begin(self, how, whole, seed):
        torch.manual_seed(seed)
        self.model, self.whole = Net().double(), whole
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.frozen = {n: (state[f"{n}.weight"], state.get(f"{n}.bias")) for n in (*LAYERS, "head")}
        self.frozen["turned"] = (state["turned.weight"].mT, state["turned.bias"])
        ak.apply_allora(self.model, **how, target_modules=list(LAYERS), modules_to_save=["head"] if whole else None)
        self.own, self.rules, self.objects, self.files = {}, {}, {}, []
        self.active, self.enabled = "default", dict.fromkeys(LAYERS, True)
        self.note("default", how)
        self.folder = tempfile.TemporaryDirectory()

    # --- the oracle ---

    def parameters_of(self, name):
        layers = ak.adapter_layers(self.model)
        found = {(n, f): getattr(layers[n].adapter(name), f) for n in LAYERS for f in FACTORS}
        if self.whole:
            head = getattr(self.model.head, "copies", {name: self.model.head})[name]
            found |= {("head", "weight"): head.weight, ("head", "bias"): head.bias}
        return found

    def note(self, name, how):
        """A new adapter, which does nothing yet, gets values."""
        self.own[name], self.rules[name] = {}, (how["eta"], how["norm"])
        for key, p in self.parameters_of(name).items():
            assert key[1] != "lora_B" or not p.any()
            p.data.normal_(std=0.5)
            self.own[name][key] = p.detach().clone().requires_grad_()

    def layer(self, n, h, names):
        weight, bias = self.frozen[n]
        rows = []
        for x, name in zip(h, names):
            if n == "head" and self.whole:
                rows.append(F.linear(x, self.own[name]["head", "weight"], self.own[name]["head", "bias"]))
            elif name is None or not self.enabled.get(n):
                rows.append(F.linear(x, weight, bias))
            else:
                factors, (eta, norm) = [self.own[name][n, f] for f in FACTORS], self.rules[name]
                rows.append(allora_linear(x, weight, bias, *factors, eta=eta, norm=norm))
        return torch.stack(rows)

    def expected(self, x, names=None):
        names, h = names or [self.active] * len(x), x
        for n in (*LAYERS, "shared"):
            h = self.layer(n, h, names).tanh()
        return self.layer("head", h, names)

    @invariant()
    def it_computes_as_expected(self):
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(self.model(x), self.expected(x), **CLOSE)

    @invariant()
    def it_has_what_is_expected(self):
        assert not self.model._forward_pre_hooks and not self.model._forward_hooks
        assert set(ak.adapter_names(self.model)) == self.own.keys() and ak.active_adapter(self.model) == self.active
        for n, layer in ak.adapter_layers(self.model).items():
            assert ((layer.eta, layer.norm), layer.enabled) == (self.rules[self.active], self.enabled[n])
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        assert trained == {id(p) for name in self.own for p in self.parameters_of(name).values()}
        for name, own in self.own.items():
            for key, p in self.parameters_of(name).items():
                assert p is self.objects.setdefault((name, *key), p)
                torch.testing.assert_close(p.detach(), own[key].detach(), **CLOSE)
                assert (p.grad is None) == (own[key].grad is None), (name, key)
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, own[key].grad, **CLOSE)

    def refused(self, match, call, *args, **kwargs):
        before = photograph(self.model)
        with pytest.raises(ValueError, match=match):
            call(self.model, *args, **kwargs)
        assert photograph(self.model) == before

    # --- adapters ---

    @rule(name=st.sampled_from(NAMES), how=RULE, use=st.booleans())
    def add(self, name, how, use):
        if name in self.own:
            return self.refused("already", ak.add_adapter, name, **how)
        ak.add_adapter(self.model, name, **how)
        self.note(name, how)
        if use:
            ak.set_adapter(self.model, name)
            self.active = name

    @rule(data=st.data(), remove=st.booleans())
    def choose(self, data, remove):
        name = data.draw(st.sampled_from([*reversed(self.own), "nobody"]))
        call = ak.remove_adapter if remove else ak.set_adapter
        if name == "nobody" or (remove and name == self.active):
            return self.refused("adapter", call, name)
        call(self.model, name)
        if remove:
            del self.own[name], self.rules[name]
            self.objects = {key: p for key, p in self.objects.items() if key[0] != name}
        else:
            self.active = name

    @rule(on=st.sampled_from([True, True, False]), one=st.sampled_from([None, *LAYERS]))
    def switch(self, on, one):
        ak.set_enabled(self.model, on) if one is None else setattr(ak.adapter_layers(self.model)[one], "enabled", on)
        self.enabled |= dict.fromkeys(LAYERS if one is None else [one], on)

    @rule(copied=st.booleans())
    def merge_and_back(self, copied):
        if not all(self.enabled.values()):
            return self.refused("is disabled", ak.merge_adapter, keep=True)
        if len(self.own) > 1:
            self.refused("would lose the others", ak.merge_adapter)
        ak.merge_adapter(self.model, keep=True)
        self.it_computes_as_expected()
        self.refused("no adapters", ak.set_adapter, self.active)
        if copied:
            self.copy(copy.deepcopy)
        ak.unmerge_adapter(self.model)

    @rule(by=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, by):
        self.model.zero_grad()
        self.model, self.objects = by(self.model), {}
        for own in (t for of in self.own.values() for t in of.values()):
            own.grad = None

    # --- values ---

    @rule(data=st.data(), wrap=st.sampled_from([None, True, False]), after=st.sampled_from(["", "set", "off", "merge"]))
    def train(self, data, wrap, after):
        names = data.draw(st.lists(st.sampled_from(list(self.own)), min_size=1, max_size=4))
        x = torch.randn(len(names), 2, 5, dtype=torch.float64, requires_grad=True)
        mixed = data.draw(st.booleans())
        with ak.adapter_rows(self.model, names) if mixed else contextlib.nullcontext():
            y = self.model(x) if wrap is None else checkpoint(self.model, x, use_reentrant=wrap)
        with contextlib.ExitStack() as block:
            if after == "set":
                ak.set_adapter(self.model, data.draw(st.sampled_from(list(self.own))))
                block.callback(ak.set_adapter, self.model, self.active)
            elif after == "off":
                block.enter_context(ak.disable_adapters(self.model))
            elif after == "merge" and wrap is None and all(self.enabled.values()):
                ak.merge_adapter(self.model, keep=True)
                block.callback(ak.unmerge_adapter, self.model)
            y.square().sum().backward()
        own_x = x.detach().requires_grad_()
        self.expected(own_x, names if mixed else None).square().sum().backward()
        torch.testing.assert_close(x.grad, own_x.grad, **CLOSE)

    @rule(only=st.sampled_from([None, *NAMES]))
    def step(self, only):
        names = [only] if only in self.own else list(self.own)
        torch.optim.SGD([p for name in names for p in ak.adapter_parameters(self.model, name)], lr=0.01).step()
        torch.optim.SGD([t for name in names for (n, _), t in self.own[name].items() if n != "head"], lr=0.01).step()

    @precondition(lambda self: not self.whole and any(self.enabled.values()))
    @rule(data=st.data(), max_norm=st.sampled_from([0.5, 1e9]))
    def clip(self, data, max_norm):
        self.model.zero_grad()
        names = data.draw(st.lists(st.sampled_from([None, *self.own]), min_size=1, max_size=4).filter(any))
        x = torch.randn(len(names), 2, 5, dtype=torch.float64)
        with ak.per_sample.record(self.model), ak.adapter_rows(self.model, names):
            self.model(x).square().sum().backward()
        leaves, norms, sums = [t for own in self.own.values() for t in own.values()], [], {}
        for i, name in enumerate(names):
            y = self.expected(x[i : i + 1], [name]).square().sum()
            found = torch.autograd.grad(y, leaves, allow_unused=True) if name else [None] * len(leaves)
            of = {leaf: g for leaf, g in zip(leaves, found) if g is not None}
            norms.append(math.sqrt(sum(g.square().sum().item() for g in of.values())))
            for leaf, g in of.items():
                sums[leaf] = sums.get(leaf, 0) + g * min(1.0, max_norm / max(norms[-1], 1e-30))
        torch.testing.assert_close(ak.per_sample.clip_(self.model, max_norm).tolist(), norms, **CLOSE)
        ak.per_sample.clear(self.model)
        for leaf in leaves:
            leaf.grad = sums.get(leaf)

    # --- files ---

    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(list(self.own)))
        folder = f"{self.folder.name}/{len(self.files)}"
        ak.save_adapter(self.model, folder, adapter=name)
        self.files.append((folder, {key: t.detach().clone() for key, t in self.own[name].items()}, self.rules[name]))

    @precondition(lambda self: self.files)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def load(self, data, name):
        folder, values, how = data.draw(st.sampled_from(self.files))
        if name in self.own and any(values[key].shape != t.shape for key, t in self.own[name].items()):
            return self.refused("does not fit", ak.load_adapter, folder, adapter=name)
        ak.load_adapter(self.model, folder, adapter=name)
        if name not in self.own:
            self.rules[name] = how
            self.own[name] = {key: t.clone().requires_grad_() for key, t in values.items()}
        for key, t in self.own[name].items():
            t.data.copy_(values[key])


def test_any_sequence_of_calls(one_thread):
    sizes = {"max_examples": 50, "stateful_step_count": 25, "derandomize": True, "deadline": None}
    run(Sequences, settings=settings(**sizes, suppress_health_check=list(HealthCheck)))
