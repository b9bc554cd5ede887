"""EGGROLL: the gradient estimated by evolution, with low-rank noise, so that a whole population shares one product.

    G = - σ / √N Σᵢ zᵢ sᵢ Eₖ        from the fitness of N members of a population,  in detail:

    Eₖ = Aₖ Bₖᵀ / √r                                          entries of A, B ~ N(0, 1)
    member 2k has the weights W + σ Eₖ, member 2k + 1 has W - σ Eₖ         (sᵢ = +1, -1)
    yᵢ = xᵢ Wᵀ + sᵢ σ / √r (xᵢ Bₖ) Aₖᵀ                         the first term is one product for all members
    zᵢ = (fᵢ - mean f) / √(var f + 1e-5)
    G  = - √N / N Σᵢ zᵢ sᵢ σ Eₖ                                one product [a, N r] x [N r, b]

    W, G [a, b]     A [K, a, r]     B [K, b, r]     K = N / 2 pairs     f, z [N] the members' fitness

Saves: activations.

`Eggroll` puts G into `.grad`. Any optimizer makes the step, and Adam divides the unit σ of G out again. Biases and norms
get dense noise. Nothing is differentiated and no [N, a, b] is formed: beyond the forward pass a pair costs r (a + b)
numbers per matrix. They are drawn again wherever they are needed, from a seed that names parameter, epoch and pair.

Forward hooks add the noise (`lorank.evolution.perturbation`), so any model made of linear layers, embeddings and norms
can be trained, low-rank ones included. A parameter that no hook can perturb is refused by name.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652.

Departures from the authors' code. Embeddings are perturbed too, W[t] + A'[t] Bᵀ, as in their nano-egg. One seed draws
`BLOCK` pairs, so that not every pair costs a call.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorank.evolution.noise import check_population, check_whole, over_processes, pair_noise
from lorank.evolution.perturbation import hooked_modules, perturbed_model
from lorank.fields import Count, Whole, check_value
from lorank.optim.shards import processes

# ---- the mathematics


def operations_per_byte(a: int, b: int, members: int, rank: int = 0) -> float:
    """Operations for each byte moved by one product with W [a, b] in bf16, one vector per member; rank 0: no noise.

    N (2 a b + 2 r (a + b) + a) / 2 (a b + N (1 + r) (a + b) + 2 N r): W is read once for all, x, y, A and B once by each
    member, and x B is written and read. For a square W this is the paper's (m + 2 r + 1/2) / (2 + r (2 + 2 / m) + m / N),
    and N m / (2 N + m) without noise.

    >>> round(operations_per_byte(8192, 8192, 324), 2), round(operations_per_byte(8192, 8192, 352, 1), 2)
    (300.25, 300.46)
    """
    operations = members * (2 * a * b + (2 * rank * (a + b) + a if rank else 0))
    return operations / (2 * (a * b + members * (1 + rank) * (a + b) + 2 * members * rank))


def shaped(fitness: Tensor, group_size: int = 0) -> Tensor:
    """z [N]: fitness [N] minus the mean (of each group, if members are grouped), over the deviation of all.

    Where each member answered Q questions, fitness [N, Q], means are those of each question, and z is the mean over them.
    """
    groups = fitness.view(-1, group_size or len(fitness), *fitness.shape[1:])
    centred = (groups - groups.mean(dim=1, keepdim=True)).view_as(fitness)
    return (centred / (fitness.var(correction=0) + 1e-5).sqrt()).view(len(fitness), -1).mean(1)


def above_baseline(fitness: Tensor, group_size: int = 0) -> Tensor:
    """z [N]: fitness [N] or [N, Q] minus that of the group's first member, over the group's deviation; 0 for the first
    pair.

    zᵢ = (fᵢ - f₀) / (std f + 1e-8)            the mean over Q questions, if there are any
    """
    groups = fitness.view(-1, group_size or len(fitness), *fitness.shape[1:])
    z = (groups - groups[:, :1]) / (groups.std(dim=1, correction=0, keepdim=True) + 1e-8)
    z[:, :2] = 0.0
    return z.view(len(fitness), -1).mean(1)


# ---- the estimator


class Eggroll:
    """Estimates the gradient of a mean fitness, to be maximised, at a model's parameters; they are not changed.

    Args:
        population: members N, an even number.
        sigma: size of the noise.
        rank: r of the noise; the paper uses 1 nearly everywhere.
        group_size: consecutive members that see the same data and are compared with each other; 0: all members do.
        baseline: the first pair of each group has no noise, z is `above_baseline`, and all of G together is clipped to
            norm 1.
        noise_reuse: epochs with the same noise; 0: all.
        freeze_others: do not perturb anything but matrices.
        chunk: members in one forward pass, an even number; None: all.

    Raises:
        ValueError: numbers that do not go together, or a trained parameter that cannot be perturbed or is sharded (FSDP2).

    >>> model = nn.Linear(2, 1, bias=False)
    >>> estimate = Eggroll(model, population=4096, sigma=0.01)
    >>> x = torch.eye(2)  # a member's output is its weights
    >>> def fitness(members: range) -> Tensor:
    ...     return model(x.repeat(len(members), 1)).view(len(members), 2) @ torch.tensor([3.0, -4.0])
    >>> _ = estimate(fitness)
    >>> (model.weight.grad / model.weight.grad.norm()).round(decimals=1)  # a descent direction, hence the signs
    tensor([[-0.6000,  0.8000]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        population: int,
        sigma: float,
        rank: int = 1,
        group_size: int = 0,
        baseline: bool = False,
        noise_reuse: int = 1,
        freeze_others: bool = False,
        chunk: int | None = None,
        seed: int = 0,
    ):
        check_population(population, group_size, chunk)
        check_value("rank", rank, Count)
        check_value("noise_reuse", noise_reuse, Whole)
        check_value("baseline", baseline, bool)
        check_value("freeze_others", freeze_others, bool)
        if baseline and (group_size or population) < 4:
            raise ValueError(
                f"baseline needs groups of at least 4 members, because the first pair of each has no noise, got "
                f"{group_size or population}"
            )
        self.model, self.population, self.sigma, self.rank = model, population, _positive(sigma), rank
        self.group_size, self.noise_reuse, self.chunk, self.seed = group_size, noise_reuse, chunk or population, seed
        self.baseline, self.freeze_others = baseline, freeze_others
        self.epoch = 0
        self.perturbed = {
            p: index
            for index, p in enumerate(model.parameters())
            if p.requires_grad and not (freeze_others and p.ndim < 2)
        }
        self.names = {p: name for name, p in model.named_parameters()}
        for p in self.perturbed:
            check_whole(p, self.names[p])
        self.modules = hooked_modules(model, self.perturbed)
        self.watched = False
        """Whether a forward pass has been watched for uses of the parameters that no hook sees."""

    def on(self, model: nn.Module, **changes: Any) -> "Eggroll":
        """The same estimator on another model, with some arguments changed."""
        names = (
            "population",
            "sigma",
            "rank",
            "group_size",
            "baseline",
            "noise_reuse",
            "freeze_others",
            "chunk",
            "seed",
        )
        return Eggroll(model, **{**{name: getattr(self, name) for name in names}, **changes})

    def factors(self, p: nn.Parameter, pairs: range) -> tuple[Tensor, Tensor]:
        """A' [pairs, a, r], which includes σ / √r, and B [pairs, b, r] of a matrix; B is drawn first, as in the source."""
        a, b = p.shape
        noise = self._noise(p, pairs, (a + b) * self.rank).view(-1, a + b, self.rank)
        return noise[:, b:] * (self.sigma / math.sqrt(self.rank)), noise[:, :b]

    def dense(self, p: nn.Parameter, pairs: range) -> Tensor:
        """σ ε [pairs, ...] of a parameter that is not a matrix."""
        return self.sigma * self._noise(p, pairs, p.numel()).view(-1, *p.shape)

    def _noise(self, p: nn.Parameter, pairs: range, size: int) -> Tensor:
        epoch = self.epoch // self.noise_reuse if self.noise_reuse else 0
        noise = pair_noise((self.seed, self.perturbed[p], epoch), pairs, size, p.device).to(p.dtype)
        if self.baseline:
            each = (self.group_size or self.population) // 2
            noise[-pairs.start % each :: each] = 0.0
        return noise

    @torch.no_grad()
    def __call__(self, fitness: Callable[[range], Tensor]) -> Tensor:
        """Put the estimate into `.grad`, begin the next epoch, and return the members' fitness [N].

        `fitness` gets a range of members and returns the fitness of each, [members], or [members, Q] for Q questions.
        Every module it calls must see the rows of these members one after another along the first dimension, equally many
        of each. In a distributed run fitness is averaged over the processes: their data may differ, their estimates do
        not.

        Raises:
            FloatingPointError: the fitness of a member is not finite; `.grad` is unchanged.
            ValueError: the model uses a parameter in a way that cannot be perturbed, or fitness is not one for each member.
        """
        found = []
        for start in range(0, self.population, self.chunk):
            members = range(start, min(start + self.chunk, self.population))
            with self.perturb(members):
                found.append(fitness(members).float())
            if found[-1].ndim not in (1, 2) or len(found[-1]) != len(members):
                raise ValueError(
                    f"fitness must return one number or one row for each of {len(members)} members, got shape "
                    f"{list(found[-1].shape)}"
                )
        f = torch.cat(found)
        over_processes(f)
        f /= processes()
        if not f.isfinite().all():
            raise FloatingPointError("the fitness of a member is not finite; lower sigma or lr")
        self.write_gradients((above_baseline if self.baseline else shaped)(f, self.group_size))
        if self.baseline:
            torch.nn.utils.clip_grad_norm_(list(self.perturbed), 1.0)
        self.epoch += 1
        return f

    def write_gradients(self, z: Tensor) -> None:
        """Put G for shaped fitness z [N] into `.grad`."""
        weights = -(z[0::2] - z[1::2]) / math.sqrt(self.population)  # [K]
        for p in self.perturbed:
            G = torch.zeros_like(p, dtype=torch.float32)
            for start in range(0, self.population // 2, self.chunk // 2):
                pairs = range(start, min(start + self.chunk // 2, self.population // 2))
                w = weights[pairs.start : pairs.stop]
                if p.ndim == 2:
                    A, B = self.factors(p, pairs)
                    weighted = A.float() * w[:, None, None]
                    G += (
                        weighted.transpose(0, 1).flatten(1) @ B.float().transpose(0, 1).flatten(1).T
                    )  # [a, K r] [K r, b]
                else:
                    G += torch.tensordot(w, self.dense(p, pairs).float(), dims=1)
            p.grad = G.to(p.dtype)

    @contextlib.contextmanager
    def perturb(self, members: range) -> Iterator[None]:
        """Inside, the model computes each member's rows with that member's weights."""
        with perturbed_model(self, members):
            yield


def _positive(sigma: Any) -> float:
    try:
        size = float(sigma)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"sigma must be a positive finite number such as 0.01, got {sigma!r}")
    return size
