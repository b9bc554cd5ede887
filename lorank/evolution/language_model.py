"""EGGROLL as the gradient of a causal language model: a member's fitness is its log-likelihood of the batch."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorank import accounting
from lorank.evolution.cost import in_words, step_memory
from lorank.evolution.eggroll import Eggroll
from lorank.evolution.noise import deal


class LanguageModelEggroll:
    """A `lorank.method.Gradient`: `Eggroll` whose fitness is minus the cross-entropy of a member on its rows of the batch."""

    carries = False

    def __init__(self, model: Any, estimate: Eggroll, batch_size: int, sequence_length: int):
        deal(torch.empty(batch_size, 1), estimate.population, estimate.group_size)  # refuses what does not divide
        self.model, self.estimate = model, estimate
        self.batch_size, self.sequence_length = batch_size, sequence_length

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Forward passes of all members that see a token."""
        forward = accounting.flops_per_token(self.model, self.sequence_length, batch=self.batch_size) / 3
        return forward * (self.estimate.group_size or self.estimate.population)

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        self.estimate.epoch = step
        return -self.estimate(self.fitness(batch)).mean()

    def fitness(self, batch: dict[str, Tensor]) -> Callable[[range], Tensor]:
        given = {name: deal(rows, self.estimate.population, self.estimate.group_size) for name, rows in batch.items()}

        def fitness(members: range) -> Tensor:
            rows = {name: rows_of(members).flatten(0, 1) for name, rows_of in given.items()}
            labels = rows.pop("labels")[:, 1:]
            logits = self.model(**rows, use_cache=False).logits[:, :-1]
            nats = F.cross_entropy(logits.mT.float(), labels, reduction="none").view(len(members), -1).sum(1)
            return -nats / (labels != -100).view(len(members), -1).sum(1)

        return fitness

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass

    # ---- what a step costs

    def step_cost(
        self, *, batch_size: int, sequence_length: int, optimizer_bytes: int, autocast: bool = False
    ) -> tuple[accounting.Flops, accounting.Memory]:
        """Counted on a twin without data that runs one chunk of members, each of whose pairs sees other rows.

        Forward is that of all members, the products of their noise included. There is no backward pass: in its place
        stands the product that makes G. Nothing is kept for it, so the peak is that of a chunk.
        """
        whole, model = self.estimate, self.model
        chunk = min(whole.chunk, whole.population)
        rows = batch_size * (whole.group_size or whole.population) // whole.population  # of each member
        one: dict[str, Any] = {"population": chunk, "group_size": 2, "chunk": chunk, "baseline": False}
        make = functools.partial(torch.zeros, chunk // 2 * rows, sequence_length, dtype=torch.int64)

        def forward(twin: Any) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                estimate = whole.on(twin, **one)
                with estimate.perturb(range(chunk)):
                    members = LanguageModelEggroll(twin, estimate, chunk // 2 * rows, sequence_length)
                    members.fitness({"input_ids": make(), "labels": make()})(range(chunk))

        def update(twin: Any) -> None:
            whole.on(twin, **one).write_gradients(torch.zeros(chunk))

        (products, most), (sums, most_of_update) = (accounting.measure_call(model, call) for call in (forward, update))
        gradients = sum(p.numel() * p.element_size() for p in whole.perturbed)
        when: Literal["forward", "step"] = "forward" if most >= most_of_update else "step"
        memory = step_memory(model, gradients, optimizer_bytes, max(most, most_of_update), when)
        return accounting.Flops(products * whole.population // chunk, sums * whole.population // chunk, 0), memory

    def moves(self, p: nn.Parameter) -> bool:
        return p in self.estimate.perturbed

    def treatment(self, name: str, p: nn.Parameter) -> str:
        if not self.moves(p):
            return "no noise, not stepped"
        names = [other for other, q in self.model.named_parameters(remove_duplicate=False) if q is p]
        also = f", also as {', '.join(names[1:])}" if names[1:] else ""
        kind = f"rank-{self.estimate.rank}" if p.ndim == 2 else "full"
        return f"{kind} noise, σ = {self.estimate.sigma:g}{also}"

    def describe(self) -> str:
        return in_words(self.estimate, self.batch_size, self.sequence_length, rank=self.estimate.rank)
