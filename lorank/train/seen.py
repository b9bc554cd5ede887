"""Which documents a model was trained on, as a sample that is small enough to be kept next to it.

Of all documents, the sample has those with the 4,096 smallest hashes. A document has the same hash in whatever file, form or column it
is found, so two texts that share documents share a like part of their samples.
"""

import base64
import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from lorank.whole import made_whole

MOST = 4096
LARGEST = np.iinfo(np.uint64).max
ENOUGH = 64_000_000  # characters of a text that is looked up


def sample_of(texts: Iterable[str]) -> np.ndarray:
    """The smallest hashes of documents, in order; uint64 [at most `MOST`]."""
    return joined([np.fromiter(map(_hash, texts), np.uint64)])


def with_hashes(before: list[int], texts: Iterable[str]) -> list[int]:
    """Hashes of documents, with those of more; only the smallest, when they are many."""
    before += map(_hash, texts)
    return before if len(before) < 16 * MOST else joined([np.array(before, np.uint64)]).tolist()


def joined(samples: Iterable[np.ndarray]) -> np.ndarray:
    """The sample of several texts together."""
    return np.unique(np.concatenate([np.array([], np.uint64), *samples]))[:MOST]


def kept_sample(file: Path) -> np.ndarray:
    """The sample of an Arrow file of documents, which is kept next to it."""
    kept = place_of(file)
    if not kept.exists():
        found: list[int] = []
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                found = with_hashes(found, batch.column(0).to_pylist())
        write_sample(file, found)
    return np.fromfile(kept, np.uint64)


def write_sample(file: Path, hashes: list[int]) -> None:
    """Keep the sample of an Arrow file, of whose documents these are the hashes."""
    with made_whole(place_of(file)) as half:
        joined([np.array(hashes, np.uint64)]).tofile(half)


def place_of(file: Path) -> Path:
    """Where the sample of an Arrow file is."""
    return file.with_suffix(".seen")


def packed(sample: np.ndarray, held_out: Iterable[str]) -> str:
    """A sample without the documents that were held out, as text. The last number says up to which hash it has all documents."""
    limit = sample[-1] if len(sample) == MOST else LARGEST
    kept = np.setdiff1d(sample, np.fromiter(map(_hash, held_out), np.uint64))
    return base64.b64encode(np.append(kept, limit).astype("<u8").tobytes()).decode()


def share_of(texts: Iterable[str], samples: Iterable[str]) -> float:
    """About which share of some documents, of 64 MB at most, is in the texts of which `packed` wrote samples."""
    known = [sample for one in samples if len(sample := _unpacked(one)) > 1]
    hashes, size = [], 0
    for text in texts if known else ():
        hashes.append(_hash(text))
        size += len(text)
        if size >= ENOUGH:
            break
    found = np.unique(np.array(hashes, np.uint64))
    limit = min((sample[-1] for sample in known), default=LARGEST)
    found = found[found <= limit]  # up to there all samples have all documents
    return float(np.isin(found, np.concatenate([sample[:-1] for sample in known])).mean()) if found.size else 0.0


def _unpacked(sample: str) -> np.ndarray:
    """Empty for one that is damaged."""
    with contextlib.suppress(ValueError, TypeError):
        return np.frombuffer(base64.b64decode(sample, validate=True), "<u8")
    return np.array([], np.uint64)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.strip().encode(errors="surrogatepass"))
