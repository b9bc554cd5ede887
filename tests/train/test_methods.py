"""From a recipe's three keys to methods: names, shorthands, settings, and what cannot be combined."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorank
from lorank.optim.groups import plain_groups
from lorank.table import method_names
from lorank.train.methods import (
    build_optimizer,
    kept_gradients,
    methods_of,
    optimizer_groups,
    rank_of,
    resolved,
    schedule_of,
    state_bytes,
    step_flops,
    title_of,
    with_changed_defaults,
    written_out,
)
from lorank.train.model import build_config, build_model
from lorank.train.recipe import Recipe

ALL = [name for key in ("method", "optimizer", "gradient") for name in method_names(key)]


def names_of(recipe: Recipe) -> tuple[str, str, str]:
    return tuple(method.name for method in methods_of(recipe))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ALL)
def test_every_name_works_under_method(name: str) -> None:
    """As ``--method NAME`` of the command line, whatever the question that it answers."""
    key = lorank.table.find(name).key  # type: ignore[attr-defined]
    found = methods_of(Recipe(method=name))
    assert getattr(found, key).name == name
    others = {"method": "dense", "optimizer": "adamw", "gradient": "autograd"}
    assert all(getattr(found, other).name == default for other, default in others.items() if other != key)


def test_names_go_where_they_belong() -> None:
    combined = ("cola", "galore", "autograd")
    assert names_of(Recipe(method="cola+galore")) == names_of(Recipe(optimizer="galore")) == combined
    assert names_of(Recipe(method={"cola": {}, "galore": {"rank": 4}})) == combined
    assert names_of(Recipe(method="eggroll", optimizer="muon")) == ("dense", "muon", "eggroll")
    assert names_of(Recipe(method="low-rank+eggroll")) == ("low-rank", "adamw", "eggroll")
    for recipe, title in (
        (Recipe(), "cola"),
        (Recipe(optimizer="muon"), "cola"),
        (Recipe(method="dense", optimizer="adafactor"), "dense"),
        (Recipe(method="galore"), "galore"),
        (Recipe(method="galore+cola"), "cola+galore"),
        (Recipe(method="cola+spectron"), "cola+spectron"),
    ):
        assert methods_of(recipe).title == title_of(recipe) == title


def test_a_plain_rule_works_inside_the_subspace() -> None:
    """``method: galore, optimizer: muon`` as lorank 0.1 wrote it."""
    found = methods_of(Recipe(method="galore", optimizer="muon"))
    assert found.optimizer == lorank.GaLore(rule="muon")
    ruled = methods_of(Recipe(method="cola+factor-lr", optimizer="muon"))
    assert ruled.optimizer == lorank.FactorLR(rule="muon") and ruled.rule == "muon"
    with pytest.raises(ValueError, match="muon and trion cannot be combined: both decide how the weights move"):
        methods_of(Recipe(method="trion", optimizer="muon"))


def test_settings_go_to_the_first_method_that_has_them() -> None:
    given = Recipe(method="cola+galore", rank=8, options={"update_gap": 5, "activation": "relu"})
    found = methods_of(given)
    assert (found.method.rank, found.method.activation) == (8, "relu")  # type: ignore[attr-defined]
    assert found.optimizer == lorank.GaLore(update_gap=5)
    own = methods_of(Recipe(method="cola", optimizer={"galore": {"rank": 4}}, rank=8))
    assert (own.method.rank, own.optimizer.rank) == (8, 4)  # type: ignore[attr-defined]


def test_the_recipe_comes_before_the_paper_and_the_field() -> None:
    assert rank_of(Recipe(size="60m")) == 128
    assert rank_of(Recipe(size="60m", rank=0.5)) == rank_of(Recipe(size="60m", method={"cola": {"rank": 0.5}})) == 0.5
    assert rank_of(Recipe(size="60m", options={"rank": 7})) == 7
    assert rank_of(Recipe(model="gpt2")) == 0.25
    assert rank_of(Recipe(method="dense")) is None


@pytest.mark.parametrize("name", ALL)
def test_written_out_it_means_the_same_at_any_size(name: str) -> None:
    """As when `lorank compare` narrows a model: what was the size's own must not change with the width."""
    recipe = Recipe(method=name, size="1b")
    assert methods_of(dataclasses.replace(written_out(recipe), model="gpt2")) == methods_of(recipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "colo"}, r"^unknown method 'colo'; did you mean 'cola'\? The methods are: dense, cola, .*eggroll"),
        ({"method": "dense", "rank": 3}, "dense has no setting 'rank'; its settings are: stochastic_rounding"),
        ({"options": {"sigma": 1}}, "cola has no setting 'sigma'; its settings are: rank, nonlinearity, activation"),
        ({"method": {"cola": {"sigma": 1}}}, "cola has no setting 'sigma'; its settings are: rank"),
        ({"optimizer": {"adamw": {"momentum": 1}}}, "stochastic_rounding; momentum is a setting of muon, trion"),
        ({"method": {"cola": 3}}, r"method.cola must be settings \{NAME: VALUE\}, got 3"),
        ({"options": {"activation": "x"}}, "cola: activation must be 'silu', 'gelu' or 'relu', got 'x'"),
        ({"method": "galore", "options": {"update_gap": 0}}, "galore: update_gap must be a positive integer, got 0"),
        ({"method": "cola+relora"}, "cola and relora cannot be combined: both decide what the weights are"),
        (
            {"method": "fira", "optimizer": "adafactor"},
            "adafactor and fira cannot be combined: both decide how the weights",
        ),
        ({"optimizer": "dense"}, "optimizer must be one of adamw, .*, got 'dense'; use method=dense"),
        ({"optimizer": {"cola": {"rank": 4}}}, "optimizer must be one of adamw, .*, got 'cola'; use method=cola"),
        ({"optimizer": "galore+eggroll"}, "optimizer must be one of .*, got 'eggroll'; use gradient=eggroll"),
        ({"gradient": "galore"}, "gradient must be one of autograd, .*, got 'galore'; use optimizer=galore"),
        ({"method": {}}, "method must name a method, got an empty mapping"),
        (
            {"method": "cola+muon+galore"},
            "muon and galore cannot be joined by .*; for muon inside the subspace of galore use",
        ),
        (
            {"method": "cola,galore"},
            "methods must be joined by '\\+', got 'cola,galore'; use 'cola\\+galore' for one model",
        ),
        ({"method": "cola,lora"}, "methods must be joined by '\\+', got 'cola,lora'; train a model with each"),
        ({"method": "muon+trion"}, "muon and trion cannot be combined: both decide how the weights move"),
        ({"method": "adafactor", "rank": 2}, "^adafactor has no setting 'rank'; its settings are: stochastic_rounding"),
        ({"rank": 4, "options": {"rank": 5}}, "rank is given twice, as rank=4 and among the options; give it once"),
        ({"method": "galore+fira"}, "galore and fira cannot be combined: both decide how the weights move"),
        (
            {"method": "switchlora", "options": {"stochastic_rounding": True}},
            "switchlora brings its own optimizer; leave out the settings of adamw",
        ),
        ({"method": "switchlora+galore"}, "switchlora and galore cannot be combined: both decide how the weights move"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        methods_of(Recipe(**settings))
    assert "\n" not in str(refusal.value)


def test_what_a_run_saves_has_no_shorthands() -> None:
    given = Recipe(method="cola+galore", rank=8, optimizer={"adamw": {"update_gap": 2}})
    assert (found := resolved(given)).method == {"cola": {"rank": 8}} and found.optimizer == {
        "galore": {"update_gap": 2}
    }
    assert (found.rank, found.options) == (None, {})
    assert methods_of(found) == methods_of(given) and resolved(found) == found
    assert resolved(Recipe()) == Recipe()


# ---- groups, optimizers and their costs


def test_a_run_names_settings_whose_defaults_have_changed() -> None:
    """A run that does not name them began with what they were once."""
    of = lambda recipe: methods_of(recipe).optimizer  # noqa: E731
    experts = {"expert_matrices": False}
    for name, once in (
        ("fira", {**experts, "residual": "paper"}),
        ("trion", {**experts, "adamw_lr": 3e-4}),
        ("muon", experts),
    ):
        recipe = Recipe(method=name)
        now = with_changed_defaults(recipe)
        assert of(now) == of(recipe) and now.optimizer[name].keys() == once.keys()  # type: ignore[union-attr, index]
        assert with_changed_defaults(now, began=True) == now
        assert of(with_changed_defaults(recipe, began=True)) == dataclasses.replace(of(recipe), **once)
    assert with_changed_defaults(Recipe(method="cola"), began=True) == Recipe(method="cola")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, "num_attention_heads": 2, **changes}))


