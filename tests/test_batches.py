"""Models that turn, flatten, mix or add to a batch: `record` and `adapter_rows` find each sample's rows, or say that they
cannot."""

import functools
import importlib.util
import sys
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from allora_kernels import adapter_parameters, adapter_rows, add_adapter, apply_allora, per_sample, set_adapter

K, PATCHES, IMAGE = 6, 3, 9


class Turned(nn.Module):
    """Works on [T, B, K]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(K, K)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1)


class Choices(nn.Module):
    """Takes [B, choices, K] and works on [B * choices, K]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(K, K)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])


class Looks(nn.Module):
    """Tokens, and images [images, PATCHES, K] or, `ragged`, patches of all images [patches, K], which all samples see."""

    def __init__(self, ragged=False):
        super().__init__()
        self.config = SimpleNamespace(image_token_id=IMAGE)
        self.ragged = ragged
        self.embed, self.words, self.image = nn.Embedding(10, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, input_ids, pixel_values=None):
        y = self.words(self.embed(input_ids)).tanh()
        if pixel_values is None:
            return y
        seen = self.image(pixel_values).tanh()
        if self.ragged:
            return y + seen.sum()
        # Each sample's images, one after the other.
        counts = (input_ids == IMAGE).sum(1).tolist()
        return y + torch.stack([part.reshape(-1, K).sum(0) for part in seen.split(counts)])[:, None]


class Normalized(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.layer, self.norm = nn.Linear(K, K), nn.BatchNorm1d(K, **kwargs)

    def forward(self, x):
        return self.norm(self.layer(x))


def make(cls, **kwargs):
    torch.manual_seed(0)
    model = cls(**kwargs).double()
    apply_allora(model, r=2, adapter_name="a")
    add_adapter(model, "b", r=3)
    for name in "ab":
        for p in adapter_parameters(model, name):
            nn.init.normal_(p)
    set_adapter(model, "a")
    return model


def recorded(model, *inputs, **settings):
    model.zero_grad()
    with per_sample.record(model, **settings):
        model(*inputs).square().sum().backward()
    return per_sample.norms(model)


def alone(model, *samples):
    """The norm of each sample's gradient, run by itself."""
    found = []
    for inputs in samples:
        model.zero_grad()
        model(*inputs).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model, "a") if p.grad is not None]).norm())
    return torch.stack(found)


def mixed(model, names, *inputs):
    with torch.no_grad(), adapter_rows(model, names):
        return model(*inputs)


def one_by_one(model, names, *samples):
    outputs = []
    for name, inputs in zip(names, samples):
        set_adapter(model, name)
        with torch.no_grad():
            outputs.append(model(*inputs))
    set_adapter(model, "a")
    return torch.cat(outputs)


def singly(*inputs):
    return list(zip(*(t.split(1) for t in inputs)))


# --- which dimension ---


def test_a_batch_with_as_many_tokens_as_samples_may_lie_either_way():
    model, square = make(Turned), torch.randn(4, 4, K).double()
    with pytest.raises(
        ValueError, match=r"Turned may exchange samples and tokens .* record\(model, batch_dim=0\) or 1"
    ):
        recorded(model, square)
    torch.testing.assert_close(recorded(model, square, batch_dim=1), alone(model, *singly(square)))
    with pytest.raises(ValueError, match="Turned may exchange samples and tokens"):
        mixed(model, ["a", "b", "a", None], square)
    # One that turns nothing has no need to ask.
    plain = make(functools.partial(nn.Sequential, nn.Linear(K, K), nn.Tanh()))
    torch.testing.assert_close(recorded(plain, square), alone(plain, *singly(square)))


