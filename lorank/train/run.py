"""One pre-training run: a recipe and a folder in, a model with its history out.

RUN/recipe.yaml       the resolved recipe
RUN/run.json          versions, device, commit, hash of the data: what else it takes to repeat the run
RUN/metrics.jsonl     one record per log line and evaluation, units in the names
RUN/checkpoint-N/     what --resume continues from; its optimizer's state is read as tensors only
RUN/model.safetensors, config.json, tokenizer.json ...   the trained model, for from_pretrained(RUN)
RUN/summary.json, README.md                              its figures, and its model card
"""

import contextlib
import dataclasses
import glob
import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import IterableDataset
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

import lorank
from lorank import accounting
from lorank.conversion import method_of
from lorank.train import data
from lorank.train.estimators import EggEggroll, build_estimator, egg_optimizer
from lorank.train.generation import generate_text
from lorank.train.hub import asked_if_reachable, is_reachable
from lorank.train.model import build_config, build_model, check_causal, find_projection
from lorank.train.optimizers import build_low_rank_optimizer, build_optimizer
from lorank.train.recipe import Recipe
from lorank.train.trainer import STAGING, MetricsFile, PretrainTrainer, StopOnNonFinite, StopOnSignal, write_whole

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out of a run; summary.json holds the same."""

    method: str
    parameters: int
    block_parameters: int
    flops_per_token: float
    steps: int
    tokens: int
    tokens_per_second: float | None
    """By the median step of training; None if no step was timed, as the first never is."""
    mfu: float | None
    peak_flops_source: str
    peak_memory_gib: float
    validation_loss_nats_per_token: float
    validation_perplexity: float
    validation_bits_per_byte: float | None
    published_compatible_perplexity: float
    sample: str


def pretrain(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_cpu: bool = False,
) -> Summary | None:
    """Train a model as the recipe says and leave it, its checkpoints and its history in the folder `out`; `on_cpu` even
    where there is an accelerator.

    Returns:
        The summary, or None if a signal stopped the run after a checkpoint.

    Raises:
        ValueError: something in the recipe or the data is wrong, or `out` already holds a run and `resume` is False.
        OSError: a file could not be read or written.
        FloatingPointError: the loss or a gradient is no longer finite.
    """
    out, recipe = Path(out), absolute(recipe)
    if resume and (out / "summary.json").exists():
        raise ValueError(f"{out} is finished: there is nothing to resume; start another run with --out")
    _prepare_folder(out, resume)
    start_from = _last_whole_checkpoint(out) if resume else None
    torch.set_float32_matmul_precision("high")

    corpus = data.load_corpus(
        recipe.data,
        validation=recipe.validation,
        tokenizer=recipe.tokenizer,
        vocab_size=4096 if recipe.vocab_size is None else recipe.vocab_size,
        sequence_length=recipe.sequence_length,
        documents=recipe.documents,
        text_column=recipe.text_column,
        seed=recipe.split_seed,
        order_seed=recipe.seed,
    )
    config = build_config(recipe, corpus.tokenizer)
    check_corpus(recipe, corpus, config.vocab_size)
    began = _read_json(out / "run.json")["data_hash"] if resume else corpus.hash
    if began != corpus.hash:
        raise ValueError(
            f"data={recipe.data!r} are not what {out} began with (hash {corpus.hash}, was {began}); restore them, or start "
            "another run with --out"
        )
    with PeakMemory() as memory, StopOnSignal() as stop:
        set_seed(recipe.seed)
        model = build_model(recipe, config)
        check_causal(model)
        trainer = build_trainer(
            recipe, out, model, corpus, [*callbacks, MetricsFile(out / "metrics.jsonl"), stop], on_cpu
        )
        if trainer.is_world_process_zero() and not resume:
            write_whole(out / "run.json", json.dumps({**environment(corpus), "recipe": recipe.to_dict()}, indent=2))
            write_whole(out / "recipe.yaml", recipe.to_yaml())  # the last of the two: it makes the folder a run
        if start_from and _step_of(start_from) >= recipe.steps:  # the run died after its last step
            trainer.restore(start_from)
        else:
            trainer.train(resume_from_checkpoint=str(start_from) if start_from else None)
        if stop.received is not None:
            return None
        if (method := method_of(model)) is not None:
            method.finalize(model)
        found = trainer.evaluation(max_tokens=None)
    if not math.isfinite(found.loss):
        raise FloatingPointError(f"the validation loss became {found.loss}; lower lr={recipe.lr} or warm up longer")
    if trainer.is_world_process_zero():
        save_model(model, corpus.tokenizer, out)
    rate = trainer.throughput.typical_tokens_per_second() or _logged_rate(out)
    counts = accounting.count_parameters(model)
    summary = Summary(
        method=recipe.method,
        parameters=counts.total,
        block_parameters=counts.blocks,
        flops_per_token=trainer.flops_per_token,
        steps=trainer.state.global_step,
        tokens=round(trainer.state.global_step * trainer.throughput.tokens_per_step),
        tokens_per_second=rate,
        mfu=None if rate is None else trainer.mfu(rate),
        peak_flops_source=trainer.peak_flops_source,
        peak_memory_gib=memory.gib,
        validation_loss_nats_per_token=found.loss,
        validation_perplexity=found.perplexity,
        validation_bits_per_byte=found.bits_per_byte,
        published_compatible_perplexity=found.published_compatible_perplexity,
        sample=generate_text(model, corpus.tokenizer, max_new_tokens=60, seed=recipe.seed),
    )
    if trainer.is_world_process_zero():
        write_whole(out / "README.md", model_card(recipe, summary, corpus.description))
        write_whole(out / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2))
    return summary


def check_corpus(recipe: Recipe, corpus: data.Corpus, vocab_size: int) -> None:
    """Raises ValueError if the vocabulary does not hold the text's tokens, or the text does not fill a batch."""
    data.check_ids(corpus.largest_id, vocab_size)
    if hasattr(corpus.train, "__len__") and len(corpus.train) < recipe.batch_size:
        raise ValueError(
            f"data={recipe.data!r} gives {len(corpus.train)} sequences of sequence_length={recipe.sequence_length}, fewer than "
            f"batch_size={recipe.batch_size}; give more text or a smaller batch"
        )


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


