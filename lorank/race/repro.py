"""Named reproductions: the whole run of a paper's recipe against the paper's figure, and its first steps against a curve.

A reproduction has the recipe of its name in recipes/, a line of `PUBLISHED`, and a curve of first steps in recipes/ that
`benchmarks/first_steps.py` has recorded. The whole run takes a GPU, C4 and hours. The first steps take seconds on any
CPU: the recipe in miniature, on a text that is the same everywhere, with all that a method does between steps inside.
What the miniature changes is listed by `differences`; whatever is not in that list is the recipe's.
"""

import calendar
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from lorank.sizes import SIZES
from lorank.fields import unknown
from lorank.train import run
from lorank.train.data import cache_folder
from lorank.train.folder import absolute, history, read_run
from lorank.train.model import written_out
from lorank.train.recipe import Recipe, recipe_file

# ---------------------------------------------------------------------------------------------------------------------
# What the papers report
# ---------------------------------------------------------------------------------------------------------------------

IN_FULL = 0.035
"""Tolerance where a paper gives all settings, relative: groups that report the same baseline differ by up to 3.3 %. GaLore
at 350M is 18.95 in its own paper and 19.58 in SwitchLoRA's (as its reviewers quote it), at 130M 25.36 and 25.93; full rank
at 130M is 25.08 for GaLore and Fira, 24.36 for SLTrain and CoLA."""
IN_PART = 0.10
"""Tolerance where the learning rate or something as weighty is not known: a rate 1.5 to 2.3 times the best one costs a
dense model 9 to 10 % in our own sweep (benchmarks/results/demo_sweep.txt)."""


class Published(NamedTuple):
    """What is known of a run's end: C4 validation perplexity by the papers' evaluator, sum of N batch losses / (N + 1)."""

    perplexity: float | None
    """None: nothing is published at this size on C4."""
    tolerance: float | None
    """Relative, to both sides; None: a figure to look at, which this recipe is not expected to give."""
    source: str
    remark: str = ""


PUBLISHED = {
    "60m-dense": Published(34.06, IN_PART, "GaLore, 2403.03507", "learning rate and clip are not known"),
    "60m-cola": Published(34.04, IN_FULL, "CoLA, 2502.10940"),
    "60m-cola-m": Published(34.04, IN_FULL, "CoLA, 2502.10940", "CoLA's figure: the gradients are the same"),
    "60m-low-rank": Published(
        78.18,
        None,
        "GaLore, 2403.03507",
        "another initialisation, and an unknown learning rate",
    ),
    "60m-crnet": Published(
        32.76, IN_PART, "CR-Net, 2509.18993", "as notes on the paper have it; most settings are not known"
    ),
    "60m-sltrain": Published(34.15, IN_FULL, "SLTrain, 2406.02214", "quoted from memory of the paper"),
    "60m-relora": Published(37.04, IN_PART, "GaLore, 2403.03507", "learning rate, clip and cycle are not known"),
    "60m-switchlora": Published(None, None, "SwitchLoRA, 2406.06564", "publishes no 60M"),
    "60m-sst": Published(None, None, "SST, 2405.15481", "publishes no 60M"),
    "60m-masa": Published(None, None, "MASA, 2508.04581", "publishes no 60M, and trains on RefinedWeb"),
    "60m-galore": Published(34.88, IN_FULL, "GaLore, 2403.03507"),
    "60m-fira": Published(
        31.06, IN_PART, "Fira, 2410.01623", "of the paper's algorithm or of its code's, that is not known"
    ),
    "60m-dct-adamw": Published(None, None, "DCT-AdamW, 2505.17967", "publishes no 60M"),
    "60m-trion": Published(None, None, "Trion, 2505.17967", "publishes no 60M"),
}
"""By name, SIZE-METHOD. EGGROLL has none: nobody has trained a 60M Llama without gradients, and a step costs it a forward pass
for each member of its population; EGG is no Llama. Above 60M papers evaluate on several GPUs, which moves N and the figure."""


# ---------------------------------------------------------------------------------------------------------------------
# Names and files
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A recipe with what is expected of it."""

    name: str
    recipe: Recipe
    published: Published
    curve_file: Path


def find(name: str) -> Reproduction:
    """The reproduction of a name, SIZE-METHOD, or METHOD-SIZE as its recipe is called; ValueError that lists them all."""
    method, _, size = name.rpartition("-")
    if size not in SIZES:
        size, _, method = name.partition("-")
    if (title := f"{size}-{method}") not in PUBLISHED:
        raise ValueError(unknown("reproduction", name, list(PUBLISHED)))
    file = recipe_file(method, size)  # CoLA-M must have the curve of CoLA
    recipe = dataclasses.replace(Recipe.read(file), method=method)
    return Reproduction(title, recipe, PUBLISHED[title], file.with_suffix(".json"))


# ---------------------------------------------------------------------------------------------------------------------
# The whole run
# ---------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """A finished run beside what is published."""

    perplexity: float
    """By the papers' evaluator."""
    unbiased: float
    evaluations: list[tuple[int, float]]
    """(step, perplexity by the papers' evaluator) on the way."""
    expected: Published

    @property
    def difference(self) -> float | None:
        """Relative to the published figure."""
        return None if self.expected.perplexity is None else self.perplexity / self.expected.perplexity - 1

    @property
    def within(self) -> bool | None:
        """None: there is nothing to judge by."""
        if self.difference is None or self.expected.tolerance is None:
            return None
        return abs(self.difference) <= self.expected.tolerance