TURNING = """
import torch
from torch import nn

def first_two(x):
    return x.transpose(1, 0)

class Spelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer({}).tanh()
"""
SPELLINGS = [
    *("x.transpose(0,1)", "torch.transpose(x, 0, 1)", "x.transpose(-3, -2)", "x.swapdims(0, 1)", "x.movedim(0, 1)"),
    *("x.permute((1, 0, 2))", "x.permute(1,0,2)", "torch.permute(x, [1, 0, 2])"),
    *("torch.einsum('btk->tbk', x)", "first_two(x)"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_exchange_is_seen_however_it_is_written(spelling, tmp_path):
    path = tmp_path / "turning.py"
    path.write_text(TURNING.format(spelling))
    spec = importlib.util.spec_from_file_location(f"turning_{SPELLINGS.index(spelling)}", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    model, square = make(sys.modules.pop(spec.name).Spelled), torch.randn(4, 4, K).double()
    with pytest.raises(ValueError, match="Spelled may exchange samples and tokens"):
        recorded(model, square)


def test_a_class_whose_source_cannot_be_read_may_exchange_them():
    names = {"__name__": "somewhere"}
    exec(TURNING.format("x"), names)
    with pytest.raises(ValueError, match="or its source cannot be read"):
        recorded(make(names["Spelled"]), torch.randn(4, 4, K).double())


@pytest.mark.parametrize("sizes", [(4, 6), (1, 6)])
def test_an_input_of_another_size_does_not_make_tokens_samples(sizes):
    """A mask leads with the tokens."""

    class Masked(Turned):
        def forward(self, x, mask):
            return super().forward(x) * mask.sum()

    model = make(Masked)
    x, mask = torch.randn(*sizes, K).double(), torch.ones(6, 6).double()
    with pytest.raises(ValueError, match="may exchange samples and tokens"):
        recorded(model, x, mask)
    found = recorded(model, x, mask, batch_dim=1)
    torch.testing.assert_close(found, alone(model, *((part, mask) for part in x.split(1))))


def test_what_the_inputs_are_held_in_is_looked_into():
    class Unpacks(Turned):
        def forward(self, inputs):
            return super().forward(inputs["x"])

    model, x = make(Unpacks), torch.randn(4, 6, K).double()
    for held in ({"x": x}, UserDict(x=x)):
        with pytest.raises(
            ValueError, match=r"no input of the model has 6 as its leading dimension \(they have \[4\]\)"
        ):
            recorded(model, held)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, K).double(), torch.randn(2, K).double()])
    for call in (lambda: recorded(model, {"x": packed}), lambda: mixed(model, ["a", "b"], {"x": packed})):
        with pytest.raises(ValueError, match="an input is a PackedSequence"):
            call()


# --- a part of the recorded model that is called by itself ---