def read_run(folder: str | Path) -> Recipe:
    """The recipe of a run on disk; ValueError if the folder holds none, or one that was changed since."""
    path = Path(folder) / "recipe.yaml"
    if not path.exists():
        raise ValueError(f"{folder} holds no run to resume: {path} does not exist")
    recipe = Recipe.read(path)
    began = _read_json(Path(folder) / "run.json").get("recipe")
    now = json.loads(json.dumps(recipe.to_dict()))
    changed = [name for name, value in now.items() if began and began.get(name) != value]
    if changed:
        raise ValueError(
            f"{path}: {changed[0]} was {began[changed[0]]!r} when the run began; put it back, or start another run with --out"
        )
    return recipe


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, so that the run can be resumed from anywhere."""
    changes = {
        name: os.path.abspath(os.path.expanduser(value))
        for name in ("data", "validation", "tokenizer", "model")
        if (value := getattr(recipe, name)) not in (None, "embedded")
        and (os.path.exists(os.path.expanduser(value)) or glob.glob(os.path.expanduser(value)))
    }
    return dataclasses.replace(recipe, **changes)


def _prepare_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give --out a folder")
    if not resume and (out / "recipe.yaml").exists():
        raise ValueError(f"{out} already holds a run; continue it with --resume {out}, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=out) as probe:  # better now than after an hour
            probe.write(b"lorank")
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}") from None
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(out / STAGING, ignore_errors=True)  # of a run that was killed while it saved


def _last_whole_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint all of whose files can be read; those passed over are logged."""
    found = [path for path in out.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    for path in sorted(found, key=_step_of, reverse=True):
        if damaged := _damaged_file(path):
            logger.warning("%s is passed over: %s is missing or cut short", path, damaged.name)
        else:
            return path
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _logged_rate(out: Path) -> float | None:
    """The median of the rates in a run's metrics.jsonl, None if it has none."""
    rates = [record["tokens_per_second"] for record in history(out) if "tokens_per_second" in record]
    return statistics.median(rates) if rates else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); the run cannot be resumed without it") from None


