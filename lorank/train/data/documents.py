"""The documents of files, read once by all cores and kept in the cache by what the files contain.

    files  ->  groups of about 256 MB  ->  documents/KEY.arrow, or of a large file in parts documents/KEY.parts/NUMBER.arrow

A group's key is a hash of the content of its files, so a file that changed is read again, also if its size and its time did not
change; and of a corpus in many files, only the groups with changes. A large file with a row a line is read in parts by several
processes. If more than a few of its lines cannot be read, one process reads it from its beginning, to judge it as a whole.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import xxhash
from datasets import Dataset
from filelock import FileLock

from lorank.train.data.cache import use
from lorank.train.reading import BUFFER, FEW, INVALID_SHARE, Tally, cuts_of, kind_of, warn_of
from lorank.train.seen import joined, kept_sample
from lorank.train.texts import Found, Unit, attempted, state_of, write_unit
from lorank.train.watching import tell
from lorank.train.workers import Workers, cores
from lorank.whole import made_whole

VERSION = 3  # part of every cache key; raise it when the same file must give other documents
GROUP = 256 << 20  # bytes of files whose documents are cached together
PART = 64 << 20  # bytes of a large file that one process reads at once; with another number, raise VERSION
FEW_BYTES = 2 * PART  # read without other processes


class Group(NamedTuple):
    """Files whose documents are kept together."""

    files: list[Path]
    states: list[list[int]]
    """What they were like just before they were hashed."""
    digests: list[str]
    """Of their contents."""
    column: str
    key: str
    folder: Path
    """documents/ of the cache."""

    @property
    def kept(self) -> Path:
        return self.folder / f"{self.key}.arrow"

    @property
    def counts(self) -> Path:
        """Written last, if the group is in parts."""
        return self.kept.with_suffix(".json")

    @property
    def parts(self) -> Path:
        return self.kept.with_suffix(".parts")

    @property
    def whole(self) -> Unit:
        """All of it at once."""
        return Unit([*map(str, self.files)], self.states, None, self.column, str(self.kept))

    @property
    def is_done(self) -> bool:
        return self.kept.exists() or (self.parts.exists() and self.counts.exists())

    def units(self) -> list[Unit]:
        """What is read at once: the group, or the parts of its large files and what is between these."""
        units: list[Unit] = []
        cuts = [cuts_of(file, PART) for file in self.files]
        if all(len(found) == 2 for found in cuts):
            return [self.whole]
        for file, state, found in zip(map(str, self.files), self.states, cuts, strict=True):
            kept = str(self.parts / f"{len(units):05}.arrow")
            if len(found) > 2:
                for part in itertools.pairwise(found):
                    kept = str(self.parts / f"{len(units):05}.arrow")
                    units.append(Unit([file], [state], [*part], self.column, kept))
            elif units and units[-1].part is None:
                units[-1].files.append(file)
                units[-1].states.append(state)
            else:
                units.append(Unit([file], [state], None, self.column, kept))
        return units

    def arrows(self) -> list[Path]:
        return [self.kept] if self.kept.exists() else sorted(self.parts.glob("*.arrow"))

    def documents(self) -> Dataset:
        found = datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in self.arrows()])
        found._fingerprint = self.key  # what is made from them is known by what they contain
        return found


def read_documents(files: Sequence[Path], column: str, cache: Path) -> tuple[Dataset, Tally, list[str], np.ndarray]:
    """The documents of files in their order, one column, text; what was read and left out; the digests of the files' contents; and a
    sample of the documents' hashes, see `lorank.train.seen`.

    Raises:
        ValueError: a file holds no text, or not where it was looked for.
        OSError: a file or the cache failed, or a file changed meanwhile.
    """
    groups = list(_groups(files, column, cache / "documents"))
    for group in groups:
        use(group.kept)
    try:
        groups[0].folder.mkdir(parents=True, exist_ok=True)
        with FileLock(groups[0].kept.with_suffix(".lock")):  # one process of a node reads, the others wait
            missing = [group for group in groups if not group.is_done]
            if missing:
                _read(missing, sum(group.whole.size for group in groups))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(f"the disk of the cache {cache} is full; free some space or set XDG_CACHE_HOME") from error
        raise
    tallies = [Tally(**json.loads(group.counts.read_text())) for group in groups]
    documents = datasets.concatenate_datasets([group.documents() for group in groups])
    sample = joined(kept_sample(file) for group in groups for file in group.arrows())
    return documents, sum(tallies, Tally()), [digest for group in groups for digest in group.digests], sample


def _groups(files: Sequence[Path], column: str, folder: Path) -> Iterator[Group]:
    total, hashed = sum(state_of(file)[0] for file in files), 0
    for some in _divided(files):
        states, contents = [], []
        for file in some:
            states.append(state_of(file))
            contents.append((kind_of(file), file.suffix.lower(), _digest(file, hashed, total)))
            hashed += states[-1][0]
        key = hashlib.blake2b(repr((VERSION, column, contents)).encode(), digest_size=16).hexdigest()
        yield Group(some, states, [digest for _, _, digest in contents], column, key, folder)


def _divided(files: Iterable[Path]) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.stat().st_size
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def same_content(files: Iterable[Path], others: Iterable[Path], digests: Iterable[str] = ()) -> set[Path]:
    """Those of some files whose content is that of one of the others, or has one of these digests. Empty files are left out."""
    sizes = {file: file.stat().st_size for file in files}
    wanted = {size for size in sizes.values() if size}
    alike = [file for file in others if file.stat().st_size in wanted]
    known = {*digests, *(_digest(file, 0, file.stat().st_size) for file in alike)}
    return {file for file, size in sizes.items() if size and known and _digest(file, 0, size) in known}


def _digest(file: Path, done: int, total: int) -> str:
    """Of the whole content, at several GB a second: sizes and times of change do not tell whether a file is the same."""
    digest = xxhash.xxh3_128()
    with open(file, "rb", buffering=0) as stream:
        while part := stream.read(BUFFER):
            digest.update(part)
            done += len(part)
            tell("hashing", done, total, "B")
    return digest.hexdigest()


def _read(groups: Sequence[Group], total: int) -> None:
    """Read groups, unit by unit, and keep what was finished if it is interrupted. `total` are the bytes of all files."""
    units = {group.key: group.units() for group in groups}
    wanted = [unit for some in units.values() for unit in some]
    missing = [unit for unit in wanted if not Path(unit.kept).exists()]
    for unit in missing:
        Path(unit.kept).parent.mkdir(exist_ok=True)
    progress = _Progress(total, total - sum(unit.size for unit in missing))
    try:
        found = _found(missing, progress)
    finally:
        for unit in missing:  # of processes that were ended
            for half in Path(unit.kept).parent.glob(f".{Path(unit.kept).stem}.*"):
                half.unlink(missing_ok=True)
    for group in groups:
        some = units[group.key]
        if some == [group.whole]:
            _warn(found[some[0].kept].left_out)  # type: ignore[union-attr]
        elif not _accepted(some, found):
            shutil.rmtree(group.parts)
            _warn(write_unit(group.whole, lambda size: None).left_out)
        else:
            counts = sum((_counts(unit) for unit in some), Tally())
            with made_whole(group.counts) as half:
                half.write_text(json.dumps(dataclasses.asdict(counts)))


def _found(units: Sequence[Unit], progress: "_Progress") -> dict[str, Found | None]:
    """What was read of units, by their Arrow files."""
    count = min(cores(), len(units))
    if count < 2 or sum(unit.size for unit in units) < FEW_BYTES:
        found: dict[str, Found | None] = {}
        for number, unit in enumerate(units):
            found[unit.kept] = attempted(unit, lambda size, number=number: progress.tell(number, size))  # type: ignore[misc]
            progress.tell(number, unit.size)
        return found
    with tempfile.TemporaryDirectory(dir=Path(units[0].kept).parent, prefix=".reading-") as folder:
        Path(folder, "units.json").write_text(json.dumps(units))
        said = Workers("lorank.train.texts", Path(folder), progress.say, progress.tell).do(range(len(units)), count)
    answers = {units[number].kept: answer for number, answer in said.items()}
    return {kept: answer and Found(Tally(**answer[0]), answer[1]) for kept, answer in answers.items()}


def _counts(unit: Unit) -> Tally:
    return Tally(**json.loads(unit.counts.read_text()))


def _accepted(units: Sequence[Unit], found: Mapping[str, Found | None]) -> bool:
    """Whether what was read of the units of a group is what one process would have read; then it is warned of lines left out."""
    if any(unit.kept in found and found[unit.kept] is None for unit in units):
        return False
    left_out = [one for unit in units if (read := found.get(unit.kept)) for one in read.left_out]
    for file in {unit.files[0] for unit in units if unit.part}:
        counts = sum((_counts(unit) for unit in units if unit.part and unit.files[0] == file), Tally())
        lines = counts.documents + counts.empty + counts.invalid
        if counts.invalid > min(FEW, INVALID_SHARE * lines):
            return False
        if of_file := [one for one in left_out if one[0] == file]:
            left_out = [one for one in left_out if one[0] != file] + [[file, counts.invalid, lines, of_file[0][3]]]
    _warn(left_out)
    return True


def _warn(left_out: Iterable[Sequence[Any]]) -> None:
    for one in left_out:
        warn_of(*one)


class _Progress:
    """How much was read, told to whoever watches."""

    def __init__(self, total: int, before: int):
        self.total, self.before = total, before
        self.read: dict[int, int] = {}

    def say(self, number: int, size: int) -> None:
        self.read[number] = size

    def tell(self, number: int | None = None, size: int = 0) -> None:
        if number is not None:
            self.say(number, size)
        tell("reading", min(self.total, self.before + sum([*self.read.values()])), self.total, "B")
