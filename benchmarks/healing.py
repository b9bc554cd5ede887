"""Does a causal model that is compressed and healed beat one of the same size that is trained from new weights?

    python benchmarks/healing.py > benchmarks/results/healing.txt

For each seed a dense Llama of two blocks is trained on bytes of Python's standard library, fitted at half of the matrices' parameters
(`lorank compress --method svd`), and trained on for EXTRA steps. From new weights, models of the same form and ranks are trained for as
many steps, at two learning rates of which the better one counts, and for as many as dense training and healing have together. All
runs read the same text in the same order; perplexities are per byte, on text that none is trained on.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from lorank.train.compress import Job, compress_folder
from lorank.train.data.files import embedded_files
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain

SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE, EXTRA = 300, 100
"""Steps of the dense model, and after it."""
COMMON: dict[str, Any] = {
    "tokenizer": "bytes",
    "sequence_length": 64,
    "batch_size": 8,
    "eval_every": 0,
    "save_every": 0,
    "validation_tokens": 16_000,
}


def text(folder: Path, files: int = 60) -> Path:
    """A part of the standard library, in a folder."""
    folder.mkdir()
    for number, file in enumerate([one for one in sorted(embedded_files()) if one.suffix == ".py"][::9][:files]):
        (folder / f"{number}.txt").write_text(file.read_text(encoding="utf-8", errors="replace"), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"steps: dense {DENSE}, then {EXTRA}; {COMMON['sequence_length'] * COMMON['batch_size']} tokens each")
    columns = ("dense", "compressed", "healed", f"new, {EXTRA}", f"new, {DENSE + EXTRA}")
    print("seed" + "".join(f"{name:>12}" for name in columns) + "  parameters", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = str(text(folder / "text"))
        for seed in options.seeds:

            def run(
                name: str, method: Any, steps: int, lr: float, seed: int = seed, shape: Any = SHAPE, start: Any = None
            ) -> Any:
                given = {"start_from": start} if start else {"shape": shape}
                recipe = Recipe(
                    **{**COMMON, **given, "tokenizer": None if start else "bytes"},
                    data=data,
                    method=method,
                    steps=steps,
                    warmup_steps=steps // 10,
                    lr=lr,
                    seed=seed,
                    data_seed=0,
                )
                return pretrain(recipe, folder / f"{seed}-{name}", on_cpu=True)

            dense = run("dense", "dense", DENSE, 3e-3)
            small = folder / f"{seed}-small"
            found = compress_folder(
                Job(model=str(folder / f"{seed}-dense"), budget="0.5", tokens=20_000, eval_tokens=8_000), small
            )
            ranks = dict(AutoConfig.from_pretrained(small).lorank["arguments"]["rank"]["in_order"])
            healed = run("healed", "low-rank", EXTRA, 1e-3, start=str(small))
            low = {"low-rank": {"rank": ranks}}
            new = min(
                (run(f"new-{lr}", low, EXTRA, lr) for lr in (3e-3, 1e-2)), key=lambda one: one.validation_perplexity
            )
            long = run("long", low, DENSE + EXTRA, 3e-3)
            assert healed.parameters == new.parameters == long.parameters
            row = [dense.validation_perplexity, found["after"]["perplexity"]]
            row += [one.validation_perplexity for one in (healed, new, long)]
            rows.append(row)
            print(f"{seed:4}" + "".join(f"{x:12.3f}" for x in row) + f"  {new.parameters:,}", flush=True)
    print("mean" + "".join(f"{statistics.fmean(column):12.3f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    main()
