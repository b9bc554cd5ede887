"""The rank in its three spellings, what a site knows about itself, and what a method writes into a file."""

import dataclasses
import json
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from lorank import CoLA, CoLAM, LowRank, Method, ReLoRA, Site, SwitchLoRA, convert
from lorank.architectures import llama_config
from lorank.fields import RANK_TABLES, Rank, check_value
from lorank.method import Dense, by_role, check_combination, check_ranks, rank_at
from lorank.optim.plain import AdamW
from lorank.table import find, method_names


def site(name: str, d_in: int, d_out: int) -> Site:
    return Site(f"layers.0.{name}", f"layers.*.{name}", 0, nn.Linear(d_in, d_out, device="meta"))


def test_a_site_reads_its_sizes_off_the_dense_layer() -> None:
    up = site("up", 512, 1376)
    assert (up.d_in, up.d_out) == (512, 1376)
    assert up.break_even_rank == 512 * 1376 / (512 + 1376)


@pytest.mark.parametrize("rank", [1, 128, 0.25, 0.999, 1.0, {".*": 4}, {"q_proj$": 4, ".*": 0.5}])
def test_ranks_that_make_sense_are_accepted(rank: Rank) -> None:
    check_value("rank", rank, Rank)
    assert CoLA(rank=rank).rank == LowRank(rank=rank).rank == rank


@pytest.mark.parametrize("method", [CoLA, LowRank])
@pytest.mark.parametrize(
    "rank",
    [
        0,
        -3,
        True,
        False,
        1.5,
        0.0,
        -0.25,
        float("nan"),
        float("inf"),
        "x",
        "128",
        None,
        [4],
        {},
        {".*": 0},
        {".*": "x"},
    ],
)
def test_any_other_rank_is_refused_in_one_sentence(rank: object, method: type[CoLA]) -> None:
    with pytest.raises(ValueError, match="rank") as refusal:
        method(rank=rank)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_a_pattern_of_a_rank_table_must_be_a_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"rank must hold regular expressions as strings, got '\('"):
        CoLA(rank={"(": 4})


def test_an_integer_rank_is_taken_as_it_is() -> None:
    assert rank_at(7, site("any", 32, 16)) == 7


@pytest.mark.parametrize(
    ("fraction", "d_in", "d_out", "rank"),
    [
        (0.25, 512, 512, 128),  # the paper's d / 4 in attention,
        (0.25, 512, 1376, 128),  # ... in gate and up,
        (0.25, 1376, 512, 128),  # ... and in down
        (1 / 3, 768, 768, 256),  # 130M
        (0.25, 512, 128, 32),  # key and value of grouped-query attention
        (0.25, 4096, 5, 1),
        (0.01, 32, 32, 1),  # never none at all
    ],
)
def test_a_fraction_is_of_the_narrower_side(fraction: float, d_in: int, d_out: int, rank: int) -> None:
    assert rank_at(fraction, site("any", d_in, d_out)) == rank


def test_a_table_gives_its_first_pattern_that_matches() -> None:
    table = {"q_proj": 4, "_proj": 0.5, ".*": 7}
    assert rank_at(table, site("q_proj", 32, 32)) == 4
    assert rank_at(table, site("k_proj", 32, 32)) == 16
    assert rank_at(table, site("fc1", 32, 32)) == 7
    assert rank_at({".*": 7, "q_proj": 4}, site("q_proj", 32, 32)) == 7


@pytest.mark.parametrize("size", ["60m", "130m", "1b"])
def test_tables_with_a_name_cost_what_a_quarter_does(size: str) -> None:
    def parameters(rank: Rank) -> int:
        with torch.device("meta"):
            config = llama_config(size)
            config.num_hidden_layers = 1  # all blocks are alike
            model = convert(LlamaForCausalLM(config), LowRank(rank=rank))
        return sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)

    for name in RANK_TABLES:
        assert parameters(name) == pytest.approx(parameters(0.25), rel=0.01)
    assert rank_at("attention-rich", site("model.layers.0.self_attn.q_proj", 64, 64)) == 24
    assert rank_at("attention-rich", site("model.layers.0.mlp.up_proj", 64, 172)) == 10
    assert rank_at("mlp-rich", site("transformer.h.0.attn.c_attn.query", 64, 64)) == 8


