"""Documents that a model was trained on are known again in another file, form or column."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorank.train import seen
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain
from lorank.train.text import text_of

TEXTS = [f"row {i} says {i * i} in {'abc'[i % 3]} and {i % 7}" for i in range(200)]


def test_a_sample_estimates_what_two_texts_have_in_common() -> None:
    many = [f"document {i}" for i in range(30_000)]
    sample = seen.joined([seen.sample_of(many[:7000]), seen.sample_of(many[6000:])])
    assert len(sample) == seen.MOST and np.array_equal(sample, seen.sample_of(many[::-1]))
    few_of_many = seen.with_hashes(seen.with_hashes([], many), many[::-1] * 2)
    assert len(few_of_many) < 4 * len(many) and np.array_equal(np.unique(few_of_many)[: seen.MOST], sample)
    held_out = many[::10]
    kept = seen.packed(sample, held_out)
    assert seen.share_of(held_out, [kept]) == 0
    assert seen.share_of([f" {text}\n" for text in many], [kept]) == pytest.approx(0.9, abs=0.03)
    mixed = [*many[1:9000:10], *(f"another {i}" for i in range(2700))]
    assert seen.share_of(mixed, [kept]) == pytest.approx(0.25, abs=0.1)
    assert seen.share_of(many, []) == seen.share_of(many, ["damaged"]) == 0
    both = [kept, seen.packed(seen.sample_of(held_out[::2]), [])]
    assert seen.share_of(many, both) == pytest.approx(0.95, abs=0.02), "in one of them"
    few = seen.packed(seen.sample_of(many[:10]), [])
    assert seen.share_of([*many[:1], *many[100:200]], [few]) == pytest.approx(1 / 101), "all hashes are kept"


@pytest.mark.usefixtures("quick")
def test_rows_in_another_form_are_known_again(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def write(name: str, column: str, texts: list[str]) -> str:
        rows = "".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts)
        (tmp_path / name).write_bytes(gzip.compress(rows.encode()) if name.endswith(".gz") else rows.encode())
        return str(tmp_path / name)

    changes: dict[str, Any] = {"steps": 1, "warmup_steps": 0, "eval_every": 0, "save_every": 0, "sequence_length": 16}
    pretrain(recipe(data=write("a.jsonl", "body", TEXTS), text_column="body", **changes), tmp_path / "run")
    model = str(tmp_path / "run")
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in TEXTS[::-1])])
    others = [f"new {i}" for i in range(60)]
    for name, texts in (("b.csv", TEXTS), ("half.jsonl.gz", TEXTS[::2])):
        if name != "b.csv":
            write(name, "text", texts)
        found = text_of(model, data=str(tmp_path / name), text_column="text")
        assert 0.85 < found.share_trained_on < 1, "5 % were held out"
        assert "of its documents are in what the run" in str(found)
    part = text_of(model, data=write("some.jsonl", "text", [*TEXTS[:20], *others]), text_column="text")
    assert part.share_trained_on == pytest.approx(0.25, abs=0.05)
    new = text_of(model, data=write("new.jsonl", "text", others), text_column="text")
    assert new.share_trained_on == 0 and "too good" not in str(new) and "too good" not in str(text_of(model))
