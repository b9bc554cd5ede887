"""Who takes part, with which learning rates, and what dense-small is like."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorank.cli.flags import recipe_of
from lorank.comparison.controls import CONTROL
from lorank.comparison.matching import CLOSE, Costs
from lorank.comparison.results import gather
from lorank.comparison.rows import Candidate, beyond, candidates_of, find_rows, plan_rows
from lorank.comparison.runner import Comparison
from lorank.comparison.settings import ComparisonSettings, slug
from lorank.train.data import load_tokenizer
from lorank.train.methods import methods_of, title_of
from lorank.train.model import build_config
from lorank.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("forked_processes")


def test_the_control_costs_what_the_cheapest_method_costs(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    (*_, control, with_muon), missing = plan_rows(
        ComparisonSettings(base=base, methods=["low-rank", "cola", "cola+muon"]), costs, tmp_path
    )
    cola = costs.of("flops_per_token", dataclasses.replace(base, method="cola"))
    assert (control.name, control.kind) == (
        "dense-small",
        "control",
    ) and control.chosen.endswith(f"for the {control.like}")
    assert control.like == "training FLOPs per token of low-rank" and missing == {}
    assert costs.of("flops_per_token", control.candidates[0].recipe) == pytest.approx(cola, rel=0.02)
    assert control.candidates[0].recipe.steps == base.steps  # equal tokens
    muon = costs.of("flops_per_token", dataclasses.replace(base, method="cola", optimizer="muon"))
    assert with_muon.name == "dense-small-muon" and with_muon.like == "training FLOPs per token of cola+muon"
    assert costs.of("flops_per_token", with_muon.candidates[0].recipe) == pytest.approx(muon, rel=0.02)
    assert with_muon.candidates[0].recipe.optimizer == "muon"
    found, missing = plan_rows(ComparisonSettings(base=base, methods=["dense"]), costs, tmp_path)
    assert [one.name for one in found] == ["dense", "dense-muon"]
    assert missing["dense-small"].startswith("no method takes part")


def test_named_rows_may_be_compared_alone(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    asked = ComparisonSettings(base=base, methods=["cola", "d=dense"], only=True)
    found, missing = plan_rows(asked, costs, tmp_path)
    assert [one.name for one in found] == ["cola", "d"] and missing == {}


def test_a_sweep_goes_beyond_the_edge_where_its_best_is(base: Recipe) -> None:
    def candidates(**values: list[Any]) -> list[Candidate]:
        chosen = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
        return [Candidate(one, base.but(one), 1.0, None) for one in chosen]

    found = candidates(lr=[1e-3, 3e-3, 6e-3])
    further = beyond(found, [3.0, 2.0, 1.0])
    assert further is not None and further.settings == {"lr": 1.2e-2} and further.recipe.lr == 1.2e-2
    assert (below := beyond(found, [1.0, 2.0, None])) and below.settings["lr"] == pytest.approx(1e-3 / 3, rel=1e-3)
    assert beyond(found, [3.0, 1.0, 2.0]) is None and beyond(found, [None] * 3) is None
    assert beyond(found, [2.0, 1.0, None]) is None  # beyond lies what failed
    assert beyond(found[:1], [1.0]) is None
    two = beyond(candidates(lr=[1e-3, 2e-3], weight_decay=[0.1, 0.2, 0.4]), [9, 9, 9, 9, 1, 9])
    assert two is not None and two.settings == {"lr": 4e-3, "weight_decay": 0.2}
    assert beyond(candidates(rank=[4, 8]), [2.0, 1.0]) is None  # another cost


def test_the_control_of_a_gpt2_is_a_gpt2(of_type: Callable[..., Recipe], costs: Costs, tmp_path: Path) -> None:
    recipe = of_type("gpt2", tmp_path / "m", n_embd=64, n_layer=1, n_head=2)
    (*_, control, _), _ = plan_rows(ComparisonSettings(base=recipe, methods=["cola"]), costs, tmp_path)
    assert control.name == "dense-small" and control.like == "training FLOPs per token of cola"
    assert build_config(control.candidates[0].recipe, costs.tokenizer).model_type == "gpt2"


def test_a_comparison_without_a_control_says_why(of_type: Callable[..., Recipe], costs: Costs, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        of_type("bloom", tmp_path / "m", hidden_size=64, n_layer=2, n_head=4), attention="eager"
    )
    asked = ComparisonSettings(base=recipe, methods=["cola"])
    found, missing = plan_rows(asked, costs, tmp_path / "models")
    assert [one.name for one in found] == ["cola", "dense", "dense-muon"]
    why = missing["dense-small"]
    assert why.startswith("a model of type 'bloom' cannot be made narrower") and not (tmp_path / "models").exists()
    results = gather(Comparison(tmp_path, asked, found, {"corpus": "", "no_control": missing}))
    assert f"There is no dense-small: {why}." in results["notes"]


@pytest.mark.parametrize(
    ("methods", "match", "figure"),
    [(["switchlora"], "flops", "memory_bytes"), (["masa"], "flops", "parameters"), (["galore", "cola"], "params", "memory_bytes")],
)  # fmt: skip
def test_without_saved_compute_the_control_has_what_is_saved(
    base: Recipe, costs: Costs, tmp_path: Path, methods: list[str], match: Any, figure: Any
) -> None:
    shape = {"hidden_size": 48} if match == "params" else {}  # which the file of the narrower model replaces
    recipe = dataclasses.replace(base, rank=None if methods == ["masa"] else 8, shape=shape)
    found, missing = plan_rows(ComparisonSettings(base=recipe, methods=methods, match=match), costs, tmp_path)
    control = next(one for one in found if one.name == "dense-small")
    assert missing == {}, missing
    least = min(costs.of(figure, one.candidates[0].recipe) for one in found if one.kind == "method")
    assert costs.of(figure, control.candidates[0].recipe) == pytest.approx(least, rel=CLOSE)
    assert control.like.startswith({"parameters": "parameters of", "memory_bytes": "memory (estimated) of"}[figure])


def test_dense_rows_are_always_there_and_always_tuned(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    def rates(**asked: Any) -> dict[str, tuple[list[Any], str]]:
        settings, found = ComparisonSettings(**asked), {}
        for name, (recipe, _) in find_rows(settings).items():
            recipes, rate = candidates_of(settings, name, recipe)
            found[name] = [one.lr for _, one in recipes], rate
        return found

    around, swept = [0.003333, 0.01, 0.03], "the best of its sweep"
    found = rates(base=base, methods=["cola"], tuned="dense")  # --lr 1e-2
    assert found == {"cola": ([0.01], "as given, not tuned"), "dense": (around, swept), "dense-muon": (around, swept)}
    (*_, small, _), _ = plan_rows(ComparisonSettings(base=base, methods=["cola"], tuned="dense"), costs, tmp_path)
    assert small.name == "dense-small" and [one.recipe.lr for one in small.candidates] == around
    found = rates(base=base, methods=["d=dense"], tuned="dense", own={"dense": {"lr": [5e-3]}})
    assert found == {"d": (around, swept), "dense": ([5e-3], "as given, not tuned"), "dense-muon": (around, swept)}
    sized = dataclasses.replace(base, model=None, size="60m", rank=None)
    found = rates(base=sized, methods=["galore", "cola-m", "crnet"], tuned="all")  # neither --lr nor --sweep
    assert found["galore"] == ([1e-2], "from its 60m recipe, not tuned here") and found["cola-m"][0] == [6e-3]
    assert found["crnet"] == found["dense"] == ([1e-3, 3e-3, 9e-3], swept)  # no source is known for CR-Net's
    assert rates(base=base, methods=["cola"], tuned="all")["cola"][1] == swept  # no recipe is for this shape


def test_no_two_settings_share_a_folder() -> None:
    settings = [{"lr": 1e30}, {"lr": 1e-30}, {"lr": 1.0}, {"lr": 10.0}, {"betas": "a b"}, {"betas": "a-b"}, {}]
    settings += [{"lr": 0.003000001}, {"lr": 0.003000002}]
    assert len({slug(one) for one in settings}) == len(settings) and "/" not in slug({"x": "../y"})


def test_matched_steps_are_whole_cycles(base: Recipe, costs: Costs, quick, watcher, tmp_path: Path) -> None:
    long = dataclasses.replace(base, steps=20, eval_every=0, save_every=0)
    asked = ComparisonSettings(
        base=long, methods=["cola", "relora"], own={"relora": {"option.cycle": [5]}}, match="flops", only=True
    )
    comparison = Comparison.plan(asked, tmp_path / "out", watcher)
    cola, relora = (one.candidates[0] for one in comparison.rows)
    assert relora.recipe.steps in (10, 15, 20) and relora.recipe.options["cycle"] == 5
    assert relora.flops == pytest.approx(cola.flops, rel=2.5 / relora.recipe.steps)
    comparison.run(watcher, after_each=lambda comparison: None)
    assert comparison.failures() == {} and len(watcher.outcomes) == 2
    asked = dataclasses.replace(asked, own={"relora": {"option.cycle": [18]}})
    with pytest.raises(
        ValueError,
        match=r"relora, with the 1\d steps that --match flops gives it: .* must be a multiple of cycle=18",
    ):
        plan_rows(asked, costs, tmp_path / "models")


def test_several_methods_may_be_one_row(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    """Beside the optimizer that all of them have, dense rows are plain."""
    small = dataclasses.replace(base, rank=4)
    found, _ = plan_rows(ComparisonSettings(base=small, methods=["cola+galore", "p=galore"]), costs, tmp_path)
    assert [(one.name, one.method, one.kind) for one in found[:2]] == [
        ("cola+galore", "cola+galore", "method"),
        ("p", "galore", "method"),
    ]
    projected = dataclasses.replace(base, optimizer="galore")
    rows = find_rows(ComparisonSettings(base=projected, methods=["cola"]))
    assert {name: (title_of(recipe), recipe.optimizer, kind) for name, (recipe, kind) in rows.items()} == {
        "cola": ("cola+galore", "galore", "method"),
        "dense": ("dense", "adamw", "dense"),
        "dense-muon": ("dense", "muon", "dense"),
    }
    plain = dataclasses.replace(base, rank=None)
    [(recipe, kind), *_] = find_rows(ComparisonSettings(base=plain, methods=["adafactor"])).values()
    assert (title_of(recipe), recipe.optimizer, kind) == ("dense", "adafactor", "dense")
    [(recipe, _)] = find_rows(
        ComparisonSettings(base=dataclasses.replace(base, optimizer="muon"), methods=["dense"], only=True)
    ).values()
    assert recipe.optimizer == "muon"


def test_dense_rows_have_the_settings_of_their_optimizer(base: Recipe) -> None:
    """As the low-rank rows with that optimizer have them."""
    given = dataclasses.replace(base, rank=None, options={"scaling": "dion"})
    own, rows = {"muon": {"momentum": [0.5]}}, ["muon", "cola+muon", "dense"]
    asked = ComparisonSettings(base=given, methods=rows, sweep={"optimizer.adamw_lr": [1e-3, 2e-3]}, own=own)
    found = {}
    for name, (recipe, _) in find_rows(dataclasses.replace(asked, sweep={})).items():
        swept = candidates_of(asked, name, recipe)[0] if name != "dense" else [({}, recipe)]
        movers = [methods_of(one).optimizer for _, one in swept]
        found[name] = [[getattr(mover, f, None) for f in ("scaling", "momentum", "adamw_lr")] for mover in movers]
    assert found == {
        "muon": [["dion", 0.5, 1e-3], ["dion", 0.5, 2e-3]],
        "cola+muon": [["dion", 0.95, 1e-3], ["dion", 0.95, 2e-3]],
        "dense": [[None, None, None]],
        "dense-muon": [["dion", 0.95, 1e-3], ["dion", 0.95, 2e-3]],
    }
    misspelt = dataclasses.replace(given, options={"scalling": "dion"})
    with pytest.raises(ValueError, match="'scalling'; did you mean 'scaling'"):
        find_rows(ComparisonSettings(base=misspelt, methods=["muon"]))


def test_a_control_has_the_settings_of_the_dense_row_it_narrows(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    given = dataclasses.replace(base, options={"scaling": "dion"})
    asked = ComparisonSettings(base=given, methods=["cola", "cola+muon"], own={"dense-muon": {"momentum": [0.5]}})
    rows = {row.name: row.candidates[0].recipe for row in plan_rows(asked, costs, tmp_path)[0]}
    for name in ("dense-muon", "dense-small-muon"):
        mover = methods_of(rows[name]).optimizer
        assert (mover.to_dict()["scaling"], mover.to_dict()["momentum"]) == ("dion", 0.5)


@pytest.mark.parametrize(("method", "tried"), [("cola", 1), ("cola+muon", 3), ("cola+adafactor", 3), ("galore", 1)])
def test_the_rate_of_a_paper_is_for_its_optimizer(method: str, tried: int) -> None:
    asked = ComparisonSettings(base=Recipe(size="60m"), methods=[method], only=True, tuned="all")
    [(name, (recipe, _))] = find_rows(asked).items()
    assert len(candidates_of(asked, name, recipe)[0]) == tried


def test_a_setting_goes_to_the_rows_that_have_it(base: Recipe) -> None:
    """As in `lorank plan`; a row's own is for that row alone."""
    given = dataclasses.replace(base, options={"nonlinearity": "both"})
    rows = {"methods": ["cola", "cola+galore", "low-rank+eggroll"], "only": True}
    asked = ComparisonSettings(
        base=given, sweep={"update_gap": [3, 4]}, own={"low-rank+eggroll": {"population": [4]}}, **rows
    )
    found = {name: candidates_of(asked, name, recipe)[0] for name, (recipe, _) in find_rows(asked).items()}
    options = {name: [recipe.options for _, recipe in each if recipe.lr == 1e-2] for name, each in found.items()}
    assert options == {
        "cola": [{"nonlinearity": "both"}],
        "cola+galore": [{"nonlinearity": "both", "update_gap": 3}, {"nonlinearity": "both", "update_gap": 4}],
        "low-rank+eggroll": [{"population": 4}],
    }
    for wrong in ({"base": given, "sweep": {"fall": [1, 2]}}, {"base": dataclasses.replace(base, options={"fall": 1})}):
        with pytest.raises(ValueError, match=r"no method here \(cola, cola\+galore, low-rank\+eggroll\) has .* 'fall'"):
            find_rows(ComparisonSettings(**wrong, **rows))


