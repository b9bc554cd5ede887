"""EGG, an int8 recurrent language model, learns bytes without a gradient: how far, against counts of single bytes and pairs.

    python benchmarks/egg_demo.py                         # calendars and names of Latin characters
    for corpus in calendar latin docstrings embedded; do python benchmarks/egg_demo.py $corpus; done > benchmarks/results/egg_demo.txt

Corpora: `calendar`, years 1000 to 2999 as Python's own `calendar` prints them; `latin`, the names that Unicode gives to Latin
characters, 32 to a document; `docstrings`, those of Python's standard library; `embedded`, its sources, the default corpus of
`lorank pretrain`. A fifth of the documents is held out, of `embedded` what `lorank pretrain` holds out. The model and the entropies are measured on the same validation bytes, in rows of 256 that begin without a
state. The entropies are those of these very bytes, so that a table of pairs that had seen them beforehand could do no better than
the second.
"""

import argparse
import ast
import calendar
import contextlib
import json
import math
import shutil
import sys
import sysconfig
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lorank.evolution.egg_model import EggConfig, EggForCausalLM
from lorank.evolution.integers import IntegerEggroll
from lorank.train import run
from lorank.train.data import collate, load_corpus
from lorank.train.evaluation import evaluate
from lorank.train.folder import history
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model

SETTINGS: dict[str, dict[str, Any]] = {
    "calendar": {"gradient.group_size": 2, "batch_size": 1024, "optimizer.fall": 2.5},
    "latin": {"gradient.group_size": 32, "batch_size": 64, "optimizer.fall": 3.0},  # a small text: few and long lanes
    "docstrings": {"gradient.group_size": 8, "batch_size": 256, "optimizer.fall": 2.5},
    "embedded": {"gradient.group_size": 8, "batch_size": 256, "optimizer.fall": 2.5},
}
COMMON = {
    "shape.hidden_size": 16,
    "gradient.population": 2048,
    "gradient.chunk": 1024,
    "sequence_length": 16,
    "eval_every": 0,
    "save_every": 0,
}


def documents(name: str) -> Iterator[str]:
    if name == "calendar":
        yield from map(calendar.TextCalendar().formatyear, range(1000, 3000))
    elif name == "latin":
        names = [unicodedata.name(chr(i), "") for i in range(sys.maxunicode)]
        names = [name for name in names if name.startswith("LATIN ")]
        yield from ("\n".join(names[i : i + 32]) + "\n" for i in range(0, len(names), 32))
    else:
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if not {"site-packages", "test", "tests", "idle_test"} & set(file.parts):
                with contextlib.suppress(SyntaxError, ValueError), warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(file.read_text(encoding="utf-8"))
                    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
                    if text := "\n".join(filter(None, found)):
                        yield f"{text}\n"


def entropies(rows: torch.Tensor) -> tuple[float, float]:
    """Bits of a byte, and of a byte after the one before it, over the predicted bytes of rows [n, T]."""
    pairs = torch.bincount((rows[:, :-1] * 256 + rows[:, 1:]).flatten(), minlength=65_536).double()
    pairs /= pairs.sum()
    first, second = pairs.view(256, 256).sum(1), pairs.view(256, 256).sum(0)
    bits = lambda p: -(p[p > 0] * p[p > 0].log2()).sum().item()  # noqa: E731
    return bits(second), bits(pairs) - bits(first)


def in_turns_with(name: str) -> float:
    """Time of a step as written over that of a compiled one, in turns, at the demo's sizes: the least of five each."""
    recipe = Recipe.read("egg").but({**COMMON, **SETTINGS[name]})
    rows = torch.randint(1, 128, (recipe.batch_size, recipe.sequence_length))
    least = {}
    options = recipe.gradient["eggroll"]  # type: ignore[index]
    for _ in range(5):
        for compiled in (False, True):
            if compiled not in least:
                torch.manual_seed(0)
                model = EggForCausalLM(EggConfig(**recipe.shape))
                least[compiled] = (IntegerEggroll(model, **options, compile=compiled), math.inf)
                least[compiled][0](rows)  # warms up
            estimate, best = least[compiled]
            start = time.perf_counter()
            estimate(rows)
            least[compiled] = (estimate, min(best, time.perf_counter() - start))
    return least[False][1] / least[True][1]


def learn(name: str, steps: int, folder: str, compiled: bool) -> None:
    data, validation = "embedded", None
    if name != "embedded":
        data, validation = f"{folder}/{name}.jsonl", f"{folder}/{name}-held-out.jsonl"
        texts = [json.dumps({"text": text}) + "\n" for text in documents(name)]
        Path(validation).write_text("".join(texts[::5]))
        Path(data).write_text("".join(text for i, text in enumerate(texts) if i % 5))
    changes = {"data": data, "validation": validation, "steps": steps, "compile": compiled}
    recipe = Recipe.read("egg").but({**COMMON, **SETTINGS[name], **changes, "log_every": max(1, steps // 30)})
    corpus = load_corpus(data, validation=validation, tokenizer="bytes", sequence_length=256, seed=recipe.seed)
    single, pair = entropies(torch.tensor(corpus.validation["input_ids"]))
    start = time.perf_counter()
    summary = run.pretrain(recipe, f"{folder}/{name}")
    seconds = time.perf_counter() - start
    assert summary is not None
    model, _ = load_model(f"{folder}/{name}")
    bits = evaluate(
        model, DataLoader(corpus.validation, 512, collate_fn=partial(collate, vocab_size=256))
    ).loss / math.log(2)  # type: ignore[arg-type]
    options = {"hidden_size": recipe.shape["hidden_size"], **recipe.gradient["eggroll"]}  # type: ignore[index]
    fall = recipe.optimizer["votes"]["fall"]  # type: ignore[index]
    print(f"{corpus.description.replace(folder + '/', '')}; {options}, {steps} steps of {recipe.batch_size} x")
    print(f"{recipe.sequence_length} bytes, fall {fall}; {summary.parameters:,} parameters, all int8")
    records = [record for record in history(f"{folder}/{name}") if "loss_nats_per_token" in record]
    for record in records[len(records) // 6 - 1 :: max(1, len(records) // 6)]:
        print(
            f"  step {record['step']:5}  {record['loss_nats_per_token'] / math.log(2):.3f} bits per byte, of the members"
        )
    tokens = len(corpus.validation) * 255
    print(f"{tokens:,} bytes of validation text: {bits:.3f} bits per byte; one byte {single:.3f}, pairs {pair:.3f}")
    below = "below the pairs" if bits < pair else "NOT below the pairs"
    print(f"{below}; {seconds:.0f} s, {torch.get_num_threads()} threads{', compiled' if compiled else ''}")
    print(f"it writes: {summary.sample!r}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*", default=["calendar", "latin"], metavar="CORPUS")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    if unknown := set(arguments.corpora) - set(SETTINGS):
        parser.error(f"no corpus is named {unknown.pop()}; there are {', '.join(SETTINGS)}")
    compiled = shutil.which("c++") is not None
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.corpora:
            learn(name, arguments.steps, folder, compiled)
    if compiled:
        print(
            f"a step as written takes {in_turns_with(arguments.corpora[0]):.1f} times that of a compiled one, in turns in one process"
        )


if __name__ == "__main__":
    main()
