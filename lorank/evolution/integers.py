"""EGGROLL in integers: the noise is int8, a pair has one vote, and a weight moves by one where the votes are clear.

    member 2k + (s < 0):  M x → (M x + ((x · B) A s >> (4 + sig)))        so that σ = 2^-sig, see `lorank.evolution.egg`
    F = sign(f of the first - f of the second)                             one of -1, 0, 1
    Z = Σ F A Bᵀ,  of vectors Σ F A B                                      over the K pairs
    Θ ← clip(Θ + (1 where Z > 0, else -1))  where  16 |Z| ≥ q ⌊√K⌋ 256,    q = ⌊16 Φ⁻¹(1 - α/2)⌋

    Θ [a, b] int8     Z [a, b] int32     A [K, a], B [K, b] int8: 16 N(0, 1) rounded towards zero

α is the fraction of the weights that would move if fitness were noise; it takes the learning rate's place, and falls as
1 / ((2^flag - 1) t / 1000 + 1) if the flag is above 1 (4 was the paper's best). At t = 0 it is 1, q is 0 and all weights move.

Source: as `lorank.evolution.eggroll`, appendix H, and the authors' nano-egg.

Departures. Noise comes from seeds as in `lorank.evolution.eggroll`, not from a table of 2³⁰ bytes at hashed places.
A pair has no vote on the embeddings of bytes it did not read, which its noise cannot have helped: the authors count them.
"""

from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.evolution.egg import DOCUMENT_START, EggForCausalLM, Noise, score, signs
from lorank.evolution.eggroll import check_population, check_whole, over_processes, pair_noise
from lorank.optim.shards import processes


def alpha_at(step: int, flag: float) -> float:
    """The fraction of weights moved by noise alone; ValueError for a flag beyond [0, 64].

    >>> round(alpha_at(10, 4), 4), round(alpha_at(999, 4), 5), alpha_at(999, 0.25)
    (0.8696, 0.06256, 0.25)
    """
    if not 0 <= flag <= 64:
        raise ValueError(
            f"the flag of α, which is lr, is {flag}; give a part of the weights up to 1, or above 1 how fast it falls: 4"
        )
    return flag if flag <= 1 else 1 / ((2**flag - 1) * step / 1000 + 1)


def threshold(alpha: float) -> int:
    """q.

    >>> [threshold(alpha_at(step, 4)) for step in (0, 10, 100, 999)]
    [0, 2, 13, 29]
    """
    return int(16 * NormalDist().inv_cdf(1 - alpha / 2))


class IntegerEggroll:
    """Puts the votes Z into `.grad` (int32) of an EGG model's parameters.

    Args:
        population: members N, an even number.
        sig: σ = 2^-sig.
        group_size: members in a row that share data; 0: all do.
        carry: rows of a batch go on where the same rows of the batch before ended: each member keeps its states, and the last
            byte of a row predicts the first of the next.
        chunk: members in one forward pass, an even number.
        compile: let torch.compile fuse what comes between the products; the numbers are the same.
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
        check_population(population, group_size, chunk, sig=sig, carry=carry)
        if not 0 <= sig < 28:
            raise ValueError(f"sig={sig} is not between 0 and 27; the noise is 2**-sig")
        for name, p in model.named_parameters():
            check_whole(p, name)
        self.model, self.population, self.sig, self.group_size = model, population, sig, group_size
        self.carry, self.chunk, self.seed, self.epoch = carry, chunk, seed, 0
        self.score: Any = torch.compile(score, dynamic=False) if compile else score
        self.perturbed = {p: index for index, p in enumerate(model.parameters())}
        self.left: dict[str, Tensor] = {}
        """What the last batch left, where states are carried: "last" bytes [batch, 1], "states" [K, layers, R, D] int8."""

    def factors(self, p: nn.Parameter, pairs: range) -> tuple[Tensor, Tensor]:
        """A [pairs, a] and B [pairs, b] of a matrix, or two [pairs, a] of a vector: int8 values in float32."""
        a, b = p.shape if p.ndim == 2 else (p.numel(), p.numel())
        noise = pair_noise((self.seed, self.perturbed[p], self.epoch), pairs, a + b, p.device)
        noise = noise.mul_(16).trunc_().clamp_(-127, 127)
        return noise[:, b:], noise[:, :b]

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Votes on bytes [batch, T], begin the next epoch, and return fitness per member [N], in sixteenths of a bit a byte.

        In a distributed run it is that over the batches of all processes, so that all count the same votes.
        With a group size the batch is dealt to the groups, which are as many as its rows or a divisor of them.
        """
        if self.carry:
            ids = self._go_on(ids)
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

    def _go_on(self, ids: Tensor) -> Tensor:
        """Rows with the byte before them; what begins, begins a document."""
        last = self.left.get("last", torch.full_like(ids[:, :1], DOCUMENT_START))
        if len(last) != len(ids):
            raise ValueError(
                f"a batch of {len(ids)} rows does not go on from one of {len(last)}; give carry=False where batches differ"
            )
        return torch.cat([last, ids], dim=1)


def deal(batch: Tensor, population: int, group_size: int) -> Callable[[range], Tensor]:
    """Which rows of a batch [rows, T] a range of members sees: [members, rows of each, T].

    Raises:
        ValueError: the groups cannot be given equally many rows.
    """
    groups = population // group_size if group_size else 1
    if len(batch) % groups:
        raise ValueError(
            f"{len(batch)} sequences are not dealt evenly to {groups} groups; take batch_size={groups} or a multiple, or "
            f"group_size={population // len(batch)}"
        )
    dealt = batch.view(groups, -1, batch.shape[-1])
    return lambda members: dealt[torch.arange(members.start, members.stop, device=batch.device) * groups // population]


class Votes(Optimizer):
    """Moves int8 weights by one where their votes, found in `.grad`, are clear; the learning rate is α.

    >>> p = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    >>> p.grad_dtype = torch.int32
    >>> p.grad = torch.tensor([10_000, -10_000, 100], dtype=torch.int32)
    >>> _ = Votes([p], lr=0.4, pairs=64).step()
    >>> p.data
    tensor([ 1, -1,  0], dtype=torch.int8)
    """

    def __init__(self, params: Iterable[Any], *, lr: float, pairs: int):
        if not 0 <= lr <= 1:
            raise ValueError(f"lr={lr}, the fraction of weights moved by noise, is not in [0, 1]")
        if not isinstance(pairs, int) or pairs < 1:
            raise ValueError(f"pairs={pairs!r}, the pairs of members that vote, is no positive integer")
        super().__init__(params, {"lr": lr, "pairs": pairs})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Votes evaluates no closure; count the votes before step()")
        for group in self.param_groups:
            bound = threshold(group["lr"]) * int(group["pairs"] ** 0.5) * 256 if group["lr"] > 0 else 2**40
            for p in group["params"]:
                if p.grad is not None:
                    move = torch.where(p.grad > 0, 1, -1) * (16 * p.grad.long().abs() >= bound)
                    p.copy_((p + move).clamp_(-127, 127))
        return None
