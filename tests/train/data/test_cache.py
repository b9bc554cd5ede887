"""What the cache holds, and that emptying it leaves what a process uses."""

import os
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from lorank.train.data import cache

pytestmark = pytest.mark.usefixtures("forked_processes")

HOUR = 3600


@pytest.fixture
def place(tmp_path, documents, write_jsonl, load):
    """A cache with the entries of one corpus, which nobody uses."""
    load(write_jsonl(tmp_path / "a.jsonl", documents(50)))
    for file in (tmp_path / "xdg" / "lorank" / "users").iterdir():
        file.unlink()
    cache._user.cache_clear()
    return tmp_path / "xdg" / "lorank"


def age(entry, seconds):
    for path in entry.paths:
        for file in [path, *path.rglob("*")]:
            os.utime(file, (time.time() - seconds,) * 2)


def test_it_lists_what_a_corpus_left(place):
    found = cache.entries(place)
    kinds = [entry.kind for entry in found]
    assert kinds.count("documents") == kinds.count("vocabularies") == 1 and kinds.count("rows of tokens") >= 2
    files = [file for file in place.rglob("*") if file.is_file()]
    assert sum(entry.bytes for entry in found) == sum(file.stat().st_size for file in files)
    assert not any(entry.in_use for entry in found) and all(0 <= entry.age < 600 for entry in found)
    assert cache.entries(place / "nowhere") == []


def test_only_what_is_old_is_deleted(place, load):
    first, *others = cache.entries(place)
    age(first, 48 * HOUR)
    assert [entry.paths for entry in cache.clear(place, 24 * HOUR)] == [first.paths]
    assert [entry.paths for entry in cache.entries(place)] == [entry.paths for entry in others]
    for entry in others:
        age(entry, 48 * HOUR)
    load("a.jsonl")
    assert not cache.clear(place, 24 * HOUR), "use makes an entry young again"


def test_what_a_process_uses_stays(place, load):
    load("a.jsonl")  # this one
    used = cache.entries(place)
    assert any(entry.in_use for entry in used)
    assert not any(entry.in_use for entry in cache.clear(place))
    kept = cache.entries(place)
    assert kept == [entry for entry in kept if entry.in_use] and kept
    corpus = load("a.jsonl")
    assert len(corpus.train) > 0


def test_a_process_that_ended_uses_nothing(place):
    [documents, *_] = cache.entries(place)
    code = "import os, sys; from pathlib import Path; from lorank.train.data import cache; cache.use(Path(sys.argv[1])); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(documents.paths[0])], check=True)
    [user] = (place / "users").iterdir()  # it had no time to delete it
    assert len(user.read_text().splitlines()) == 2
    assert cache.clear(place) and cache.entries(place) == []
    assert not [*(place / "users").iterdir()]


def test_another_machine_is_believed_for_a_week(place):
    [documents, *_] = cache.entries(place)
    user = place / "users" / "elsewhere-1"
    user.write_text(f"1.0\ndocuments/{documents.paths[0].stem}\n")
    assert cache.entries(place)[0].in_use
    os.utime(user, (time.time() - 8 * 24 * HOUR,) * 2)
    assert not cache.entries(place)[0].in_use


def test_rows_that_are_being_made_stay(place):
    rows = next(entry for entry in cache.entries(place) if any(path.suffix == ".lock" for path in entry.paths))
    with FileLock(next(path for path in rows.paths if path.suffix == ".lock")):
        cache.clear(place)
    assert [entry.paths for entry in cache.entries(place)] == [rows.paths]
