"""The quick tokenizer gives the tokens of the slow one, and leaves to it what it does not know."""

import json
import random
import unicodedata
from typing import Any

import gigatoken
import pytest
from tokenizers import Tokenizer

from lorank.train import tokens
from lorank.train.data import load_tokenizer, specials


@pytest.fixture
def tokenizer(prose):
    return load_tokenizer(None, [prose(2000)], vocab_size=300)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
AS_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
SAME: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "a space before": {"pre_tokenizer": {"add_prefix_space": True}},
    "Llama 3": {"pre_tokenizer": AS_LLAMA3, "model": {"ignore_merges": True}},
    "NFC": {"normalizer": {"type": "NFC"}},
}
OTHER: dict[str, dict[str, Any]] = {
    "a normaliser that is not known": {"normalizer": {"type": "NFKC"}},
    "no words": {"pre_tokenizer": None},
    "words that are not known": {"pre_tokenizer": {"type": "Whitespace"}},
    "a word that is added": {"added_tokens": ["New York"]},
    "chance": {"model": {"dropout": 0.1}},
}


def rules_with(tokenizer, changes) -> str:
    rules = json.loads(specials.rules_of(tokenizer, None))
    for name, change in changes.items():
        if name == "added_tokens":
            change = [{**rules[name][0], "content": word, "special": False, "id": 5} for word in change]
        rules[name] = (
            {**rules[name], **change} if isinstance(rules[name], dict) and isinstance(change, dict) else change
        )
    return json.dumps(rules)


def odd_texts(prose) -> list[str]:
    """White space of all kinds, what Python alone takes for it, marks and digits between, and all planes of Unicode 16."""
    odd = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u3000\ufeff'a1é日_.,!²\u0301"
    code = "'sretxZ09_=(.,!\" \né²\x1c"
    planes = "".join(
        chr(n) for n in range(0x300, 0x20000, 61) if unicodedata.category(chr(n)) not in ("Cn", "Cs", "Co")
    )
    chosen = random.Random(0)
    texts = [
        "".join(chosen.choices(of, k=chosen.randint(0, 40))) for of in (odd, code, planes + odd) for _ in range(700)
    ]
    return [*texts, "", "it's  they'll\n\n  <|endoftext|> 12345", "self.x1 ='re'[3:]#²", prose(50)]


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_the_quick_tokenizer_gives_the_same_tokens(tokenizer, prose, changes):
    rules = rules_with(tokenizer, changes)
    slow = Tokenizer.from_str(rules)
    slow.encode_special_tokens = True
    quick, texts = tokens.encoder(rules, cut=False), odd_texts(prose)
    assert isinstance(quick, tokens.Quick)
    wanted = [found.ids for found in slow.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in quick(texts)] == wanted
    quick.seen = quick.MOST  # and now it begins anew
    assert [ids.tolist() for ids in quick(texts[:50])] == wanted[:50] and quick.seen == 0


@pytest.mark.parametrize("changes", OTHER.values(), ids=OTHER)
def test_a_tokenizer_unknown_to_the_quick_one_runs_as_it_is(tokenizer, changes):
    assert not isinstance(tokens.encoder(rules_with(tokenizer, changes), cut=False), tokens.Quick)


def test_a_tokenizer_that_is_quickly_read_wrong_runs_as_it_is(tokenizer, monkeypatch):
    load, letters = gigatoken.Tokenizer.from_json, rules_with(tokenizer, {"added_tokens": [], "model": {"merges": []}})
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda _: load(letters))
    assert not isinstance(tokens.encoder(rules_with(tokenizer, {}), cut=False), tokens.Quick)


def test_a_table_of_all_ids_is_not_made_if_one_is_huge(tokenizer, monkeypatch):
    rules = rules_with(tokenizer, {})
    monkeypatch.setattr(tokens, "MOST_IDS", max(json.loads(rules)["model"]["vocab"].values()))
    assert not isinstance(tokens.encoder(rules, cut=False), tokens.Quick)
