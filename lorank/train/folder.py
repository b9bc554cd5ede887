"""The folder of a run: prepared, read back, and its checkpoints."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import pickle
import re
import statistics
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from lorank.distributed.saving import OPTIMIZER, OPTIMIZER_FILE, WEIGHTS
from lorank.train.data.files import would_read
from lorank.train.data.sources import weighted
from lorank.train.methods import schedule_of, with_changed_defaults
from lorank.train.recipe import Recipe
from lorank.train.world import is_first
from lorank.train.yamls import load
from lorank.whole import cleared

logger = logging.getLogger(__name__)
STAGING = ".saving"
"""Folder of a run in which a checkpoint is written before it is moved to its name."""
SUMS = "SHA256SUMS"
"""File of a checkpoint with the checksums of the others."""
STATE: Mapping[str, Any] = {
    "global_step": int,
    "max_steps": int,
    "train_batch_size": int,
    "log_history": list,
    "stateful_callbacks": dict,
}
"""What a run that goes on takes from trainer_state.json."""
LOADED = (".safetensors", ".pt", ".pth")
"""Ends of names of files with weights and states."""
LOCK = ".lock"
"""File that the one process holds which writes into a folder."""


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it, so that it is never half written. Names of files that are not
    UTF-8 are written with escapes."""
    temporary = cleared(path.with_name(f".{path.name}.part"))
    with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    os.replace(temporary, path)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, so that the run can be resumed from anywhere."""
    changes: dict[str, Any] = {
        name: absolute_name(value)
        for name in ("validation", "tokenizer", "model", "start_from")
        if (value := getattr(recipe, name)) is not None
    }
    if recipe.distil is not None:
        name, _ = weighted(recipe.distil)
        changes["distil"] = absolute_name(name) + recipe.distil[len(name) :]
    if isinstance(recipe.data, str):
        return dataclasses.replace(recipe, data=absolute_name(recipe.data), **changes)
    several = [(source, *weighted(source)) for source in recipe.data]
    return dataclasses.replace(
        recipe, data=[absolute_name(name) + source[len(name) :] for source, name, _ in several], **changes
    )


def absolute_name(name: str) -> str:
    """A path that exists, or that something matches, from the root; any other name as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name != "embedded" and (os.path.exists(path) or glob.glob(path)) else name


def check_apart(out: Path, *data: str | list[str] | None) -> None:
    """ValueError if what is written to a folder would be read as part of some text: then the text would be another one when a run goes on,
    and for all other runs."""
    for source in (one for some in data if some is not None for one in ([some] if isinstance(some, str) else some)):
        if source != "embedded" and would_read(weighted(source)[0], out):
            raise ValueError(
                f"--out must be outside of the text, because its files would be read as text from then on, got {out} in {source!r}; choose "
                "another --out, or one whose name begins with a dot"
            )


def prepare_folder(out: Path, resume: bool) -> None:
    """Make a run's folder and check that it can be written to, by libraries that need names in UTF-8 too."""
    try:
        str(out).encode()
        os.fsencode(out)
    except UnicodeEncodeError:
        raise ValueError(
            f"--out must be a name that is UTF-8 in this locale (LC_ALL, PYTHONUTF8), got {str(out)!a}; choose another name"
        ) from None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, got {out}, a file")
    if not resume and (out / "recipe.yaml").exists():
        raise ValueError(f"{out} already contains a run; continue it with --resume {out}, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=out) as probe:  # better now than after an hour
            probe.write(b"lorank")
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}") from None


@contextlib.contextmanager
def locked(out: Path, *, keep: bool = False) -> Iterator[None]:
    """ValueError if another process is inside for the same folder; of those of a distributed run the first is inside for all. `keep` leaves
    the file there, as a sign that lorank made the folder."""
    lock = FileLock(out / LOCK, timeout=0)
    if is_first():
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{out} is in use by another process; wait until it ends, or stop it and try again"
            ) from None
        cleared(out / STAGING)  # of a process that was killed while it saved
    try:
        yield
    finally:
        if lock.is_locked and not keep:
            (out / LOCK).unlink(missing_ok=True)
        lock.release()


