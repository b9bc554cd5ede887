"""The folders of checkpoints: which of them are a run's own, and which of these are kept."""

from pathlib import Path
from typing import Any

import pytest

from lorank.train.folder import checkpoints, last_whole_checkpoint, read_run
from lorank.train.run import pretrain

pytestmark = pytest.mark.usefixtures("quick")


def test_a_folder_with_another_name_is_no_checkpoint(recipe: Any, before_step: Any, tmp_path: Path) -> None:
    """Neither a run goes on from it, nor is it removed; and one of a later step does not take the place of a new one."""
    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        pretrain(recipe(save_every=1, keep=1, eval_every=0), out, callbacks=[before_step(3)])
    others = {"checkpoint-²", "checkpoint-٣", "checkpoint-1-mine", "checkpoint-5x", "checkpoint--1", "checkpoint-99"}
    for name in others:
        (out / name).mkdir()
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-99"]
    assert last_whole_checkpoint(out) == out / "checkpoint-3"
    pretrain(read_run(out), out, resume=True)
    assert {path.name for path in out.glob("checkpoint-*")} == {*others, "checkpoint-8"}
