"""A model, a tokenizer and data small enough to fine-tune in a second."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LETTERS = [f"w{i}" for i in range(20)]
VOCABULARY = ["[PAD]", "[UNK]", "[END]", *LETTERS, "good", "bad"]
_SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(VOCABULARY), "max_position_embeddings": 32,
    "initializer_range": 0.3,
}  # fmt: skip


def make_model(folder: Path, family: str) -> str:
    """A random ``"Bert"``, ``"Roberta"`` or ``"XLNet"`` (without a head), ``"Llama"`` or ``"Mixtral"`` (with one) and its
    tokenizer, in `folder`."""
    torch.manual_seed(0)
    if family == "Bert":
        # Dropout stays on: what draws random numbers is what resuming can get wrong.
        model = transformers.BertModel(transformers.BertConfig(**_SIZES))
    elif family == "Roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**_SIZES))
    elif family == "XLNet":
        sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": len(VOCABULARY)}
        model = transformers.XLNetModel(transformers.XLNetConfig(**sizes, pad_token_id=0))
    elif family == "Mixtral":
        config = transformers.MixtralConfig(**_SIZES, num_key_value_heads=1, num_local_experts=3)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, num_key_value_heads=1))
    model.save_pretrained(folder)
    words = models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", model_max_length=32
    ).save_pretrained(folder)
    return str(folder)


def switch_dropout_off(folder: str) -> None:
    """In the config of a saved Bert."""
    config = Path(folder, "config.json")
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | without))


def sentences(count: int = 96) -> list[tuple[str, str]]:
    """(text, label): the text has one of two words that give the label away; the other words always come in order."""
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        start = generator.randrange(12)
        word = generator.choice(["good", "bad"])
        text = [*LETTERS[start : start + generator.randint(3, 7)], word]
        rows.append((" ".join(text), "fresh" if word == "good" else "rotten"))
    return rows


def write_csv(file: Path, rows: list[tuple[str, str]]) -> str:
    file.write_text("".join(f"{text},{label}\n" for text, label in [("text", "label"), *rows]))
    return str(file)


class At(transformers.TrainerCallback):
    """Calls `action` at the end of optimizer step `step`."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def trained(model) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all bits are."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
