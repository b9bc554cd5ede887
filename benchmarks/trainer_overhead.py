"""What does `lorank pretrain` cost beyond a bare PyTorch loop? Same model, data, optimizer, clipping, schedule and
logging.

    python benchmarks/trainer_overhead.py [--size tiny] [--steps 12] [--rounds 5]

Both loops run in turns in one process, for a few steps each, from the same weights; the ratio is between the medians of
their seconds per step. Both must arrive at the same loss, which is checked: they did the same work.
"""

import argparse
import copy
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainerCallback, get_scheduler, set_seed

from lorank.train.build import build_trainer
from lorank.train.data import collate, load_corpus
from lorank.train.methods import build_optimizer
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def with_lorank(recipe: Recipe, model: torch.nn.Module, corpus, folder: Path) -> tuple[list[float], list[float]]:
    """(seconds per step, losses) of `lorank pretrain`'s Trainer."""
    times = StepTimes()
    trainer = build_trainer(recipe, folder, model, corpus, [times])
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return [b - a for a, b in pairwise(times.ends)], losses


def bare(recipe: Recipe, model: torch.nn.Module, corpus) -> tuple[list[float], list[float]]:
    """(seconds per step, losses) of the loop that anybody would write."""
    model.train()
    optimizer = build_optimizer(recipe, model)
    schedule = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        recipe.warmup,
        recipe.steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.1},
    )
    order = RandomSampler(corpus.train, generator=torch.Generator().manual_seed(recipe.seed))
    loader = DataLoader(corpus.train, batch_size=recipe.batch_size, sampler=order, collate_fn=collate, drop_last=True)
    ends, losses = [], []
    for _, batch in zip(range(recipe.steps), loader, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return [b - a for a, b in pairwise(ends)], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=12, help="per round and loop")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    recipe = Recipe(size=options.size, steps=options.steps, warmup_steps=2, log_every=1, eval_every=0, save_every=0)
    corpus = load_corpus(sequence_length=recipe.sequence_length)
    set_seed(0)
    start = build_model(recipe, build_config(recipe, corpus.tokenizer))

    seconds: dict[str, list[float]] = {"lorank pretrain": [], "bare loop": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            ours, our_losses = with_lorank(recipe, copy.deepcopy(start), corpus, Path(folder))
            theirs, their_losses = bare(recipe, copy.deepcopy(start), corpus)
            seconds["lorank pretrain"] += ours
            seconds["bare loop"] += theirs
    ours, theirs = (statistics.median(times) for times in seconds.values())
    print(f"{options.size} CoLA, {recipe.batch_size} x {recipe.sequence_length} tokens per step, medians of "
          f"{len(seconds['bare loop'])} steps, torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(
        f"bare loop        {theirs * 1e3:8.1f} ms per step, first and last loss {their_losses[0]:.4f} {their_losses[-1]:.4f}"
    )
    print(
        f"lorank pretrain  {ours * 1e3:8.1f} ms per step, first and last loss {our_losses[0]:.4f} {our_losses[-1]:.4f}"
    )
    print(f"overhead         {ours / theirs - 1:8.1%}")


if __name__ == "__main__":
    main()
