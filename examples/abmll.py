"""ABMLL: from tasks with few examples to a new one.

python examples/abmll.py [ROUNDS]     (60 rounds take ten seconds on a CPU)

A task is to say of pairs of numbers whether the first is at least t, with another t for each task: eight pairs are given, and the
rest is asked for. A start that was learned over other tasks is compared with an untrained one, after the same steps.
"""

import sys

import torch
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.adapters.abmll import gaussian, kl, sampled, towards
from lorank.adapters.perk import written

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 60
STEPS, RATE, OUTER, BETA, BATCH, RANK, OFFSET, M = 5, 0.3, 0.2, 1e-7, 2, 4, -12.0, 8

torch.manual_seed(0)
shape = LlamaConfig(vocab_size=M, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(shape)
draw = torch.Generator().manual_seed(1)
rows = torch.cartesian_prod(torch.arange(M), torch.arange(M))


def loss_of(weights, limit: int | None, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of the answers to these rows, and how often they are right; without a limit they are sums."""
    logits = functional_call(model, weights, (), {"input_ids": rows[chosen]}).logits[:, -1]
    first, second = rows[chosen].T
    wanted = (first + second) % M if limit is None else (first >= limit).long()
    return torch.nn.functional.cross_entropy(logits, wanted), (logits.argmax(1) == wanted).float().mean()


# A base that knows something else: sums.
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
for _ in range(150):
    optimizer.zero_grad()
    loss_of({}, None, torch.arange(len(rows)))[0].backward()
    optimizer.step()

dense = {name: p.detach() for name, p in model.named_parameters() if "proj" in name}


def pairs(seed: int) -> dict[str, torch.Tensor]:
    """Two pairs for each matrix: B and A of the mean, D and C of the variance."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, W in dense.items():
        for B, A in ("BA", "DC"):
            made[f"{name} {B}"] = torch.zeros(len(W), RANK)
            made[f"{name} {A}"] = torch.randn(RANK, W.shape[1], generator=generator) * W.shape[1] ** -0.5
    return made


def distributions(phi) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    given = {name: [phi[f"{name} {side}"] for side in "BADC"] for name in dense}
    return {n: gaussian(dense[n], (B, A), (D, C), scale=1.0, offset=OFFSET) for n, (B, A, D, C) in given.items()}


def adapted(theta, limit: int, chosen: torch.Tensor):
    """The pairs of a task after its inner steps."""
    prior = distributions(theta)

    def loss(phi) -> torch.Tensor:
        q = distributions(phi)
        weights = {name: sampled(*q[name]) for name in dense}
        divergence = torch.stack([kl(*q[name], *prior[name]) for name in dense]).sum()
        return loss_of(weights, limit, chosen)[0] + BETA * divergence

    return written(loss, theta, [RATE] * STEPS, kept=0)


def right(theta) -> float:
    """Of the pairs that were not shown, by the mean weights after ten tasks."""
    found, generator = 0.0, torch.Generator().manual_seed(2)
    for task in range(10):
        limit, order = 2 + task % 5, torch.randperm(len(rows), generator=generator)
        phi = adapted(theta, limit, order[:8])
        means = {name: mu for name, (mu, _) in distributions(phi).items()}
        found += loss_of(means, limit, order[8:])[1].item() / 10
    return found


theta = pairs(0)
print(f"right answers: {right(theta):.0%} from an untrained start")
for _ in range(ROUNDS):
    tasks = []
    for limit in torch.randint(2, 7, (BATCH,), generator=draw).tolist():
        tasks.append(adapted(theta, limit, torch.randperm(len(rows), generator=draw)[:32]))
    towards(theta, tasks, OUTER)
print(f"right answers: {right(theta):.0%} from the start that was learned")
