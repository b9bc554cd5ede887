"""Run by test_engines.py: a run in one process, and the same one by several in turn; says what it found as JSON."""

import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

from lorank import accounting
from lorank.train import run
from lorank.train.engine import Engine
from lorank.train.folder import history
from lorank.train.recipe import Recipe
from tests.distributed.together import together

SHAPE = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 45, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # type: ignore[dict-item]
SETTINGS: dict[str, Any] = {"tokenizer": "bytes", "vocab_size": 300, "sequence_length": 16, "batch_size": 4, "rank": 6}
SETTINGS |= {"micro_batch_size": 1}  # so that several processes sum micro-batches too
SETTINGS |= {"steps": 6, "warmup_steps": 1, "lr": 1e-2, "log_every": 1, "eval_every": 0, "save_every": 2, "keep": 9}
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "two by fsdp": (2, {"fsdp": True}),
    "two by tensor parallel": (2, {"tensor_parallel": 2}),
    "four by both": (4, {"fsdp": True, "tensor_parallel": 2}),
}
STREAMED = ("two, four, one",)
"""Chains whose text is read while they train."""
CHAINS: dict[str, Sequence[str]] = {
    "two, one, two": ("two by tensor parallel", "one", "two by fsdp"),
    "two, four, one": ("two by fsdp", "four by both", "one"),
}
"""By which processes a run is trained for two steps each, and then killed; the last ones end it."""


class Kill(TrainerCallback):
    """Kills the last process; one alone leaves by an error."""

    def __init__(self, step: int):
        self.step, self.at = step, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.at = time.monotonic()
            if args.world_size == 1:
                raise MemoryError("killed by the test")
            if args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)


def trained(recipe: Recipe, out: Path, engine: str, *, resume: bool = False, stop: int | None = None) -> list[Any]:
    """What each process held of all parameters, and with what it ended; at `stop` the last process is killed."""
    processes, settings = ENGINES[engine]

    def one() -> Any:
        os.environ |= {"LOCAL_RANK": os.environ["RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
        shares, kill, said = Shares(), Kill(stop or 0), ""
        callbacks: list[TrainerCallback] = [shares, *([] if stop is None else [kill])]
        try:
            run.pretrain(recipe, out, on_cpu=True, resume=resume, callbacks=callbacks, engine=Engine(**settings))
        except (MemoryError, ConnectionError) as error:
            assert stop is not None and time.monotonic() - kill.at < 60, "the others end soon"
            said = str(error)
        return {"held": shares.held, "said": said}

    return together(one, processes, killed=int(stop is not None and processes > 1))


class Shares(TrainerCallback):
    held = 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parts = [getattr(p, "_local_tensor", p).numel() for p in model.parameters()]
        self.held = sum(parts) / sum(p.numel() for p in model.parameters())


def losses(out: Path) -> list[float]:
    return [one["loss_nats_per_token"] for one in history(out) if "loss_nats_per_token" in one]


def apart(one: Path, other: Path) -> dict[str, float]:
    """The largest differences of losses, relative, and of weights."""
    weights = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights[0].keys() == weights[1].keys()
    return {
        "losses": max(abs(a - b) / a for a, b in zip(losses(one), losses(other), strict=True)),
        "weights": max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]),
    }


def alone_in_this_process() -> None:
    """Quiet, and without what takes longer than the steps; not at import, since pytest imports this file too."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    accounting.flops_per_token = lambda *_, **__: 1.0  # type: ignore[assignment]
    accounting.achievable_flops = lambda: (1e12, "assumed")  # type: ignore[assignment]
    run.generate_text = lambda *_, **__: ""  # type: ignore[assignment]
    torch.set_num_threads(1)


def main(folder: Path, name: str) -> dict[str, Any]:
    lines = [f"line {i}: {i * i} lazy dogs\n" for i in range(100)]
    (folder / "texts").mkdir()
    for start in range(0, 100, 10):
        (folder / f"texts/{start}.txt").write_text("".join(lines[start : start + 10]))
    (folder / "config.json").write_text(json.dumps(SHAPE))
    recipe = Recipe(data=str(folder / "texts"), model=str(folder / "config.json"), stream=name in STREAMED, **SETTINGS)
    run.pretrain(recipe, folder / "alone", on_cpu=True)  # in this process, so that others find everything imported
    ends, chain = {}, CHAINS[name]
    for i, engine in enumerate(chain):
        last = i == len(chain) - 1
        ends[engine] = trained(recipe, folder / "run", engine, resume=i > 0, stop=None if last else 2 * i + 3)
    files = [sorted(p.name for p in (folder / run).iterdir() if p.is_file()) for run in ("alone", "run")]
    return {**apart(folder / "alone", folder / "run"), "ends": ends, "same files": files[0] == files[1]}


if __name__ == "__main__":
    alone_in_this_process()
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
