"""lorank finetune: train a saved model on, with defaults for trained weights."""

from typing import Any

import click

from lorank.cli.flags import (
    SETTINGS,
    Folder,
    InGroups,
    changes_of,
    recipe_flags,
    recipe_of,
    resume_flag,
    split_budget,
)
from lorank.cli.pretrain import resumed, show_plan, train
from lorank.train.recipe import LONGEST

OWN = {"start_from": "MODEL", "size": "MODEL", "model": "MODEL", "method": "--method", "data": "--data"}
"""Settings that the argument and the command's other flags decide."""
DEFAULTS = {
    "distil": None,
    "optimizer": "adamw",
    "rank": "each method's own",
    "options": None,
    "targets": None,
    "exclude": None,
    "checkpoint": None,
    "precision": "fp32",
    "tokenizer": "the model's",
    "sequence_length": "256, or the model's positions",
    "lr": "1e-3; full and osft 1e-4",
    "steps": "3 epochs",
    "warmup_steps": "0.1",
    "batch_size": "8",
    "micro_batch_size": None,
    "seed": "42",
}
"""Everyday flags, and what the help shows as their defaults."""


@click.command(cls=InGroups, context_settings=SETTINGS)
@click.argument("model", required=False)
@recipe_flags(own=OWN, only=DEFAULTS)
@click.option(
    "--method",
    default=None,
    metavar="NAME",
    help="lora, smora, moram, codyra, row-adaptive, osft, comp-lora or another method that keeps a trained model; full: all weights. "
    "With an optimizer: lora+muon.",
    show_default="lora, or the model's own",
)
@click.option(
    "--data",
    multiple=True,
    metavar="TEXT",
    help="What to train on: a file, folder or glob (txt md py jsonl parquet csv), or a hub name. Several local ones are mixed, PATH:0.3 "
    "with that weight.",
)
@click.option("--out", type=Folder(), default=None, help="Folder of the run.", show_default="runs/METHOD-MODEL")
@resume_flag
@click.option("--dry-run", is_flag=True, help="Print what would be trained, parameters, memory and tokens, and stop.")
def finetune(
    model: str | None,
    method: str | None,
    data: tuple[str, ...],
    out: str | None,
    resume: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train a saved model on with your text, by default with a LoRA for three epochs.

    MODEL is a run, a folder or a hub name. Its weights stay as they are, and frozen, under an adapter (lora, smora, moram, codyra,
    row-adaptive, ...); osft trains what the leading directions leave free, and full all weights. A converted model keeps its method.

    OUT gets the whole model, and in OUT/adapter the adapter alone: a small file, which lorank.load_adapter puts on the same weights.
    It is pretrain --start-from MODEL with other defaults; --set changes any other setting.
    """
    changes = changes_of(flags)
    if resume:
        given = {"MODEL": model, "--method": method, "--data": data, "--out": out, "--dry-run": dry_run}
        return resumed(resume, flags, given)
    if model is None or not data:
        raise ValueError(
            "a model and a text must be given: lorank finetune MODEL --data TEXT, or --resume RUN to go on with a run"
        )
    budget, flags = split_budget(flags)
    from lorank.train.budget import Budget
    from lorank.train.finetuning import EPOCHS, defaults
    from lorank.train.start import started

    if budget is None and "steps" not in changes:
        budget, flags = Budget(epochs=EPOCHS), {**flags, "steps": LONGEST}
    base = {**defaults(model, method), "data": data[0] if len(data) == 1 else [*data]}
    settings = started(recipe_of(None, flags, own=OWN, base=base))
    if dry_run:
        return show_plan(settings, budget)
    train(settings, out, budget, None)
