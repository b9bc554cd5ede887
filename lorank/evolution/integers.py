"""EGGROLL in integers: the noise is int8, and each pair of members has one vote on every weight.

    member 2k + (s < 0):  M x → (M x + ((x · B) A s >> (4 + sig)))        so that σ = 2^-sig, see `lorank.evolution.egg`
    F = sign(f of the first - f of the second)                             one of -1, 0, 1
    Z = Σ F A Bᵀ,  of vectors Σ F A B                                      over the K pairs

    Z [a, b] int32     A [K, a], B [K, b] int8: 16 N(0, 1) rounded towards zero

`lorank.evolution.votes` moves the weights by the votes Z.

Source: as `lorank.evolution.eggroll`, appendix H, and the authors' nano-egg.

Departures. Noise comes from seeds as in `lorank.evolution.eggroll`, not from a table of 2³⁰ bytes at hashed places.
A pair has no vote on the embeddings of bytes it did not read, which its noise cannot have helped: the authors count them.
"""

from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorank import accounting
from lorank.evolution.cost import in_words, step_memory
from lorank.evolution.egg import DOCUMENT_START, Noise, score, signs
from lorank.evolution.egg_model import EggForCausalLM
from lorank.evolution.noise import (
    check_population,
    check_whole,
    deal,
    over_processes,
    pair_noise,
)
from lorank.fields import Bounds, check_value
from lorank.optim.shards import processes

Exponent = Annotated[int, Bounds(least=0, most=27)]
COMPILED = 16
"""The narrowest model to compile. With torch 2.13, GCC 12 and AVX-512 a compiled `score` of width 8 wrote past the end of its result."""


