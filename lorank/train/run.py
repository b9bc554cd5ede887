"""One pre-training run: a recipe and a folder in, a model with its history out.

RUN/recipe.yaml       the resolved recipe
RUN/run.json          versions, device, commit, hash of the data: what else a repetition needs
RUN/metrics.jsonl     one record per log line and evaluation, units in the names
RUN/checkpoint-N/     what --resume continues from (its optimizer state is read as tensors only)
RUN/model.safetensors, config.json, tokenizer.json ...   the trained model, for from_pretrained(RUN)
RUN/stream.jsonl      where pools of a streamed text begin, see lorank.train.data.marks
RUN/adapter/          what an adapter added, without the model, for lorank.load_adapter
RUN/summary.json, README.md                              its figures and its model card
"""

import contextlib
import dataclasses
import json
import logging
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from lorank import accounting
from lorank.adapter_files import save_adapter
from lorank.adapters.gated import Adapter
from lorank.conversion import method_of
from lorank.train import data
from lorank.train.budget import Budget, extent_of, of_length, saved_parameters
from lorank.train.build import build_trainer, check_settings
from lorank.train.callbacks import MetricsFile, StopOnSignal
from lorank.train.card import NAME, Card, write_card
from lorank.train.engine import Engine, in_company
from lorank.train.evaluation import Evaluation
from lorank.train.folder import (
    absolute,
    check_apart,
    last_whole_checkpoint,
    locked,
    logged_rate,
    longer,
    only_tensors,
    prepare_folder,
    read_json,
    read_recipe,
    step_of,
    write_whole,
)
from lorank.train.generation import generate_text
from lorank.train.hub import read_config
from lorank.train.memory import PeakMemory
from lorank.train.methods import methods_of, resolved, title_of, with_changed_defaults
from lorank.train.model import build_config, build_model, check_causal, check_separate, empty_model, warn_of_weights
from lorank.train.push import check_push, push
from lorank.train.recipe import Recipe
from lorank.train.saved import rehearse_saving, save_model
from lorank.train.shape import reason_of
from lorank.train.sharded import reading
from lorank.train.signals import on_stop
from lorank.train.start import Start, started
from lorank.train.summary import Summary, environment
from lorank.train.text import DOCUMENTS, limits_of, with_split_of_start
from lorank.train.trainer import PretrainTrainer
from lorank.train.vocabulary import keep_vocabulary
from lorank.train.world import is_first
from lorank.whole import without_link

logger = logging.getLogger(__name__)
ADAPTER = "adapter"