def decayed(model: torch.nn.Module, groups: list[dict[str, Any]], weight_decay: float) -> set[str]:
    wanted = {p for group in groups if group["weight_decay"] == weight_decay for p in group["params"]}
    return {name for name, p in model.named_parameters() if p in wanted}


def test_matrices_decay_and_norms_biases_embeddings_do_not() -> None:
    model = lorank.convert(llama(attention_bias=True), "cola")
    groups = plain_groups(model, 0.1)
    exempt = {n for n, p in model.named_parameters() if p.ndim == 1} | {"model.embed_tokens.weight"}
    assert decayed(model, groups, 0.0) == exempt
    hidden = decayed(model, groups[:1], 0.1)
    assert {name.rpartition(".")[0][-1] for name in hidden} == {"A", "B"}
    assert decayed(model, groups, 0.1) == hidden | {"lm_head.weight"}


def test_all_means_all_as_in_the_papers() -> None:
    model = llama()
    assert decayed(model, plain_groups(model, 0.1, "all"), 0.1) == {name for name, _ in model.named_parameters()}


def test_each_parameter_is_in_one_group_also_when_tied() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    groups = plain_groups(model, 0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    assert "transformer.wte.weight" in decayed(model, groups, 0.0)


def test_targets_choose_what_is_converted_or_else_projected() -> None:
    recipe = Recipe(method="galore", rank=4, targets=["q_proj"], exclude=["layers.0"])
    groups = optimizer_groups(recipe, model := llama())
    [projected] = [group for group in groups if group["rank"]]
    assert projected["params"] == [model.model.layers[1].self_attn.q_proj.weight]
    combined = recipe.but({"method": "low-rank+galore"})
    assert sum(len(group["params"]) for group in optimizer_groups(combined, llama()) if group["rank"]) == 14


def in_place(out: Any, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Of W.addmm_(a, b), which PyTorch's counter does not know."""
    (m, r), (_, n) = shapes
    return 2 * m * r * n


@pytest.mark.parametrize(
    ("method", "rule", "options"),
    [
        ("dense", "adamw", {}),
        ("dense", "muon", {}),
        ("dense", "adafactor", {}),
        ("galore", "adamw", {}),
        ("galore", "adamw", {"in_backward": True}),
        ("galore", "adamw", {"projection": "reverse_std"}),
        ("galore", "muon", {"projection": "full", "basis": "svd"}),
        ("galore", "adafactor", {"projection": "left", "basis": "randomised"}),
        ("fira", "adamw", {}),
        ("dct-adamw", "adamw", {}),
        ("dct-adamw", "adamw", {"error_feedback": "full", "transform": "fft"}),
        ("trion", "adamw", {}),
        ("trion", "adamw", {"transform": "fft"}),
    ],
)
def test_flops_of_a_step_are_those_of_the_counter(method: str, rule: str, options: dict[str, Any]) -> None:
    """To the number, over the steps from one refresh to the next, with two micro-batches each."""
    model, gap = llama(intermediate_size=24), 3
    settings = options | ({} if method in ("dense", "trion") else {"update_gap": gap})
    rank = {} if method == "dense" else {"rank": 5}
    recipe = Recipe(method=method, optimizer=rule, options=settings, lr=1e-3, weight_decay=0.0, **rank)
    optimizer = build_optimizer(recipe, model)
    weights = [(p, torch.randn_like(p)) for p in model.parameters()]

    def steps() -> None:
        for _ in range(gap):
            for _ in range(2):
                torch.stack([(p * gradient).sum() for p, gradient in weights]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps()  # DCT-AdamW has one choice of columns more in these
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        steps()
    found = step_flops(recipe, model, micro_batches=2)
    assert counter.get_total_flops() == pytest.approx(gap * found, rel=1e-12)
    assert (found > 0) == ((method, rule) != ("dense", "adamw"))


def test_state_and_waiting_gradients_of_a_combination() -> None:
    """GaLore on the factors of a plain factorisation: rank 2 on A [4, 16] and B [16, 4]."""
    recipe = Recipe(method={"low-rank": {"rank": 4}}, optimizer={"galore": {"rank": 2, "in_backward": True}})
    model = lorank.convert(llama(), methods_of(recipe).method, targets="q_proj")
    factors = [p for name, p in model.named_parameters() if name.endswith(("q_proj.A.weight", "q_proj.B.weight"))]
    kept = kept_gradients(recipe, model)
    assert [kept[p] for p in factors] == [(2, 16), (16, 2)] * 2
    own = {p: 2 * p.numel() for p in model.parameters()}
    projected = {p: 2 * 2 * max(p.shape) + 2 * min(p.shape) for p in kept}
    assert state_bytes(recipe, model) == 4 * sum({**own, **projected}.values())


@pytest.mark.parametrize(("rank", "said"), [(8, ["galore projects nothing: its rank 8"]), (7, [])])
def test_a_rank_that_projects_nothing_is_told(rank: int, said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """As in `--size 60m --method cola+galore`, where both papers have rank 128."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    recipe = Recipe(method={"cola": {"rank": 8}}, optimizer={"galore": {"rank": rank}}, shape=shape, vocab_size=64)
    build_optimizer(recipe, build_model(recipe, build_config(recipe)))
    assert [one.getMessage()[: len(said[0])] for one in caplog.records] == said


@pytest.mark.parametrize("name", ["adamw", "muon", "fira"])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_state_with_another_number_of_groups_is_refused(name: str, more: int) -> None:
    recipe = Recipe(method="dense", optimizer=name, shape={"hidden_size": 32, "num_hidden_layers": 1}, vocab_size=64)
    optimizer = build_optimizer(recipe, build_model(recipe, build_config(recipe)))
    state = optimizer.state_dict()
    groups = state["param_groups"]
    state["param_groups"] = [*groups, {**groups[0], "params": []}] if more > 0 else groups[:-1]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)


def test_a_method_may_bring_its_schedule() -> None:
    plain = schedule_of(Recipe(steps=100, warmup_steps=10))
    assert [plain(step) for step in (0, 5, 10, 55, 100)] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])
    jagged = schedule_of(Recipe(method="relora", steps=100, warmup_steps=10, options={"cycle": 50}))
    assert jagged(50) == 0 < plain(50)
    with pytest.raises(ValueError, match="cycle"):
        schedule_of(Recipe(method="relora", steps=100, options={"cycle": 30}))
