"""EGGROLL: the gradient estimated by evolution, with low-rank noise, so that a whole population shares one product.

    Eₖ = Aₖ Bₖᵀ / √r                                          entries of A, B ~ N(0, 1)
    member 2k has the weights W + σ Eₖ, member 2k + 1 has W - σ Eₖ         (sᵢ = +1, -1)
    yᵢ = xᵢ Wᵀ + sᵢ σ / √r (xᵢ Bₖ) Aₖᵀ                         the first term is one product for all members
    zᵢ = (fᵢ - mean f) / √(var f + 1e-5)
    G  = - √N / N Σᵢ zᵢ sᵢ σ Eₖ                                one product [a, N r] x [N r, b]

    W, G [a, b]     A [K, a, r]     B [K, b, r]     K = N / 2 pairs     f, z [N] the members' fitness

`Eggroll` puts G into `.grad`; any optimizer makes the step, and Adam divides the unit σ of G out again. Biases and norms
get dense noise. Nothing is differentiated and no [N, a, b] is formed: beyond the forward pass a pair costs r (a + b) numbers
per matrix, drawn anew where they are needed, from a seed that names parameter, epoch and pair.

Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652.

Departures from the authors' code. Embeddings are perturbed too, W[t] + A'[t] Bᵀ, as in their nano-egg, and an output layer
that is the embedding gets the embedding's noise. One seed draws `BLOCK` pairs, so that not each costs a call.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers.pytorch_utils import Conv1D

BLOCK = 32
"""Pairs drawn from one seed."""


def pair_noise(key: tuple[int, int, int], pairs: range, size: int, device: torch.device | None = None) -> Tensor:
    """Standard normal numbers [pairs, size] of a key (seed, parameter, epoch): those of a pair depend on nothing else."""
    drawn = []
    for block in range(pairs.start // BLOCK, -(-pairs.stop // BLOCK)):
        digest = hashlib.blake2b(repr((*key, block)).encode(), digest_size=8).digest()
        generator = torch.Generator(device=device or "cpu").manual_seed(int.from_bytes(digest) >> 1)
        noise = torch.randn(BLOCK, size, generator=generator, device=device)
        drawn.append(noise[max(0, pairs.start - block * BLOCK) : pairs.stop - block * BLOCK])
    return torch.cat(drawn)


def shaped(fitness: Tensor, group_size: int = 0) -> Tensor:
    """z: fitness [N] without the mean (of each group, if members are grouped), over the deviation of all."""
    groups = fitness.view(-1, group_size or len(fitness))
    centred = (groups - groups.mean(dim=1, keepdim=True)).view(-1)
    return centred / (fitness.var(correction=0) + 1e-5).sqrt()


class Eggroll:
    """Estimates the gradient of a mean fitness, to be maximised, at a model's parameters; they are not changed.

    Args:
        population: members N, an even number.
        sigma: size of the noise.
        rank: r of the noise; 1 is the paper's choice nearly everywhere.
        group_size: this many members in a row saw the same data and are compared with each other; 0: all did.
        noise_reuse: epochs with the same noise; 0: all.
        freeze_others: leave what is no matrix alone.
        chunk: members in one forward pass, an even number; None: all.

    Raises:
        ValueError: numbers that do not go together, or a parameter that cannot be perturbed.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> estimate = Eggroll(model, population=4096, sigma=0.01)
    >>> x = torch.eye(2)  # a member's output is its weights
    >>> def fitness(members: range) -> Tensor:
    ...     return model(x.repeat(len(members), 1)).view(len(members), 2) @ torch.tensor([3.0, -4.0])
    >>> _ = estimate(fitness)
    >>> (model.weight.grad / model.weight.grad.norm()).round(decimals=1)  # a way down, so the other way round
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
        noise_reuse: int = 1,
        freeze_others: bool = False,
        chunk: int | None = None,
        seed: int = 0,
    ):
        check_population(population, group_size, chunk)
        if sigma <= 0 or rank < 1 or noise_reuse < 0:
            raise ValueError(
                f"sigma={sigma} and rank={rank} have to be positive, noise_reuse={noise_reuse} not negative"
            )
        self.model, self.population, self.sigma, self.rank = model, population, sigma, rank
        self.group_size, self.noise_reuse, self.chunk, self.seed = group_size, noise_reuse, chunk or population, seed
        self.epoch = 0
        self.perturbed = {
            p: index
            for index, p in enumerate(model.parameters())
            if p.requires_grad and not (freeze_others and p.ndim < 2)
        }
        for name, module in model.named_modules():
            own = {n for n, p in module.named_parameters(recurse=False) if p in self.perturbed}
            if own and not _is_matrix(module) and (any(module.children()) or _has_matrix(module)):
                raise ValueError(
                    f"{name or 'the model'} ({type(module).__name__}) keeps {', '.join(sorted(own))} itself, and how it uses "
                    "them is not known; EGGROLL takes nn.Linear, Conv1D, nn.Embedding and modules of vectors; freeze it"
                )

    def factors(self, p: nn.Parameter, pairs: range) -> tuple[Tensor, Tensor]:
        """A' [pairs, a, r], which has σ / √r in it, and B [pairs, b, r] of a matrix; B comes first, as in the source."""
        a, b = p.shape
        noise = self._noise(p, pairs, (a + b) * self.rank).view(-1, a + b, self.rank)
        return noise[:, b:] * (self.sigma / math.sqrt(self.rank)), noise[:, :b]

    def dense(self, p: nn.Parameter, pairs: range) -> Tensor:
        """σ ε [pairs, ...] of a parameter that is no matrix."""
        return self.sigma * self._noise(p, pairs, p.numel()).view(-1, *p.shape)

    def _noise(self, p: nn.Parameter, pairs: range, size: int) -> Tensor:
        epoch = self.epoch // self.noise_reuse if self.noise_reuse else 0
        return pair_noise((self.seed, self.perturbed[p], epoch), pairs, size, p.device).to(p.dtype)

    @torch.no_grad()
    def __call__(self, fitness: Callable[[range], Tensor]) -> Tensor:
        """Put the estimate into `.grad`, begin the next epoch, and return the members' fitness [N].

        `fitness` gets a range of members and returns the fitness of each. Every module it calls must see the rows of these
        members one after another along the first dimension, equally many of each.

        Raises:
            FloatingPointError: the fitness of a member is not finite; `.grad` is as it was.
        """
        found = []
        for start in range(0, self.population, self.chunk):
            members = range(start, min(start + self.chunk, self.population))
            with self.perturb(members):
                found.append(fitness(members).float())
        f = torch.cat(found)
        if not f.isfinite().all():
            raise FloatingPointError("the fitness of a member is not finite; lower sigma or lr")
        z = shaped(f, self.group_size)
        self.write_gradients(z)
        self.epoch += 1
        return f

    def write_gradients(self, z: Tensor) -> None:
        """G of shaped fitness z [N]."""
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
        """Inside, the model's modules compute with the weights of these members, each with those of its own rows."""
        pairs = range(members.start // 2, members.stop // 2)
        batch = _Batch(len(members))
        forms = {nn.Linear: self._linear, Conv1D: self._linear, nn.Embedding: self._embedding}
        handles = []
        before = {m: m.__dict__["forward"] for m in self.model.modules() if "forward" in m.__dict__}  # somebody's own
        for module in self.model.modules():
            if any(p in self.perturbed for p in module.parameters(recurse=False)):
                if _is_matrix(module):
                    form = next(form for kind, form in forms.items() if isinstance(module, kind))
                    handles.append(module.register_forward_hook(partial(form, pairs, batch)))
                else:
                    module.forward = partial(self._vectors, pairs, batch, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in self.model.modules():
                module.__dict__.pop("forward", None)
                if module in before:
                    module.forward = before[module]

    def _linear(self, pairs: range, batch: "_Batch", module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """y + (x B) A'ᵀ, where W is [d_in, d_out] y + (x A') Bᵀ; and the bias's own noise."""
        y = batch.by_pair(output)  # [K, 2, rows, d_out]
        if module.weight in self.perturbed:
            A, B = (factor.to(output.dtype) for factor in self.factors(module.weight, pairs))
            down, up = (A, B) if isinstance(module, Conv1D) else (B, A)
            h = batch.signed(batch.by_pair(inputs[0].to(output.dtype)).flatten(1, 2) @ down)
            y = torch.baddbmm(y.flatten(1, 2), h, up.mT).view_as(y)
        if module.bias is not None and module.bias in self.perturbed:
            noise = self.dense(module.bias, pairs).to(output.dtype)
            y = y + torch.stack([noise, -noise], dim=1)[:, :, None]
        return y.view_as(output)

    def _embedding(self, pairs: range, batch: "_Batch", module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """W[t] + A'[t] Bᵀ; what is looked up once for all, as positions are, is looked up by each."""
        A, B = self.factors(module.weight, pairs)
        one = inputs[0].shape[0] == 1 < batch.rows
        ids, out = (t.expand(batch.rows, *t.shape[1:]) if one else t for t in (inputs[0], output))
        at = batch.split(ids).reshape(len(A), -1)  # [K, 2 * rows]
        h = batch.signed(A.gather(1, at[:, :, None].expand(-1, -1, self.rank)))
        return (out.reshape(len(at), -1, B.shape[1]) + h @ B.mT).view_as(out)

    def _vectors(self, pairs: range, batch: "_Batch", module: Any, x: Tensor) -> Tensor:
        """A module of vectors, such as a norm, called with those of each member."""
        own = {name: p for name, p in module.named_parameters(recurse=False) if p in self.perturbed}
        moved = {}
        for name, p in own.items():
            noise = self.dense(p, pairs)
            moved[name] = torch.stack([p + noise, p - noise], dim=1).flatten(0, 1)  # [N, ...]
        ours = module.__dict__.pop("forward")
        try:
            y = vmap(partial(functional_call, module))(moved, batch.split(x))
        finally:
            module.forward = ours
        return y.flatten(0, 1)


def check_population(population: int, group_size: int, chunk: int | None) -> None:
    if population < 2 or population % 2:
        raise ValueError(f"population={population} is not an even number of members, two to a pair")
    if group_size < 0 or group_size % 2 or (group_size and population % group_size):
        raise ValueError(f"group_size={group_size} is neither 0 nor an even divisor of population={population}")
    if chunk is not None and (chunk < 2 or chunk % 2):
        raise ValueError(f"chunk={chunk} is not an even number of members, two to a pair")


class _Batch:
    """How the rows of a chunk of members lie: one member after another."""

    def __init__(self, members: int):
        self.members = members
        self.rows = 0

    def split(self, x: Tensor) -> Tensor:
        """Rows by member [N, rows of a member, ...]."""
        if x.shape[0] % self.members:
            raise RuntimeError(f"a module got {x.shape[0]} rows, which are not those of {self.members} members")
        self.rows = x.shape[0]
        return x.reshape(self.members, -1, *x.shape[1:])

    def by_pair(self, x: Tensor) -> Tensor:
        """Vectors by pair [K, 2, vectors of a member, d]."""
        return self.split(x).reshape(self.members // 2, 2, -1, x.shape[-1])

    def signed(self, h: Tensor) -> Tensor:
        """h [K, 2 * rows, r], the second half negative."""
        first, second = h.chunk(2, dim=1)
        return torch.cat([first, -second], dim=1)


def _is_matrix(module: nn.Module) -> bool:
    """A module whose use of its matrix is known: not a subclass that does something else with it."""
    known: tuple[Any, ...] = (nn.Linear, Conv1D, nn.Embedding)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in known)


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters(recurse=False))
