"""`explain` of a model: a line for every linear layer, fused or not, and why."""

import pytest
from torch import nn

from allora_kernels import FusedALLoRALinear, WrappedALLoRALinear, apply_allora, explain, set_enabled


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.attention = nn.MultiheadAttention(8, 2)
        self.classifier = nn.Linear(8, 2)


@pytest.fixture
def model():
    model = Model()
    apply_allora(model, r=3, target_modules=["up"], modules_to_save=["classifier"])
    return model


def test_every_linear_layer_has_its_line(model):
    explanation = explain(model)
    assert {name: layer.r for name, layer in explanation.layers.items()} == {
        **{f"layers.{i}.up": 3 for i in range(3)},
        **{f"layers.{i}.down": None for i in range(3)},
        "attention.out_proj": None,
        "classifier": None,
    }
    assert not any(layer.fused for layer in explanation.layers.values())
    lines = str(explanation).splitlines()
    assert lines[0] == "0 of 3 adapted layers fused; 5 linear layers without an adapter"
    assert lines[1].startswith("  3 x layers.*.up [12, 8], r=3, not fused: cpu tensors")
    assert lines[2] == "  3 x layers.*.down [8, 12], no adapter, not fused: no adapter was put on it"
    assert "MultiheadAttention reads this layer's weight itself" in lines[3]
    assert lines[4].endswith("trained whole (modules_to_save)")


def test_where_the_kernels_run_each_plan_is_said_once(model, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layers = explain(model, rows=70).layers
    assert layers["layers.0.up"].fused and layers["layers.0.up"].reason == "TRITON_INTERPRET=1"
    assert dict(layers["layers.0.up"].plan)["adapted_linear (y)"]
    text = str(explain(model, rows=70))
    assert "3 of 3 adapted layers fused" in text and text.count("plan 1") == 2 and "plan 2" not in text


def test_a_disabled_adapter_is_said(model):
    set_enabled(model, False)
    assert "the adapter is disabled" in explain(model).layers["layers.1.up"].reason


def test_on_another_device(model):
    model.to("meta")
    assert "meta tensors" in str(explain(model))
    assert "cpu tensors" in str(explain(model, device="cpu"))


def test_a_layer_by_itself():
    (layer,) = explain(FusedALLoRALinear(4, 3, r=2)).layers.values()
    assert layer.shape == (3, 4)
    (plain,) = explain(nn.Linear(4, 3)).layers.values()
    assert plain.r is None


class BaseTunerLayer(nn.Module):
    """What PEFT calls the class of its layers."""


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Sequential(BaseTunerLayer()), {}, ValueError, "integrations.peft.explain"),
        (nn.ReLU(), {}, ValueError, "no linear layers"),
        (nn.Linear(2, 2), {"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        (
            FusedALLoRALinear(4, 3, r=2),
            {"device": "cuda:99"},
            ValueError,
            r"device='cuda:99', but torch .* sees \d+ GPUs",
        ),
        (WrappedALLoRALinear(nn.Linear(4, 3), r=2), {"device": "cuda:99"}, ValueError, "device='cuda:99', but torch"),
        (3, {}, TypeError, "model must be an nn.Module, got int"),
    ],
)
def test_what_cannot_be_explained(model, options, error, message):
    with pytest.raises(error, match=message):
        explain(model, **options)


def test_from_the_command_line_no_weight_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=50,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    testing = pytest.importorskip("typer.testing")
    from allora_kernels.tools import cli

    def explained(*arguments):
        return testing.CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["explain", *arguments])

    done = explained(str(tmp_path), "--r", "4", "--target-modules", "q_proj", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.stderr
    for words in ("2 layers adapted", "0 of 2 adapted layers fused", "self_attn.q_proj", "lm_head"):
        assert words in done.stdout, done.stdout
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "nonesuch"}')
    for wrong, words in (
        ([str(tmp_path / "unknown")], "unknown cannot be explained: "),
        ([str(tmp_path / "nowhere")], "no such model folder"),
        ([str(tmp_path), "--target-modules", "w_proj"], "leaves no layer to adapt"),
        ([str(tmp_path), "--dtype", "int8"], "dtype must be one of"),
        ([str(tmp_path), "--r", "0"], "r must be between 1 and 256"),
        ([str(tmp_path), "--rows", "0"], "rows must be at least 1"),
    ):
        done = explained(*wrong)
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_command_names_the_rules_as_it_takes_them():
    from allora_kernels.tools import cli

    with pytest.raises(ValueError, match="norm must be one of row, matrix, factor, entry, token, none, got 'foo'"):
        cli.explain("no-model", norm="foo")
