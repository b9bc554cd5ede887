"""The page of an analysis is complete, shows what was found, and needs nothing but itself."""

import copy
import re
from typing import Any

import pytest
import torch
from rich.console import Console

import lorank
from lorank.analysis import analyze, suggest_ranks
from lorank.report.analysis import analysis_page
from lorank.report.effective_ranks import analysis_table, in_percent, loss_line, quantities, short_names
from tests.conftest import ARCHITECTURES, VOCABULARY

NASTY = '</pre><script src="http://evil.example/x.js">alert(1)</script><img src=//evil.example> & "quotes"'


def results_of(name: str, method: str | None = None, gradient_batches: int = 1, **changes: Any) -> dict[str, Any]:
    model = ARCHITECTURES[name].dense(**changes)
    if method:
        lorank.convert(model, method)
    drawn = torch.randint(3, VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(3))
    found = analyze(model, [{"input_ids": drawn}], gradient_batches=gradient_batches).to_dict()
    about = {
        "lorank": "0",
        "model": f"runs/{name}",
        "model_type": name,
        "method": method or "dense",
        "data": "a.txt",
        "text": "a.txt",
    }
    suggestion = {"budget": "0.5", **suggest_ranks(found["projections"], "0.5")._asdict(), "no_recipe": None}
    return {**about, "parameters": 1234567, "sequence_length": 60, "suggestion": suggestion, **found}


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    return results_of("llama", num_hidden_layers=3)


def printed(results: dict[str, Any], width: int) -> str:
    console = Console(width=width)
    with console.capture() as shown:
        console.print(analysis_table(results))
    return shown.get()


def test_the_page_needs_nothing_but_itself(llama: dict[str, Any]) -> None:
    page = analysis_page(llama)
    assert not re.search(r"""(src|href)\s*=|url\((?!#)|@import|https?://(?!www\.w3\.org)""", page)
    for word in ("Outputs", "Inputs", "Weights", "Gradients", "From block to block", "Ranks for the budget"):
        assert word in page
    assert "nan" not in page.lower().replace("nano", "") and "None" not in page


@pytest.mark.parametrize(
    ("name", "method", "changes"),
    [
        ("llama", "cola", {}),
        ("llama", "masa", {}),
        ("gpt2", "crnet", {}),
        ("gpt2", None, {}),
        ("llama", None, {"num_hidden_layers": 1}),
    ],
)
def test_other_models_have_a_page_and_a_table(name: str, method: str | None, changes: dict[str, Any]) -> None:
    results = results_of(name, method, **changes)
    page, table = analysis_page(results), printed(results, 110)
    if method == "cola":
        assert "<h3>Gradients of A<small>" in page and "<h3>Gradients of B<small>" in page
    assert ("From block to block" in page) == (changes.get("num_hidden_layers") != 1)
    assert "block 0" in table and "…" not in table


def test_the_page_compares_with_a_uniform_rank(llama: dict[str, Any]) -> None:
    page = analysis_page(llama)
    assert loss_line(llama["suggestion"]) in page and "were left out" not in page
    assert f"A uniform rank of {llama['suggestion']['uniform_rank']} at the same cost loses" in page
    experts = copy.deepcopy(llama) | {"left_out": {"model.layers.*.mlp.experts.down_proj": 12345}}
    experts["suggestion"]["no_recipe"] = "there is no such model"
    page = analysis_page(experts)
    assert "12,345 parameters of matrices that were left out" in page and "there is no such model" in page


def test_what_suggested_ranks_lose_in_words() -> None:
    said = loss_line(
        {
            "lost": {"mean": 0.05, "worst": 0.12},
            "uniform_rank": 64,
            "uniform_lost": {"mean": 0.06, "worst": 0.15},
        }
    )
    assert said == (
        "These ranks lose 5.0 % of output energy on average (worst projection: 12 %). "
        "A uniform rank of 64 at the same cost loses 6.0 % (worst: 15 %)."
    )


def test_without_gradients_and_without_a_budget() -> None:
    page = analysis_page({**results_of("llama", gradient_batches=0), "suggestion": None})
    assert "Gradients" not in page and "Ranks for the budget" not in page


def test_names_are_escaped(llama: dict[str, Any]) -> None:
    results = copy.deepcopy(llama)
    results.update(model=NASTY, data=NASTY, method=NASTY, notes=[NASTY])
    page = analysis_page(results)
    assert NASTY not in page and page.count("<script") == 1 and "<img" not in page


def test_a_cell_shows_rank_over_width(llama: dict[str, Any]) -> None:
    page, one = analysis_page(llama), llama["projections"][5]
    share = one["output"]["rank"] / one["d_out"]
    assert f'title="block 0, up_proj: {share * 100:.1f} %">{in_percent(share)}</td>' in page
    assert quantities(llama)["output"].by_role[one["role"]][0] == share


def test_short_names_are_distinct() -> None:
    roles = ["h.*.attn.c_proj", "h.*.attn.c_attn.key", "h.*.mlp.c_proj", "c_proj"]
    assert list(short_names(roles).values()) == ["attn.c_proj", "key", "mlp.c_proj", "c_proj"]


def test_many_blocks_fit_a_terminal() -> None:
    results = results_of("llama", num_hidden_layers=30, gradient_batches=0)
    assert len(printed(results, 100).splitlines()) <= 24
