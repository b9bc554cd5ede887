"""Work that takes long tells how far it is."""

import gzip
import lzma

import pyarrow as pa

from lorank.train.watching import watched_by


def heard(work):
    """{what: [(done, total, unit)]} of some work."""
    found = {}
    with watched_by(lambda what, done, total, unit: found.setdefault(what, []).append((done, total, unit))):
        work()
    return found


def test_reading_and_hashing_tell_how_far_they_are(tmp_path, monkeypatch, documents, write, write_jsonl, load):
    monkeypatch.setattr("lorank.train.reading.BLOCK", 1000)
    plain = write_jsonl(tmp_path / "data" / "a.jsonl", documents(50)).read_bytes()
    write(tmp_path / "data" / "b.jsonl.gz", gzip.compress(plain))
    write(tmp_path / "data" / "c.jsonl.xz", lzma.compress(plain))
    with pa.output_stream(str(tmp_path / "data" / "d.jsonl.zst"), compression="zstd") as stream:
        stream.write(plain)
    size = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())
    found = heard(lambda: load("data"))
    for what in ("hashing", "reading"):
        amounts = [done for done, *_ in found[what]]
        assert amounts == sorted(amounts) and amounts[-1] == size
        assert all(tuple(rest) == (size, "B") for _, *rest in found[what])
    assert "reading" not in heard(lambda: load("data")), "it is in the cache"
