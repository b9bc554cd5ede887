"""Memory and files of a long run: ten thousand tiny steps, with evaluations, checkpoints and log lines.

    python benchmarks/long_run.py [--steps 10000]

Resident memory is read after the first tenth of the run, when everything has been used once, and then at each tenth.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from lorank.train import run
from lorank.train.recipe import Recipe

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}


class Memory(TrainerCallback):
    """Resident MiB at each tenth of a run."""

    def __init__(self, steps: int):
        self.every, self.mib = steps // 10, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.mib.append(psutil.Process().memory_info().rss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("".join(f"line {i}: {i * i} lazy dogs\n" for i in range(2000)))
        recipe = Recipe(
            data=str(text),
            tokenizer="bytes",
            vocab_size=300,
            shape={**SHAPE, "num_key_value_heads": 1},
            rank=4,
            sequence_length=8,
            batch_size=2,
            steps=steps,
            eval_every=steps // 10,
            eval_tokens=64,
            save_every=steps // 10,
            log_every=10,
        )
        memory = Memory(steps)
        run.pretrain(recipe, Path(folder, "run"), callbacks=[memory], on_cpu=True)
        metrics = Path(folder, "run", "metrics.jsonl").stat().st_size
        last = max(Path(folder, "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        state = (last / "trainer_state.json").stat().st_size
        kept = len(json.loads((last / "trainer_state.json").read_text())["log_history"])
    print(f"{steps:,} steps of a tiny CoLA, {recipe.log_every} steps between log lines, on a CPU")
    print("resident MiB at each tenth:", ", ".join(f"{mib:.1f}" for mib in memory.mib))
    print(f"growth after the first tenth: {memory.mib[-1] - memory.mib[0]:.1f} MiB")
    print(f"metrics.jsonl: {metrics / 1024:.0f} KiB; trainer_state.json: {state / 1024:.0f} KiB, {kept} records")


if __name__ == "__main__":
    main()