@pytest.mark.parametrize(
    "text", ["optimizer.update_gap=7", "optimizer.galore.update_gap=7", "method.galore.update_gap=7", "update_gap=7"]
)
def test_a_method_may_be_named_for_the_rows_that_have_it(base: Recipe, text: str) -> None:
    """By the flag that names it for one run; dense rows and CoLA alone have no such setting."""
    given = recipe_of(None, {"assignments": (text,)}, shared=True)
    found = find_rows(ComparisonSettings(base=given, methods=["cola", "galore", "cola+galore"]))
    gaps = {name: getattr(methods_of(recipe).optimizer, "update_gap", None) for name, (recipe, _) in found.items()}
    assert gaps == {"cola": None, "galore": 7, "cola+galore": 7, "dense": None, "dense-muon": None}
    name, _, _ = text.partition("=")
    asked = ComparisonSettings(base=base, methods=["cola", "galore"], sweep={name: [3, 4]}, tuned="dense")
    tried = {name: len(candidates_of(asked, name, recipe)[0]) for name, (recipe, _) in find_rows(asked).items()}
    assert tried == {"cola": 1, "galore": 2, "dense": 3, "dense-muon": 3}


def test_each_answer_has_its_own_rank(base: Recipe) -> None:
    given = recipe_of(None, {"assignments": ("method.rank=8", "optimizer.rank=4")}, shared=True)
    [(_, (recipe, _))] = find_rows(ComparisonSettings(base=given, methods=["cola+galore"], only=True)).items()
    assert (methods_of(recipe).method.rank, methods_of(recipe).optimizer.rank) == (8, 4)
    again = recipe.but({"optimizer.galore.rank": 5})
    assert (methods_of(again).method.rank, methods_of(again).optimizer.rank) == (8, 5), "in place of the option"
    with pytest.raises(ValueError, match=r"no method here \(galore\) has the setting 'cola.rank'"):
        wrong = recipe_of(None, {"assignments": ("method.cola.rank=4",)}, shared=True)
        find_rows(ComparisonSettings(base=wrong, methods=["galore"], only=True))


