"""A recipe as a trainer."""

import copy
import dataclasses
import logging
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
from lorank.distributed.sharding import emptied, fill, shard
from lorank.loss import balances_experts
from lorank.method import Gradient
from lorank.train import data
from lorank.train.callbacks import StopOnNonFinite
from lorank.train.distil import Teacher
from lorank.train.engine import Engine
from lorank.train.methods import build_optimizer, methods_of, schedule_of
from lorank.train.recipe import Recipe
from lorank.train.text import limits_of
from lorank.train.trainer import PretrainTrainer
from lorank.train.world import processes

logger = logging.getLogger(__name__)
PROJECT = "lorank"
"""What trackers call the project, unless the user's environment says otherwise."""


@dataclasses.dataclass
class RunArguments(TrainingArguments):
    """Trainer's, which trackers get, with the recipe."""

    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


def build_trainer(
    recipe: Recipe,
    out: Path,
    model: PreTrainedModel,
    corpus: data.Corpus,
    callbacks: Sequence[TrainerCallback] = (),
    on_cpu: bool = False,
    engine: Engine | None = None,
) -> PretrainTrainer:
    """The recipe as a Trainer, ready to train. If processes share the model, it is split, whether it has weights or is on the meta device."""
    engine = engine or Engine()
    check_settings(recipe, engine)
    groups, micro = engine.groups, _micro_batch(recipe, engine)
    if recipe.batch_size != micro and balances_experts(model):  # which runs the model
        raise ValueError(
            f"batch_size must be one batch of one process ({micro}) for a model that balances its experts over the batch, got "
            f"{recipe.batch_size}; leave out micro_batch_size, or set shape.output_router_logits=false"
        )
    estimator = build_estimator(recipe, model)
    if estimator is not None and estimator.carries and isinstance(corpus.train, IterableDataset):
        raise ValueError(
            f"data={recipe.data} is a stream, whose rows do not continue from batch to batch; add --option carry=false"
        )
    _name_project()
    arguments = RunArguments(
        output_dir=str(out),
        run_name=out.resolve().name,
        project=PROJECT,
        recipe=recipe.to_dict(),
        max_steps=recipe.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * groups),
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr_ratio},
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        bf16=recipe.precision == "bf16",
        use_cpu=on_cpu or torch.accelerator.current_accelerator() is None,
        torch_compile=recipe.compile and estimator is None,  # which compiles what it calls
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
        ignore_data_skip=corpus.begins > 0,  # the stream has skipped it
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    peak, source = accounting.achievable_flops()
    flops = _flops_per_token(recipe, model, estimator, micro)
    mesh, outline = engine.mesh(arguments.device), None
    if mesh is not None:
        model, held = emptied(model)
        outline = copy.deepcopy(model)
        shard(model, mesh)
        fill(model, held if engine.draws else None, arguments.device)
    trainer = PretrainTrainer(
        model=model,
        mesh=mesh,
        outline=outline,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=partial(
            data.collate, vocab_size=model.config.vocab_size, end=data.end_of(recipe.documents, corpus.tokenizer)
        ),
        processing_class=corpus.tokenizer,
        callbacks=[*callbacks, StopOnNonFinite()],
        make_optimizer=partial(build_optimizer, recipe),
        schedule=schedule_of(recipe),
        schedule_steps=recipe.scheduled,
        estimator=estimator,
        tokens_per_step=recipe.batch_size * recipe.sequence_length * corpus.fill,
        fill=corpus.fill,
        flops_per_token=flops,
        peak_flops=(peak * processes(), source),
        eval_tokens=limits_of(recipe)[0],
        bytes_per_token=corpus.validation_size.per_token,
        skips_nan=recipe.on_nan == "skip",
        teacher=None if recipe.distil is None else Teacher(recipe, model, corpus.tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _flops_per_token(recipe: Recipe, model: PreTrainedModel, estimator: Gradient | None, batch: int) -> float | None:
    """FLOPs of training on one token; None, with a warning, for a model that can be trained but not be counted."""
    try:
        if estimator is not None:
            return estimator.flops_per_token
        return accounting.flops_per_token(model, recipe.sequence_length, batch=batch)
    except ValueError as error:
        logger.warning("this run logs no FLOPs: %s", error)
        return None


def build_estimator(recipe: Recipe, model: PreTrainedModel) -> Gradient | None:
    """The estimator of the recipe's gradient; None for autograd.

    Raises:
        ValueError: several processes or micro-batches, or a model or batch that does not suit the estimator.
    """
    method = methods_of(recipe).gradient
    estimator = method.gradient(
        model,
        batch_size=recipe.batch_size,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        compile=recipe.compile,
    )
    if estimator is not None and processes() > 1:
        raise ValueError(f"gradient={method.name} runs in one process; start it without torchrun")
    if estimator is not None and recipe.micro_batch_size not in (None, recipe.batch_size):
        raise ValueError(
            f"gradient={method.name} does not accumulate gradients; leave out micro_batch_size, and use --option chunk=MEMBERS "
            "to save memory"
        )
    if estimator is not None and getattr(methods_of(recipe).optimizer, "in_backward", False):
        raise ValueError(
            f"in_backward must be false with gradient={method.name}, which has no backward pass, got in_backward=True"
        )
    return estimator


def check_settings(recipe: Recipe, engine: Engine) -> None:
    """Raises ValueError for settings that do not go together or not on this machine, as far as it is known without text and model: preparing
    text may take an hour."""
    micro, groups = _micro_batch(recipe, engine), engine.groups
    if recipe.batch_size % (micro * groups):
        each = "processes" if engine.tensor_parallel == 1 else f"groups of {engine.tensor_parallel} processes"
        raise ValueError(
            f"batch_size must be a multiple of micro_batch_size={micro} times {groups} {each}, got {recipe.batch_size}"
        )
    methods = methods_of(recipe)
    if methods.gradient.answers() and recipe.distil is not None:
        raise ValueError(f"distil must be left out with gradient={methods.gradient.name}, which has another loss")
    if recipe.on_nan == "skip" and getattr(methods.optimizer, "in_backward", False):
        raise ValueError(
            "on_nan must be stop with in_backward=true, which has used a gradient before the whole of it is known, got skip"
        )
    known = get_available_reporting_integrations()  # those of transformers whose packages are installed
    for name in recipe.report_to:
        if name not in (*known, "none", "all"):
            raise ValueError(f"report_to must name installed trackers ({', '.join(known) or 'none'}), got {name!r}")


def _micro_batch(recipe: Recipe, engine: Engine) -> int:
    return recipe.micro_batch_size or max(1, recipe.batch_size // engine.groups)


def _name_project() -> None:
    for variable in (
        "WANDB_PROJECT",
        "MLFLOW_EXPERIMENT_NAME",
        "COMET_PROJECT_NAME",
        "CLEARML_PROJECT",
        "SWANLAB_PROJECT",
    ):
        os.environ.setdefault(variable, PROJECT)
