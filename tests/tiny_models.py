"""Random models small enough to build in milliseconds, and what the tests of adapters ask of any model."""

import torch
import transformers
from torch import nn
from transformers import logging

from allora_kernels import adapter_parameters, apply_allora

logging.set_verbosity_error()

VOCAB = 40
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": 0}
_CONFIGS = {
    "Bert": _SIZES,
    "Roberta": {**_SIZES, "max_position_embeddings": 32},
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "Llama": {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0},
    "GPT2": _GPT2,
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "OPT": {**_SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Mixtral": {**_SIZES, "num_key_value_heads": 1, "num_local_experts": 2},
    "Qwen3Moe": {
        **_SIZES, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Qwen2Moe": {
        **_SIZES, "num_key_value_heads": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12,
        "num_experts": 4, "num_experts_per_tok": 2,
    },
    "Olmoe": {**_SIZES, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        **_SIZES, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 24,
    },
    "DeepseekV3": {
        **_SIZES, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "first_k_dense_replace": 1, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    },
    "Laguna": {
        **_SIZES, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12,
        "num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2, "pad_token_id": 0,
        "num_attention_heads_per_layer": [2, 2], "mlp_layer_types": ["dense", "sparse"],
    },
    "ViT": {**_SIZES, "image_size": 8, "patch_size": 4},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "Jamba": {
        **_SIZES, "num_key_value_heads": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "MobileBert": {**_SIZES, "embedding_size": 8, "intra_bottleneck_size": 16},
    "LayoutLMv3": {
        **_SIZES, "input_size": 8, "patch_size": 4, "coordinate_size": 2, "shape_size": 4, "max_position_embeddings": 32,
        "has_relative_attention_bias": True, "has_spatial_attention_bias": True,
    },
    "Wav2Vec2": {
        **_SIZES, "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 1, "tdnn_dim": (8, 8), "tdnn_kernel": (3, 1),
        "tdnn_dilation": (1, 1), "apply_spec_augment": False,
    },
    "WavLM": {
        **_SIZES, "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (4,), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip


def transformer(family: str, head: str, **config) -> nn.Module:
    """``transformer("Bert", "ForMaskedLM")``: the same weights at every call, in eval mode."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, **_CONFIGS[family], **config}
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**settings))
    return model.eval()


def bert(**config) -> nn.Module:
    return transformer("Bert", "ForSequenceClassification", num_labels=3, **config)


def llama(**config) -> nn.Module:
    return transformer("Llama", "ForCausalLM", **config)


def gpt2(**config) -> nn.Module:
    return transformer("GPT2", "LMHeadModel", **config)


MIXTURES = {
    "Qwen3Moe": {"moe_intermediate_size": 12},
    "Mixtral": {"num_local_experts": 3},
    "Olmoe": {},
    "GptOss": {},
    "DeepseekV3": {},
}
"""Architectures with experts in 3-D parameters, none of them square."""


@torch.no_grad()
def mixture(family: str, **config) -> nn.Module:
    """A language model with experts that differ, biases too."""
    model = transformer(family, "ForCausalLM", **{**MIXTURES.get(family, {}), **config})
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "experts" in name or "router" in name or name.endswith("gate.weight"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tied_mixture() -> nn.Module:
    """Each layer has a module of experts of its own, with the same parameters, as DiffusionGemma's encoder and decoder have."""
    model = mixture("Mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    return model


def shared_mixture() -> nn.Module:
    """Both layers have the same module of experts."""
    model = mixture("Mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(14).reshape(2, 7) * 5 % VOCAB
    return model(input_ids=ids).logits


@torch.no_grad()
def pretend_to_train(model: nn.Module) -> nn.Module:
    """Give every trainable parameter random values, so that no adapter is zero."""
    generator = torch.Generator().manual_seed(1)
    assert adapter_parameters(model)
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """A PEFT model with random values in every adapter and module to save, whatever order the modules are in."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        if "lora_" in name or "modules_to_save" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def photograph(model: nn.Module):
    """Everything of a model that a function which fails must leave as it was; compare two by `==`."""
    modules = [(name, id(m), sorted(m.__dict__)) for name, m in model.named_modules(remove_duplicate=False)]
    flags = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    lazy = torch.nn.parameter.UninitializedParameter
    values = {name: t.tolist() for name, t in model.state_dict().items() if not (isinstance(t, lazy) or t.is_meta)}
    return modules, flags, values


def adapted_mixture(family: str = "Qwen3Moe", **arguments) -> nn.Module:
    """A `mixture` with adapters, also of its experts, that are not zero."""
    model = mixture(family)
    apply_allora(model, **{"r": 3, "experts": True, **arguments})
    return pretend_to_train(model)
