"""Which files a source means, and the cache of their documents."""

import os

import pytest

from lorank.train.data import files
from lorank.train.data.files import local_files, read_documents


@pytest.fixture
def names(caplog, tmp_path):
    """names(source): the files to read, relative to the test's folder, the number left out, and what is said."""

    def names(source):
        caplog.clear()
        found, left = local_files(str(source))
        return [os.path.relpath(file, tmp_path) for file in found], left, caplog.text

    return names


def test_links_are_followed_and_each_file_is_read_once(tmp_path, write, names):
    write(tmp_path / "data" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "deep" / "b.txt", "b")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "same.txt").symlink_to("a.txt")
    assert names("data") == (["data/a.txt", "data/again/deep/b.txt"], 0, "")
    for pattern in ("data/**/*.txt", "da*/**/*.txt", "data/**"):
        assert sorted(names(pattern)[0]) == ["data/a.txt", "data/again/deep/b.txt"]
    assert names("data/*/**/b.*")[0] == ["data/again/deep/b.txt"]


def test_what_is_not_read_is_named(tmp_path, write, names):
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", "c.tsv", "d.zip", "deep/e.tar", "f.txt.br", "z.md"):
        write(tmp_path / "data" / name, "text")
    (tmp_path / "data" / "gone.txt").symlink_to("nowhere")
    read, left, said = names("data")
    assert read == ["data/a.txt", "data/z.md"] and left == 5
    assert "data: left out c.tsv, d.zip, f.txt.br and 2 more; looked for .txt, .md" in said
    read, left, said = names("data/[az]*")
    assert read == ["data/a.txt", "data/z.md"] and not left
    assert "data/deep (a folder)" in names("data/[ad]*")[2]
    assert "gone.txt (a broken link)" in names("data/[ag]*")[2]


def test_a_folder_that_cannot_be_searched_is_no_empty_one(tmp_path, write, monkeypatch):
    write(tmp_path / "data" / "a.txt", "a")

    def locked(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", locked)
    with pytest.raises(OSError, match="data cannot be searched: Permission denied"):
        local_files(str(tmp_path / "data"))


def test_the_cache_knows_files_by_what_they_contain(tmp_path, write, monkeypatch):
    """Neither the time of change nor the size tells that a file was written anew; a name or place changes nothing."""
    cache = tmp_path / "cache"
    for word in ("cat", "dog"):
        file = write(tmp_path / "a.txt", f"the {word} sat")
        os.utime(file, (1_600_000_000, 1_600_000_000))
        documents, _ = read_documents([file], "text", cache)
        assert documents["text"][:] == [f"the {word} sat"]
    moved = write(tmp_path / "deep" / "b.txt", "the dog sat")
    monkeypatch.setattr(files, "blocks", None)
    again, tally = read_documents([moved], "text", cache)
    assert again["text"][:] == ["the dog sat"] and (tally.documents, tally.bytes) == (1, 11)
    assert again._fingerprint == documents._fingerprint


def test_only_groups_with_changes_are_read_again(tmp_path, write, monkeypatch):
    monkeypatch.setattr(files, "GROUP", 10)
    shards = [write(tmp_path / f"{i}.txt", f"document {i}") for i in range(5)]
    read_documents(shards, "text", tmp_path / "cache")
    write(shards[2], "changed")
    read, blocks = [], files.blocks
    monkeypatch.setattr(files, "blocks", lambda file, *rest: read.append(file.name) or blocks(file, *rest))
    documents, tally = read_documents(shards, "text", tmp_path / "cache")
    assert documents["text"][:] == ["document 0", "document 1", "changed", "document 3", "document 4"]
    assert "2.txt" in read and not {"0.txt", "1.txt", "4.txt"} & set(read) and tally.files == 5


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, write, monkeypatch):
    file, blocks = write(tmp_path / "a.txt", "before"), files.blocks

    def slow(*arguments):
        yield from blocks(*arguments)
        file.write_text("after all")

    monkeypatch.setattr(files, "blocks", slow)
    with pytest.raises(OSError, match="a.txt changed while it was read"):
        read_documents([file], "text", tmp_path / "cache")
    assert not [*(tmp_path / "cache").rglob("*.arrow")]


def test_a_full_disk_is_one_sentence(tmp_path, write, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk of the cache .* is full; free some space or set XDG_CACHE_HOME"):
        read_documents([write(tmp_path / "a.txt", "a")], "text", tmp_path / "cache")