class Holds(nn.Module):
    """Calls nothing itself, as a training framework's module."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def test_a_part_that_is_called_by_itself_is_looked_at_as_the_model_is():
    model, x = Holds(make(Turned)), torch.randn(4, 6, K).double()
    with pytest.raises(ValueError, match=r"inputs for 6 .* \(they have \[4\]\)"), per_sample.record(model):
        model.net(x).square().sum().backward()
    with pytest.raises(ValueError, match="may exchange"), per_sample.record(model):
        model.net(x[:, :4]).square().sum().backward()
    model = Holds(make(Normalized))
    for call in (model.net, model.net.forward):
        with pytest.raises(ValueError, match=r"net.norm \(BatchNorm1d\)"), per_sample.record(model):
            call(torch.randn(5, K).double())
    assert model.net.layer._recording is None and not model.net._forward_pre_hooks


def test_parts_that_follow_one_another_are_one_forward_pass():
    model = Holds(
        nn.Sequential(*(make(functools.partial(nn.Sequential, nn.Linear(K, K), nn.Tanh())) for _ in range(2)))
    )
    x = torch.randn(4, 5, K).double()
    with per_sample.record(model):
        model.net[1](model.net[0](x)).square().sum().backward()
    found = per_sample.norms(model)
    torch.testing.assert_close(found, alone(model.net, *singly(x)))


def test_ranges_of_rows_are_those_of_the_models_inputs():
    model, x = make(Turned), torch.randn(4, 5, K).double()
    ranges = torch.arange(0, 21, 5, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"do not lie as in the model's inputs: its own is \[5, 4, 6\], and these lead with \[4\]"
    ):
        recorded(model, x, cu_seqlens=ranges)
    plain = make(functools.partial(nn.Sequential, nn.Linear(K, K), nn.Tanh()))
    for packed in (x, x.reshape(1, 20, K), x.reshape(20, K)):
        torch.testing.assert_close(recorded(plain, packed, cu_seqlens=ranges), alone(plain, *singly(x)))


def test_samples_do_not_hide_what_a_layer_sees():
    model, x = make(Choices), torch.randn(8, 2, K).double()
    with pytest.raises(ValueError, match=r"inputs for 8 .* \(they have \[4\]\)"), per_sample.record(model, samples=8):
        (model(x[:4]).square().sum() + model(x[4:]).square().sum()).backward()


# --- images beside tokens ---


def images_of(ids, images):
    """For each sample its own tokens and images."""
    counts = (ids == IMAGE).sum(1).tolist()
    return [(row[None], part if len(part) else None) for row, part in zip(ids, images.split(counts))]


@pytest.mark.parametrize("size", [(PATCHES, K), (K,)])
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 0, 1), (0, 1, 2)])
def test_as_many_images_as_samples_are_one_of_each_or_refused(counts, size):
    model, images = make(Looks), torch.randn(3, *size).double()
    ids = torch.tensor([[IMAGE] * n + [1] * (5 - n) for n in counts])
    if counts == (1, 1, 1):
        torch.testing.assert_close(recorded(model, ids, images), alone(model, *images_of(ids, images)))
        found = mixed(model, ["a", "b", "b"], ids, images)
        torch.testing.assert_close(found, one_by_one(model, ["a", "b", "b"], *images_of(ids, images)))
    else:
        for call in (lambda: recorded(model, ids, images), lambda: mixed(model, ["a", "b", "b"], ids, images)):
            with pytest.raises(ValueError, match="as many images as samples, but not one of each"):
                call()
    # Without images there is nothing to ask.
    torch.testing.assert_close(recorded(model, ids), alone(model, *singly(ids)))


@pytest.mark.parametrize("patches", [10, 12])
def test_patches_are_no_samples_nor_their_tokens(patches):
    """Of two samples of five tokens each."""
    model, ids, pixels = make(Looks, ragged=True), torch.ones(2, 5, dtype=torch.int64), torch.randn(patches, K).double()
    with pytest.raises(ValueError, match=f"layer 'image' for {patches}"):
        recorded(model, ids, pixels)
    model(ids)  # Whatever came before.
    with pytest.raises(ValueError, match="which sample each row is of cannot be told"):
        mixed(model, ["a", "b"], ids, pixels)


def test_the_tokens_of_an_earlier_batch_do_not_count():
    """Ten patches would be five tokens of each of two samples, as the batch before had."""
    model = make(Looks, ragged=True)
    with torch.no_grad(), adapter_rows(model, ["a", "b"]):
        model(torch.ones(2, 5, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"of \[4\] tokens each"):
            model(torch.ones(2, 4, dtype=torch.int64), torch.randn(10, K).double())


# --- samples that depend on one another ---


def test_a_norm_over_the_batch_is_refused_while_it_trains():
    model, x = make(Normalized), torch.randn(5, K).double()
    with pytest.raises(ValueError, match=r"norm \(BatchNorm1d\) normalizes each sample by the whole batch, so that"):
        recorded(model, x)
    with per_sample.record(model), torch.no_grad():
        model(x)
    model.norm.eval()
    torch.testing.assert_close(recorded(model, x), alone(model, *singly(x)))
    without_statistics = make(functools.partial(Normalized, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="put a GroupNorm in its place where it keeps no statistics"):
        recorded(without_statistics, x)


# --- one sample, one adapter ---


@pytest.mark.parametrize("cls, size", [(Turned, (1, 4, K)), (Choices, (1, 4, K))])
def test_all_rows_of_one_sample_are_its(cls, size):
    model, x = make(cls), torch.randn(size).double()
    torch.testing.assert_close(recorded(model, x), alone(model, (x,)))
    torch.testing.assert_close(mixed(model, ["b"], x), one_by_one(model, ["b"], (x,)))


def test_one_adapter_for_all_samples_needs_no_order():
    model, x = make(Turned), torch.randn(4, 4, K).double()
    set_adapter(model, "b")
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(mixed(model, ["b"] * 4, x), expected)
    with pytest.raises(ValueError, match="which sample each row is of cannot be told"):
        mixed(model, ["b", "b", "b", None], x)


def test_texts_and_images_of_another_number():
    """As a model has them that compares each with each: the names say which of the two are the samples."""

    class Compares(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.text, self.image = nn.Embedding(10, K), nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, input_ids, pixel_values):
            return self.image(pixel_values) @ self.text(self.embed(input_ids)).sum(1).T

    torch.manual_seed(0)
    model = Compares().double()
    apply_allora(model, r=2, adapter_name="a", target_modules=["image"])
    add_adapter(model, "b", r=2)
    for name in "ab":
        for p in adapter_parameters(model, name):
            nn.init.normal_(p)
    ids, pixels = torch.ones(3, 4, dtype=torch.int64), torch.randn(2, K).double()
    found = mixed(model, ["a", "b"], ids, pixels)
    torch.testing.assert_close(found, one_by_one(model, ["a", "b"], *((ids, part) for part in pixels.split(1))))
    set_adapter(model, "a")
    with pytest.raises(ValueError, match=r"'image' has inputs for 2 .* \(they have \[3\]\)"):
        recorded(model, ids, pixels)
    expected = alone(model, *((ids, part) for part in pixels.split(1)))
    torch.testing.assert_close(recorded(model, ids, pixels, batch_dim=0), expected)


def test_where_the_images_are_is_asked_once_a_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: asked.append(t) or bool(t.item()))
    model, ids = make(Looks), torch.tensor([[IMAGE, 1], [IMAGE, 1]])
    model.image = nn.Sequential(model.image, nn.Tanh(), model.image)
    recorded(model, ids, torch.randn(2, PATCHES, K).double())
    assert len(asked) == 1
