"""TRL's SFTTrainer teaches SmolLM2-135M Shakespeare, with adapters put on by apply_allora, offline.

    python examples/trl_sft.py --output runs/trl-sft

Model and plays come from the packages of the language model demo (requirements-demo-lm.txt). On two CPU cores this takes some
minutes.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from demo_lm import model_and_plays, pieces
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from allora_kernels import apply_allora
from allora_kernels.training import AdapterCheckpoints

CHARACTERS = 400  # of a text; some 128 tokens


class AdapterSFTTrainer(AdapterCheckpoints, SFTTrainer):
    """SFTTrainer whose checkpoints hold the adapters alone, and that goes on from them."""


def finetune(
    base: Path, output: Path, train: list[str], held_out: list[str], steps: int, learning_rate: float = 1e-3
) -> tuple[float, float]:
    """Train adapters on the texts `train` and save them in ``output/adapter``; the loss on `held_out` before and after."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    print(apply_allora(model, r=8))
    trainer = AdapterSFTTrainer(
        model=model,
        args=SFTConfig(
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
        train_dataset=Dataset.from_dict({"text": train}),
        eval_dataset=Dataset.from_dict({"text": held_out}),
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
        "--output", type=Path, default=Path("runs/trl-sft"), help="folder for everything that is written"
    )
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()

    base, play, other = model_and_plays(options.output)
    before, after = finetune(
        base, options.output, pieces(play, 96, CHARACTERS), pieces(other, 8, CHARACTERS), options.steps
    )
    print(f"loss on a play it was not trained on: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
