"""A tokenizer whose rules end in a panic of Rust, which is no Exception: one sentence, in any process."""

import json
from pathlib import Path

import click
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorank.cli import errors
from lorank.train.data import load_tokenizer
from lorank.train.data.specials import encode
from lorank.train.tokens import encoder

TEXT = "a" * 40 + "b"
"""For which an expression in the rules takes too many steps."""
SENTENCE = r"the tokenizer.* cannot read the text \(.*Regex.*\); use another tokenizer"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    found = load_tokenizer("bytes")
    assert isinstance(found, PreTrainedTokenizerFast)
    rules = json.loads(found.backend_tokenizer.to_str())
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**rules, "pre_tokenizer": slow}))
    return load_tokenizer(str(file))


def test_a_panic_of_a_tokenizer_is_a_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=SENTENCE):
        encode(tokenizer, [TEXT])
    assert encode(tokenizer, ["ab"])


def test_a_panic_in_a_worker_is_a_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    with pytest.raises(ValueError, match=SENTENCE):
        encoder(tokenizer.backend_tokenizer.to_str(), cut=False)([TEXT])


def test_any_other_panic_ends_a_command_with_one_sentence(
    tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        tokenizer(TEXT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["lorank"])
        errors.run(command)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "lorank: a library failed" in said and "Traceback" not in said
