"""Links in a folder that somebody else made: what lorank writes there stays in it."""

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lorank.train.data.marks import Mark, Marks
from lorank.train.data.streams import Place
from lorank.train.folder import STAGING, locked, write_whole
from lorank.whole import cleared, made_whole, open_to_others, without_link

TEXT = "precious\n"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder next to another one, outside, with a file."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text(TEXT)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def link(path: Path, to: str = "../outside/file") -> Path:
    path.symlink_to(to)
    return path


def outside(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out.parent / "outside").iterdir()}


def test_a_text_is_not_written_through_a_link(out: Path) -> None:
    link(out / ".a.json.part"), link(out / "a.json")
    write_whole(out / "a.json", "text")
    assert (out / "a.json").read_text() == "text" and not (out / "a.json").is_symlink()
    assert outside(out) == {"file": TEXT}


def test_half_a_file_is_not_written_through_a_link(out: Path) -> None:
    for half in (f".a.{os.getpid()}", f".b.{os.getpid()}"):
        link(out / half)
    link(out / f".a.{os.getpid()}.new", "../outside/new")
    with made_whole(out / "a") as half_a:
        half_a.write_text("text")
    with made_whole(out / "b") as half_b:
        save_file({}, half_b)
    open_to_others([out / "a"])
    assert outside(out) == {"file": TEXT} and sorted(path.name for path in out.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("to", ["../outside", "../outside/file", "nowhere"])
def test_a_checkpoint_is_not_written_through_a_link(out: Path, to: str) -> None:
    link(out / STAGING, to)
    with locked(out):
        assert not (out / STAGING).is_symlink()
    assert not [*out.iterdir()] and outside(out) == {"file": TEXT}


def test_marks_are_not_written_through_a_link(out: Path) -> None:
    marks = Marks(link(out / "stream.jsonl"), "a stream", writes=True)
    marks.add(Mark(0, [], Place(0, {}, 0, [])))
    assert outside(out) == {"file": TEXT} and len((out / "stream.jsonl").read_text().splitlines()) == 2


def test_of_a_link_the_link_alone_is_removed(out: Path) -> None:
    (out / "folder").mkdir()
    (out / "folder/file").write_text("text")
    link(out / "folder/more", "../../outside")
    assert not cleared(out / "folder").exists() and not cleared(link(out / "a", "../outside")).is_symlink()
    (out / "kept").mkdir()
    assert without_link(out / "kept").is_dir() and not without_link(link(out / "a", "../outside")).is_symlink()
    assert outside(out) == {"file": TEXT}
