"""How fast is a step next to the authors' code? Forward and backward of whole CoLA and CoLA-M models on a CPU, fp32.

    git clone https://github.com/alvin-zyl/CoLA                       the authors' code, which has no licence: run it, copy nothing
    python -m venv theirs && theirs/bin/pip install torch==2.13.0 transformers==4.47.1 "numpy<3"
    OMP_NUM_THREADS=1 python benchmarks/authors.py CoLA theirs/bin/python [60m 130m] [--rounds 5]

Each model is in a process of its own, because the two need different versions of transformers; they take turns, step by step. Weights
and batches are equal, and so must losses be. Ours has the loss without logits, as in `lorank pretrain`. Seconds are of processor time, so
with one thread other programs count little; ratios are between medians, and between the shortest times as a check. Kept in
results/authors.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from turns import ratios

FILE = Path(__file__).with_name("results") / "authors.json"
BATCH, LENGTH = 2, 256
KINDS = ("cola", "cola-m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("python", type=Path, help="of the environment in which the authors' code runs")
    parser.add_argument("sizes", nargs="*", default=["60m", "130m"])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    for size in asked.sizes:
        kept = json.loads(FILE.read_text()) if FILE.exists() else {}
        with tempfile.TemporaryDirectory() as folder:
            kept[size] = {**compared(asked, size, Path(folder)), "rounds": asked.rounds, "torch": torch.__version__}
        print(size, json.dumps(kept[size]))
        FILE.write_text(json.dumps(kept, indent=2) + "\n")


def compared(asked: Any, size: str, folder: Path) -> dict[str, Any]:
    """Times of theirs over ours, of both kinds."""
    programs = {"ours": sys.executable, "theirs": str(asked.python)}
    processes = {}
    for kind in KINDS:
        for whose, python in programs.items():  # ours writes the weights
            command = [python, __file__, "work", whose, kind, size, str(asked.clone), str(folder)]
            environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") if whose == "ours" else ""}
            processes[kind, whose] = process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
    times: dict[tuple[str, str], list[float]] = {key: [] for key in processes}
    losses = {}
    for round_ in range(asked.rounds + 1):
        for key, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            print(round_, file=process.stdin, flush=True)
            seconds, losses[key] = map(float, process.stdout.readline().split())
            if round_:  # warm
                times[key].append(seconds)
    for process in processes.values():
        process.communicate("")
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    found = {f"{kind}, theirs / ours": ratios(times[kind, "theirs"], times[kind, "ours"]) for kind in KINDS}
    return {"loss": round(losses["cola", "ours"], 4), **found}


# ---- in a process


def work(whose: str, kind: str, size: str, clone: str, folder: str) -> None:
    """Print "ready", then for each line of input the seconds and the loss of one step."""
    build: Any = ours if whose == "ours" else theirs
    step = build(kind, size, Path(folder) / f"{kind}.safetensors", clone)
    ids = torch.randint(32_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        loss = step(ids)
        loss.backward()
        print(time.process_time() - start, loss.item(), flush=True)


def ours(kind: str, size: str, file: Path, clone: str) -> Any:
    from step import build

    from lorank.loss import next_token_loss
    from lorank.speed.allocator import keep_freed_memory

    keep_freed_memory()
    model = build(kind, size)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)

    def step(ids: torch.Tensor) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss: torch.Tensor = next_token_loss(model, {"input_ids": ids, "labels": ids}).total
        return loss

    return step


def theirs(kind: str, size: str, file: Path, clone: str) -> Any:
    sys.path.insert(0, clone)
    from cola import ColaConfig, ColaForCausalLM, ColaMForCausalLM  # type: ignore[import-not-found]

    settings = json.loads(Path(clone, f"cola_configs/{kind.replace('-', '')}_{size}.json").read_text())
    model = (ColaMForCausalLM if kind == "cola-m" else ColaForCausalLM)(ColaConfig(**{**settings, "use_cache": False}))
    last = model.config.num_hidden_layers - 1
    model.load_state_dict({renamed(name, kind, last): tensor_of(name, t) for name, t in load_file(file).items()})
    model.train()

    def step(ids: torch.Tensor) -> Any:
        model.zero_grad(set_to_none=True)
        return model(input_ids=ids, labels=ids).loss

    return step


HOMES = {
    "cola": {
        **dict.fromkeys("qkvo", ("self_attn", "self_attn")),
        **dict.fromkeys(("gate", "up", "down"), ("mlp", "mlp")),
    },
    "cola-m": {
        **dict.fromkeys("qkv", ("pre_attn", "self_attn")),
        "o": ("self_attn", "post_attn"),
        **dict.fromkeys(("gate", "up"), ("pre_mlp", "self_mlp")),
        "down": ("self_mlp", "last_layer_post_mlp"),
    },
}
"""Where their models have A and B of a projection."""


def renamed(name: str, kind: str, last: int) -> str:
    """Their name of our weight. In their CoLA-M a block's last B is in the next block, but in the `last` block that block's own."""
    found = re.match(r"model\.layers\.(\d+)\.\w+\.(\w+)_proj\.([AB])\.weight$", name)
    if found is None:
        return name
    block, projection, factor = int(found[1]), found[2], found[3]
    home = HOMES[kind][projection]["AB".index(factor)]
    if home == "last_layer_post_mlp":
        block, home = (block, "post_mlp") if block == last else (block + 1, home)
    half = {"cola": "", "cola-m": "pre_" if factor == "A" else "post_"}[kind]
    return f"model.layers.{block}.{home}.{half}{projection}_proj.cola_{factor.lower()}"


def tensor_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Their factors are transposed."""
    return tensor.T.contiguous() if re.search(r"_proj\.[AB]\.weight$", name) else tensor


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["work"] else main()