def reproduce(
    name: str, out: str | Path, callbacks: Sequence[TrainerCallback] = (), *, micro_batch_size: int | None = None
) -> Outcome | None:
    """Run a reproduction in the folder `out`, or go on with it where it stopped, and judge it; None if a signal stopped it.

    Args:
        micro_batch_size: another one than the recipe's, for less memory; sums of gradients stay what they are.

    Raises:
        ValueError: unknown name, or `out` holds another run or lacks files of its own.
        OSError, FloatingPointError: as `lorank.train.run.pretrain`.
    """
    out, reproduction = Path(out), find(name)
    recipe = reproduction.recipe
    if micro_batch_size is not None:
        recipe = dataclasses.replace(recipe, micro_batch_size=micro_batch_size)
    begun = (out / "recipe.yaml").exists()
    if begun:
        found = read_run(out)
        if micro_batch_size is None:
            recipe = dataclasses.replace(recipe, micro_batch_size=found.micro_batch_size)
        _check_same(out, name, found.to_dict(), absolute(recipe).to_dict())
    if not (begun and (out / "summary.json").exists()) and not run.pretrain(
        recipe, out, resume=begun, callbacks=callbacks
    ):
        return None
    return judge(reproduction, out)


def _check_same(out: Path, name: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for setting, value in wanted.items():
        if found[setting] != value:
            raise ValueError(
                f"{out} holds another run: its {setting} is {found[setting]!r}, that of {name} is {value!r}; give another --out"
            )


def judge(reproduction: Reproduction, out: Path) -> Outcome:
    """A finished run's figures, as the recipe's micro-batch gives them (N counts batches, so the figure depends on their
    size); ValueError if a file is missing or cannot be read."""
    try:
        end = json.loads((out / "summary.json").read_text())
        records = [record for record in history(out) if "eval_perplexity" in record]
        micro = read_run(out).micro_batch_size or reproduction.recipe.batch_size
        part = micro / (reproduction.recipe.micro_batch_size or reproduction.recipe.batch_size)
        on_the_way = [
            (
                r["step"],
                r["eval_published_compatible_perplexity"] * _correction(r["eval_perplexity"], r["eval_batches"], part),
            )
            for r in records
        ]
        loss, biased = math.log(end["validation_perplexity"]), math.log(end["published_compatible_perplexity"])
        batches = biased / (loss - biased)  # as loss · N / (N + 1) = biased
        perplexity = math.exp(biased) * _correction(math.exp(loss), batches, part)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        name = getattr(error, "filename", None)
        reason = f"{Path(name).name} is missing" if isinstance(error, FileNotFoundError) and name else repr(error)
        raise ValueError(f"{out} cannot be judged: {reason}; put it back, or run again with another --out") from None
    if not on_the_way:
        raise ValueError(f"{out} cannot be judged: metrics.jsonl has no evaluation; run again with another --out")
    return Outcome(perplexity, math.exp(loss), on_the_way, reproduction.published)


def _correction(perplexity: float, batches: float, part: float) -> float:
    """Makes of exp(l N / (N + 1)) what it were with N · part batches."""
    wanted = batches * part
    return math.exp(math.log(perplexity) * (wanted / (wanted + 1) - batches / (batches + 1)))


# ---------------------------------------------------------------------------------------------------------------------
# The first steps
# ---------------------------------------------------------------------------------------------------------------------

STEPS = 24
WIDTH, MLP_WIDTH, BLOCKS, HEADS = 64, 172, 2, 4
TOLERANCE = 0.003
"""Relative, of every loss: four times what another CPU's instructions move any curve by, but for those whose basis is a
singular value decomposition. benchmarks/results/first_steps.txt has the measurements, and what faults do."""
WIDER = {"galore": 0.01, "fira": 0.01}
"""The same by method, where it is not `TOLERANCE`."""
ACTS: dict[str, dict[str, Any]] = {
    "galore": {"update_gap": 6},
    "fira": {"update_gap": 6},
    "relora": {"cycle": 2, "restart_warmup_steps": 1},
    "switchlora": {"interval": 2, "freeze_steps": 1},
    "sst": {"interval": 2, "restart_warmup_steps": 1},
}
"""Options with which it happens within `STEPS` what a method does now and then, often enough to be seen in the losses: GaLore
and Fira change their basis three times, ReLoRA merges eleven times, SwitchLoRA exchanges vectors in the first few steps, SST
draws eleven times and decomposes once on the way."""


class Curve(NamedTuple):
    """Losses in nats per token: of each step before its update, then of the validation text after the last one."""

    losses: list[float]
    text: str
    """Hash of the text."""
    versions: dict[str, str]


@functools.cache
def months() -> list[str]:
    """The text of the first steps, a document a month: forty years as Python's `calendar` prints them.

    The embedded corpus would not do: it is the interpreter's own library, of which every version of Python has another.
    """
    return [calendar.TextCalendar().formatmonth(year, month) for year in range(1980, 2020) for month in range(1, 13)]


def text_hash() -> str:
    return hashlib.blake2b("\0".join(months()).encode(), digest_size=8).hexdigest()


def miniature(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe at a size of seconds; its text and its model's shape are written to `folder`.

    Ranks keep their part of the width, warm-up its part of the steps, and alpha its ratio to the rank.
    """
    full = written_out(recipe)
    width = SIZES[recipe.size].hidden_size
    options = {**full.options, **ACTS.get(full.method, {})}
    if "alpha" in options:
        options["alpha"] = options["alpha"] * WIDTH / width
    shape = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": month}) + "\n" for month in months())
    for name, text in (("config.json", json.dumps(shape)), ("months.jsonl", data)):
        if not (folder / name).exists() or (folder / name).read_text() != text:
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as part:  # several may be at it
                part.write(text)
            os.replace(part.name, folder / name)
    return dataclasses.replace(
        full,
        model=str(folder / "config.json"),
        rank=full.rank / width if isinstance(full.rank, int) else full.rank,
        options=options,
        data=str(folder / "months.jsonl"),
        tokenizer="bytes",
        vocab_size=None,
        sequence_length=64,
        batch_size=8,
        micro_batch_size=8,
        steps=STEPS,
        warmup_steps=max(1, round(full.warmup_steps * STEPS / full.steps)),
        log_every=1,
        eval_every=0,
        save_every=0,
    )


def differences(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Every setting in which the miniature is not its recipe, options by their own names: (recipe's, miniature's)."""
    shape = SIZES[recipe.size]
    small = miniature(recipe, text_folder())
    before, after = ({**r.to_dict(), **r.options} for r in (written_out(recipe), small))
    changed = {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}
    del changed["model"], changed["data"]
    changed.pop("options", None)
    return {
        "width, MLP, blocks, heads": (shape[:4], (WIDTH, MLP_WIDTH, BLOCKS, HEADS)),
        "data": (recipe.data, f"{len(months())} months of the calendar"),
        **changed,
    }


def text_folder() -> Path:
    """Where the text and the shape of miniatures are kept from one to the next."""
    return cache_folder() / "first-steps"


def first_steps(recipe: Recipe, threads: int = 1) -> Curve:
    """Run the miniature of a recipe, on the CPU wherever it is; so small, a second thread would only wait.

    Raises:
        KeyboardInterrupt: a signal stopped it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(prefix="lorank-") as folder:
            summary = run.pretrain(miniature(recipe, text_folder()), folder, on_cpu=True)
            if summary is None:
                raise KeyboardInterrupt
            losses = [r["loss_nats_per_token"] for r in history(folder) if "loss_nats_per_token" in r]
    finally:
        torch.set_num_threads(before)
    return Curve([*losses, summary.validation_loss_nats_per_token], text_hash(), versions())


def versions() -> dict[str, str]:
    """Of what may change numbers from one release to the next."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def recorded(reproduction: Reproduction) -> Curve:
    """The curve that is kept beside the recipe; ValueError if it is missing or of another text than `months` gives here."""
    file = reproduction.curve_file
    try:
        curve = Curve(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{reproduction.name} has no curve of first steps: {file} cannot be read ({error})") from None
    if curve.text != text_hash():
        raise ValueError(
            f"this Python prints other calendars than the one that {file.name} was recorded with, so first steps cannot be "
            f"compared; take Python {curve.versions['python']}"
        )
    return curve


def tolerance_of(recipe: Recipe) -> float:
    return WIDER.get(recipe.method, TOLERANCE)


def deviation(found: Curve, expected: Curve) -> tuple[float, int]:
    """The largest relative difference of a loss, and its step (`STEPS` + 1: the validation text); infinite for another
    number of losses or one that is no number."""
    if len(found.losses) != len(expected.losses):
        return math.inf, min(len(found.losses), len(expected.losses)) + 1
    apart = [abs(ours / theirs - 1) for ours, theirs in zip(found.losses, expected.losses, strict=True)]
    worst = max(range(len(apart)), key=lambda i: math.inf if math.isnan(apart[i]) else apart[i])
    return math.inf if math.isnan(apart[worst]) else apart[worst], worst + 1
