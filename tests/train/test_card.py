"""The model card: what is known of a model, nothing invented, and never over what somebody wrote."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import lorank
from lorank.table import METHODS, find
from lorank.train import card
from lorank.train.card import Card, card_text, citations, is_ours, marked, write_card
from lorank.train.export import as_dense, as_trained, export
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain

CARD = Card(form="dense", auto="AutoModelForCausalLM", parameters=10, block_parameters=4, methods=())
WITHOUT_A_PAPER = {"dense", "adamw", "autograd"}


@pytest.fixture(scope="module")
def run(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank model, trained by Spectron."""
    out = tmp_path_factory.mktemp("run") / "run"
    asked = recipe(method="low-rank", optimizer="spectron", steps=2, warmup_steps=1, eval_every=0, save_every=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorank.accounting.achievable_flops", lambda: (1e12, "assumed"))
        summary = pretrain(dataclasses.replace(asked, license="cc-by-4.0"), out)
    assert summary is not None
    return out


def test_the_card_of_a_run_says_what_is_known(run: Path, text: Path) -> None:
    card = ModelCard.load(run / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "cc-by-4.0",
        "text-generation",
        "transformers",
    )
    assert card.data.tags == ["lorank", "low-rank", "spectron"] and "datasets" not in card.data.to_dict()
    assert "| method | low-rank, rank 8, spectron |" in card.text and "| tokens | 256 in 2 steps |" in card.text
    assert "arxiv.org/abs/2209.13569" in card.text and "arxiv.org/abs/2602.12429" in card.text
    assert card.text.count("trust_remote_code=True)") == 2, "the tokenizer reads config.json too"
    assert "pip install torch transformers" in card.text
    assert text.name in card.text and str(text.parent) not in card.text, "places on this machine are nobody's business"


def test_a_model_that_was_trained_on_names_what_it_began_with(tmp_path: Path) -> None:
    def said(base: str | None) -> str:
        recipe = Recipe(start_from=base, tokenizer="bytes")
        return card_text(dataclasses.replace(CARD, recipe=recipe, corpus="some texts", summary={}))

    assert "Pre-trained from scratch with lorank on some texts." in said(None) and "base_model" not in said(None)
    assert "Trained on from org/base with lorank on some texts." in (hub := said("org/base"))
    assert "base_model: org/base" in hub
    assert f"Trained on from {tmp_path.name}/ with lorank" in (local := said(str(tmp_path)))
    assert str(tmp_path) not in local and "base_model" not in local


def test_an_exported_card_is_of_what_was_exported(run: Path, tmp_path: Path) -> None:
    export(str(run), tmp_path / "dense", as_dense, license="mit")
    card = ModelCard.load(tmp_path / "dense/README.md")
    assert card.data.license == "mit" and "trust_remote_code" not in card.text and "AutoModelForCausalLM" in card.text
    assert "| method | low-rank, rank 8, spectron, merged into dense layers |" in card.text
    assert "| tokens | 256 in 2 steps |" in card.text
    export(str(tmp_path / "dense"), tmp_path / "again", as_trained)
    card = ModelCard.load(tmp_path / "again/README.md")
    assert card.data.license is None and "| tokens |" not in card.text, "of a plain folder nothing is known"


@pytest.mark.parametrize(("there", "kept"), [("mine", True), ("ours", False), ("ours, changed", True)])
def test_a_card_that_somebody_wrote_is_kept(
    there: str, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = marked(card_text(CARD))
    texts = {"mine": "# Mine\n", "ours": ours, "ours, changed": ours.replace("10 parameters", "ten parameters")}
    (tmp_path / "README.md").write_text(texts[there])
    with caplog.at_level(logging.WARNING):
        write_card(tmp_path, dataclasses.replace(CARD, license="mit"))
    now = (tmp_path / "README.md").read_text()
    assert (now == texts[there]) is kept is not is_ours(now)
    assert ("stays as it is" in caplog.text) is kept


def test_every_method_with_a_paper_cites_it() -> None:
    for name in METHODS:
        found = citations([find(name)()])
        assert (not found) is (name in WITHOUT_A_PAPER), (name, found)
        assert all(len(one) < 250 and one.count('"') in (0, 2) for one in found), found
    assert len(citations([lorank.CoLA(carry="tensor", init="dlr")])) == 3


def test_data_of_the_hub_is_named_in_the_metadata() -> None:
    card = dataclasses.replace(CARD, recipe=Recipe(data="allenai/c4:en"))
    assert "datasets: allenai/c4" in card_text(card) or "datasets:\n- allenai/c4" in card_text(card)


def test_places_of_several_sources_are_nobodys_business() -> None:
    recipe = Recipe(data=["/home/me/books", "/home/me/code:0.3"])
    corpus = "/home/me/books: 3 documents; /home/me/code: 4 documents, times 0.3"
    assert card._without_folders(corpus, recipe) == "books: 3 documents; code: 4 documents, times 0.3"


def test_a_licence_is_an_identifier() -> None:
    with pytest.raises(ValueError, match="license must be an identifier such as apache-2.0"):
        Recipe(license="Apache License, Version 2.0")
