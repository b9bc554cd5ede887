"""A comparison on a model 32 wide: most of it runs in this process, and one finished comparison serves many tests."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorank import accounting
from lorank.comparison import runner as module
from lorank.comparison.matching import Costs
from lorank.comparison.process import PretrainProcess
from lorank.comparison.results import write_results
from lorank.comparison.runner import Comparison
from lorank.comparison.settings import ComparisonSettings
from lorank.train import data
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain

TEXT = "".join(f"line {i}: the {'quick' if i % 3 else 'slow'} brown fox counts {i * i} lazy dogs\n" for i in range(400))
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "fox.txt").write_text(TEXT)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture(scope="session")
def base(files: Path) -> Recipe:
    return Recipe(
        model=str(files / "config.json"),
        rank=8,
        data=str(files / "fox.txt"),
        vocab_size=300,
        sequence_length=32,
        batch_size=4,
        steps=6,
        warmup_steps=2,
        eval_every=2,
        eval_tokens=500,
        log_every=1,
        save_every=3,
        lr=1e-2,
    )


@pytest.fixture(scope="session")
def costs(base: Recipe) -> Costs:
    """Shared: what was counted once is known."""
    return Costs(data.load_corpus(base.data, vocab_size=300, sequence_length=32, seed=42).tokenizer)


@pytest.fixture(scope="session")
def of_type(base: Recipe) -> Callable[..., Recipe]:
    """of_type("gpt2", folder, n_embd=64): the base recipe on another architecture."""

    def make(model_type: str, folder: Path, **shape: Any) -> Recipe:
        folder.mkdir()
        settings = {"model_type": model_type, "max_position_embeddings": 64, **shape}
        (folder / "config.json").write_text(json.dumps(settings))
        return dataclasses.replace(base, model=str(folder))

    return make


class Silent:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.outcomes: list[str] = []

    def say(self, text: str) -> None: ...
    def update(self, records: Any) -> None: ...
    def close(self) -> None: ...
    def start(self, title: str, steps: int, flops: float, number: int, runs: int, work_left: float) -> None:
        assert 1 <= number <= runs and 0 < flops <= work_left * (1 + 1e-9) and steps > 0
        self.started.append(title)

    def end(self, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def watcher() -> Silent:
    return Silent()


class InThisProcess(PretrainProcess):
    """Runs without a process: quick, and the figures are the same."""

    fail: str | None = None
    """Part of the folder of a run that fails."""

    @classmethod
    def start(cls, recipe: Recipe, folder: Path) -> "InThisProcess":
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if cls.fail is not None and cls.fail in str(folder):
                raise FloatingPointError("the loss became nan; lower the learning rate")
            pretrain(recipe, folder, resume=(folder / "recipe.yaml").exists())
        except FloatingPointError as error:
            (folder / "log.txt").write_text(f"step 1\nlorank: {error}\n")
        return cls(None, folder)  # type: ignore[arg-type]

    def wait(self, update: Any) -> None: ...


@pytest.fixture
def processless() -> type[InThisProcess]:
    """In place of `PretrainProcess`."""
    return InThisProcess


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> type[InThisProcess]:
    """Runs of comparisons take place in this process."""
    monkeypatch.setattr(module, "PretrainProcess", InThisProcess)
    monkeypatch.setattr(InThisProcess, "fail", None)
    return InThisProcess


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs do not count FLOPs, which takes longer than their steps."""
    monkeypatch.setattr(accounting, "flops_per_token", lambda *args, **kwargs: 1.0)


@pytest.fixture
def repro_command(in_this_process: Callable[..., tuple[int, str, str]]):
    """lorank repro ARGUMENTS in this process: (exit code, stdout, stderr)."""
    return partial(in_this_process, "repro")


@dataclasses.dataclass
class Finished:
    """A comparison of equal FLOPs, two seeds and a sweep, in which dense-muon failed at first."""

    settings: ComparisonSettings
    comparison: Comparison
    failed: dict[str, Any]
    """Results when dense-muon had failed."""
    results: dict[str, Any]
    """Results after the same command again."""
    watchers: tuple[Silent, Silent]
    untouched: bool
    """Whether runs that had finished were left alone the second time."""


@pytest.fixture(scope="session")
def finished(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    out = tmp_path_factory.mktemp("finished") / "out"
    settings = ComparisonSettings(
        base=dataclasses.replace(base, eval_tokens=60, eval_all_at_end=True),
        methods=["cola", "dense"],
        seeds=[1, 2],
        sweep={"lr": [1e-3, 1e-2]},
        own={name: {"lr": [1e-2]} for name in ("dense", "dense-muon", "dense-small", "dense-small-muon")},
        match="flops",
    )
    first, second = Silent(), Silent()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PretrainProcess", InThisProcess)
        patch.setattr(InThisProcess, "fail", "dense-muon")
        comparison = Comparison.plan(settings, out, first)
        comparison.run(first, after_each=lambda comparison: write_results(comparison, whole=False))
        failed = write_results(comparison)
        patch.setattr(InThisProcess, "fail", None)
        before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/summary.json")}
        Comparison.plan(settings, out, second).run(second, after_each=lambda comparison: None)
        untouched = all(path.stat().st_mtime_ns == when for path, when in before.items())
        results = write_results(Comparison.open(out))
    yield Finished(settings, comparison, failed, results, (first, second), untouched)


@pytest.fixture
def flags(base: Recipe) -> list[str]:
    """The base recipe on the command line."""
    names = (
        "model",
        "rank",
        "data",
        "sequence_length",
        "batch_size",
        "steps",
        "warmup_steps",
        "eval_every",
        "save_every",
        "lr",
    )
    pieces = [piece for name in names for piece in (f"--{name.replace('_', '-')}", str(getattr(base, name)))]
    for name in ("vocab_size", "eval_tokens", "log_every"):
        pieces += ["--set", f"{name}={getattr(base, name)}"]
    return pieces
