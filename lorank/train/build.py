"""A recipe as a trainer."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from lorank import accounting
from lorank.conversion import method_of
from lorank.train import data
from lorank.train.callbacks import StopOnNonFinite
from lorank.train.estimators import EggEggroll, build_estimator, egg_optimizer
from lorank.train.model import find_projection
from lorank.train.optimizers import build_low_rank_optimizer, build_optimizer
from lorank.train.recipe import Recipe
from lorank.train.trainer import PretrainTrainer


def build_trainer(
    recipe: Recipe,
    out: Path,
    model: PreTrainedModel,
    corpus: data.Corpus,
    callbacks: Sequence[TrainerCallback] = (),
    on_cpu: bool = False,
) -> PretrainTrainer:
    """The recipe as a Trainer, ready to train."""
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    micro = recipe.micro_batch_size or max(1, recipe.batch_size // devices)
    if recipe.batch_size % (micro * devices):
        raise ValueError(
            f"batch_size={recipe.batch_size} is not a multiple of micro_batch_size={micro} times {devices} processes"
        )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * devices),
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr_ratio},
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.clip,
        bf16=recipe.precision == "bf16",
        use_cpu=on_cpu or torch.accelerator.current_accelerator() is None,
        torch_compile=recipe.compile and recipe.method != "eggroll",  # that compiles what it calls
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=recipe.keep,
        report_to=recipe.report_to or "none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    _check_trackers(recipe.report_to)
    method = method_of(model)
    settings: dict[str, Any] = {name: getattr(recipe, name) for name in ("lr", "weight_decay", "decay", "betas", "eps")}

    def build(trained: torch.nn.Module) -> torch.optim.Optimizer:
        projection = find_projection(recipe, trained)  # of its own parameters, which sharding has replaced
        if projection is not None:
            kind, ranks, options = projection
            return build_low_rank_optimizer(trained, kind, ranks, recipe.optimizer, options=options, **settings)
        return build_optimizer(trained, recipe.optimizer, adamw=method.adamw if method else None, **settings)

    peak, source = accounting.achievable_flops()
    estimator = build_estimator(recipe, model)
    if estimator is not None and estimator.carries and isinstance(corpus.train, IterableDataset):
        raise ValueError(
            f"data={recipe.data} is a stream, whose rows do not go on from batch to batch; give --option carry=false"
        )
    schedule = method.schedule(recipe.steps, recipe.warmup_steps, recipe.min_lr_ratio) if method is not None else None
    make_optimizer: Any = build
    if isinstance(estimator, EggEggroll):
        make_optimizer, schedule = egg_optimizer(recipe, estimator)
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=partial(data.collate, vocab_size=model.config.vocab_size),
        processing_class=corpus.tokenizer,
        callbacks=[*callbacks, StopOnNonFinite()],
        make_optimizer=make_optimizer,
        schedule=schedule,
        estimator=estimator,
        tokens_per_step=recipe.batch_size * recipe.sequence_length * corpus.fill,
        fill=corpus.fill,
        flops_per_token=accounting.flops_per_token(model, recipe.sequence_length, batch=micro)
        if estimator is None
        else estimator.flops_per_token,
        peak_flops=(peak * devices, source),
        eval_tokens=recipe.eval_tokens,
        bytes_per_token=corpus.validation_bytes_per_token,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_trackers(names: Sequence[str]) -> None:
    known = get_available_reporting_integrations()  # those of transformers whose packages are installed
    for name in names:
        if name not in (*known, "none", "all"):
            raise ValueError(f"report_to={name!r} is not installed; installed trackers: {', '.join(known) or 'none'}")
