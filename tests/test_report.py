"""What the report says of what is not adapted: experts of a mixture, and names that the model does not have."""

import warnings

import pytest
from tiny_models import llama, photograph, transformer

from allora_kernels import apply_allora, load_adapter, save_adapter


def experts(model):
    """The parameters of all experts, counted by name."""
    return {name: p for name, p in model.named_parameters() if ".experts." in name}


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_experts_are_reported_with_their_share(family):
    model = transformer(family, "ForCausalLM")
    assert {p.ndim for p in experts(model).values()} == {3}
    report = apply_allora(model, r=2)
    size = sum(p.numel() for p in experts(model).values())
    assert report.stacked == size
    for i in (0, 1):
        reason = report.skipped[f"model.layers.{i}.mlp.experts"]
        assert "3-D parameters" in reason and "gate_up_proj [" in reason and "down_proj [" in reason
    assert f"in 3-D parameters, as of experts: {size:,} parameters, {size / report.total:.2%} of all" in str(report)
    assert "2 x model.layers.*.mlp.experts: " in str(report)
    assert size / report.total > 0.3


def test_experts_that_are_trained_whole_or_not_asked_for_are_not_in_the_way():
    report = apply_allora(transformer("Mixtral", "ForCausalLM"), r=2, modules_to_save=["experts"])
    assert report.stacked == 0 and "3-D" not in str(report)
    report = apply_allora(transformer("Mixtral", "ForCausalLM"), r=2, target_modules=["q_proj"])
    assert report.stacked == 0 and not report.skipped


@pytest.mark.parametrize("target", ["experts", "mlp.experts"])
def test_experts_that_are_asked_for_are_left_alone_with_the_reason(target):
    report = apply_allora(transformer("Mixtral", "ForCausalLM"), r=2, target_modules=["q_proj", target])
    assert "3-D parameters" in report.skipped["model.layers.0.mlp.experts"] and report.stacked > 0


@pytest.mark.parametrize("family, head", [("ViT", "Model"), ("WavLM", "Model"), ("GPT2", "LMHeadModel")])
def test_other_3d_parameters_are_no_experts(family, head):
    """Class tokens, position embeddings and convolutions."""
    report = apply_allora(transformer(family, head), r=2)
    assert report.stacked == 0 and "3-D" not in str(report)


@pytest.mark.parametrize(
    "typo, near",
    [
        ("v_prj", "'v_proj'"),
        ("mlp.up_prok", "'mlp.up_proj'"),
        ("layers.0.self_attn.k_porj", "'layers.0.self_attn.k_proj'"),
    ],
)
def test_a_typo_beside_names_that_match_is_a_warning_with_near_matches(typo, near):
    with pytest.warns(UserWarning, match=rf"target_modules: the model has no module {typo!r}; did you mean.*{near}"):
        report = apply_allora(llama(), r=2, target_modules=["q_proj", typo])
    assert len(report.adapted) == 2
    assert f"did you mean {near}" in report.skipped[typo]


def test_a_name_like_no_other_and_the_name_of_a_parameter():
    with pytest.warns(UserWarning, match="no module 'zzzzzz'$"):
        apply_allora(llama(), r=2, target_modules=["q_proj", "zzzzzz"])
    with pytest.warns(UserWarning, match=r"'gate_up_proj': it is a 3-D parameter \(model\.layers\.0\.mlp\.experts"):
        apply_allora(transformer("Mixtral", "ForCausalLM"), r=2, target_modules=["q_proj", "gate_up_proj"])


def test_a_typo_in_the_only_name_is_an_error_with_near_matches():
    model = llama()
    before = photograph(model)
    with pytest.raises(ValueError, match=r"leaves no layer to adapt.*did you mean 'q_proj'"):
        apply_allora(model, r=2, target_modules=["q_prj"])
    assert photograph(model) == before


def test_names_that_match_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = llama()
        apply_allora(model, r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
        apply_allora(llama(), r=2, target_modules=r".*v_proj")
        save_adapter(model, tmp_path)
        load_adapter(llama(), tmp_path)
