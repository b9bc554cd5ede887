"""The folders of checkpoints: their checksums, which of them are a run's own, and which of these are kept."""

import os
from pathlib import Path
from typing import Any

import pytest

from lorank.train.folder import SUMS, checkpoints, last_whole_checkpoint, read_run, write_sums
from lorank.train.run import pretrain

pytestmark = pytest.mark.usefixtures("quick")


def test_a_checkpoint_has_its_checksums_when_it_gets_its_name(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut right after the move leaves one whose files can be checked."""
    move = os.replace

    def cut(old: Any, new: Any) -> None:
        move(old, new)
        if Path(new).name == "checkpoint-2":
            raise MemoryError("the lights went out")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(MemoryError):
        pretrain(recipe(steps=3, save_every=2), tmp_path / "run")
    folder = tmp_path / "run/checkpoint-2"
    sums = (folder / SUMS).read_text()
    summed = {line.partition("  ")[2] for line in sums.splitlines()}
    assert summed == {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {SUMS}
    (folder / "notes.txt").write_text("a copy for Ada")
    for cut in ("", sums.partition("scheduler.pt")[0][:-66]):
        (folder / SUMS).write_text(cut)
        with pytest.raises(ValueError, match="SHA256SUMS is not as it was written"):
            last_whole_checkpoint(tmp_path / "run")
    (folder / SUMS).write_text(sums)
    assert last_whole_checkpoint(tmp_path / "run") == folder, "a file of somebody's is no damage"
    (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="optimizer.pt is"):
        last_whole_checkpoint(tmp_path / "run")


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


@pytest.mark.parametrize(
    "written", ["[" * 100_000, "{}", '{"model_type": "lama"}', '{"model_type": ["llama"]}', "\xff"]
)
def test_a_configuration_that_cannot_be_read_is_named(
    written: str, recipe: Any, before_step: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        pretrain(recipe(save_every=1, eval_every=0), out, callbacks=[before_step(1)])
    (out / "checkpoint-1/config.json").write_text(written, encoding="latin-1")
    write_sums(out / "checkpoint-1")
    with pytest.raises(ValueError, match="checkpoint-1/config.json must hold what a checkpoint has there"):
        pretrain(read_run(out), out, resume=True)