def test_a_table_without_a_pattern_names_the_module() -> None:
    with pytest.raises(ValueError, match=r"must have a pattern for layers\.0\.fc1, got \['q_proj'\]"):
        rank_at({"q_proj": 4}, site("fc1", 32, 32))


def test_the_warning_comes_exactly_at_the_break_even_rank() -> None:
    square, wide = site("square", 32, 32), site("wide", 32, 96)  # break even at 16 and at 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ranks(15, [square, wide])
    with pytest.warns(UserWarning, match=r"layers\.\*\.square \(rank 16, break-even 16\)") as caught:
        check_ranks(16, [square, square, wide])
    assert len(caught) == 1
    assert "wide" not in str(caught[0].message)
    with pytest.warns(UserWarning, match=r"square.*wide \(rank 24, break-even 24\)"):
        check_ranks(24, [square, wide])


def test_at_break_even_factors_are_as_large_as_dense() -> None:
    square = site("square", 32, 32)
    rank = int(square.break_even_rank)
    assert rank * (square.d_in + square.d_out) == square.d_in * square.d_out


@pytest.mark.parametrize(
    "method",
    [
        CoLA(),
        CoLA(rank=12, nonlinearity="low-rank", activation="gelu"),
        LowRank(rank=0.125),
        CoLA(rank={"q_proj": 4, "k_proj": 0.5, ".*": 8}),
    ],
)
def test_a_method_survives_json_that_sorts_its_keys(method: Method) -> None:
    """transformers writes config.json with sorted keys, and of a rank table the first match counts."""
    written = json.dumps(method.to_dict(), sort_keys=True)
    back = type(method).from_dict(json.loads(written))
    assert back == method
    if isinstance(method.rank, dict):
        assert list(back.rank) == list(method.rank)


def test_a_plain_table_is_read_as_well() -> None:
    assert CoLA.from_dict({"rank": {".*": 4}}) == CoLA(rank={".*": 4})


def test_methods_are_frozen_and_take_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoLA().rank = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        CoLA(8)  # type: ignore[misc]


def test_a_method_without_build_says_so() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Empty(Method):
        name: ClassVar[str] = "empty"

    with pytest.raises(NotImplementedError, match="Empty defines neither build nor build_stack"):
        Empty().build_stack([site("q", 8, 8)])


@pytest.mark.parametrize("table", [{"conv": 4, ".*": 8}, {".*": 8, "q_proj": 4}])
def test_a_pattern_that_decides_nothing_is_refused(table: Rank) -> None:
    dead = "conv" if "conv" in table else "q_proj"  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"'{dead}' decides nothing"):
        check_ranks(table, [site("q_proj", 32, 32), site("fc1", 32, 32)])


def test_dense_answers_no_question() -> None:
    assert Dense.answers() == frozenset()
    assert LowRank.answers() == {"method"}
    assert CoLAM.answers() == {"method", "memory", "hook"}
    assert not CoLA().has_hook and CoLA(init="dlr", decay_to="reuse").has_hook
    assert ReLoRA.answers() == {"method", "hook"}
    assert SwitchLoRA.answers() == {"method", "optimizer", "hook"}


def test_methods_combine_if_they_answer_other_questions() -> None:
    check_combination([CoLA(), AdamW()])
    with pytest.raises(ValueError, match="cola and low-rank cannot be combined: both decide what the weights are"):
        check_combination([CoLA(), LowRank()])


def test_stacks_keep_the_order_of_roles_and_depths() -> None:
    sites = [Site(f"layers.{d}.{n}", f"layers.*.{n}", d, nn.Linear(2, 2)) for d in (0, 1) for n in "qk"]
    assert {role: [s.depth for s in stack] for role, stack in by_role(sites).items()} == {
        "layers.*.q": [0, 1],
        "layers.*.k": [0, 1],
    }


@pytest.mark.parametrize("name", method_names())
def test_settings_for_acting_soon_are_valid(name: str) -> None:
    kind = find(name)
    assert kind(**kind.soon)
