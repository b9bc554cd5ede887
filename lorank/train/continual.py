"""One trained model, one task after another: what is learned, and what is forgotten.

    L[i][j]  loss on the held-out text of task j after i tasks, in nats per token; L[0] is that of the model as it came

    learned            mean over j of L[0][j] - L[j][j]       of each task, right after it
    forgotten          mean over j < T of L[T][j] - L[j][j]   since then; less than 0 where later tasks helped
    forward transfer   mean over j > 1 of L[0][j] - L[j-1][j]   of a task before its turn
    loss               mean over j of L[T][j]

Each method starts from the same weights and sees the same batches. "full" tunes all weights.
"""

import copy
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lorank import accounting
from lorank.adapter_files import hash_without
from lorank.conversion import convert
from lorank.fields import field_types
from lorank.loop import lr_schedule, next_task, optimizer, step_hook
from lorank.loss import next_token_loss
from lorank.method import Method, seeded_generator
from lorank.table import find, method_names
from lorank.train.data import cache_folder, collate
from lorank.train.data.corpus import Corpus, hash_of, load_corpus, seen_of
from lorank.train.data.sources import open_data
from lorank.train.evaluation import evaluate
from lorank.train.folder import check_apart, read_json, write_whole
from lorank.train.model import check_causal, check_positions
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model, save_model
from lorank.train.text import write_text
from lorank.train.watching import tell
from lorank.whole import without_link

FULL = "full"
RATES = {FULL: 1e-4, "osft": 1e-4}
"""Learning rates unless it is said otherwise; that of the other methods is `RATE`."""
RATE = 1e-3
FILE = "results.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How long, and on what, each task is trained."""

    steps: int = 200
    """Optimizer steps of each task."""
    batch_size: int = 16
    sequence_length: int = 128
    warmup: float = 0.1
    """Part of a task's steps in which the learning rate climbs; then it falls along a cosine to a tenth."""
    clip: float = 1.0
    """The most a gradient's norm may be."""
    eval_tokens: int = 20_000
    """Held-out tokens of each task."""
    text_column: str = "text"


@dataclasses.dataclass(frozen=True)
class Stream:
    """What one method made of all tasks, with one seed."""

    method: str
    seed: int
    lr: float
    parameters: int
    trained: int
    """Parameters that moved in one task."""
    losses: list[list[float]]
    """L."""
    seconds: float

    @property
    def perplexities(self) -> list[list[float]]:
        """exp L."""
        return [[math.exp(min(loss, 700.0)) for loss in row] for row in self.losses]

    @property
    def learned(self) -> float:
        return _mean(self.losses[0][j] - self.losses[j + 1][j] for j in range(self._tasks))

    @property
    def forgotten(self) -> float:
        return _mean(self.losses[-1][j] - self.losses[j + 1][j] for j in range(self._tasks - 1))

    @property
    def forward_transfer(self) -> float:
        return _mean(self.losses[0][j] - self.losses[j][j] for j in range(1, self._tasks))

    @property
    def loss(self) -> float:
        return _mean(self.losses[-1])

    @property
    def _tasks(self) -> int:
        return len(self.losses[0])

    def to_dict(self) -> dict[str, Any]:
        derived = ("perplexities", "loss", "learned", "forgotten", "forward_transfer")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


