"""Which layers a module takes the weight of and never calls: by its source, and in doubt none."""

import importlib
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from allora_kernels import apply_allora
from allora_kernels.models.weight_readers import use_of


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.plain(x) + self.other(x)


class Product(Base):
    def other(self, x):
        return x @ self.odd.weight.mT


class Function(Base):
    def other(self, x):
        return F.linear(x, self.odd.weight, self.odd.bias) if self.odd is not None else x


class Metadata(Base):
    def other(self, x):
        assert isinstance(self.odd, nn.Linear) and self.odd.weight.shape == self.odd.weight.size()
        return x.to(self.odd.weight.dtype) * self.odd.weight.t().sum()


class Replaced(Base):
    def other(self, x):
        return x @ self.odd.weight.mT

    def replace(self):
        self.odd = nn.Linear(8, 8)
        nn.init.zeros_(self.odd.weight)


class Called(Base):
    def other(self, x):
        return self.odd(x) + self.odd.weight.square().mean()


class DotForward(Base):
    def other(self, x):
        return self.odd.forward(x) + self.odd.weight.mean()


class Penalised(Base):
    """Called from outside, and its weight is taken for a loss alone."""

    def forward(self, x):
        return self.plain(x)

    def penalty(self):
        return self.odd.weight.square().sum()


class Reset(Base):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.odd, nn.ReLU())
        nn.init.zeros_(self.odd.weight)

    def other(self, x):
        return self.net(x.type_as(self.odd.weight)) + self.odd.weight.mean()


class InALambda(Base):
    run = lambda self, x: self.odd(x)  # noqa: E731

    def other(self, x):
        return self.run(x) + self.odd.weight.mean()


class ByName(Base):
    def other(self, x):
        return sum(getattr(self, name)(x) for name in ("odd",)) + self.odd.weight.mean()


class ByOneName(Base):
    def other(self, x):
        return getattr(self, "odd")(x) + self.odd.weight.mean()  # noqa: B009


class EveryChild(Base):
    def other(self, x):
        return sum(layer(x) for layer in self.children()) + self.odd.weight.mean()


class HandedOn(Base):
    def other(self, x):
        return call(self.odd, x) + self.odd.weight.mean()


class OwnPenalty(HandedOn):
    """What calls it stands in the class below."""

    def penalty(self):
        return self.odd.weight.square().sum()


class Bookkeeping(Base):
    def __init__(self):
        super().__init__()
        self.of_the_optimizer = [self.plain, self.odd]

    def other(self, x):
        return self.odd(x)


def call(layer, x):
    return layer(x)


@pytest.mark.parametrize("kind", [Product, Function, Metadata, Replaced])
def test_a_layer_that_is_never_called_is_left_alone(kind):
    model = kind()
    assert list(apply_allora(model, r=2).adapted) == ["plain"]


@pytest.mark.parametrize(
    "kind",
    [Called, DotForward, Penalised, Reset, InALambda, ByName, ByOneName, EveryChild, HandedOn, OwnPenalty, Bookkeeping],
)
def test_a_layer_that_may_be_called_is_adapted(kind):
    model = kind()
    report = apply_allora(model, r=2)
    assert "odd" in report.adapted and "plain" in report.adapted
    if kind is not Penalised:
        model(torch.randn(3, 8)).sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


MODULE = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.plain(x) + ({})
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the module of this name anew."""
    monkeypatch.syspath_prepend(tmp_path)
    name, file, writes = "a_module_of_a_test", tmp_path / "a_module_of_a_test.py", iter(range(1, 9))

    def write(source):
        file.write_text(source)
        # Also where the clock is slower than this.
        os.utime(file, (1e9, 1e9 + next(writes)))
        importlib.invalidate_caches()
        return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)

    yield write
    sys.modules.pop(name, None)


def test_a_module_that_is_loaded_anew_is_read_anew(module):
    assert use_of(module(MODULE.format("x @ self.odd.weight")).Model(), "odd") == (True, True, False)
    assert use_of(module(MODULE.format("self.odd(x) * self.odd.weight.sum()")).Model(), "odd") == (True, True, True)


@pytest.mark.parametrize("spoilt", ["def half_typed(:\n", "\0"])
def test_a_file_that_cannot_be_parsed_any_more_says_nothing(module, spoilt, tmp_path):
    model = module(MODULE.format("x @ self.odd.weight")).Model()
    (tmp_path / "a_module_of_a_test.py").write_text(MODULE.format("x @ self.odd.weight") + spoilt)
    assert not use_of(model, "odd").known
    assert set(apply_allora(model, r=2).adapted) == {"odd", "plain"}


def test_what_has_no_source_is_not_known():
    names = {}
    exec(MODULE.format("x @ self.odd.weight"), names)
    assert not use_of(names["Model"](), "odd").known
