"""Several methods in one race: the same tokens in the same order, the same evaluation, each run in a process of its own.

OUT/comparison.json        what was asked for, and the plan: contestants, candidates, what was matched
OUT/runs/NAME/SETTINGS/seed-N/   a run of `lorank pretrain` each, with its output in log.txt
OUT/models/NAME/           shapes of the narrower dense models
OUT/running.json           who plans or runs it at this moment
OUT/failed.json            run -> why it failed; tried again when the comparison is continued
OUT/results.json, report.html    what came out, written anew after every run

Every contestant runs each of its candidates with the first seed; the one with the lowest validation loss then runs with
the other seeds. A seed changes initial values and the order of the training data; tokenizer and held-out text are those of
the first seed in all runs, so that their losses are of the same text. Whatever is finished is never run again, so that starting a comparison twice continues it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from lorank.race.contest import Candidate, Comparison, Contestant, find_contestants, plan_contest, slug
from lorank.race.matching import Costs
from lorank.race.process import PretrainProcess, begun, stop_on_signal
from lorank.race.tasks import check_tasks, is_file
from lorank.train.folder import absolute, write_whole
from lorank.train.model import build_config
from lorank.train.recipe import Recipe
from lorank.train.run import check_corpus

LOCK = "running.json"
PLANNING = "planning"
"""What running.json says is run before there are runs."""
PROBE_STEPS = 12
PROBE_TEXT = "Enough text for one evaluation: how fast a step is does not depend on what the evaluation says.\n"


class Run(NamedTuple):
    """One training of a race."""

    contestant: Contestant
    candidate: Candidate
    seed: int

    @property
    def key(self) -> str:
        return f"{self.contestant.name}/{slug(self.candidate.settings)}/seed-{self.seed}"

    @property
    def title(self) -> str:
        settings = " ".join(
            f"{name}={value:.10g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.candidate.settings.items()
        )
        return " ".join(filter(None, (self.contestant.name, settings, f"seed {self.seed}")))

    @property
    def recipe(self) -> Recipe:
        return dataclasses.replace(self.candidate.recipe, seed=self.seed)


class Watcher(Protocol):
    """Whoever shows how the race goes."""

    def say(self, text: str) -> None: ...
    def start(self, run: Run, number: int, runs: int, work_left: float) -> None:
        """`work_left` is in FLOPs, this run's included."""

    def update(self, records: Mapping[str, Any]) -> None: ...
    def end(self, outcome: str) -> None: ...
    def close(self) -> None: ...