def continual(
    model: str,
    tasks: Sequence[str],
    methods: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    rates: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    save: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> list[Stream]:
    """Train each method on each task in turn, and write the losses to ``OUT/results.json`` after each.

    What that file has already is not trained again, so that an interrupted call goes on where it was.

    Args:
        model: a run, a folder or a hub name of a dense causal model.
        tasks: sources of text, as `lorank.train.data.load_corpus` takes them.
        methods: "full", or methods that adapt a trained model.
        rates: learning rates by method, if not the usual ones; that under "" holds for all others.
        options: settings, each for the methods that have it.
        save: keep each model after its last task, in ``OUT/METHOD-SEED``.
        say: called with a line when a task is done.

    Raises:
        ValueError: an argument cannot be used, or `out` has results of other settings.
        OSError: a file cannot be read or written.
        FloatingPointError: a loss is no longer finite.
    """
    settings, rates = settings or Settings(), rates or {}
    made = {name: method_named(name, options or {}) for name in methods}
    if not made:
        raise ValueError("methods must be one or more names, such as lora or full, got none")
    check_options(made, options or {})
    if unused := [name for name in rates if name and name not in made]:
        raise ValueError(f"a learning rate must be for one of {', '.join(made)}, got one for {unused[0]}")
    if len(tasks) < 1 or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must be different sources of text, got {', '.join(tasks) or 'none'}")
    check_apart(out, *tasks)
    base, tokenizer = load_model(model)
    check_causal(base)
    check_positions(base, settings.sequence_length)
    corpora = [_corpus(task, model, settings) for task in tasks]
    hashes = {"weights": hash_without(base, ()), "texts": [corpus.hash for corpus in corpora]}
    asked = {
        "model": model,
        "tasks": [*tasks],
        **hashes,
        "options": dict(options or {}),
        **dataclasses.asdict(settings),
    }
    done = _earlier(out, asked)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder for the results, got the file {out}")
    _check_suited(base, made.values())
    trained_already = {(one.method, one.seed, one.lr) for one in done}
    planned = [(seed, name, rates.get(name, rates.get("", RATES.get(name, RATE)))) for seed in seeds for name in made]
    for seed, name, lr in planned:
        if save and (name, seed, lr) in trained_already and not (out / f"{name}-{seed}").is_dir():
            raise ValueError(
                f"{out} has results of {name}, seed {seed}, but its model was not kept; choose another folder with --out to train it again"
            )
    for seed, name, lr in planned:
        if (name, seed, lr) not in trained_already:
            trained = copy.deepcopy(base)
            stream = run_stream(trained, name, made[name], corpora, lr, seed, settings, say)
            out.mkdir(parents=True, exist_ok=True)
            if save:
                without_link(out / f"{name}-{seed}").mkdir(exist_ok=True)
                save_model(trained, tokenizer, out / f"{name}-{seed}")
                _write_text(model, tasks, settings, out / f"{name}-{seed}")
            done.append(stream)
            results = {**asked, "streams": [one.to_dict() for one in done]}
            write_whole(out / FILE, json.dumps(results, indent=1))
    wanted = {(name, seed) for name in made for seed in seeds}
    return [one for one in done if (one.method, one.seed) in wanted]


def _check_suited(base: PreTrainedModel, methods: Iterable[Method | None]) -> None:
    """Raises ValueError for a method that the model cannot have, before any other trains for hours."""
    shapes = copy.deepcopy(base).to("meta")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again where it trains
        for method in methods:
            if method is not None:
                convert(copy.deepcopy(shapes), method)


def run_stream(
    model: PreTrainedModel,
    name: str,
    method: Method | None,
    corpora: Sequence[Corpus],
    lr: float,
    seed: int,
    settings: Settings,
    say: Callable[[str], object] = lambda line: None,
) -> Stream:
    """Train a model, in place, on the tasks in turn."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    inner: Any = model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))  # type: ignore[arg-type]
    inner.train()
    if method is not None:
        convert(model, method)
    moving = optimizer(model, lr=lr)
    step_hook(model, moving, steps=settings.steps, seed=seed)
    losses = [[_loss(model, corpus, settings) for corpus in corpora]]
    for stage, corpus in enumerate(corpora):
        if stage:
            next_task(model, moving)
        _train(model, moving, corpus, lr, settings, (seed, stage), f"{name}, seed {seed}, task {stage + 1}")
        losses.append([_loss(model, corpus, settings) for corpus in corpora])
        say(
            f"{name}, seed {seed}: task {stage + 1} of {len(corpora)}, loss {losses[-2][stage]:.3f} -> {losses[-1][stage]:.3f}"
        )
    counts = accounting.count_parameters(model)
    return Stream(name, seed, lr, counts.total, counts.trainable, losses, time.perf_counter() - began)


def _train(
    model: PreTrainedModel,
    moving: torch.optim.Optimizer,
    corpus: Corpus,
    lr: float,
    settings: Settings,
    seed: tuple[int, int],
    what: str,
) -> None:
    multiplier = lr_schedule(model, steps=settings.steps, warmup_steps=settings.warmup, optimizer=moving)
    trained = [p for group in moving.param_groups for p in group["params"]]
    device = next(model.parameters()).device
    for step, batch in zip(range(settings.steps), _batches(model, corpus, settings, seed), strict=False):
        for group in moving.param_groups:
            group["lr"] = lr * multiplier(step + 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            given = {key: value.to(device) for key, value in batch.items()}
            loss = next_token_loss(model, given, use_cache=False).total
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of {what} became {loss.item()} at step {step}; lower its learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        moving.step()
        moving.zero_grad()
        tell(what, step + 1, settings.steps, "steps")


def _batches(
    model: PreTrainedModel, corpus: Corpus, settings: Settings, seed: tuple[int, int]
) -> Iterator[dict[str, Tensor]]:
    """Batches without end, each pass over the text in another order."""
    embeddings: Any = model.get_input_embeddings()
    make = partial(collate, vocab_size=embeddings.weight.shape[0])
    generator = seeded_generator("continual", *seed)
    while True:
        yield from DataLoader(
            corpus.train,  # type: ignore[arg-type]
            batch_size=settings.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=make,
            generator=generator,
        )


def _loss(model: PreTrainedModel, corpus: Corpus, settings: Settings) -> float:
    rows: Any = DataLoader(corpus.validation, batch_size=settings.batch_size, collate_fn=collate)  # type: ignore[arg-type]
    return evaluate(model, rows, max_tokens=settings.eval_tokens).loss


def _corpus(task: str, model: str, settings: Settings) -> Corpus:
    corpus = load_corpus(
        task, tokenizer=model, sequence_length=settings.sequence_length, text_column=settings.text_column
    )
    if not hasattr(corpus.train, "__len__") or len(corpus.train) < settings.batch_size:
        rows = f"{len(corpus.train)} sequences" if hasattr(corpus.train, "__len__") else "a stream"
        raise ValueError(
            f"task {task!r} must be local text that fills a batch of {settings.batch_size} sequences, got {rows}"
        )
    return corpus


def _write_text(model: str, tasks: Sequence[str], settings: Settings, out: Path) -> None:
    """Write next to a trained model what it was trained on, and what was held out."""
    data = [*tasks] if len(tasks) > 1 else tasks[0]
    read = {"sequence_length": settings.sequence_length, "text_column": settings.text_column}
    recipe = Recipe(data=data, start_from=model, batch_size=settings.batch_size, **read)  # type: ignore[arg-type]
    opened = open_data(data, recipe.text_column, recipe.split_seed, cache_folder(), recipe.validation_tokens)
    write_text(recipe, out, hash_of(opened.validation), opened.digests, seen_of(opened, opened.validation))


def method_named(name: str, options: Mapping[str, Any]) -> Method | None:
    """The method with those of the options that it has; None for "full"."""
    if name == FULL:
        return None
    kind = find(name)
    if not kind.adapts:
        known = [FULL, *(one for one in method_names("method") if find(one).adapts)]
        raise ValueError(f"methods must be of {', '.join(known)}, which keep what a model knows, got {name!r}")
    return kind(**{key: value for key, value in options.items() if key in field_types(kind)})


def check_options(made: Mapping[str, Method | None], options: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that none of the methods has."""
    for option in options:
        if not any(method is not None and option in field_types(type(method)) for method in made.values()):
            raise ValueError(f"none of {', '.join(made)} has a setting {option!r}")


def _earlier(out: Path, asked: Mapping[str, Any]) -> list[Stream]:
    """The streams that `out` has."""
    if not (out / FILE).exists():
        return []
    found = read_json(out / FILE, streams=list)
    if other := next((name for name, value in asked.items() if name in found and found[name] != value), None):
        if other in ("weights", "texts"):
            what = asked["model"] if other == "weights" else _changed(asked, found)
            raise ValueError(f"{out} has results from before {what} changed; choose another folder with --out")
        raise ValueError(
            f"{out} has results of {other}={found.get(other)!r}, got {asked[other]!r}; choose another folder with --out"
        )
    try:
        return [_stream(one, len(asked["tasks"])) for one in found["streams"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{out / FILE} is damaged; choose another folder with --out") from None


def _stream(one: Mapping[str, Any], tasks: int) -> Stream:
    """Of a file; KeyError, TypeError or ValueError if it is none."""
    made = Stream(**{field.name: one[field.name] for field in dataclasses.fields(Stream)})
    numbers = [
        made.seed,
        made.lr,
        made.parameters,
        made.trained,
        made.seconds,
        *(x for row in made.losses for x in row),
    ]
    if not isinstance(made.method, str) or not all(isinstance(x, int | float) for x in numbers):
        raise ValueError
    if [len(row) for row in made.losses] != [tasks] * (tasks + 1):
        raise ValueError
    return made


def _changed(asked: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first task with another text than before."""
    before = found["texts"] if isinstance(found["texts"], list) else []
    texts = zip(asked["tasks"], asked["texts"], before, strict=False)
    return next((task for task, now, then in texts if now != then), asked["tasks"][0])


def _mean(values: Any) -> float:
    found = [*values]
    return sum(found) / len(found) if found else 0.0
