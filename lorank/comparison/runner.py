"""A comparison in its folder: the same tokens in the same order, the same evaluation, each run in a separate process.

OUT/comparison.json        what was asked for, and the plan: rows, candidates, what was matched
OUT/runs/NAME/SETTINGS/seed-N/   a run of `lorank pretrain` each; see `lorank.comparison.process`
OUT/models/NAME/           shapes of the narrower dense models
OUT/.lock                  held by the process that plans or runs the comparison
OUT/failed.json            run -> why it failed; tried again when the comparison is continued
OUT/results.json           what came out, written again after every run; report.html shows it

Every row runs each of its candidates with the first seed. While the best is at the edge of a sweep, the sweep is
extended by a step, at most twice. The candidate with the lowest validation loss then runs with the other seeds. A seed changes initial values and the order of the training data; tokenizer and held-out text are those
of the first seed in all runs, so that all losses are on the same text. A finished run is never repeated, so starting a
comparison a second time continues it.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lorank.comparison.controls import CONTROL
from lorank.comparison.matching import Costs
from lorank.comparison.process import PretrainProcess, begun, stop_on_signal
from lorank.comparison.rows import (
    EXTENSIONS,
    Candidate,
    Row,
    beyond,
    candidates_of,
    find_rows,
    plan_rows,
)
from lorank.comparison.settings import ComparisonSettings, slug
from lorank.train import data
from lorank.train.budget import Budget, of_length
from lorank.train.folder import LOCK, ONCE, absolute, check_apart, locked, read_json, write_whole
from lorank.train.model import build_config, warn_of_weights
from lorank.train.recipe import Recipe
from lorank.train.run import check_corpus, corpus_of
from lorank.train.tasks import check_tasks, is_file
from lorank.train.text import limits_of
from lorank.whole import cleared, without_link

PROBE_STEPS = 12
PROBE_TEXT = "Enough text for one evaluation: the speed of a step does not depend on what the evaluation finds.\n"


class Run(NamedTuple):
    """One training run of a comparison."""

    row: Row
    candidate: Candidate
    seed: int

    @property
    def key(self) -> str:
        return f"{self.row.name}/{slug(self.candidate.settings)}/seed-{self.seed}"

    @property
    def title(self) -> str:
        settings = " ".join(
            f"{name}={value:.10g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.candidate.settings.items()
        )
        return " ".join(filter(None, (self.row.name, settings, f"seed {self.seed}")))

    @property
    def recipe(self) -> Recipe:
        return dataclasses.replace(self.candidate.recipe, seed=self.seed)


class Watcher(Protocol):
    """Shows the progress of a comparison."""

    def say(self, text: str) -> None: ...
    def start(self, title: str, steps: int, flops: float, number: int, runs: int, work_left: float) -> None:
        """Run `number` of `runs` begins; `work_left` is in FLOPs, with this run's `flops`."""

    def update(self, records: Mapping[str, Any]) -> None: ...
    def end(self, outcome: str) -> None: ...
    def close(self) -> None: ...


