"""TRL's DPOTrainer teaches SmolLM2-135M to prefer a play's next lines over lines from elsewhere, offline.

    python examples/trl_dpo.py --output runs/trl-dpo

The model is a PeftModel, so the reference model costs no second copy of the base. Model and plays come from the packages of the
language model demo (requirements-demo-lm.txt). On two CPU cores this takes some minutes.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from demo_lm import model_and_plays, pieces
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from allora_kernels.integrations.peft import get_allora_model

CHARACTERS = 240  # of a text: half of it is the prompt


def preferences(texts: list[str]) -> Dataset:
    """Of each text the first half as prompt, its second half as the chosen answer, and another text's as the rejected one."""
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    elsewhere = halves[len(halves) // 2 :] + halves[: len(halves) // 2]
    return Dataset.from_list(
        [{"prompt": a, "chosen": b, "rejected": other} for (a, b), (_, other) in zip(halves, elsewhere)]
    )


def finetune(
    base: Path, output: Path, train: list[str], held_out: list[str], steps: int, learning_rate: float = 1e-3
) -> tuple[float, float]:
    """Train adapters on the texts `train` and save them in ``output/adapter``; the DPO loss on `held_out` before and after."""
    set_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_allora_model(AutoModelForCausalLM.from_pretrained(base), config)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(output / "checkpoints"),
            max_steps=steps,
            save_steps=max(steps // 2, 1),
            per_device_train_batch_size=4,
            learning_rate=learning_rate,
            max_length=128,
            logging_steps=1,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=preferences(train),
        eval_dataset=preferences(held_out),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output / "adapter"))
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/trl-dpo"), help="folder for everything that is written"
    )
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    base, play, other = model_and_plays(options.output)
    before, after = finetune(
        base, options.output, pieces(play, 96, CHARACTERS), pieces(other, 16, CHARACTERS), options.steps
    )
    print(f"DPO loss on a play it was not trained on: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