class Race:
    """A comparison in its folder: planned once, run and continued as often as it takes."""

    def __init__(self, out: Path, comparison: Comparison, contestants: list[Contestant], facts: dict[str, Any]):
        self.out, self.comparison, self.contestants, self.facts = out, comparison, contestants, facts

    @classmethod
    def open(cls, out: str | Path) -> "Race":
        """The comparison of a folder; ValueError if it holds none."""
        try:
            found = json.loads((Path(out) / "comparison.json").read_text())
            contestants = [
                Contestant(**{**one, "candidates": list(map(_candidate, one["candidates"]))})
                for one in found["contestants"]
            ]
            return cls(Path(out).resolve(), Comparison.from_dict(found["comparison"]), contestants, found["facts"])
        except FileNotFoundError:
            raise ValueError(f"{out} holds no comparison to continue: it has no comparison.json") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{out}/comparison.json cannot be read ({error}); start another one with --out") from None

    @classmethod
    def plan(cls, comparison: Comparison, out: str | Path, watcher: Watcher) -> "Race":
        """Check everything that can be checked, settle who runs what, and write it down; a folder that holds the same
        comparison is continued.

        Raises:
            ValueError: something asked for does not exist, does not fit or cannot be matched, or the folder holds
                something else.
        """
        out = Path(out).resolve()
        tasks = [os.path.abspath(task) if is_file(task) else task for task in comparison.tasks]
        base = absolute(comparison.base)
        comparison = dataclasses.replace(comparison, base=base, tasks=tasks)
        if (out / "comparison.json").exists():
            race = cls.open(out)
            was, now = race.comparison.to_dict(), comparison.to_dict()
            if was != now:
                raise ValueError(
                    f"{out} holds another comparison ({_difference(was, now)}); continue that one with --resume {out}, or "
                    "choose another --out"
                )
            return race
        _check_free(out)
        find_contestants(comparison)
        if comparison.tasks:
            check_tasks(comparison.tasks)
        from lorank.train import data

        watcher.say("reading the data and counting the models")
        if base.data_seed is None:
            base = dataclasses.replace(base, data_seed=comparison.seeds[0])
        planned = dataclasses.replace(comparison, base=base)
        corpus = data.load_corpus(
            base.data,
            validation=base.validation,
            tokenizer=base.tokenizer,
            vocab_size=4096 if base.vocab_size is None else base.vocab_size,
            sequence_length=base.sequence_length,
            documents=base.documents,
            text_column=base.text_column,
            seed=base.split_seed,
        )
        check_corpus(base, corpus, build_config(base, corpus.tokenizer).vocab_size)
        costs, seconds = Costs(corpus.tokenizer), {}
        _check_free(out)
        made = not out.exists()
        try:
            with stop_on_signal():
                _clear(out)  # what a plan left that was killed
                out.mkdir(parents=True, exist_ok=True)
                _hold(out / LOCK, PLANNING)
                if comparison.match == "time":
                    untimed = dataclasses.replace(planned, match="tokens")
                    for contestant in plan_contest(untimed, costs, out / "models")[0]:
                        seconds[contestant.name] = _seconds_per_step(contestant, out, watcher)
                contestants, no_control = plan_contest(planned, costs, out / "models", seconds)
                facts = {"corpus": corpus.description, "seconds_per_step": seconds, "no_control": no_control}
                plan = {
                    "comparison": comparison.to_dict(),
                    "facts": facts,
                    "contestants": [dataclasses.asdict(contestant) for contestant in contestants],
                }
                write_whole(out / "comparison.json", json.dumps(plan, indent=2))
        except BaseException:
            _clear(out)
            if made and out.exists() and not any(out.iterdir()):
                out.rmdir()
            raise
        (out / LOCK).unlink()
        return cls(out, comparison, contestants, facts)

    # -----------------------------------------------------------------------------------------------------------------

    def runs(self) -> Iterator[Run]:
        """All runs in their order, those with further seeds once it is known which candidate they take; a contestant
        none of whose candidates came through has none."""
        for contestant in self.contestants:
            for candidate in contestant.candidates:
                yield Run(contestant, candidate, self.comparison.seeds[0])
        for contestant in self.contestants:
            best = self.best(contestant)
            for seed in self.comparison.seeds[1:] if best else ():
                yield Run(contestant, best, seed)  # type: ignore[arg-type]

    def best(self, contestant: Contestant) -> Candidate | None:
        """The candidate whose first run has the lowest validation loss; None if none has finished."""
        losses = []
        for place, candidate in enumerate(contestant.candidates):
            found = self.summary(Run(contestant, candidate, self.comparison.seeds[0]))
            if found is not None:
                losses.append((found["validation_loss_nats_per_token"], place))
        return contestant.candidates[min(losses)[1]] if losses else None

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.key

    def summary(self, run: Run) -> dict[str, Any] | None:
        """Of a finished run."""
        path = self.folder(run) / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def failures(self) -> dict[str, str]:
        """Run -> why it failed."""
        path = self.out / "failed.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def count(self) -> int:
        """Runs of the whole race, if none fails."""
        return sum(len(one.candidates) + len(self.comparison.seeds) - 1 for one in self.contestants)

    def work(self) -> float:
        """FLOPs of the whole race, if none fails and the best are as long as the first."""
        seeds = len(self.comparison.seeds) - 1
        return sum(
            sum(candidate.flops for candidate in one.candidates) + seeds * one.candidates[0].flops
            for one in self.contestants
        )

    def run(self, watcher: Watcher, after_each: Callable[["Race"], object]) -> None:
        """Do what is left to do; a failing run is noted and does not stop the others.

        Raises:
            KeyboardInterrupt: a signal came; the run of the moment has left a checkpoint.
            ValueError: somebody else is running this comparison.
        """
        lock = self.out / LOCK
        _check_lock(lock)
        work = self.work()
        try:
            with stop_on_signal():
                for number, run in enumerate(self.runs(), start=1):
                    if self.summary(run) is None:
                        watcher.start(run, number, self.count(), work)
                        watcher.end(self._run_one(run, lock, watcher))
                        after_each(self)
                    work -= run.candidate.flops
        finally:
            watcher.close()
            lock.unlink(missing_ok=True)

    def _run_one(self, run: Run, lock: Path, watcher: Watcher) -> str:
        folder = self.folder(run)
        with begun(lambda: _orphan(lock, run.key) or PretrainProcess.start(run.recipe, folder)) as process:
            _hold(lock, run.key, process)
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


