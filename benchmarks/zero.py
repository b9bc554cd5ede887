"""Training under DeepSpeed's ZeRO: losses of two processes next to those of one, and which optimizers refuse.

    pip install deepspeed==0.19.8
    python benchmarks/zero.py

Every run has the same weights and the same global batch, in float32 on CPUs. DeepSpeed is called by itself, because accelerate
1.15 counts one process where there is no accelerator. What is compared with has no DeepSpeed in it.
"""

import json
import os
import subprocess
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import lorank

STEPS, BATCH = 20, 4
METHODS: dict[str, Any] = {
    "dense": None,
    "cola": lorank.CoLA(rank=16),
    "cola-m": lorank.CoLAM(rank=16),
    "low-rank": lorank.LowRank(rank=16),
}
REFUSED = ("galore", "fira", "muon", "spectron")
SHOWN = "losses "


def losses(method: str, optimizer: str, stage: int) -> list[float]:
    """Of the global batch, before each step; `stage` 0 is without DeepSpeed, in one process."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(shape)
    if METHODS[method] is not None:
        lorank.convert(model, METHODS[method])
    batches = (torch.randint(64, (STEPS * BATCH, 1)) + torch.arange(33)) % 64  # each token is followed by the next one
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    made = lorank.optimizer(model, optimizer, lr=3e-3, eps=1e-5)  # above the rounding of gradients, or Adam enlarges it
    if stage:
        settings = {
            "train_batch_size": BATCH,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,  # 1.0 if it is not given
            "zero_allow_untested_optimizer": True,
            "steps_per_print": STEPS + 1,
        }
        model, made, *_ = deepspeed.initialize(model=model, optimizer=made, config=settings)
    found = []
    for rows in batches.split(BATCH):
        part = rows[rank::processes]
        loss = model(input_ids=part, labels=part).loss
        whole = loss.detach() / processes
        if stage:
            dist.all_reduce(whole)
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            made.step()
            made.zero_grad()
        found.append(whole.item())
    return found


def run(method: str, optimizer: str, stage: int) -> list[float] | str:
    """`losses` in processes of their own, or the sentence in which the optimizer refuses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={2 if stage else 1}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, method, optimizer, str(stage)], env=env, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(SHOWN)]
    if found:
        return json.loads(found[0].removeprefix(SHOWN))
    refused = [line for line in done.stderr.splitlines() if "ValueError: " in line]
    return refused[0].partition("ValueError: ")[2] if refused else sys.exit(done.stderr[-4000:])


def main() -> None:
    for method in METHODS:
        plain = torch.tensor(run(method, "adamw", 0))
        for stage in (2, 3):
            under = torch.tensor(run(method, "adamw", stage))
            gap = ((under - plain).abs() / plain).max()
            print(
                f"{method}, adamw, ZeRO-{stage}: losses from {under[0]:.4f} to {under[-1]:.4f}, at most {gap:.1e} from those of one process",
                flush=True,
            )
    for optimizer in REFUSED:
        for stage in (2, 3):
            print(f"cola, {optimizer}, ZeRO-{stage}: {run('cola', optimizer, stage)}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        method, optimizer, stage = sys.argv[1:]
        measured = losses(method, optimizer, int(stage))
        if os.environ["RANK"] == "0":
            print(SHOWN + json.dumps(measured), flush=True)