def pretrain(
    recipe: Recipe,
    out: str | Path,
    *,
    budget: Budget | None = None,
    resume: bool = False,
    say: Callable[[str], object] = logger.info,
    callbacks: Sequence[TrainerCallback] = (),
    on_cpu: bool = False,
    engine: Engine | None = None,
) -> Summary | None:
    """Train a model by a recipe and save it, its checkpoints and its history in the folder `out`. `on_cpu` ignores
    accelerators.

    Args:
        engine: how processes share the model; a run may go on with another. Default: each has all of it.
        budget: how long the run is, in place of the recipe's steps. A run that resumes may be longer than it was; its schedule
            stays that of the steps with which it began, and after these the learning rate stays where it has ended.
        say: called once with how long the run is, in one line.

    Returns:
        The summary, or None if a signal stopped the run after a checkpoint.

    Raises:
        ValueError: something in the recipe or the data is wrong, or `out` already contains a run and `resume` is False.
        OSError: a file could not be read or written, or the finished model could not be pushed.
        FloatingPointError: the loss or a gradient is no longer finite.
    """
    recipe = started(recipe)
    out, recipe = Path(out).expanduser(), absolute(recipe if resume else with_changed_defaults(resolved(recipe)))
    recipe = _with_split(recipe, out, resume=resume)
    finished = (
        resume
        and (out / "summary.json").exists()
        and read_json(out / "summary.json", steps=int)["steps"] >= recipe.steps
    )
    if finished and budget is None:
        raise ValueError(
            f"{out} is finished, so there is nothing to resume; train it longer with --steps, or start another run with --out"
        )
    first, engine = is_first(), Engine.of(engine)
    engine.check(recipe)
    check_start(recipe)
    check_settings(recipe, engine)
    place = check_push(recipe.push_to_hub) if recipe.push_to_hub is not None and first else None
    check_apart(out, recipe.data, recipe.validation)
    if recipe.start_from is None and not resume:
        empty_model(recipe)  # what it refuses is refused before minutes of reading text
    prepare_folder(out, resume)
    torch.set_float32_matmul_precision("high")
    with locked(out):
        start_from = last_whole_checkpoint(out) if resume else None
        if finished and start_from is None:
            raise ValueError(
                f"{out} has no checkpoint, from which it could be trained longer; save_every must not be 0 for that"
            )
        corpus, config, saved = _text_and_shape(recipe, out, start_from, resume=resume)
        stop = StopOnSignal()
        with in_company(out), PeakMemory() as memory, on_stop(stop.receive):
            set_seed(recipe.seed)
            begins = recipe.start_from is not None and start_from is None and engine.draws
            start = Start(recipe, corpus.train) if begins else None
            with contextlib.nullcontext() if engine.draws else torch.device("meta"):
                model = build_model(recipe, config, saved, start)
            engine.check_model(model)
            if engine.draws:
                check_causal(model, recipe.shape)
                if recipe.documents == "separate":
                    check_separate(model)
            parameters = saved_parameters(model)
            if budget is not None:
                steps = budget.steps_of(recipe, corpus, parameters, engine.groups)
                recipe = longer(recipe, steps) if resume else of_length(recipe, steps)
            say(str(extent_of(recipe, corpus, parameters, engine.groups)))
            if recipe.scheduled < recipe.steps:
                say(f"the learning rate stays where its schedule ends, at step {recipe.scheduled:,}")
            trainer = build_trainer(
                recipe, out, model, corpus, [*callbacks, MetricsFile(out / "metrics.jsonl"), stop], on_cpu, engine
            )
            trainer.create_optimizer()  # what it refuses is refused before the folder holds a run
            rehearse_saving(model, corpus.tokenizer, out)
            trainer.accelerator.wait_for_everyone()  # all have seen that the folder holds no run
            if trainer.is_world_process_zero() and not resume:
                about = {
                    **environment(corpus),
                    "engine": str(engine),
                    "recipe": recipe.to_dict(),
                    DOCUMENTS: corpus.seen,
                }
                write_whole(out / "run.json", json.dumps(about, indent=2))
                write_whole(out / "recipe.yaml", recipe.to_yaml())  # written last: it makes the folder a run
            if trainer.is_world_process_zero() and resume and budget is not None:  # run.json keeps how it began
                write_whole(out / "recipe.yaml", longer(read_recipe(out / "recipe.yaml"), recipe.steps).to_yaml())
            if start_from and step_of(start_from) >= recipe.steps:  # the run died after its last step
                trainer.restore(start_from)
            else:
                with only_tensors(start_from):
                    trainer.train(resume_from_checkpoint=str(start_from) if start_from else None)
            if stop.received is not None:
                return None
            trained, method = trainer.whole_model(), method_of(model)
            if trained is not None and method is not None:
                method.finalize(trained)
            if trained is not None and trainer.is_world_process_zero():
                names = save_model(trained, corpus.tokenizer, out)  # before anything that may fail
                if isinstance(method, Adapter) and method.inseparable(trained) is None:
                    save_adapter(trained, without_link(out / ADAPTER))
            found = trainer.evaluation(limits_of(recipe)[1])
        summary = _summary(recipe, out, trainer, found, memory.gib, trained)
        if trained is not None and trainer.is_world_process_zero():
            card = Card.of(trained, names, run=out, method=method)
            write_card(out, dataclasses.replace(card, summary=dataclasses.asdict(summary), place=place or card.place))
            write_whole(out / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2))
            if place is not None:
                again = f"lorank export {shlex.quote(str(out))} --format trained --push-to-hub {place}"
                push(out, [*names, NAME], place, again=again)
        return summary


def _with_split(recipe: Recipe, out: Path, *, resume: bool) -> Recipe:
    """The recipe with the split of the run that it starts from, or with the one that it began with."""
    if not resume:
        return with_split_of_start(recipe)
    if recipe.start_from is None or recipe.data_seed is not None or not (out / "recipe.yaml").exists():
        return recipe
    return dataclasses.replace(recipe, data_seed=read_recipe(out / "recipe.yaml").data_seed)