class Comparison:
    """A comparison in its folder: planned once, then run and continued as often as necessary."""

    def __init__(self, out: Path, settings: ComparisonSettings, rows: list[Row], facts: Mapping[str, Any]):
        self.out, self.settings, self.rows, self.facts = out, settings, rows, facts

    @classmethod
    def open(cls, out: str | Path) -> "Comparison":
        """The comparison in a folder; ValueError if there is none."""
        out = Path(out).expanduser()
        try:
            found = json.loads((out / "comparison.json").read_text())
            rows = [
                Row(**{**one, "candidates": list(map(_candidate, one["candidates"]))})
                for one in found["rows" if "rows" in found else "contestants"]  # as lorank 0.2 wrote
            ]
            settings = ComparisonSettings.from_dict(found["comparison"])
            facts = dict(found["facts"])
            if isinstance(why := facts.get("no_control"), str):  # by lorank 0.1
                facts["no_control"] = {CONTROL: why} if why else {}
            return cls(out.resolve(), settings, rows, facts)
        except FileNotFoundError:
            raise ValueError(f"{out} holds no comparison to continue: it has no comparison.json") from None
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{out}/comparison.json cannot be read ({error}); start another comparison with --out"
            ) from None

    @classmethod
    def plan(cls, settings: ComparisonSettings, out: str | Path, watcher: Watcher) -> "Comparison":
        """Check everything that can be checked, decide who runs what, and write it down; a folder that holds the same
        comparison is continued.

        Raises:
            ValueError: something in the settings does not exist, does not fit or cannot be matched, or the folder holds
                something else.
        """
        out = Path(out).expanduser().resolve()
        tasks = [os.path.abspath(task) if is_file(task) else task for task in settings.tasks]
        base = absolute(settings.base)
        settings = dataclasses.replace(settings, base=base, tasks=tasks)
        if (out / "comparison.json").exists():
            return _same(cls.open(out), settings)
        _check_free(out)
        check_apart(out, base.data, base.validation)
        find_rows(settings)
        if settings.tasks:
            check_tasks(settings.tasks)
        watcher.say("reading the data and counting the models")
        if base.data_seed is None:
            base = dataclasses.replace(base, data_seed=settings.seeds[0])
        planned = dataclasses.replace(settings, base=base)
        corpus = _corpus(base)
        warn_of_weights(base.model)
        _check_free(out)
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, keep=True), stop_on_signal():
            try:
                _clear(out)  # what a killed plan left
                rows, facts = _plan(planned, Costs(corpus.tokenizer), out, watcher)
                facts = {"corpus": corpus.description, **facts}
                plan = {
                    "comparison": settings.to_dict(),
                    "facts": facts,
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                write_whole(out / "comparison.json", json.dumps(plan, indent=2))
            except BaseException:
                _clear(out)
                (out / LOCK).unlink(missing_ok=True)
                if made and not any(out.iterdir()):
                    out.rmdir()
                raise
        return cls(out, settings, rows, facts)

    def runs(self) -> Iterator[Run]:
        """All runs in their order. Those with further seeds come when the best candidate is known; a row whose
        candidates have all failed has none."""
        for row in self.rows:
            place = 0
            while place < len(candidates := self.candidates(row)):  # which may have become more
                yield Run(row, candidates[place], self.settings.seeds[0])
                place += 1
        for row in self.rows:
            best = self.best(row)
            for seed in self.settings.seeds[1:] if best else ():
                yield Run(row, best, seed)  # type: ignore[arg-type]

    def candidates(self, row: Row) -> list[Candidate]:
        """Those that were planned, and those by which a sweep has been extended because its best value was at an edge."""
        found = list(row.candidates)
        failures = self.failures()
        for _ in range(EXTENSIONS):
            runs = [Run(row, candidate, self.settings.seeds[0]) for candidate in found]
            losses = [self._loss(run) for run in runs]
            if any(loss is None and run.key not in failures for run, loss in zip(runs, losses, strict=True)):
                break  # not all have ended
            further = beyond(found, losses)
            if further is None:
                break
            found.append(further)
        return found

    def best(self, row: Row) -> Candidate | None:
        """The candidate whose first run has the lowest validation loss; None if no run has finished."""
        found = self.candidates(row)
        losses = [self._loss(Run(row, candidate, self.settings.seeds[0])) for candidate in found]
        done = [(loss, place) for place, loss in enumerate(losses) if loss is not None]
        return found[min(done)[1]] if done else None

    def _loss(self, run: Run) -> float | None:
        found = self.summary(run)
        return None if found is None else found["validation_loss_nats_per_token"]

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.key

    def summary(self, run: Run) -> dict[str, Any] | None:
        """Of a run; None if it has not finished."""
        path = self.folder(run) / "summary.json"
        return read_json(path, steps=int, tokens=int) if path.exists() else None

    def failures(self) -> dict[str, str]:
        """Run -> why it failed."""
        path = self.out / "failed.json"
        return read_json(path) if path.exists() else {}

    def count(self) -> int:
        """Runs of the whole comparison, as far as is known, if no run fails."""
        return sum(len(self.candidates(one)) + len(self.settings.seeds) - 1 for one in self.rows)

    def work(self) -> float:
        """FLOPs that are left, as far as is known, if the best candidates cost what the first ones do."""
        left, (first, *others) = 0.0, self.settings.seeds
        for one in self.rows:
            left += sum(c.flops for c in self.candidates(one) if self.summary(Run(one, c, first)) is None)
            best = self.best(one) or one.candidates[0]
            left += sum(best.flops for seed in others if self.summary(Run(one, best, seed)) is None)
        return left

    def run(self, watcher: Watcher, after_each: Callable[["Comparison"], object]) -> None:
        """Do what is left to do; a failing run is noted and does not stop the others.

        Raises:
            KeyboardInterrupt: a signal came; the run in progress has saved a checkpoint.
            ValueError: another process is running this comparison.
        """
        with locked(self.out, keep=True), stop_on_signal():
            try:
                for number, run in enumerate(self.runs(), start=1):
                    if self.summary(run) is None:
                        flops = run.candidate.flops
                        watcher.start(run.title, run.recipe.steps, flops, number, self.count(), self.work())
                        watcher.end(self._run_one(run, watcher))
                        after_each(self)
            finally:
                watcher.close()

    def _run_one(self, run: Run, watcher: Watcher) -> str:
        folder = self.folder(run)
        # a comparison that was killed has left its run at work
        with begun(lambda: PretrainProcess.find(folder) or PretrainProcess.start(run.recipe, folder)) as process:
            process.wait(watcher.update)
        failures = self.failures()
        failures.pop(run.key, None)
        found = self.summary(run)
        if found is None:
            failures[run.key] = process.last_words()
        write_whole(self.out / "failed.json", json.dumps(failures, indent=2))
        if found is None:
            return f"failed: {failures[run.key]}"
        return f"validation perplexity {found['validation_perplexity']:.2f}"


def with_budget(settings: ComparisonSettings, budget: Budget) -> ComparisonSettings:
    """What is asked for, with the steps that spend a budget; parameters are those of the first row.

    Raises:
        ValueError: the data or the first row cannot be used, or epochs are those of a stream.
    """
    base = absolute(settings.base)
    corpus = corpus_of(dataclasses.replace(base, seed=settings.seeds[0]))
    name, (recipe, _) = next(iter(find_rows(dataclasses.replace(settings, base=base)).items()))
    [(_, first), *_], _ = candidates_of(settings, name, recipe)
    steps = budget.steps_of(first, corpus, round(Costs(corpus.tokenizer).of("parameters", first)))
    return dataclasses.replace(settings, base=of_length(settings.base, steps))


def _corpus(base: Recipe) -> data.Corpus:
    """The data of all runs, checked; ValueError if they do not suit the recipe."""
    corpus = corpus_of(base)
    check_corpus(base, corpus, build_config(base, corpus.tokenizer).vocab_size)
    return corpus


def _plan(settings: ComparisonSettings, costs: Costs, out: Path, watcher: Watcher) -> tuple[list[Row], dict[str, Any]]:
    """The rows, timed if that is what is matched, and what the plan found out."""
    seconds: dict[str, float] = {}
    if settings.match == "time":
        untimed = dataclasses.replace(settings, match="tokens")
        for row in plan_rows(untimed, costs, out / "models")[0]:
            seconds[row.name] = _seconds_per_step(row, out / "probes", watcher)
    rows, no_control = plan_rows(settings, costs, out / "models", seconds)
    return rows, {"seconds_per_step": seconds, "no_control": no_control}


def _seconds_per_step(row: Row, probes: Path, watcher: Watcher) -> float:
    """The median over a few steps of the row's first candidate, in a separate process.

    Raises:
        ValueError: the short run failed.
        KeyboardInterrupt: a signal came; the short run has ended.
    """
    watcher.say(f"measuring how fast {row.name} trains")
    probes.mkdir(exist_ok=True)
    recipe = row.candidates[0].recipe
    text = probes / "validation.txt"
    text.write_text(PROBE_TEXT * (2 + recipe.sequence_length // 4))
    short: dict[str, Any] = {
        "steps": PROBE_STEPS,
        "schedule_steps": None,
        "warmup_steps": 1,
        "eval_every": 0,
        "save_every": 0,
        "report_to": [],
    }
    probe = recipe.but({**short, "validation": str(text)})
    with begun(lambda: PretrainProcess.start(probe, probes / row.name)) as process:
        process.wait(lambda records: None)
    try:
        found = json.loads((probes / row.name / "summary.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{row.name} cannot be timed: {process.last_words()}") from None
    return found["tokens"] / found["steps"] / found["tokens_per_second"]


def _check_free(out: Path) -> None:
    """Raises ValueError unless a comparison may be planned in a folder: it does not exist, is empty, or holds only what a
    killed plan left."""
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    if LOCK in found:
        with locked(out, keep=True):
            found -= {LOCK, "models", "probes", ".comparison.json.part"}
    if found:
        raise ValueError(f"{out} is not an empty folder and holds no comparison; choose another --out")


def _clear(out: Path) -> None:
    """Remove what a plan that did not end well has left, its short run included."""
    for folder in without_link(out / "probes").glob("*"):
        if process := PretrainProcess.find(folder):
            process.kill()
    for name in ("models", "probes"):
        cleared(out / name)
    cleared(out / ".comparison.json.part")


def _same(found: Comparison, wanted: ComparisonSettings) -> Comparison:
    """The comparison that was found, if it is the one that is wanted; else ValueError."""
    given = found.settings.base
    if wanted.base.warmup == given.warmup:  # 0.2 of 400 steps, or the 80 that were once the default
        wanted = dataclasses.replace(wanted, base=dataclasses.replace(wanted.base, warmup_steps=given.warmup_steps))
    if limits_of(wanted.base) == limits_of(given):  # by default, or 100,000 and all, as was once written out
        own = {name: getattr(given, name) for name in ("eval_tokens", "eval_all_at_end")}
        wanted = dataclasses.replace(wanted, base=dataclasses.replace(wanted.base, **own))
    was, now = found.settings.to_dict(), wanted.to_dict()
    if was != now:
        raise ValueError(
            f"{found.out} holds another comparison ({_difference(was, now)}); continue that one with --resume {found.out}, or "
            "choose another --out"
        )
    return found


def _candidate(fields: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**fields, "recipe": Recipe.from_dict({**ONCE, **fields["recipe"]})})


def _difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting in which two comparisons differ."""
    for name in now:
        if was.get(name) != now[name]:
            if isinstance(now[name], dict) and isinstance(was.get(name), dict):
                for inner in {**was[name], **now[name]}:
                    if was[name].get(inner) != now[name].get(inner):
                        return f"{inner} was {was[name].get(inner)}, is {now[name].get(inner)}"
            return f"{name} was {was.get(name)}, is {now[name]}"
    return "made by another version of lorank"
