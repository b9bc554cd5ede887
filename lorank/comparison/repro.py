"""Named reproductions: the whole run of a paper's recipe, compared with the paper's figure.

A reproduction has the recipe of its name in recipes/ and next to it a JSON file with what is published of it and with a curve
of its first steps (`lorank.comparison.first_steps`). The whole run needs a GPU, C4 and hours; the first steps run in seconds on any CPU.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from lorank.accelerators import Fleet, find_accelerator
from lorank.fields import unknown
from lorank.plan.counts import count
from lorank.sizes import SIZES
from lorank.table import METHODS, names_joined
from lorank.train import run
from lorank.train.folder import absolute, history, read_run
from lorank.train.methods import resolved, title_of
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe
from lorank.train.shipped import recipe_file

# ---- what the papers report

IN_FULL = 0.035
"""Relative tolerance if a paper gives all settings: groups that report the same baseline differ by up to 3.3 %. GaLore at
350M is 18.95 in its own paper and 19.58 in SwitchLoRA's (as its reviewers quote it), at 130M 25.36 and 25.93; full rank at
130M is 25.08 for GaLore and Fira, 24.36 for SLTrain and CoLA."""
IN_PART = 0.10
"""Relative tolerance if the learning rate or something as important is not known: a rate 1.5 to 2.3 times the best one
costs a dense model 9 to 10 % in our own sweep (benchmarks/results/demo_sweep.txt)."""


class Published(NamedTuple):
    """What is known about a run's end: C4 validation perplexity by the papers' evaluator, sum of N batch losses / (N + 1)."""

    perplexity: float | None
    """None: nothing is published at this size on C4."""
    tolerance: float | None
    """Relative, to both sides; None: a figure for orientation, which this recipe is not expected to reach."""
    source: str
    remark: str = ""


TOLERANCES = {"all": IN_FULL, "some": IN_PART, "none": None}
"""By how many of a run's settings its paper gives, as the file of the curve says. "none": the figure is for orientation."""


