"""Experts that can get no adapters, and what of experts is refused: named, and with the model left as it was."""

import pytest
import torch
from tiny_models import llama, mixture, photograph, pretend_to_train, transformer
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation

from allora_kernels import (
    adapter_names,
    adapter_rows,
    add_adapter,
    apply_allora,
    merge_adapter,
    remove_adapter,
    set_adapter,
    set_enabled,
    use_batch_invariant,
)

OTHER_INTERFACE = ExpertsInterface()


class Config:
    _experts_implementation = "eager"


class Experts(nn.Module):
    def __init__(self, config=None, dtype=torch.float32, experts=3):
        super().__init__()
        self.num_experts, self.act_fn = experts, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.ones(experts, 8, 6, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.ones(experts, 6, 4, dtype=dtype), requires_grad=False)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class Dispatched(Experts):
    pass


class DispatchedElsewhere(Experts):
    pass


class Overridden(Dispatched):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights)


use_experts_implementation(Dispatched)
use_experts_implementation(DispatchedElsewhere, experts_interface=OTHER_INTERFACE)


class Model(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.q_proj, self.experts = nn.Linear(6, 6), experts


def spread(experts):
    experts._is_expert_parallel = True
    return experts


def offloaded(experts):
    experts.forward = lambda *arguments: experts(*arguments)
    return experts


def parametrized(experts):
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    return experts


REFUSED = {
    "not dispatched": (lambda: Experts(), "forward pass of Experts does not go through transformers' registry"),
    "overridden": (lambda: Overridden(Config()), "forward pass of Overridden does not go through"),
    "another registry": (
        lambda: DispatchedElsewhere(Config()),
        "forward pass of DispatchedElsewhere does not go through",
    ),
    "quantized": (
        lambda: Dispatched(Config(), torch.float8_e4m3fn),
        r"Dispatched with a float8_e4m3fn gate_up_proj \(quantized\)",
    ),
    "parametrized": (lambda: parametrized(Dispatched(Config())), "Dispatched whose down_proj is no plain nn.Parameter"),
    "parallel": (lambda: spread(Dispatched(Config())), "is spread over processes"),
    "offloaded": (lambda: offloaded(Dispatched(Config())), "with a forward pass of its own"),
    "alone": (lambda: Dispatched(Config(), experts=1), "Dispatched with one expert"),
}


def refused(model, match, error=ValueError, **arguments):
    before = photograph(model)
    with pytest.raises(error, match=match):
        apply_allora(model, **{"r": 2, **arguments})
    assert photograph(model) == before


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_experts_that_can_get_no_adapter(make, reason):
    refused(Model(make()), f"experts=True: the model's experts can get no adapters .*experts: .*{reason}", experts=True)


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_one_that_cannot_beside_one_that_can_is_in_the_report(make, reason):
    import re

    model = Model(make())
    model.good = Model(Dispatched(Config()))
    report = apply_allora(model, r=2, experts=True)
    assert report.experts.keys() == {"good.experts.gate_up_proj", "good.experts.down_proj"}
    assert re.search(reason, report.skipped["experts"])


def test_models_without_such_experts():
    refused(llama(), "experts=True: the model has no experts in 3-D parameters", experts=True)
    # Switch Transformers has such a ModuleDict.
    for several in (nn.ModuleList([nn.Linear(6, 6)]), nn.ModuleDict({"expert_0": nn.Linear(6, 6)})):
        match = "the experts of experts are modules of their own, whose linear layers target_modules reaches"
        refused(Model(several), match, experts=True)
    refused(transformer("ViT", "Model"), "no experts in 3-D parameters", experts=True)


@pytest.mark.parametrize(
    "names, match",
    [
        (["mlp.experts.down_prj"], r"no parameter 'mlp\.experts\.down_prj'; did you mean 'mlp\.experts\.down_proj'"),
        (["gate_proj"], r"no parameter 'gate_proj'; did you mean 'gate_up_proj'\?"),
        (["xyz"], r"no parameter 'xyz'; the experts have 'down_proj', 'gate_up_proj'"),
        (["down_proj", "gate.weight"], r"names model\.layers\.0\.mlp\.gate\.weight: only stacks of experts' weights"),
        (
            ["q_proj.weight"],
            r"names model\.layers\.0\.self_attn\.q_proj\.weight: .*target_modules reaches linear layers",
        ),
        ([""], "must not contain an empty name"),
    ],
)
def test_target_parameters_that_name_something_else(names, match):
    refused(mixture("Qwen3Moe"), match, target_parameters=names)


def test_arguments_that_do_not_fit():
    refused(mixture("Qwen3Moe"), "give one of them", experts=True, target_parameters=["down_proj"])
    refused(mixture("Qwen3Moe"), "must be a list", error=TypeError, target_parameters="down_proj")
    refused(mixture("Qwen3Moe"), "experts must be a bool", error=TypeError, experts="yes")
    refused(mixture("Qwen3Moe"), r"rank_pattern\['nope'\] matches none", experts=True, rank_pattern={"nope": 2})
    refused(
        mixture("Qwen3Moe"), "which is in exclude_modules", target_parameters=["down_proj"], exclude_modules=["experts"]
    )
    refused(mixture("Qwen3Moe"), r"trained whole", target_parameters=["down_proj"], modules_to_save=["experts"])
    refused(mixture("Qwen3Moe"), "leaves no layer to adapt", target_modules=[])
    refused(
        llama(),
        r"no parameter 'down_proj': the model has no experts in 3-D parameters",
        target_parameters=["down_proj"],
    )


def test_the_report_without_experts_says_how_to_get_them():
    report = apply_allora(mixture("Qwen3Moe"), r=2)
    assert "get no adapter unless asked for by experts=True" in report.skipped["model.layers.0.mlp.experts"]
    report = apply_allora(Model(Experts()), r=2)
    assert "get no adapter here, as transformers does not dispatch it" in report.skipped["experts"]


def adapted():
    model = mixture("Qwen3Moe")
    apply_allora(model, r=2, experts=True)
    return pretend_to_train(model)


def test_what_adapted_experts_refuse():
    model = adapted()
    with pytest.raises(ValueError, match="already has adapters"):
        apply_allora(model, r=2, experts=True)
    set_enabled(model.model.layers[0].mlp, False)
    with pytest.raises(ValueError, match="is disabled, so"):
        merge_adapter(model)
    set_enabled(model.model.layers[0].mlp, True)
    ids = torch.arange(5)[None]
    use_batch_invariant(True)
    try:
        with pytest.raises(RuntimeError, match="use_batch_invariant is on"):
            model(input_ids=ids)
    finally:
        use_batch_invariant(False)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(RuntimeError, match="were spread over processes"):
        model(input_ids=ids)


def test_our_entry_of_the_registry_is_for_adapted_experts_only():
    adapted()
    assert "allora" in ALL_EXPERTS_FUNCTIONS
    plain = mixture("Qwen3Moe")
    plain.config._experts_implementation = "allora"
    with pytest.raises(ValueError, match=r"is for experts with adapters: apply_allora\(model, experts=True\)"):
        plain(input_ids=torch.arange(5)[None])


def test_our_entry_of_the_registry_leaves_nothing_to_run_while_adapters_are_off():
    model, ids = adapted(), torch.arange(5)[None]
    model.set_experts_implementation("allora")
    model(input_ids=ids)
    set_enabled(model, False)
    with pytest.raises(ValueError, match="leaves nothing to run while the adapters are switched off"):
        model(input_ids=ids)
    model.set_experts_implementation("eager")
    model(input_ids=ids)


def test_experts_that_were_offloaded_with_their_adapters_say_so():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(adapted(), execution_device="cpu")
    with pytest.raises(RuntimeError, match="offloading experts with adapters is not supported"):
        model(input_ids=torch.arange(5)[None])


def test_opacus_is_told():
    opacus = pytest.importorskip("allora_kernels.integrations.opacus", exc_type=ImportError)
    model = adapted().train()
    assert any("adapts the experts of a mixture" in reason for reason in opacus.reasons_against(model))


def test_experts_take_one_adapter():
    model = transformer("Qwen3Moe", "ForCausalLM")
    apply_allora(model, r=2, experts=True, adapter_name="only")
    before = photograph(model)
    for call in (
        lambda: add_adapter(model, "another"),
        lambda: adapter_rows(model, ["only"]).__enter__(),
        lambda: remove_adapter(model, "only"),
    ):
        with pytest.raises(ValueError, match=r"adapts the experts of a mixture, which take one adapter"):
            call()
    set_adapter(model, "only")
    assert photograph(model) == before and adapter_names(model) == ("only",)
