"""Streams of tasks: the figures follow from the losses, and what is done is not done again."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, LlamaConfig, LlamaForCausalLM

from lorank.train import continual as streams
from lorank.train.continual import Settings, Stream, continual
from lorank.train.data.tokenizers import byte_tokenizer
from lorank.train.evaluation import evaluate_folder
from lorank.train.text import TRAINED_ON, text_of

LOSSES = [[4.0, 5.0, 6.0], [2.0, 4.5, 6.5], [2.5, 1.0, 6.25], [3.0, 0.5, 2.0]]
QUICK = Settings(steps=3, batch_size=4, sequence_length=16, eval_tokens=200)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that reads bytes, and beside it two texts."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, line in (("a", "abc abc {} abc\n"), ("b", "{} + {} = {}\n")):
        rows = [{"text": "".join(line.format(i, j, i + j) for j in range(9))} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_figures_follow_from_the_losses() -> None:
    one = Stream("lora", 0, 1e-3, 100, 10, LOSSES, 1.0)
    assert one.learned == pytest.approx((2 + 4 + 4) / 3)
    assert one.forgotten == pytest.approx((1.0 - 0.5) / 2)
    assert one.forward_transfer == pytest.approx((0.5 - 0.25) / 2)
    assert one.loss == pytest.approx(5.5 / 3) and one.perplexities[3][1] == pytest.approx(1.6487, abs=1e-4)


def test_a_stream_is_trained_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method from the same weights; the model of each is kept if wanted."""
    tasks = [str(base / f"{name}.jsonl") for name in "ab"]
    said: list[str] = []
    given: dict[str, Any] = {"settings": QUICK, "options": {"rank": 4}, "rates": {"": 1e-2}}
    found = continual(str(base), tasks, ["moram", "full"], tmp_path, save=True, say=said.append, **given)
    assert [one.method for one in found] == ["moram", "full"] and len(said) == 4
    assert found[0].losses[0] == found[1].losses[0] != found[1].losses[2]
    assert len(found[0].losses) == 3 and all(one.learned > 0 for one in found)
    assert found[0].trained == 4 * 2 * (4 * 64 + 3 * 96) < found[1].trained == found[1].parameters
    assert json.loads((tmp_path / "moram-0" / "config.json").read_text())["lorank"]["arguments"]["tasks"] == 2
    corpora = [streams._corpus(task, str(base), QUICK) for task in tasks]
    held_out = sum(len(corpus.validation) for corpus in corpora)
    text = text_of(str(tmp_path / "full-0"))
    assert (
        text.data == tasks
        and text.held_out
        and len(json.loads((tmp_path / "full-0" / TRAINED_ON).read_text())["files"]) == 2
    )
    assert evaluate_folder(str(tmp_path / "full-0")).tokens == held_out * 15, "of both tasks what was held out"
    shutil.copy(tasks[0], tmp_path / "copy.jsonl")
    assert text_of(str(tmp_path / "full-0"), data=str(tmp_path / "copy.jsonl")).trained_on == 1
    monkeypatch.setattr(streams, "run_stream", None)
    assert continual(str(base), tasks, ["full", "moram"], tmp_path, **given) == found
    shutil.rmtree(tmp_path / "moram-0")
    with pytest.raises(ValueError, match=r"results of moram, seed 0, but its model was not kept; choose another"):
        continual(str(base), tasks, ["moram"], tmp_path, save=True, **given)
    with pytest.raises(ValueError, match=r"has results of steps=3, got 4; choose another folder"):
        continual(str(base), tasks, ["moram"], tmp_path, **{**given, "settings": replace(QUICK, steps=4)})
    changed = [str(tmp_path / "copy.jsonl"), *tasks[1:]]
    before = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**before, "tasks": changed}))
    assert continual(str(base), changed, ["full", "moram"], tmp_path, **given) == found, (
        "the same text in another place"
    )
    rows = Path(changed[0]).read_text().splitlines(keepends=True)
    Path(changed[0]).write_text("".join(rows[: len(rows) // 2]))
    with pytest.raises(ValueError, match=r"has results from before .*copy\.jsonl changed; choose another folder"):
        continual(str(base), changed, ["full", "moram"], tmp_path, **given)


def test_the_loss_is_that_of_the_next_token(base: Path, tmp_path: Path) -> None:
    """Also of BART, whose own loss compares each position with the token that it has read. The identity would be learnt at once."""
    entries = len(byte_tokenizer())
    shape = {"vocab_size": entries, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    BartForCausalLM(BartConfig(**shape, decoder_ffn_dim=64, dropout=0.0)).save_pretrained(tmp_path / "bart")
    byte_tokenizer().save_pretrained(tmp_path / "bart")
    given: dict[str, Any] = {"settings": replace(QUICK, steps=40), "rates": {"full": 1e-2}}
    (found,) = continual(str(tmp_path / "bart"), [str(base / "a.jsonl")], ["full"], tmp_path / "out", **given)
    assert found.losses[1][0] < 0.6 * found.losses[0][0], "the next token is learnt, not the one that was read"


def test_bad_input_is_refused_before_training(base: Path, tmp_path: Path, in_this_process: Callable[..., Any]) -> None:
    task = str(base / "a.jsonl")
    for more, words in (
        (["--method", "cola"], "methods must be of full, lora, .*, which keep what a model knows, got 'cola'"),
        (["--method", ","], "methods must be one or more names, such as lora or full, got none"),
        (["--method", "lora", "--option", "rank=2", "--rank", "4"], "rank is given twice, as --rank 4 and among the"),
        (["--out", task], "out must be a folder for the results, got the file"),
        (["--method", "lora", "--option", "x=1"], "none of lora has a setting 'x'"),
        (
            ["--method", "full,smora", "--rank", "8", "--option", "expert_rank=3"],
            "expert_rank must divide the rank 8 of",
        ),
        (["--method", "full,lora", "--rank", "999"], "rank must be at most 64, the longest side"),
        (["--method", "lora", "--lr", "full=1e-3"], "a learning rate must be for one of lora, got one for full"),
        (["--lr", "fast"], "--lr must be a positive number, or NAME=NUMBER, got 'fast'"),
        (["--batch-size", "999"], "must be local text that fills a batch of 999 sequences, got"),
        (["--sequence-length", "99999"], "sequence_length=99999 exceeds the model's 2048 positions"),
        (["--tasks", f"{task},{task}"], "tasks must be different sources of text"),
    ):
        code, _, error = in_this_process("continual", base, "--out", tmp_path / "out", "--tasks", task, *more)
        assert code == 2 and re.search(words, error), error
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table(base: Path, tmp_path: Path, in_this_process: Callable[..., Any]) -> None:
    flags = ["--steps", "1", "--batch-size", "2", "--sequence-length", "16", "--out", str(tmp_path)]
    flags += ["--tasks", f"{base / 'a.jsonl'},{base / 'b.jsonl'}", "--method", "lora", "--seeds", "2"]
    code, printed, error = in_this_process("continual", base, *flags)
    assert code == 0, error
    assert all(word in printed for word in ("as it came", "lora, lr 0.001", "forgotten", "±", "perplexity", "after b"))
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("<svg") == 2 * 2
        and "loss on b" in page
        and "lora, lr 0.001, after b" in page
        and "lora, lr 0.001" in page
        and "lowest to the highest" in page
    )
    assert "http" not in page.replace("http://www.w3.org", "")