def write_sums(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files next to them, as ``sha256sum --check`` reads them."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file != checkpoint / SUMS)
    lines = [f"{_sha256(file)}  {file.relative_to(checkpoint).as_posix()}\n" for file in files]
    (checkpoint / SUMS).write_text("".join(lines), encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _changed_file(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint that is not as it was written; None also if no checksums were. Files that somebody has put there
    have none, but what a run is continued from must have one."""
    sums = checkpoint / SUMS
    if not sums.exists():
        return None
    summed = set()
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        wanted, _, name = line.partition("  ")
        file, inside = checkpoint / name, Path(name)
        if inside.is_absolute() or ".." in inside.parts or not file.is_file() or _sha256(file) != wanted:
            return file if name else sums
        summed.add(file)
    continued = {file for file in checkpoint.rglob("*") if file.suffix in LOADED or file.name == "trainer_state.json"}
    return sums if continued - summed else None


def checkpoints(out: Path) -> list[Path]:
    """Those of a run, the newest last. What has another name, as a copy that somebody keeps, is none."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted(found, key=step_of)


def last_whole_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint whose files can all be read and are as they were written; None if there is none at all. Those that are
    skipped are logged.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
    """
    reasons = []
    for path in reversed(checkpoints(out)):
        if damaged := _damaged_file(path):
            reasons.append(f"{damaged.name} is missing or damaged")
        elif changed := _changed_file(path):
            reasons.append(f"{changed.name} is not as it was written")
        else:
            return path
        logger.warning("%s is skipped: %s", path, reasons[-1])
    if reasons:
        raise ValueError(
            f"{out} has no checkpoint that is whole (in the newest, {reasons[0]}); restore one, or remove {out}/checkpoint-* to begin anew"
        )
    return None


@contextlib.contextmanager
def only_tensors(checkpoint: Path | None) -> Iterator[None]:
    """Around reading a checkpoint: ValueError names the file that holds more than tensors and numbers, which torch does not load."""
    try:
        yield
    except pickle.UnpicklingError:
        if checkpoint is None:
            raise
        file = next((file for file in sorted(checkpoint.glob("*.pt*")) if not _is_tensors(file)), checkpoint)
        raise ValueError(
            f"{file} must hold tensors and numbers alone, but it may hold code, which lorank does not run; remove "
            f"{checkpoint} to continue from an earlier checkpoint"
        ) from None


def _is_tensors(file: Path) -> bool:
    try:
        with safe_globals():
            torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.partition("-")[2])


def logged_rate(out: Path) -> float | None:
    """The median tokens per second in a run's metrics.jsonl, None if it has none."""
    rates = [record["tokens_per_second"] for record in history(out) if "tokens_per_second" in record]
    return statistics.median(rates) if rates else None


def read_json(path: Path, **kinds: Any) -> dict[str, Any]:
    """A JSON file of a run, with entries of these types; ValueError if it cannot be read or has others."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); the run cannot be resumed without it") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must hold names and values, got {type(found).__name__}; restore it, or begin another run"
        )
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{path} is damaged: it has no proper {name!r}; restore it, or begin another run")
    return found


def _damaged_file(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint that is missing or truncated, or whose state is no state of this step."""
    state = checkpoint / "trainer_state.json"
    try:
        read = TrainerState.load_from_json(str(state))
    except (OSError, ValueError, TypeError, RecursionError):
        return state
    proper = all(isinstance(getattr(read, name), kind) for name, kind in STATE.items())
    if not proper or read.global_step != step_of(checkpoint) or "TrainerControl" not in read.stateful_callbacks:  # type: ignore[operator]
        return state
    tensors = [*checkpoint.rglob("*.safetensors")] or [checkpoint / "model.safetensors"]
    for file in tensors:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return file
    several = checkpoint / OPTIMIZER_FILE  # processes have written it
    if several.exists() and not all(any((checkpoint / part).glob("*.safetensors")) for part in (WEIGHTS, OPTIMIZER)):
        return checkpoint / WEIGHTS
    needed = {checkpoint / name for name in ("scheduler.pt", *([] if several.exists() else ["optimizer.pt"]))}
    needed |= set(checkpoint.glob("rng_state*.pth")) or {checkpoint / "rng_state.pth"}
    return next((file for file in sorted(needed | {*checkpoint.glob("*.pt*")}) if not zipfile.is_zipfile(file)), None)


def read_run(folder: str | Path) -> Recipe:
    """The recipe of a run on disk; ValueError if there is none, or if it was changed since the run began."""
    folder = Path(folder).expanduser()
    path = folder / "recipe.yaml"
    if not path.exists():
        raise ValueError(f"{folder} contains no run to resume: {path} does not exist")
    recipe = read_recipe(path)
    saved = read_json(folder / "run.json", recipe=dict | None).get("recipe")
    if saved:
        first = Recipe.from_dict({**ONCE, **saved})
        began, now = first.to_dict(), recipe.to_dict()
        changed = [name for name in now if began[name] != now[name]]
        if changed and not (recipe.steps > first.steps and recipe == longer(first, recipe.steps)):
            raise ValueError(
                f"{path}: {changed[0]} was {began[changed[0]]!r} when the run began; restore it, or start another run with --out"
            )
    return with_changed_defaults(recipe, began=True)


ONCE: Mapping[str, Any] = {"validation_tokens": None}
"""Settings that a run of lorank 0.1 does not name, as they were."""


def read_recipe(path: Path) -> Recipe:
    """The recipe that a run has written; errors are those of `Recipe.read`."""
    recipe, named = Recipe.read(path), load(path.read_text(encoding="utf-8"))
    return dataclasses.replace(recipe, **{name: value for name, value in ONCE.items() if name not in named})


def longer(recipe: Recipe, steps: int) -> Recipe:
    """The recipe of a run that goes on to more steps. Its schedule stays as it is, so that no step that has been done changes; after its
    end the learning rate stays where it has ended.

    Raises:
        ValueError: `steps` are not more, or the learning rate is 0 in all of them.
    """
    if steps <= recipe.steps:
        raise ValueError(f"steps must be above {recipe.steps}, which the run has already, got {steps}")
    found = dataclasses.replace(recipe, steps=steps, schedule_steps=recipe.scheduled)
    schedule = schedule_of(found)
    if all(schedule(step) < 1e-5 for step in range(recipe.steps, steps)):  # some begin a cycle with nearly 0
        raise ValueError(
            f"min_lr_ratio must be above 0 to train a run longer, because its learning rate stays as it is after step {recipe.scheduled}, got 0"
        )
    return found


def history(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    with (Path(folder) / "metrics.jsonl").open("rb") as file:
        yield from (record for line in file if (record := record_of(line)) is not None)


def record_of(line: bytes) -> dict[str, Any] | None:
    """What a line of metrics.jsonl holds; None for one that is half written, because the process died, or that was damaged since."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
