"""A stream whose text is removed while a model trains on it ends in one sentence. What is not a stream was prepared, and is not needed any more."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorank.cli.errors import sentence
from lorank.train import run
from lorank.train.data import streams
from lorank.train.folder import last_whole_checkpoint
from lorank.train.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick")


def test_a_stream_whose_files_vanish_ends_with_a_checkpoint(
    recipe: Callable[..., Recipe], before_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "OPEN", 1)
    monkeypatch.setattr(streams, "POOL", 1000)
    (folder := tmp_path / "texts").mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"a text of number {i}\n" * 50)
    streamed = recipe(data=str(folder), stream=True, tokenizer="bytes", save_every=4, steps=120, eval_every=0)
    gone = before_step(3, lambda: shutil.rmtree(folder))
    with pytest.raises((OSError, ValueError)) as error:
        run.pretrain(streamed, tmp_path / "run", on_cpu=True, callbacks=[gone])
    assert str(folder) in sentence(error.value), sentence(error.value)
    assert last_whole_checkpoint(tmp_path / "run") is not None