def test_an_estimated_gradient_is_compared_with_autograd(base: Recipe, costs: Costs, tmp_path: Path) -> None:
    """EGGROLL's passes are those of its population; dense rows learn by autograd, and none is as narrow as EGGROLL is cheap."""
    asked = ComparisonSettings(base=dataclasses.replace(base, rank=None), methods=["eggroll"])
    found, missing = plan_rows(asked, costs, tmp_path)
    assert [(one.name, one.candidates[0].recipe.gradient) for one in found[1:]] == [
        ("dense", "autograd"),
        ("dense-muon", "autograd"),
    ]
    assert missing[CONTROL].startswith("no method takes part") and CONTROL not in [one.name for one in found]
    assert found[0].candidates[0].flops != pytest.approx(found[1].candidates[0].flops, rel=0.1)


def test_integers_are_compared_without_dense_rows(base: Recipe, tmp_path: Path) -> None:
    small = {
        "gradient": {"eggroll": {"population": 8, "group_size": 2, "chunk": 8}},
        "batch_size": 4,
        "data": base.data,
    }
    egg = Recipe.read("egg").but(small)
    counts = Costs(load_tokenizer("bytes"))
    found, missing = plan_rows(ComparisonSettings(base=egg, methods=["e=eggroll"], tuned="all"), counts, tmp_path)
    assert [(one.name, one.method, one.rate) for one in found] == [("e", "eggroll", "the default of its rule")]
    assert missing == {"dense-small": "EGG has no dense twin in floating point"}
