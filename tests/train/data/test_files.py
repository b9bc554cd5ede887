"""Which files a source means."""

import os

import pytest

from lorank.train.data.files import local_files, would_read


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


def test_where_files_would_become_text_of_a_source(tmp_path, write, monkeypatch):
    write(tmp_path / "data" / "a.txt", "a")
    (tmp_path / "linked").symlink_to("data")
    monkeypatch.chdir(tmp_path / "data")
    inside = tmp_path / "linked" / "runs" / "one"
    for source in (
        ".",
        "..",
        "../linked",
        "**/*.jsonl",
        "../data/**",
        "runs/*/*.json",
        str(tmp_path / "*" / "runs" / "one" / "*.md"),
    ):
        assert would_read(source, inside), source
    for source in ("a.txt", "*.txt", "*.jsonl", "runs/*.md", "**/*.txt", str(tmp_path / "other")):
        assert not would_read(source, inside), source
    assert not would_read(".", tmp_path / "data" / ".runs" / "one") and not would_read(".", tmp_path / "runs")