def _text_and_shape(
    recipe: Recipe, out: Path, start_from: Path | None, *, resume: bool
) -> tuple[data.Corpus, PretrainedConfig, PretrainedConfig | None]:
    """What a run in a folder is trained on, the configuration of its model, and the one that it began with if it goes on."""
    done = step_of(start_from) * recipe.batch_size if start_from else 0
    corpus = corpus_of(recipe, marks=out / "stream.jsonl", begin=done)
    config = build_config(recipe, corpus.tokenizer)
    saved = None
    if start_from is not None:
        with reading(start_from / "config.json"):
            saved = read_config(str(start_from))
        keep_vocabulary(config, saved)
    check_corpus(recipe, corpus, config.vocab_size)
    if not resume:
        warn_of_weights(recipe.model)
    began = read_json(out / "run.json", data_hash=str)["data_hash"] if resume else corpus.hash
    if began != corpus.hash:
        raise ValueError(
            f"data={recipe.data!r} must be the text with which {out} began (hash {began}), got other text (hash {corpus.hash}); "
            "restore it, or start another run with --out"
        )
    return corpus, config, saved


def _summary(
    recipe: Recipe,
    out: Path,
    trainer: PretrainTrainer,
    found: Evaluation,
    memory_gib: float,
    trained: PreTrainedModel | None,
) -> Summary:
    """The figures of a run that has ended, with a text of its model, where this process has all of it.

    Raises:
        FloatingPointError: the validation loss is not finite.
    """
    if not math.isfinite(found.loss):
        raise FloatingPointError(f"the validation loss became {found.loss}; lower lr={recipe.lr} or warm up longer")
    tokenizer: Any = trainer.processing_class
    rate = trainer.throughput.typical_tokens_per_second() or logged_rate(out)
    counts = accounting.count_parameters(trainer.outline if trained is None else trained)  # type: ignore[arg-type]
    return Summary(
        method=title_of(recipe),
        parameters=counts.total,
        block_parameters=counts.blocks,
        flops_per_token=trainer.flops_per_token,
        steps=trainer.state.global_step,
        tokens=round(trainer.state.global_step * trainer.throughput.tokens_per_step),
        tokens_per_second=rate,
        mfu=None if rate is None else trainer.mfu(rate),
        peak_flops_source=trainer.peak_flops_source,
        peak_memory_gib=memory_gib,
        validation_loss_nats_per_token=found.loss,
        validation_perplexity=found.perplexity,
        validation_bits_per_byte=found.bits_per_byte,
        published_compatible_perplexity=found.published_compatible_perplexity,
        evaluated_tokens=found.tokens,
        sample="" if trained is None else sample_of(trained, tokenizer, recipe.seed),
    )


def sample_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    """A text by a trained model. If it cannot write any, this is logged and the text is empty, because the model is trained and
    saved nevertheless."""
    try:
        return generate_text(model, tokenizer, max_new_tokens=60, seed=seed)
    except Exception as error:  # whatever the modelling code makes of a call that training does not need
        logger.warning("the run has no sample of its text: %s", reason_of(error, model.config))
        return ""


def check_start(recipe: Recipe) -> None:
    """Raises ValueError for a method that freezes the weights it is given, where these would be random."""
    if (method := methods_of(recipe).method).adapts and recipe.start_from is None:
        raise ValueError(
            f"method must train from new weights, got {method.name}, which freezes those of a trained model; name one with "
            "--start-from"
        )


def corpus_of(recipe: Recipe, **place: Any) -> data.Corpus:
    """The data of a recipe, a stream of it from a place on; errors are those of `lorank.train.data.load_corpus`."""
    return data.load_corpus(
        recipe.data,
        validation=recipe.validation,
        tokenizer=recipe.tokenizer,
        vocab_size=4096 if recipe.vocab_size is None else recipe.vocab_size,
        sequence_length=recipe.sequence_length,
        documents=recipe.documents,
        text_column=recipe.text_column,
        stream=recipe.stream,
        seed=recipe.split_seed,
        order_seed=recipe.seed,
        validation_tokens=recipe.validation_tokens,
        **place,
    )


def check_corpus(recipe: Recipe, corpus: data.Corpus, vocab_size: int) -> None:
    """Raise ValueError if the vocabulary lacks tokens of the text, or the text does not fill a batch."""
    data.check_ids(corpus.largest_id, vocab_size)
    if hasattr(corpus.train, "__len__") and len(corpus.train) < recipe.batch_size:
        raise ValueError(
            f"batch_size must be at most {len(corpus.train)}, the number of training sequences in data={recipe.data!r}, got "
            f"{recipe.batch_size}; give more text or a smaller batch"
        )