# ---- names and files


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A recipe, and what is expected of it."""

    name: str
    recipe: Recipe
    published: Published
    curve_file: Path


@functools.cache
def names() -> tuple[str, ...]:
    """METHOD-SIZE, in the order of the methods' table, of all that have a recipe with a curve at 60M. EGGROLL has none: nobody has trained
    a 60M Llama without gradients, and each step needs a forward pass for each member of its population; EGG is not a Llama. Above 60M
    papers evaluate on several GPUs, which changes N and the figure."""
    size = "60m"
    return tuple(f"{method}-{size}" for method in METHODS if curve_file(method, size).exists())


def curve_file(method: str, size: str) -> Path:
    """What is published of a recipe, and its first steps."""
    return recipe_file(method, size).with_suffix(".json")


def find(name: str) -> Reproduction:
    """The reproduction called METHOD-SIZE, as its recipe, or SIZE-METHOD as in 0.2; ValueError that lists all names."""
    method, _, size = name.rpartition("-")
    if size not in SIZES:
        size, _, method = name.partition("-")
    if (title := f"{method}-{size}") not in names():
        raise ValueError(unknown("reproduction", name, names()))
    recipe, file = Recipe.read(recipe_file(method, size)), curve_file(method, size)
    known = json.loads(file.read_text(encoding="utf-8"))["published"]
    published = Published(known["perplexity"], TOLERANCES[known["settings"]], known["source"], known["remark"])
    if method not in names_joined(title_of(recipe)):  # CoLA-M has the recipe of CoLA, and must have its curve
        recipe = dataclasses.replace(recipe, method=method)
        published = published._replace(remark="CoLA's figure: the gradients are the same")
    return Reproduction(title, recipe, published, file)


# ---- the whole run


def listing() -> list[dict[str, Any]]:
    """Every reproduction by name: how many tokens it trains on (padding included), and what is published."""
    found = [find(name) for name in names()]
    return [{"name": one.name, "positions": _positions(one.recipe), **one.published._asdict()} for one in found]


def card(one: Reproduction) -> dict[str, Any]:
    """The settings of a reproduction, what its run needs, and what is expected."""
    recipe = dataclasses.replace(one.recipe, tokenizer=None)  # its vocabulary is written in the recipe
    counts = count(recipe, empty_model(recipe))
    flops, h100 = counts.flops_per_token * _positions(recipe), find_accelerator("h100")
    return {
        "name": one.name,
        "settings": {name: value for name, value in one.recipe.to_dict().items() if value not in (None, [], {})},
        "micro_batch_size": recipe.micro_batch_size,
        "peak_bytes": counts.memory.peak_bytes,
        "flops": flops,
        "accelerator": h100.name,
        "hours": Fleet(accelerator=h100, devices=1).run(flops, recipe.precision).hours,
        **one.published._asdict(),
    }


def _positions(recipe: Recipe) -> int:
    return recipe.steps * recipe.batch_size * recipe.sequence_length


def reproduce(
    name: str, out: str | Path, callbacks: Sequence[TrainerCallback] = (), *, micro_batch_size: int | None = None
) -> dict[str, Any] | None:
    """Run a reproduction in the folder `out`, or continue it where it stopped, and `judge` it; None if a signal stopped it.

    Args:
        micro_batch_size: instead of the recipe's, to need less memory; sums of gradients stay the same.

    Raises:
        ValueError: unknown name, or `out` holds another run or some of its files are missing.
        OSError, FloatingPointError: as `lorank.train.run.pretrain`.
    """
    out, reproduction = Path(out), find(name)
    recipe = reproduction.recipe
    if micro_batch_size is not None:
        recipe = dataclasses.replace(recipe, micro_batch_size=micro_batch_size)
    begun = (out / "recipe.yaml").exists()
    if begun:
        found = read_run(out)
        recipe = dataclasses.replace(recipe, validation_tokens=found.validation_tokens)
        if micro_batch_size is None:
            recipe = dataclasses.replace(recipe, micro_batch_size=found.micro_batch_size)
        _check_same(out, name, resolved(found).to_dict(), absolute(resolved(recipe)).to_dict())
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


def judge(reproduction: Reproduction, out: Path) -> dict[str, Any]:
    """A finished run's figures next to the published ones, for batches of the recipe's size (N counts batches, so the
    figure depends on their size).

    Returns:
        perplexity (by the papers' evaluator), unbiased, evaluations [(step, perplexity by the papers' evaluator)],
        difference (relative to the published figure) and within (None: there is nothing to judge by), and the fields of
        `Published` under "published".

    Raises:
        ValueError: a file is missing or cannot be read.
    """
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
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        name = getattr(error, "filename", None)
        reason = f"{Path(name).name} is missing" if isinstance(error, FileNotFoundError) and name else repr(error)
        raise ValueError(f"{out} cannot be judged: {reason}; restore it, or run again with another --out") from None
    if not on_the_way:
        raise ValueError(f"{out} cannot be judged: metrics.jsonl has no evaluation; run again with another --out")
    return outcome(perplexity, math.exp(loss), on_the_way, reproduction.published)


def outcome(
    perplexity: float, unbiased: float, evaluations: Sequence[tuple[int, float]], expected: Published
) -> dict[str, Any]:
    """See `judge`."""
    difference = None if expected.perplexity is None else perplexity / expected.perplexity - 1
    judged = difference is not None and expected.tolerance is not None
    return {
        "perplexity": perplexity,
        "unbiased": unbiased,
        "evaluations": list(evaluations),
        "difference": difference,
        "within": abs(difference) <= expected.tolerance if judged else None,  # type: ignore[arg-type, operator]
        "published": expected._asdict(),
    }


def _correction(perplexity: float, batches: float, part: float) -> float:
    """exp(l N / (N + 1)) as it would be with N · part batches."""
    wanted = batches * part
    return math.exp(math.log(perplexity) * (wanted / (wanted + 1) - batches / (batches + 1)))