def _damaged_file(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint that is not there or was not written to its end."""
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return state
    tensors = [*checkpoint.glob("*.safetensors")] or [checkpoint / "model.safetensors"]
    for file in tensors:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return file
    needed = {checkpoint / name for name in ("optimizer.pt", "scheduler.pt")}
    needed |= set(checkpoint.glob("rng_state*.pth")) or {checkpoint / "rng_state.pth"}
    return next((file for file in sorted(needed | {*checkpoint.glob("*.pt*")}) if not zipfile.is_zipfile(file)), None)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Model and tokenizer into `out`, each file under a temporary name until all are written."""
    staging = Path(tempfile.mkdtemp(prefix=".model-", dir=out))
    try:
        model.config.use_cache = True
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for file in staging.iterdir():
            os.replace(file, out / file.name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write the model to {out}: {str(error).splitlines()[0]}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_model(
    folder: str, *, tokenizer: str | None = None, of_any_kind: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model (folder or hub name) and its tokenizer, in evaluation mode.

    Args:
        tokenizer: folder or hub name of another one, or "bytes"; by default the model's own.
        of_any_kind: also what is no causal language model, as the class that its config.json names: a masked language
            model, or a body without a head.

    Raises:
        ValueError: there is none, it reads no text, or its weights are not finite.
    """
    if not folder.strip():
        raise ValueError("the model's name is empty; give a run, a folder with a config.json, or a hub name")
    path = Path(folder).expanduser()
    looks_local = folder.startswith((".", "/", "~")) or path.exists()
    if looks_local and not (path / "config.json").exists():
        hint = "; it is an unfinished run, continue it with --resume" if (path / "recipe.yaml").exists() else ""
        raise ValueError(f"{folder} is not a directory with a model (no config.json){hint}")
    place = str(path) if looks_local else folder
    try:
        with asked_if_reachable():
            kind = _kind_of(AutoConfig.from_pretrained(place), folder) if of_any_kind else AutoModelForCausalLM
            model = kind.from_pretrained(place)
    except _Unfit:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if not looks_local and not is_reachable():
            reason = "there is no such folder, and without a network the hub cannot be asked for it"
        raise ValueError(f"no model could be loaded from {folder}: {reason}") from None
    check_finite(model, folder)
    return model.eval(), _tokenizer_of(place, folder, tokenizer)


class _Unfit(ValueError):
    """The model is there, but not one that can be used here."""


def _kind_of(config: PretrainedConfig, folder: str) -> Any:
    """The Auto class for the architecture that a configuration names, else the first that has its type."""
    if config.is_encoder_decoder:
        raise _Unfit(
            f"{folder} is an encoder-decoder ({config.model_type}), which reads one text and writes another; only models that read "
            "one text are looked at"
        )
    named, autos = (config.architectures or [""])[0], (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
    fitting = [auto for auto in autos if type(config) in auto._model_mapping]
    for auto in fitting:
        classes: Any = auto._model_mapping[type(config)]
        if named in [one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))]:
            return auto
    return fitting[-1] if fitting else AutoModel  # of a classifier and the like, the body


def _tokenizer_of(place: str, folder: str, other: str | None) -> PreTrainedTokenizerBase:
    try:
        return data.load_tokenizer(other or place)
    except OSError as error:
        if other is not None:
            raise ValueError(str(error)) from None
        raise ValueError(f"{folder} has a model but no tokenizer that can be read; name one with --tokenizer") from None


def check_finite(model: torch.nn.Module, name: str) -> None:
    """ValueError that names the weights of a model that hold NaN or infinity."""
    broken = [key for key, tensor in model.named_parameters() if not tensor.isfinite().all()]
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ValueError(
            f"{name} has weights that are not finite numbers: {broken[0]}{others}; it has diverged or was damaged, take an earlier one"
        )


def environment(corpus: data.Corpus) -> dict[str, Any]:
    """What besides the recipe it takes to repeat a run: data, versions, device and commit."""
    packages = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return {
        "corpus": corpus.description,
        "data_hash": corpus.hash,
        "python": platform.python_version(),
        "packages": {"lorank": lorank.__version__, **{name: version(name) for name in packages}},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def model_card(recipe: Recipe, summary: Summary, corpus: str) -> str:
    """README.md of a trained model."""
    bits = summary.validation_bits_per_byte
    return f"""---
library_name: transformers
tags: [lorank, {recipe.method}]
---
# {recipe.method}, {summary.parameters:,} parameters

Pre-trained from scratch with lorank on {corpus}.

```python
import lorank  # registers the architecture
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

| | |
|---|---|
| parameters (in blocks) | {summary.parameters:,} ({summary.block_parameters:,}) |
| training FLOPs per token | {summary.flops_per_token:,.0f} |
| tokens | {summary.tokens:,} in {summary.steps:,} steps |
| validation perplexity (unbiased) | {summary.validation_perplexity:.2f} |
| bits per byte | {"unknown" if bits is None else f"{bits:.3f}"} |
| published-compatible perplexity, N/(N+1) | {summary.published_compatible_perplexity:.2f} |

The recipe is in `recipe.yaml`, versions and device in `run.json`, the loss curve in `metrics.jsonl`.
"""


class PeakMemory:
    """Largest growth of memory inside a ``with``: allocated on CUDA, resident (sampled each 5 ms) on CPU."""

    gib: float = math.nan

    def __enter__(self) -> "PeakMemory":
        self._before = self._peak = psutil.Process().memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, process.memory_info().rss)

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        self._thread.join()
        grown = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._peak - self._before
        self.gib = grown / 2**30


def history(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    with (Path(folder) / "metrics.jsonl").open() as file:
        for line in file:
            yield json.loads(line)