def _hold(lock: Path, key: str, child: PretrainProcess | None = None) -> None:
    """Write down that this process is at it, and whose end it waits for."""
    me = psutil.Process()
    about = {"child": child.pid, "child_since": child.since} if child else {"child": None, "child_since": None}
    write_whole(lock, json.dumps({"pid": me.pid, "since": me.create_time(), "run": key, **about}))


def _check_lock(lock: Path) -> None:
    if lock.exists():
        held = json.loads(lock.read_text())
        if held["pid"] != os.getpid() and _alive(held["pid"], held["since"]):
            raise ValueError(
                f"{lock.parent} is being run by process {held['pid']}; wait for it, or end it and try again"
            )


def _check_free(out: Path) -> None:
    """Raises ValueError unless a comparison may be planned in a folder: it is not there, empty, or holds nothing but what a
    plan left that was killed, whose running.json says whose it is."""
    if not out.exists():
        return
    found = {path.name.removeprefix(".").removesuffix(".part") for path in out.iterdir()} if out.is_dir() else {""}
    if LOCK in found:
        _check_lock(out / LOCK)
        found -= {LOCK, "models", "probes", "comparison.json"}
    if found:
        raise ValueError(f"{out} is not an empty folder and holds no comparison; choose another --out")


def _clear(out: Path) -> None:
    """End the probe that a plan left behind, and take its files away."""
    lock = out / LOCK
    if lock.exists() and not (out / "comparison.json").exists():
        held = json.loads(lock.read_text())
        if held["run"] == PLANNING and held["child"] and _alive(held["child"], held["child_since"]):
            with contextlib.suppress(psutil.Error):
                probe = psutil.Process(held["child"])
                probe.kill()
                probe.wait()
        shutil.rmtree(out / "models", ignore_errors=True)
        shutil.rmtree(out / "probes", ignore_errors=True)
        lock.unlink()  # the last of all: it says whose the rest is
    for part in (LOCK, "comparison.json"):
        (out / f".{part}.part").unlink(missing_ok=True)


def _orphan(lock: Path, key: str) -> PretrainProcess | None:
    """The process of this run that a killed comparison left behind, if it still runs."""
    if not lock.exists():
        return None
    held = json.loads(lock.read_text())
    if held["run"] != key or not _alive(held["child"], held["child_since"]):
        return None
    return PretrainProcess(psutil.Process(held["child"]), lock.parent / "runs" / key)


def _alive(pid: int, since: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - since) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _candidate(fields: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**fields, "recipe": Recipe.from_dict(fields["recipe"])})


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


def _seconds_per_step(contestant: Contestant, out: Path, watcher: Watcher) -> float:
    """By the median of a few steps of the contestant's first candidate, in a process of its own.

    Raises:
        ValueError: the short run failed.
        KeyboardInterrupt: a signal came; the short run has ended.
    """
    watcher.say(f"measuring how fast {contestant.name} trains")
    folder = out / "probes"
    folder.mkdir(exist_ok=True)
    recipe = contestant.candidates[0].recipe
    (folder / "validation.txt").write_text(PROBE_TEXT * (2 + recipe.sequence_length // 4))
    probe = dataclasses.replace(
        recipe,
        validation=str(folder / "validation.txt"),
        steps=PROBE_STEPS,
        warmup_steps=1,
        eval_every=0,
        save_every=0,
        report_to=[],
    )
    with begun(lambda: PretrainProcess.start(probe, folder / contestant.name)) as process:
        _hold(out / LOCK, PLANNING, process)
        process.wait(lambda records: None)
    try:
        found = json.loads((folder / contestant.name / "summary.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{contestant.name} cannot be timed: {process.last_words()}") from None
    return found["tokens"] / found["steps"] / found["tokens_per_second"]
