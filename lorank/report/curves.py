"""Loss curves as a picture."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#c2410c", "#475569", "#0f766e", "#7c3aed", "#b45309", "#0369a1")


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> None:
    """Training loss (thin) and validation loss (dots) against tokens, one colour per run, as a PNG.

    Args:
        runs: name -> records of metrics.jsonl.
        path: where the PNG goes, under a temporary name first.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=160)
    lowest, highest, ends = float("inf"), 0.0, []
    for (name, records), colour in zip(runs.items(), COLOURS, strict=False):
        train = [(r["tokens"], r["loss_nats_per_token"]) for r in records if "eval_perplexity" not in r]
        valid = [(r["tokens"], r["eval_loss_nats_per_token"]) for r in records if "eval_perplexity" in r]
        axes.plot(*zip(*train, strict=True), color=colour, linewidth=1, alpha=0.35)
        if valid:
            axes.plot(*zip(*valid, strict=True), color=colour, linewidth=2, marker="o", markersize=3.5)
        ends.append(((valid or train)[-1], name, colour))
        lowest = min(lowest, *(loss for _, loss in train + valid))
        highest = max(highest, valid[0][1] if valid else train[0][1])
    for place, (end, name, colour) in enumerate(sorted(ends, key=lambda entry: entry[0][1])):
        below = 13 * (place - (len(ends) - 1) / 2)  # points; curves that end together keep their names apart
        axes.annotate(
            f"{name}  {end[1]:.3f}",
            end,
            xytext=(8, below),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            fontweight="bold",
        )
    axes.set_ylim(lowest - 0.15, highest + 0.6)
    axes.margins(x=0.02)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1e6:g}M" if tokens else "0"))
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.text(0.995, 0.01, "line with dots: validation, faint: training", ha="right", fontsize=7, color="#64748b")
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    os.replace(temporary, path)
