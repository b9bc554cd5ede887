"""A race is fair, forgets nothing that is finished, and says what went wrong.

Most of it runs in this process, on a model of 32 numbers' width; what only processes can show has one test of its own.
"""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from lorank.race import compare, tasks
from lorank.race.compare import Race, Run
from lorank.race.contest import Comparison, _swept, find_contestants, plan_contest, slug
from lorank.race.matching import CLOSE, Costs, narrow_to_match
from lorank.race.process import PretrainProcess, begun, signals_later, stop_on_signal
from lorank.report.comparison import _baseline_rank, _clock, _mismatches, comparison_table, gather, write_results
from lorank.report.race import RaceProgress
from lorank.train import data
from lorank.train.folder import history
from lorank.train.model import build_config, build_model, check_causal
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "fox.txt").write_text(TEXT)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture(scope="module")
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


class Silent:
    """A watcher that remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.outcomes: list[str] = []

    def say(self, text: str) -> None: ...
    def update(self, records: Any) -> None: ...
    def close(self) -> None: ...
    def start(self, run: Run, number: int, runs: int, work_left: float) -> None:
        assert 1 <= number <= runs and work_left > 0
        self.started.append(run.key)

    def end(self, outcome: str) -> None:
        self.outcomes.append(outcome)


class InThisProcess(PretrainProcess):
    """Runs without a process: quick, and the figures are the same."""

    fail: str | None = None

    @classmethod
    def start(cls, recipe: Recipe, folder: Path) -> PretrainProcess:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if cls.fail is not None and cls.fail in str(folder):
                raise FloatingPointError("the loss became nan; lower the learning rate")
            pretrain(recipe, folder, resume=(folder / "recipe.yaml").exists())
        except FloatingPointError as error:
            (folder / "log.txt").write_text(f"step 1\nlorank: {error}\n")
        return cls(None, folder)  # type: ignore[arg-type]

    pid, since = 0, 0.0  # type: ignore[assignment]

    def wait(self, update: Any) -> None: ...


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> type[InThisProcess]:
    monkeypatch.setattr(compare, "PretrainProcess", InThisProcess)
    monkeypatch.setattr(InThisProcess, "fail", None)
    return InThisProcess


def test_a_race_from_plan_to_report(base: Recipe, quick: type[InThisProcess], tmp_path: Path) -> None:
    """Equal FLOPs, two seeds, a sweep, one contestant that fails and comes through at the second attempt."""
    asked = Comparison(
        base=base,
        methods=["cola", "dense"],
        seeds=[1, 2],
        sweep={"lr": [1e-3, 1e-2]},
        own={"dense": {"lr": [1e-2]}, "dense-muon": {"lr": [1e-2]}, "dense-small": {"lr": [1e-2]}},
        match="flops",
    )
    race, watcher = Race.plan(asked, tmp_path / "race", Silent()), Silent()
    flops = [candidate.flops for one in race.contestants for candidate in one.candidates]
    steps = [candidate.flops / candidate.recipe.steps for one in race.contestants for candidate in one.candidates]
    assert max(abs(one - flops[0]) / step for one, step in zip(flops, steps, strict=True)) <= 1

    quick.fail = "dense-muon"
    race.run(watcher, after_each=lambda race: write_results(race, whole=False))
    assert [key.split("/")[0] for key in watcher.started] == [
        *("cola", "cola", "dense", "dense-muon", "dense-small"),
        *("cola", "dense", "dense-small"),  # the second seed of those that came through
    ]
    results = write_results(race)
    muon = next(row for row in results["contestants"] if row["name"] == "dense-muon")
    assert muon["loss"] is None and muon["tried"][0]["status"] == "failed"
    assert any("dense-muon" in note and "became nan" in note for note in results["notes"])
    assert "failed: the loss became nan" in watcher.outcomes[3]
    assert "failed" in (race.out / "report.html").read_text()

    quick.fail = None
    before = {path: path.stat().st_mtime_ns for path in race.out.glob("runs/**/summary.json")}
    again = Silent()
    Race.plan(asked, tmp_path / "race", again).run(again, after_each=lambda race: None)  # the same command again
    assert again.started == ["dense-muon/lr=0.01/seed-1", "dense-muon/lr=0.01/seed-2"]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())

    results = write_results(Race.open(tmp_path / "race"))
    check_results(results, race.out)
    idle = Silent()
    Race.open(tmp_path / "race").run(idle, after_each=lambda race: None)
    assert idle.started == []


def check_results(results: dict[str, Any], out: Path) -> None:
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["format"] == 1 and results["failures"] == {}
    assert results["finished_runs"] == results["planned_runs"] == 9
    assert [row["name"] for row in results["contestants"]] == ["cola", "dense", "dense-muon", "dense-small"]
    assert [row["kind"] for row in results["contestants"]] == ["method", "dense", "dense", "control"]
    hashes, texts, words = set(), set(), set()
    for row in results["contestants"]:
        assert row["loss"]["low"] < row["loss"]["mean"] < row["loss"]["high"] and row["loss"]["number"] == 2
        assert [run["seed"] for run in row["runs"]] == [1, 2]
        assert results["match"]["ratios"][row["name"]] == pytest.approx(1, abs=0.25)  # six steps are coarse
        assert set(row["spectra"]) >= {"q_proj", "down_proj"} and row["sample"]
        for run in row["runs"]:
            hashes.add(run["data_hash"])
            texts.add(json.loads((out / run["folder"] / "run.json").read_text())["recipe"]["data_seed"])
            words.add((out / run["folder"] / "tokenizer.json").read_bytes())
            assert (out / run["folder"] / "model.safetensors").exists()
            for curve in (run["curve"], run["training"]):
                assert len({len(values) for values in curve.values()}) == 1
                assert curve["tokens"] == sorted(curve["tokens"])
                assert curve["seconds"][0] > 0 and curve["seconds"] == sorted(set(curve["seconds"]))
            assert run["curve"]["flops"][-1] == pytest.approx(row["training_flops"])
    assert len(hashes) == len(words) == 1 and texts == {1}  # one text held out and one tokenizer over all seeds
    cola = results["contestants"][0]
    losses = {tried["settings"]["lr"]: tried["loss"] for tried in cola["tried"]}
    assert cola["settings"]["lr"] == min(losses, key=lambda lr: losses[lr]) and cola["edge"] == ["lr"]
    assert all(rank <= 0.26 for rank in (one["effective_rank"] for one in cola["spectra"].values()))  # 8 of 32
    gaps = [
        ours["loss"] - theirs["loss"]
        for ours, theirs in zip(cola["runs"], results["contestants"][1]["runs"], strict=True)
    ]
    assert cola["difference"]["mean"] == pytest.approx(sum(gaps) / 2) and results["baseline"] == "dense"
    assert cola["difference"]["high"] - cola["difference"]["mean"] == pytest.approx(
        12.7062 * abs(gaps[0] - gaps[1]) / 2, rel=1e-4
    )


def test_a_seed_changes_order_and_initial_values_but_not_the_text(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = Race(
        tmp_path, Comparison(base=dataclasses.replace(base, data_seed=1), methods=["dense"], seeds=[1, 2]), [], {}
    )
    seen: list[list[torch.Tensor]] = []
    collate = data.collate

    def remember(rows: Any, vocab_size: int | None = None) -> Any:
        seen[-1].append(collate(rows, vocab_size)["input_ids"])
        return collate(rows, vocab_size)

    monkeypatch.setattr(data, "collate", remember)
    for seed in race.comparison.seeds:
        seen.append([])
        recipe = dataclasses.replace(
            race.comparison.base, method="dense", rank=None, seed=seed, eval_every=0, save_every=0
        )
        pretrain(recipe, tmp_path / str(seed))
    first, second = ([row.tolist() for batch in one for row in batch] for one in seen)
    train = base.steps * base.batch_size
    held_out = data.load_corpus(base.data, vocab_size=300, sequence_length=32, seed=1).validation["input_ids"]
    assert first[:train] != second[:train]
    assert first[-len(held_out) :] == second[-len(held_out) :] == [list(row) for row in held_out]


def test_all_methods_see_the_same_tokens_in_the_same_order(
    base: Recipe, costs: Costs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    collate = data.collate
    comparison = Comparison(
        base=dataclasses.replace(base, steps=8, eval_every=0, save_every=0), methods=["cola", "dense"], match="flops"
    )  # dense rows take fewer steps, and with Muon, whose products weigh much beside so few tokens, the fewest
    for one in plan_contest(comparison, costs, tmp_path / "models")[0]:
        batches: list[torch.Tensor] = []

        def remember(rows: Any, vocab_size: int | None = None, batches: list[torch.Tensor] = batches) -> Any:
            batches.append(collate(rows, vocab_size)["input_ids"])
            return collate(rows, vocab_size)

        monkeypatch.setattr(data, "collate", remember)
        recipe = one.candidates[0].recipe
        pretrain(recipe, tmp_path / one.name)
        seen[one.name] = batches[: recipe.steps]
    shortest = min(map(len, seen.values()))
    assert shortest >= 3 and len(seen) == 4
    for batches in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(batches[:shortest], seen["cola"], strict=False))


@pytest.fixture(scope="module")
def costs(base: Recipe) -> Costs:
    """Shared: what was counted once is known."""
    return Costs(data.load_corpus(base.data, vocab_size=300, sequence_length=32, seed=42).tokenizer)


def test_the_control_costs_what_the_cheapest_method_costs(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    (*_, control), missing = plan_contest(Comparison(base=base, methods=["low-rank", "cola"]), costs, tmp_path)
    cola = costs.of("flops_per_token", dataclasses.replace(base, method="cola"))
    assert (control.name, control.kind) == (
        "dense-small",
        "control",
    ) and control.chosen.endswith(f"for the {control.like}")
    assert control.like == "training FLOPs per token of low-rank" and missing == ""
    assert costs.of("flops_per_token", control.candidates[0].recipe) == pytest.approx(cola, rel=0.02)
    assert control.candidates[0].recipe.steps == base.steps  # equal tokens
    found, missing = plan_contest(Comparison(base=base, methods=["dense"]), costs, tmp_path)
    assert [one.name for one in found] == ["dense", "dense-muon"] and missing.startswith("no method takes part")


def of_type(model_type: str, folder: Path, base: Recipe, **shape: Any) -> Recipe:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "max_position_embeddings": 64, **shape}))
    return dataclasses.replace(base, model=str(folder))


PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "intermediate_size": 172},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "opt": {**PLAIN, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "qwen2": {**PLAIN, "intermediate_size": 172, "num_key_value_heads": 2},
    "qwen3": {**PLAIN, "intermediate_size": 172, "num_key_value_heads": 2, "head_dim": 32},
    "gpt_neox": {**PLAIN, "intermediate_size": 256},
    "phi": {**PLAIN, "intermediate_size": 256},  # of whose heads a half is turned
}


@pytest.mark.parametrize("model_type", SHAPES)
def test_a_narrower_model_is_of_the_same_architecture(
    base: Recipe, costs: Costs, tmp_path: Path, model_type: str
) -> None:
    recipe = dataclasses.replace(
        of_type(model_type, tmp_path / "m", base, **SHAPES[model_type]), method="dense", rank=None
    )
    whole = build_config(recipe, costs.tokenizer)
    kinds = [type(module) for module in build_model(recipe, whole).modules()]
    for part in (0.8, 0.45):
        target = part * costs.of("parameters", recipe)
        narrow, _ = narrow_to_match(recipe, costs, target, "parameters", tmp_path / str(part))
        small = build_config(narrow, costs.tokenizer)
        assert type(small) is type(whole) and small.hidden_size < whole.hidden_size + 1
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            assert getattr(small, name, None) == getattr(whole, name, None)
        model = build_model(narrow, small)
        assert [type(module) for module in model.modules()] == kinds
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(target, rel=CLOSE)
        check_causal(model)  # it runs


def test_the_control_of_a_gpt2_is_one(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    recipe = of_type("gpt2", tmp_path / "m", base, **SHAPES["gpt2"])
    (*_, control), _ = plan_contest(Comparison(base=recipe, methods=["cola"]), costs, tmp_path)
    assert control.name == "dense-small" and control.like == "training FLOPs per token of cola"
    assert build_config(control.candidates[0].recipe, costs.tokenizer).model_type == "gpt2"


def test_a_race_goes_on_without_a_control_that_cannot_be_made(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        of_type("bloom", tmp_path / "m", base, hidden_size=64, n_layer=2, n_head=4), attention="eager"
    )
    asked = Comparison(base=recipe, methods=["cola"])
    found, missing = plan_contest(asked, costs, tmp_path / "models")
    assert [one.name for one in found] == ["cola", "dense", "dense-muon"]
    assert missing.startswith("a model of type 'bloom' cannot be made narrower") and not (tmp_path / "models").exists()
    results = gather(Race(tmp_path, asked, found, {"corpus": "", "no_control": missing}))
    assert f"There is no dense-small: {missing}." in results["notes"]


@pytest.mark.parametrize(
    ("methods", "match", "figure"),
    [(["switchlora"], "flops", "memory_bytes"), (["masa"], "flops", "parameters"), (["galore", "cola"], "params", "memory_bytes")],
)  # fmt: skip
def test_where_no_method_saves_compute_the_control_has_what_is_saved(
    base: Recipe, costs: Costs, tmp_path: Path, methods: list[str], match: Any, figure: Any
) -> None:
    recipe = dataclasses.replace(base, rank=None if methods == ["masa"] else 8)
    found, missing = plan_contest(Comparison(base=recipe, methods=methods, match=match), costs, tmp_path)
    control = found[-1]
    assert control.name == "dense-small" and missing == "", missing
    least = min(costs.of(figure, one.candidates[0].recipe) for one in found if one.kind == "method")
    assert costs.of(figure, control.candidates[0].recipe) == pytest.approx(least, rel=CLOSE)
    assert control.like.startswith({"parameters": "parameters of", "memory_bytes": "memory (estimated) of"}[figure])


@pytest.mark.parametrize(("match", "figure"), [("params", "parameters"), ("memory", "memory_bytes")])
def test_rank_or_width_make_costs_equal(base: Recipe, costs: Costs, tmp_path: Path, match: Any, figure: Any) -> None:
    base = dataclasses.replace(base, rank=6)
    names = ["cola", "sltrain", "d=dense"] if match == "params" else ["cola", "sltrain"]
    found, _ = plan_contest(Comparison(base=base, methods=names, match=match), costs, tmp_path)
    target = costs.of(figure, found[0].candidates[0].recipe)
    for one in found[1 : len(names)]:
        assert costs.of(figure, one.candidates[0].recipe) == pytest.approx(target, rel=0.02)
        assert one.chosen.startswith("hidden size" if one.method == "dense" else "rank")


def test_what_a_method_drops_after_training_is_not_matched(base: Recipe, costs: Costs, quick, tmp_path: Path) -> None:
    """MASA has a network for its coefficients while it trains, half as large as a small model."""
    short = dataclasses.replace(base, rank=None, steps=2, warmup_steps=1, eval_every=0, save_every=0)
    asked = Comparison(base=short, methods=["cola", "masa"], match="params")
    race = Race(tmp_path, asked, plan_contest(asked, costs, tmp_path / "models")[0][:2], {"corpus": ""})
    race.run(Silent(), after_each=lambda race: None)
    results = gather(race)
    assert results["match"]["ratios"]["masa"] == pytest.approx(1, abs=0.02)
    assert not any("not matched" in note for note in results["notes"])


def test_what_did_not_come_out_equal_is_told() -> None:
    rows = [
        {"name": name, "kind": kind} for name, kind in (("cola", "method"), ("d", "dense"), ("dense-small", "control"))
    ]
    match = {"by": "time", "figure": "seconds", "ratios": {"cola": 1.0, "d": 1.02, "dense-small": 1.44}}
    probed, told = _mismatches({"match": match, "contestants": rows})
    assert (
        "speed of 12 steps" in probed
        and told == "dense-small is not matched: its seconds came out 1.44 times those of cola."
    )
    match = {"by": "params", "figure": "parameters", "ratios": {"cola": 1.0, "d": 0.78, "dense-small": 0.9}}
    [told] = _mismatches({"match": match, "contestants": rows})
    assert told.startswith("d is not matched: its parameters came out 0.78 times")


def test_no_two_settings_share_a_folder() -> None:
    settings = [{"lr": 1e30}, {"lr": 1e-30}, {"lr": 1.0}, {"lr": 10.0}, {"betas": "a b"}, {"betas": "a-b"}, {}]
    settings += [{"lr": 0.003000001}, {"lr": 0.003000002}]
    assert len({slug(one) for one in settings}) == len(settings) and "/" not in slug({"x": "../y"})


def test_equal_time_means_steps_by_measured_speed(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    asked = Comparison(base=base, methods=["cola", "d=dense"], match="time")
    seconds = {"cola": 0.1, "d": 0.3, "dense": 0.15, "dense-muon": 0.2, "dense-small": 0.05}
    found, _ = plan_contest(asked, costs, tmp_path, seconds)
    assert [one.candidates[0].recipe.steps for one in found] == [6, 2, 4, 3, 12]
    assert found[-1].candidates[0].recipe.warmup_steps == 4 and found[-1].candidates[0].recipe.eval_every == 4


def test_dense_rows_are_always_there_and_always_tuned(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    def rates(**asked: Any) -> dict[str, tuple[list[Any], str]]:
        comparison, found = Comparison(**asked), {}
        for name, (recipe, _) in find_contestants(comparison).items():
            recipes, rate = _swept(comparison, name, recipe)
            found[name] = [one.lr for _, one in recipes], rate
        return found

    around, swept = [0.003333, 0.01, 0.03], "the best of its sweep"
    found = rates(base=base, methods=["cola"], tuned="dense")  # --lr 1e-2
    assert found == {"cola": ([0.01], "as given, not tuned"), "dense": (around, swept), "dense-muon": (around, swept)}
    (*_, small), _ = plan_contest(Comparison(base=base, methods=["cola"], tuned="dense"), costs, tmp_path)
    assert small.name == "dense-small" and [one.recipe.lr for one in small.candidates] == around
    found = rates(base=base, methods=["d=dense"], tuned="dense", own={"dense": {"lr": [5e-3]}})
    assert found == {"d": (around, swept), "dense": ([5e-3], "as given, not tuned"), "dense-muon": (around, swept)}
    sized = dataclasses.replace(base, model=None, size="60m", rank=None)
    found = rates(base=sized, methods=["galore", "cola-m", "crnet"], tuned="all")  # neither --lr nor --sweep
    assert found["galore"] == ([1e-2], "its recipe's at 60m, not tuned here") and found["cola-m"][0] == [6e-3]
    assert found["crnet"] == found["dense"] == ([1e-3, 3e-3, 9e-3], swept)  # no source is known for CR-Net's
    assert rates(base=base, methods=["cola"], tuned="all")["cola"][1] == swept  # no recipe is for this shape


def test_a_cycle_in_updates_stays_what_it_is_when_steps_are_matched(
    base: Recipe, costs: Costs, quick: type[InThisProcess], tmp_path: Path
) -> None:
    long = dataclasses.replace(base, steps=20, eval_every=0, save_every=0)  # dense rows take fewer
    asked = Comparison(base=long, methods=["cola", "relora"], own={"relora": {"option.cycle": [5]}}, match="flops")
    race, watcher = Race.plan(asked, tmp_path / "race", Silent()), Silent()
    cola, relora, *_ = (one.candidates[0] for one in race.contestants)
    assert relora.recipe.steps in (10, 15, 20) and relora.recipe.options["cycle"] == 5
    assert relora.flops == pytest.approx(cola.flops, rel=2.5 / relora.recipe.steps)
    race.run(watcher, after_each=lambda race: None)
    assert race.failures() == {} and len(watcher.outcomes) == 5
    asked = dataclasses.replace(asked, own={"relora": {"option.cycle": [18]}})
    with pytest.raises(
        ValueError, match=r"relora, at the 1\d steps that --match flops gives it: .* not several times cycle=18; change"
    ):
        plan_contest(asked, costs, tmp_path / "models")


# ---------------------------------------------------------------------------------------------------------------------
# As a user meets it
# ---------------------------------------------------------------------------------------------------------------------


def flags(base: Recipe, **changes: Any) -> list[str]:
    names = ("model", "rank", "data", "vocab_size", "sequence_length", "batch_size", "steps", "warmup_steps")
    names += ("eval_every", "eval_tokens", "log_every", "save_every", "lr")
    settings = {**{name: getattr(base, name) for name in names}, **changes}
    return [piece for name, value in settings.items() for piece in (f"--{name.replace('_', '-')}", str(value))]


BAD = {
    "no method": ([], "no method is named"),
    "unknown method": (["--method", "colla"], "did you mean 'cola'"),
    "unknown setting": (["--method", "cola", "--sweep", "lrr=1,2"], "did you mean 'lr'"),
    "no values": (["--method", "cola", "--sweep", "lr"], "is not NAME=VALUE"),
    "bad value": (["--method", "cola", "--sweep", "lr=1e-3,-1"], "lr=-1.0 is not positive"),
    "shared setting": (["--method", "cola", "--sweep", "steps=5,9"], "steps is the same for all"),
    "own of nobody": (["--method", "cola", "--for", "sparse", "lr=1e-3"], "there is no such contestant"),
    "twice": (["--method", "cola", "--method", "cola"], "two contestants are called 'cola'"),
    "the control's name": (["--method", "dense-small=dense"], "two contestants are called 'dense-small'"),
    "a value twice": (["--method", "cola", "--sweep", "lr=1e-3,0.001"], "lr=0.001 is given twice"),
    "a name out of the folder": (["--method", "..=cola"], "'..' is no name for a contestant"),
    "a name that is a device": (["--method", "nul.1=cola"], "'nul.1' is no name for a contestant"),
    "one folder for two names": (["--method", "a=cola", "--method", "A=cola"], "two contestants are called 'A'"),
    "seeds": (["--method", "cola", "--seeds", "1,x"], "is not a list of whole numbers"),
    "no digits": (["--method", "cola", "--seeds", "²"], "is not a list of whole numbers"),
    "a seed too large": (["--method", "cola", "--seeds", "1,5000000000"], "seed 5000000000 is not from 0 to 2**32 - 1"),
    "a value in two sweeps": (["--method", "cola", "--sweep", "lr=1e-3", "--sweep", "lr=1e-3"], "is given twice"),
    "two of its own": (["--method", "cola", "--for", "cola", "lr=1e-3", "--for", "cola", "lr=1e-3"], "is given twice"),
    "seed twice": (["--method", "cola", "--seeds", "1,1"], "hold one twice"),
    "impossible match": (["--method", "cola", "--method", "relora", "--match", "params"], "no rank of relora has parameters"),
    "rank swept and matched": (["--method", "cola", "--match", "params", "--sweep", "rank=4,8"], "cannot be swept beside it"),
    "field of no method": (["--method", "cola", "--for", "cola", "option.depth=3"], "has no field 'depth'"),
    "no rank for an optimizer": (["--method", "dense", "--method", "g=galore"], "g: method=galore needs a rank"),
    "option of another type": (
        ["--method", "galore", "--rank", "4", "--for", "galore", "option.stagger=maybe"],
        "stagger='maybe' of galore is not true or false",
    ),
    "option of no optimizer": (["--method", "fira", "--for", "fira", "option.gap=3"], "fira: options: fira has no field"),
    "an optimizer of its own": (["--method", "fira", "--for", "fira", "optimizer=muon"], "fira: optimizer='muon': FiraAdamW"),
    "few sequences": (["--method", "cola", "--batch-size", "4000"], "give more text or a smaller batch"),
    "harness missing": (["--method", "cola", "--tasks", "arc_easy"], "pip install 'lorank[eval]'"),
}  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_this_process: Callable[..., tuple[int, str, str]]):
    monkeypatch.chdir(tmp_path)
    return partial(in_this_process, "compare")


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    command, base: Recipe, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    arguments, said = BAD[mistake]
    shared = flags(base)
    if "needs a rank" in said:
        shared = shared[: shared.index("--rank")] + shared[shared.index("--rank") + 2 :]
    code, _, err = command(*shared, *arguments, "--out", "there")
    assert code == 2 and said in " ".join(err.split()) and err.startswith("lorank: ") and err.count("\n") == 1, err
    assert not (tmp_path / "there").exists()


def test_the_command_and_a_folder_that_holds_another_comparison(command, base: Recipe, quick, tmp_path: Path) -> None:
    arguments = ["--method", "mine=cola", "--sweep", "lr=1e-2", *flags(base), "--out", "there"]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert (
        "mine" in out
        and "dense-small" in out
        and "report.html" in out
        and "Learning rate as given, not tuned" in " ".join(out.split())
    )
    code, _, err = command(*arguments, "--seeds", "7")
    assert code == 2 and "holds another comparison (seeds was [42], is [7])" in err
    code, out, _ = command("--resume", "there")
    assert code == 0 and "[1/4]" not in out
    assert command("--resume", "there", "--seeds", "7")[0] == 2
    assert command("--resume", "nowhere")[0] == 2
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    code, _, err = command("--method", "cola", *flags(base), "--out", "full")
    assert code == 2 and "is not an empty folder" in err and Path("full/thesis.txt").read_text() == "mine"
    (tmp_path / "there/running.json").write_text(
        json.dumps(
            {"pid": os.getppid(), "since": process_birth(os.getppid()), "run": "x", "child": 0, "child_since": 0}
        )
    )
    code, _, err = command("--resume", "there")
    assert code == 2 and "is being run by process" in err


def process_birth(pid: int) -> float:
    return psutil.Process(pid).create_time()


def test_a_rate_that_nobody_names_is_swept(command, base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Comparison] = []

    def stop(comparison: Comparison, *rest: Any) -> None:
        found.append(comparison)
        raise ValueError("enough")

    monkeypatch.setattr(Race, "plan", stop)
    without = flags(base)[:-2]
    command("--method", "cola", *without)
    command("--method", "cola", *without, "--lr", "1e-3")
    Path("recipe.yaml").write_text("lr: 2e-3\n")
    command("recipe.yaml", "--method", "cola", "--for", "cola", "option.nonlinearity=low-rank")
    assert [(one.tuned, one.sweep) for one in found] == [("all", {}), ("dense", {}), ("dense", {})]
    assert found[2].own == {"cola": {"option.nonlinearity": ["low-rank"]}} and found[2].base.lr == 2e-3


def test_the_harness_is_called_with_the_model(base: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import types

    asked: dict[str, Any] = {}

    def evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}

    manager = types.SimpleNamespace(all_tasks=["arc_easy"], load=lambda tasks: None)
    modules = {
        "lm_eval": types.SimpleNamespace(simple_evaluate=evaluate),
        "lm_eval.tasks": types.SimpleNamespace(TaskManager=lambda include_defaults: manager),
        "lm_eval.models": types.SimpleNamespace(),
        "lm_eval.models.huggingface": types.SimpleNamespace(HFLM=lambda **arguments: arguments),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    tasks.check_tasks(["arc_easy"])
    with pytest.raises(ValueError, match="knows no task 'arc_hard'"):
        tasks.check_tasks(["arc_hard"])
    pretrain(dataclasses.replace(base, method="cola"), tmp_path / "run")
    assert tasks.run_tasks(tmp_path / "run", ["arc_easy"]) == {"arc_easy": {"acc,none": 0.25}}
    assert asked["tasks"] == ["arc_easy"] and asked["model"]["pretrained"].config.lorank["method"] == "cola"


def test_stopped_then_killed_and_nothing_is_lost(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command
) -> None:
    """SIGTERM: the run of the moment saves and stops. SIGKILL: it goes on alone and is found again. In real processes."""
    long = dataclasses.replace(base, steps=150, warmup_steps=4, eval_every=0, save_every=50)
    race = Race.plan(Comparison(base=long, methods=["dense"]), tmp_path / "race", Silent())
    first, second = race.runs()
    folder, records = race.folder(first), []

    class Impatient(Silent):
        def update(self, found: Any) -> None:
            records.append(dict(found))
            if found.get("step", 0) >= 20:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        race.run(Impatient(), after_each=lambda race: None)
    assert (
        list(folder.glob("checkpoint-*")) and race.summary(first) is None and not (race.out / "running.json").exists()
    )
    assert records[-1]["tokens_per_second"] > 0

    child = PretrainProcess.start(first.recipe, folder)  # what a comparison has begun and not seen the end of
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    lock = {"pid": gone.pid, "since": 0, "run": first.key, "child": child.pid, "child_since": child.since}
    (race.out / "running.json").write_text(json.dumps(lock))
    started: list[Path] = []
    start = PretrainProcess.start

    def counted(recipe: Recipe, folder: Path) -> PretrainProcess:
        started.append(folder)
        return start(recipe, folder)

    monkeypatch.setattr(compare.PretrainProcess, "start", counted)
    code, out, err = command("--resume", race.out)
    child.process.poll()  # it was ours in truth
    assert code == 0, out + err
    assert started == [race.folder(second)]  # the first was left to the process that had it already
    assert "[1/2] dense seed 42 validation perplexity" in " ".join(out.split())
    for run in (first, second):
        assert [one["step"] for one in history(race.folder(run)) if "lr" in one] == list(range(1, 151))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, None])
def test_whatever_ends_a_race_ends_its_run(tmp_path: Path, error: type[BaseException] | None) -> None:
    """A full disk, a pipe that is gone, a signal, and one that came while the run was being started."""
    found = []

    def start() -> PretrainProcess:
        process = psutil.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()  # it would not hear a signal before
        found.append(PretrainProcess(process, tmp_path))
        if error is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return found[0]

    with pytest.raises(error or KeyboardInterrupt), stop_on_signal(), begun(start):
        assert error is not None, "the signal came before"
        raise error
    assert found[0].process.wait(1) == -signal.SIGINT
    found[0].process.stdout.close()


def test_the_time_left_goes_by_steps_and_by_what_runs_take_beside_them(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two equal runs of 6 steps, 2 s each, after 10 s; a second later it is saved, which takes 5 s. Planning took an hour."""
    now = [0.0]
    monkeypatch.setattr("lorank.report.race.time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = RaceProgress(Console(file=io.StringIO()))
    now[0] = 3600.0
    [first, second] = [
        Run(SimpleNamespace(name=name), SimpleNamespace(recipe=base, flops=6.0, settings={}), 1)  # type: ignore[arg-type]
        for name in "ab"
    ]
    left = []
    for number, run in enumerate((first, second), start=1):
        progress.start(run, number, 2, 12.0 - 6.0 * (number - 1))
        progress.update({})
        now[0] += 10
        for step in range(1, 7):
            progress.update({"step": step})
            left.append(progress._seconds_left())
            now[0] += 2
        now[0] += 4
        progress.end("done")
    assert left[0] is None, "one step says nothing of how fast they are"
    assert left[1:6] == pytest.approx([4 * 2 + 10 + 12, 3 * 2 + 10 + 12, 2 * 2 + 10 + 12, 2 + 10 + 12, 10 + 12])
    assert left[7:] == pytest.approx([4 * 2, 3 * 2, 2 * 2, 2, 0])


def test_a_signal_waits_for_the_end_of_a_count() -> None:
    """An exception in the midst of torch's C++, where models are counted, may abort the process."""
    after, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        with signals_later():
            os.kill(os.getpid(), signal.SIGTERM)
            after.append("the rest of the count")
        after.append("what follows")
    assert after == ["the rest of the count"] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_plan_that_is_ended_leaves_nothing_in_the_way(base: Recipe, tmp_path: Path, quick, end: int) -> None:
    """While it measures how fast a contestant is: no folder that is refused, no process that goes on."""
    long = dataclasses.replace(base, batch_size=64, sequence_length=64)
    arguments = ["--method", "dense", *flags(long), "--match", "time", "--out", str(tmp_path / "race")]
    planner = psutil.Popen(
        [sys.executable, "-m", "lorank", "compare", *arguments], stdout=subprocess.DEVNULL, stderr=-1
    )
    lock, held = tmp_path / "race/running.json", {}
    while not held.get("child"):
        assert planner.poll() is None, planner.stderr.read()
        held = json.loads(lock.read_text()) if lock.exists() else {}
    probe = psutil.Process(held["child"])
    with pytest.raises(ValueError, match="is being run by process"):
        compare._check_free(tmp_path / "race")
    planner.send_signal(end)
    assert planner.wait() == (130 if end == signal.SIGTERM else -end)
    planner.stderr.close()
    if end == signal.SIGTERM:
        assert not lock.parent.exists()
    else:
        Race.plan(Comparison(base=long, methods=["dense"]), lock.parent, Silent())
        assert sorted(path.name for path in lock.parent.iterdir()) == ["comparison.json"]
    assert not probe.is_running() or probe.status() == psutil.STATUS_ZOMBIE


def test_a_folder_with_models_of_somebody_else_is_not_taken(base: Recipe, tmp_path: Path) -> None:
    (tmp_path / "race/models").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not an empty folder"):
        Race.plan(Comparison(base=base, methods=["dense"]), tmp_path / "race", Silent())
    assert (tmp_path / "race/models").exists()


def test_seconds_of_evaluations_between_log_lines_and_of_slow_steps() -> None:
    """400 steps of one token in 0.1 s, logged every 100, and 60 s for a basis in one of the first and third hundred."""
    rates = {100: 100 / 70, 200: 10.0, 300: 100 / 70}
    records = [{"tokens": n, **({"tokens_per_second": rates[n]} if n in rates else {})} for n in range(50, 401, 50)]
    clock = _clock(records, 400, 10.0)
    assert [clock(n) for n in range(0, 401, 50)] == pytest.approx([0, 35, 70, 75, 80, 115, 150, 155, 160])
    assert _clock(records[:1], 400, None)(400) == 0 and _clock([], 400, 10.0)(200) == pytest.approx(20)


def test_what_was_not_timed_is_not_shown(base: Recipe, quick: type[InThisProcess], tmp_path: Path) -> None:
    """The first step is not, and here is no other."""
    one = dataclasses.replace(base, steps=1, warmup_steps=0, eval_every=0, save_every=0)
    race = Race.plan(Comparison(base=one, methods=["dense"]), tmp_path / "race", Silent())
    race.run(Silent(), after_each=lambda race: None)
    results = write_results(race, whole=False)
    assert all(row["loss"] and row["tokens_per_second"] is row["seconds"] is None for row in results["contestants"])
    speeds = next(column for column in comparison_table(results).columns if "tokens" in str(column.header))
    assert list(speeds.cells) == ["-", "-"]
    page = (race.out / "report.html").read_text()
    assert "tokens/s" not in page and "time of training" not in page


def test_the_baseline_is_the_first_dense_row_that_came_through() -> None:
    rows = [{"name": name, "kind": kind, "loss": {}} for name, kind in
            (("cola", "method"), ("dense-muon", "dense"), ("dense", "dense"), ("dense-small", "control"))]  # fmt: skip
    assert min(rows, key=_baseline_rank)["name"] == "dense"
    for failed, then in ((2, "dense-muon"), (1, "dense-small"), (3, "cola")):
        rows[failed]["loss"] = None  # type: ignore[assignment]
        assert min(rows, key=_baseline_rank)["name"] == then


def test_why_a_process_ended(tmp_path: Path) -> None:
    def ended(program: str) -> str:
        process = PretrainProcess(psutil.Popen([sys.executable, "-c", program]), tmp_path)
        process.wait(lambda records: None)
        return process.last_words()

    assert "signal 9, perhaps because memory ran out" in ended("import os; os.kill(os.getpid(), 9)")
    assert ended("") == "it ended without a word"
    (tmp_path / "log.txt").write_text("step 3\nlorank: the disk is full\n\n")
    assert ended("raise SystemExit(2)") == "the disk is full"


def test_a_stopped_comparison_says_how_to_go_on(command, base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Race, "run", interrupted)
    code, out, _ = command("--method", "dense", *flags(base), "--out", "there")
    assert code == 130 and "lorank compare --resume" in out and Path("there/report.html").exists()
