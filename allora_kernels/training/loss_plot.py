"""The picture of a training run: `loss.png`."""

import os
from pathlib import Path
from typing import Any


def plot_loss(metrics: dict[str, Any], file: Path) -> None:
    """Draw the training loss of `metrics` into the PNG `file`."""
    from matplotlib.figure import Figure

    steps, losses = zip(*metrics["loss_history"])
    # A step's loss is of one batch; the mean over a twentieth of the run shows where it is going.
    width = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(losses))]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9ab7d3", linewidth=0.8, label="batch")
    axes.plot(steps, means, color="#1f4e79", linewidth=2, label=f"mean of {width}")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(_title(metrics), fontsize=10, loc="left")
    aside = file.with_name(f".{file.name}")
    figure.savefig(aside, format="png")
    os.replace(aside, file)


def _title(metrics: dict[str, Any]) -> str:
    config, before, after = metrics["config"], metrics["before"], metrics["after"]
    measure = "accuracy" if config["task"] == "classification" else "perplexity"
    rule = f"r={config['r']}, eta={config['eta']:g}, norm={config['norm']}, {config['optimizer']}"
    change = f"{before[measure]:.3f} → {after[measure]:.3f}" if after else "interrupted"
    return f"{Path(config['model']).name}, {rule}: {measure} {change}"