class IntegerEggroll:
    """Puts the votes Z into `.grad` (int32) of an EGG model's parameters.

    Args:
        population: members N, an even number.
        sig: σ = 2^-sig.
        group_size: consecutive members that share data; 0: all do.
        carry: rows of a batch continue where the same rows of the batch before ended: each member keeps its states, and
            the last byte of a row predicts the first of the next.
        chunk: members in one forward pass, an even number.
        compile: let torch.compile fuse what lies between the products; the numbers are the same.

    Raises:
        ValueError: these numbers do not go together, a parameter is sharded, or `compile` with a model narrower than `COMPILED`.
    """

    def __init__(
        self,
        model: EggForCausalLM,
        *,
        population: int = 1024,
        sig: int = 4,
        group_size: int = 2,
        carry: bool = True,
        chunk: int = 512,
        compile: bool = False,
        seed: int = 0,
    ):
        check_population(population, group_size, chunk)
        check_value("sig", sig, Exponent)
        check_value("carry", carry, bool)
        for name, p in model.named_parameters():
            check_whole(p, name)
        if compile and (width := model.config.hidden_size) < COMPILED:
            raise ValueError(f"hidden_size must be at least {COMPILED} if compile is true, got {width}")
        self.model, self.population, self.sig, self.group_size = model, population, sig, group_size
        self.carry, self.chunk, self.seed, self.epoch = carry, chunk, seed, 0
        self.score: Any = torch.compile(score, dynamic=False) if compile else score
        self.perturbed = {p: index for index, p in enumerate(model.parameters())}
        self.left: dict[str, Tensor] = {}
        """What the last batch left if states are carried: "last" bytes [batch, 1], "states" [K, layers, R, D] int8."""

    def factors(self, p: nn.Parameter, pairs: range) -> tuple[Tensor, Tensor]:
        """A [pairs, a] and B [pairs, b] of a matrix, or two [pairs, a] of a vector: int8 values in float32."""
        a, b = p.shape if p.ndim == 2 else (p.numel(), p.numel())
        noise = pair_noise((self.seed, self.perturbed[p], self.epoch), pairs, a + b, p.device)
        noise = noise.mul_(16).trunc_().clamp_(-127, 127)
        return noise[:, b:], noise[:, :b]

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Count votes on bytes [batch, T], begin the next epoch, and return fitness [N] in sixteenths of a bit per byte.

        In a distributed run fitness is that over the batches of all processes, so that all count the same votes. With a
        group size the batch is dealt to the groups; its rows must be a multiple of them.
        """
        if self.carry:
            ids = self._continued(ids)
        data = deal(ids, self.population, self.group_size)
        self.votes = {p: torch.zeros(p.shape, dtype=torch.int32, device=p.device) for p in self.perturbed}
        found, left = [], []
        for start in range(0, self.population, self.chunk):
            members = range(start, min(start + self.chunk, self.population))
            pairs = range(members.start // 2, members.stop // 2)
            rows = data(members)  # [members, b, T]
            sign = signs(2 * rows.shape[1], ids.device)
            factors = {p: self.factors(p, pairs) for p in self.perturbed}
            noise = {p: Noise(A.int(), B, sign, 4 + self.sig) for p, (A, B) in factors.items()}
            states = None
            if "states" in self.left:
                states = [s.float() for s in self.left["states"][pairs.start : pairs.stop].unbind(1)]
            total, states = self.model.fitness(
                rows.view(len(pairs), -1, rows.shape[-1]), noise, states, score=self.score
            )
            left.append(torch.stack(states, dim=1).to(torch.int8))
            fitness = total.view(len(members), -1).sum(1)
            over_processes(fitness)
            found.append(fitness / (rows.shape[1] * (rows.shape[2] - 1) * processes()))
            vote = (fitness[0::2] - fitness[1::2]).sign().float()
            read = torch.zeros(len(pairs), 256, device=ids.device)
            read.scatter_(1, rows[:, :, :-1].reshape(len(pairs), -1), 1.0)
            over_processes(read, dist.ReduceOp.MAX)
            for p, (A, B) in factors.items():
                weighted = A * vote[:, None]
                if p is self.model.embedding:
                    weighted *= read
                # exact below 2²⁴: 1024 pairs at a time of the largest noise, 60,000 of the usual
                self.votes[p] += (weighted.T @ B if p.ndim == 2 else (weighted * B).sum(0)).int()
        if self.carry:
            self.left = {"last": ids[:, -1:].clone(), "states": torch.cat(left)}
        for p, Z in self.votes.items():
            p.grad_dtype = torch.int32
            p.grad = Z
        self.epoch += 1
        return torch.cat(found)

    def _continued(self, ids: Tensor) -> Tensor:
        """Rows with the byte before them; the first batch begins a document."""
        last = self.left.get("last", torch.full_like(ids[:, :1], DOCUMENT_START))
        if len(last) != len(ids):
            raise ValueError(
                f"a batch of {len(ids)} rows cannot continue one of {len(last)}; use carry=False where batches differ"
            )
        return torch.cat([last, ids], dim=1)


class EggEggroll:
    """A `lorank.method.Gradient`: the votes of `IntegerEggroll`. The loss is the members' integer likelihood in nats."""

    def __init__(self, estimate: IntegerEggroll, batch_size: int, sequence_length: int):
        deal(torch.empty(batch_size, 1), estimate.population, estimate.group_size)  # refuses what does not divide
        self.estimate, self.batch_size, self.sequence_length = estimate, batch_size, sequence_length
        estimate.model.voting_pairs = estimate.population // 2

    @property
    def flops_per_token(self) -> float:
        """Forward passes of all members that see a token."""
        return self.estimate.model.flops_per_token() * (self.estimate.group_size or self.estimate.population)

    @property
    def carries(self) -> bool:
        return self.estimate.carry

    def __call__(self, batch: dict[str, Tensor], step: int) -> Tensor:
        self.estimate.epoch = step
        return -self.estimate(batch["input_ids"]).mean() / 16 * torch.log(torch.tensor(2.0))

    def state_dict(self) -> dict[str, Tensor]:
        return self.estimate.left

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.estimate.left = {name: t.to(self.estimate.model.device) for name, t in state.items()}

    def step_cost(
        self, *, batch_size: int, sequence_length: int, optimizer_bytes: int, autocast: bool = False
    ) -> tuple[accounting.Flops, accounting.Memory]:
        """Counted on a twin without data that runs one chunk of members, each of whose pairs sees other rows. Forward is
        the products of all members, and what stands for backward are the votes."""
        whole, model = self.estimate, self.estimate.model
        chunk = min(whole.chunk, whole.population)
        rows = batch_size * (whole.group_size or whole.population) // whole.population  # of each member

        def votes(twin: Any) -> None:
            one = IntegerEggroll(
                twin, population=chunk, group_size=2, chunk=chunk, sig=whole.sig, carry=whole.carry, seed=whole.seed
            )
            one(torch.zeros(chunk // 2 * rows, sequence_length, dtype=torch.int64))

        everything, most = accounting.measure_call(model, votes)
        products = model.flops_per_token() * chunk * rows * (sequence_length - 1 + whole.carry)
        if whole.carry:  # the states of all members
            most += (whole.population - chunk) * rows * model.config.num_hidden_layers * model.config.hidden_size
        gradients = 4 * sum(p.numel() for p in whole.perturbed)
        forward, counts = (n * whole.population // chunk for n in (products, everything - products))
        return accounting.Flops(forward, counts, 0), step_memory(model, gradients, optimizer_bytes, most, "forward")

    def moves(self, p: nn.Parameter) -> bool:
        return p in self.estimate.perturbed

    def treatment(self, name: str, p: nn.Parameter) -> str:
        return f"{'rank-1' if p.ndim == 2 else 'full'} int8 noise, σ = 2^-{self.estimate.sig}"

    def describe(self) -> str:
        return in_words(self.estimate, self.batch_size, self.sequence_length, rank=1, per_entry=2)
