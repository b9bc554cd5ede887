"""`lorank.fit` for saved models: load, fit, measure before and after, save. A fit that is stopped keeps what is finished."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import lorank
from lorank.analysis.batches import Batch, tokens_of, until, without_cache
from lorank.conversion import method_of, sites_to_convert
from lorank.fields import check_fields
from lorank.fit import STRUCTURES, Fitted, Structure, as_structure, fit
from lorank.fit.budget import Policy, check_policy
from lorank.fit.structure import Found
from lorank.loss import predicted_tokens
from lorank.pretrained import positions_of
from lorank.sites import body_of
from lorank.train.card import Card, write_card
from lorank.train.evaluation import evaluate, text_for, with_length
from lorank.train.export import check_folder
from lorank.train.folder import check_apart, locked, prepare_folder, write_whole
from lorank.train.model import check_causal
from lorank.train.saved import load_model, whole_files
from lorank.train.text import keep_text, text_of
from lorank.train.watching import tell
from lorank.train.yamls import load
from lorank.whole import made_whole, without_link

RESULTS, UNFINISHED, PARTS = "compress.json", "unfinished.json", "projections"
STATES = 4096
"""Tokens whose last hidden states are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that fixes a compression. Written next to what is finished, so that it can go on."""

    model: str
    method: str = "svd"
    settings: dict = dataclasses.field(default_factory=dict)
    """Of the structure."""
    budget: str | None = None
    policy: Policy = "uniform"
    metric: Literal["gram", "identity"] = "gram"
    targets: list[str] = dataclasses.field(default_factory=list)
    exclude: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 100_000
    """On which the metric is measured."""
    eval_tokens: int = 50_000
    """Others, on which the model is judged before and after; at most a quarter of the text."""
    tokenizer: str | None = None
    text: dict = dataclasses.field(default_factory=dict)
    """Fields of `lorank.train.text.Text`."""

    def __post_init__(self) -> None:
        check_fields(self)
        structure = self.structure()
        check_policy(structure, self.policy, self.budget)
        if structure.needs_text and self.metric == "identity":
            raise ValueError(
                f"metric must be 'gram' with {self.method}, which is fitted to what layers give on the text, got 'identity'"
            )

    def structure(self) -> Structure:
        """The structure with its settings; ValueError if it has not such settings."""
        from_name = as_structure(self.method)
        known = [field.name for field in dataclasses.fields(from_name)]
        for name in self.settings:
            if name not in known:
                has = f"has {', '.join(known)}" if known else "has none"
                raise ValueError(f"--option must be a setting of {self.method}, which {has}; got {name}")
        return STRUCTURES[self.method](**self.settings)


class Kept(MutableMapping[str, Found]):
    """What is found for projections, each in a separate file that is whole or not there."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __getitem__(self, name: str) -> Found:
        try:
            return load_file(self._file(name))
        except (FileNotFoundError, SafetensorError):
            raise KeyError(name) from None

    def __setitem__(self, name: str, found: Found) -> None:
        with made_whole(self._file(name)) as half:
            save_file({key: tensor.cpu().contiguous() for key, tensor in found.items()}, half)

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in self.folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def unfinished(out: Path) -> Job:
    """The compression that was stopped in a folder; ValueError if there is none."""
    try:
        found = load((out / UNFINISHED).read_text(encoding="utf-8"))
        return Job(**found)
    except FileNotFoundError:
        done = "; it is finished" if (out / RESULTS).exists() else ""
        raise ValueError(f"--resume must be the folder of a compression that was stopped, got {out}{done}") from None
    except (TypeError, OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{out / UNFINISHED} cannot be read: {error}") from None


def compress_folder(
    job: Job, out: Path, *, resume: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Fit a run, model folder or hub name, and write the result to `out` with its tokenizer, a card and compress.json.

    Returns:
        The content of compress.json: settings, errors of every projection, and the model before and after.

    Raises:
        ValueError: as `lorank.fit`; there is no model or no text, or `out` has a model or an unfinished fit.
        OSError: a file could not be written.
    """
    structure = job.structure()
    check_folder(job.model, out)
    if not resume and (out / UNFINISHED).exists():
        raise ValueError(f"{out} has a fit that was stopped; continue it with --resume {out}, or choose another --out")
    say("loading the model and the text")
    chosen = text_of(job.model, **job.text)
    check_apart(out, chosen.data)
    model, words = load_model(job.model, tokenizer=job.tokenizer, of_any_kind=True)
    if words.eos_token_id is None and words.sep_token is not None:
        words.eos_token = words.sep_token  # ends a text for BERT and its kin
    total = len(sites_to_convert(model, structure.method(1), job.targets or None, job.exclude or None))
    chosen = with_length(chosen, model)
    batches, size = text_for(model, words, chosen, max_tokens=job.tokens + job.eval_tokens)
    calibration, held = divided(until(batches, job.tokens + job.eval_tokens), job.eval_tokens)
    before_held = sum(int(predicted_tokens(batch["labels"])) for batch in calibration)
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    is_causal = _is_causal(model)

    def measured() -> dict[str, Any]:
        found: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values()),
        }
        if is_causal:
            say("evaluating")
            found |= evaluate(model, held, bytes_per_token=partial(size.per_token, after=before_held)).to_dict()
            say("generating")
            found["decoded_tokens_per_second"] = decode_speed(model)
        return found

    before, states = measured(), last_states(model, held)
    prepare_folder(out, resume=True)
    with _no_empty(out), locked(out), _going_on(job, out) as finished:
        rows: list[Fitted] = []

        def see(fitted: Fitted) -> None:
            rows.append(fitted)
            tell("fitting", len(rows), total, "projections")
            say(f"fitted {len(rows)} of {total}: {fitted.name}")

        started = time.monotonic()
        fit(
            model,
            structure,
            calibration if job.metric == "gram" else None,
            budget=job.budget,
            policy=job.policy,
            targets=job.targets or None,
            exclude=job.exclude or None,
            finished=finished,
            see=see,
        )
        seconds = time.monotonic() - started
        after = measured()
        cosine = torch.nn.functional.cosine_similarity(states, last_states(model, held), dim=-1).mean().item()
        results = {
            "lorank": lorank.__version__,
            **dataclasses.asdict(job),
            "settings": structure.settings(),
            "budget": job.budget or (None if job.policy == "break-even" else structure.usual),
            "counts": structure.counts,
            "text_read": str(chosen),
            "calibration_tokens": sum(map(tokens_of, calibration)) if job.metric == "gram" else 0,
            "held_out_tokens": sum(map(tokens_of, held)),
            "seconds": seconds,
            "before": before,
            "after": {**after, "cosine_of_last_states": None if math.isnan(cosine) else cosine},
            "projections": [fitted._asdict() for fitted in rows],
        }
        say("saving")
        with whole_files(out) as staging:
            model.config.use_cache = True
            model.save_pretrained(staging)
            words.save_pretrained(staging)
            names = sorted(file.name for file in staging.iterdir())
        keep_text(job.model, out)
        write_card(out, Card.of(model, names, run=job.model, method=method_of(model)))
        write_whole(out / RESULTS, json.dumps(results))
    return results


@contextlib.contextmanager
def _no_empty(out: Path) -> Iterator[None]:
    """Removes the folder in the end if nothing is in it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()


@contextlib.contextmanager
def _going_on(job: Job, out: Path) -> Iterator[Kept]:
    """What is finished in a folder. It stays if something stops the work, unless it is nothing."""
    write_whole(out / UNFINISHED, json.dumps(dataclasses.asdict(job), indent=1))
    finished = Kept(without_link(out / PARTS))
    done = False
    try:
        yield finished
        done = True
    finally:
        if done or not len(finished):
            (out / UNFINISHED).unlink(missing_ok=True)
            shutil.rmtree(out / PARTS, ignore_errors=True)


def divided(batches: Iterator[Batch], held_tokens: int) -> tuple[list[Batch], list[Batch]]:
    """The first batches, for the metric, and the last, to judge by: so many tokens, and at most a quarter of the text.

    Raises:
        ValueError: there is one batch, or none.
    """
    whole = list(batches)
    if len(whole) < 2:
        raise ValueError(
            "the text must give two batches, one for the metric and one to judge the result by; give more text, or a smaller --batch-size"
        )
    most, held, seen = sum(map(tokens_of, whole)) / 4, 1, tokens_of(whole[-1])
    while seen + tokens_of(whole[-held - 1]) <= min(most, held_tokens) and held < len(whole) - 1:
        held, seen = held + 1, seen + tokens_of(whole[-held - 1])
    return whole[:-held], whole[-held:]


def _is_causal(model: PreTrainedModel) -> bool:
    try:
        check_causal(model)
    except ValueError:
        return False
    return True


@torch.no_grad()
def last_states(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """Outputs of the model without its head, [tokens, d], for the first tokens that are no padding."""
    body, rows, seen = body_of(model), [], 0
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        found = body(**inputs, **without_cache(body))[0].flatten(0, -2)
        mask = inputs.get("attention_mask")
        rows.append((found if mask is None else found[mask.flatten().bool()]).float().cpu())
        seen += len(rows[-1])
        if seen >= STATES:
            break
    return torch.cat(rows)[:STATES]


def decode_speed(model: PreTrainedModel, tokens: int = 32, rounds: int = 3) -> float | None:
    """Tokens per second of one sequence that grows token by token, the best of some rounds; None if the model cannot do that."""
    tokens = min(tokens, (positions_of(model) or tokens + 1) - 1)
    settings = GenerationConfig(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    start = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    best = math.inf
    try:
        for _ in range(rounds):
            started = time.perf_counter()
            model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)  # type: ignore[operator]
            best = min(best, time.perf_counter() - started)
    except Exception:  # whatever the modelling code makes of it; the speed is not what the user asked for
        return None
    return tokens / best
