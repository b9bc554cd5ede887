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

A matrix is perturbed where torch uses it, in F.linear, F.embedding or addmm, whichever module calls that: an output layer that
is the embedding gets the embedding's noise. Any other use of it is refused by name.

Departures from the authors' code. Embeddings are perturbed too, W[t] + A'[t] Bᵀ, as in their nano-egg. One seed draws `BLOCK`
pairs, so that not each costs a call.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lorank.optim.shards import processes

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


def operations_per_byte(a: int, b: int, members: int, rank: int = 0) -> float:
    """Operations for each byte that one product of W [a, b] in bf16 moves, N members with a vector each; rank 0: no noise.

    N (2 a b + 2 r (a + b) + a) / 2 (a b + N (1 + r) (a + b) + 2 N r): W is read once for all, x, y, A and B once by each, and
    x B is written and read. Of a square one this is the paper's (m + 2 r + 1/2) / (2 + r (2 + 2 / m) + m / N), and N m / (2 N + m) without noise.

    >>> round(operations_per_byte(8192, 8192, 324), 2), round(operations_per_byte(8192, 8192, 352, 1), 2)
    (300.25, 300.46)
    """
    operations = members * (2 * a * b + (2 * rank * (a + b) + a if rank else 0))
    return operations / (2 * (a * b + members * (1 + rank) * (a + b) + 2 * members * rank))


def over_processes(values: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Make `values`, of the same members asked about other rows, their sum over the processes, or what else `op` says."""
    if processes() > 1:
        dist.all_reduce(values, op)


def shaped(fitness: Tensor, group_size: int = 0) -> Tensor:
    """z [N]: fitness [N] without the mean (of each group, if members are grouped), over the deviation of all.

    Where each member answered Q questions, fitness [N, Q], means are those of each question, and z is the mean over them.
    """
    groups = fitness.view(-1, group_size or len(fitness), *fitness.shape[1:])
    centred = (groups - groups.mean(dim=1, keepdim=True)).view_as(fitness)
    return (centred / (fitness.var(correction=0) + 1e-5).sqrt()).view(len(fitness), -1).mean(1)


def above_baseline(fitness: Tensor, group_size: int = 0) -> Tensor:
    """z [N]: fitness [N] or [N, Q] over that of the group's first member, over the group's deviation; the first pair gets 0.

    zᵢ = (fᵢ - f₀) / (std f + 1e-8)            the mean over Q questions, if there are any
    """
    groups = fitness.view(-1, group_size or len(fitness), *fitness.shape[1:])
    z = (groups - groups[:, :1]) / (groups.std(dim=1, correction=0, keepdim=True) + 1e-8)
    z[:, :2] = 0.0
    return z.view(len(fitness), -1).mean(1)


class Eggroll:
    """Estimates the gradient of a mean fitness, to be maximised, at a model's parameters; they are not changed.

    Args:
        population: members N, an even number.
        sigma: size of the noise.
        rank: r of the noise; 1 is the paper's choice nearly everywhere.
        group_size: this many members in a row saw the same data and are compared with each other; 0: all did.
        baseline: the first pair of each group has no noise, and z is `above_baseline`; all of G together is clipped to norm 1.
        noise_reuse: epochs with the same noise; 0: all.
        freeze_others: leave what is no matrix alone.
        chunk: members in one forward pass, an even number; None: all.

    Raises:
        ValueError: numbers that do not go together, or a parameter that is neither a matrix nor a vector, or sharded (FSDP2).

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
        baseline: bool = False,
        noise_reuse: int = 1,
        freeze_others: bool = False,
        chunk: int | None = None,
        seed: int = 0,
    ):
        check_population(
            population,
            group_size,
            chunk,
            rank=rank,
            noise_reuse=noise_reuse,
            baseline=baseline,
            freeze_others=freeze_others,
        )
        try:
            size = float(sigma)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            size = math.nan
        if not 0 < size < math.inf:
            raise ValueError(f"sigma={sigma!r} is no positive finite number; give for example 0.01")
        if rank < 1 or noise_reuse < 0:
            raise ValueError(f"rank={rank} has to be positive, noise_reuse={noise_reuse} not negative")
        self.model, self.population, self.sigma, self.rank = model, population, size, rank
        self.group_size, self.noise_reuse, self.chunk, self.seed = group_size, noise_reuse, chunk or population, seed
        self.baseline = baseline
        if baseline and (group_size or population) < 4:
            raise ValueError(f"baseline=True leaves no member with noise in groups of {group_size or population}")
        self.epoch = 0
        self.perturbed = {
            p: index
            for index, p in enumerate(model.parameters())
            if p.requires_grad and not (freeze_others and p.ndim < 2)
        }
        self.names = {p: name for name, p in model.named_parameters()}
        for p in self.perturbed:
            check_whole(p, self.names[p])
            if p.ndim > 2:
                raise ValueError(
                    f"{self.names[p]} has {p.ndim} dimensions; EGGROLL perturbs matrices and vectors; freeze it"
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
        noise = pair_noise((self.seed, self.perturbed[p], epoch), pairs, size, p.device).to(p.dtype)
        if self.baseline:
            each = (self.group_size or self.population) // 2
            noise[-pairs.start % each :: each] = 0.0
        return noise

    @torch.no_grad()
    def __call__(self, fitness: Callable[[range], Tensor]) -> Tensor:
        """Put the estimate into `.grad`, begin the next epoch, and return the members' fitness [N].

        `fitness` gets a range of members and returns the fitness of each, [members], or [members, Q] of Q questions. Every module
        it calls must see the rows of these members one after another along the first dimension, equally many of each. In a
        distributed run it is the mean over the processes, so that data may differ among them and estimates do not.

        Raises:
            FloatingPointError: the fitness of a member is not finite; `.grad` is as it was.
            ValueError: the model uses a parameter in a way that cannot be perturbed, or fitness is not one for each member.
        """
        found = []
        for start in range(0, self.population, self.chunk):
            members = range(start, min(start + self.chunk, self.population))
            with self.perturb(members):
                found.append(fitness(members).float())
            if found[-1].ndim not in (1, 2) or len(found[-1]) != len(members):
                raise ValueError(
                    f"fitness returned {list(found[-1].shape)} for {len(members)} members; it has to be one number, or row, for each"
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
        """Inside, the model computes with the weights of these members, each with those of its own rows."""
        pairs = range(members.start // 2, members.stop // 2)
        batch = _Batch(len(members))
        before = {m: m.__dict__["forward"] for m in self.model.modules() if "forward" in m.__dict__}  # somebody's own
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"{name or 'the model'} normalises all members' rows together; put it in eval(), or take another norm"
                )
        for module in self.model.modules():
            own = dict(module.named_parameters(recurse=False))
            vectors = {name: p.detach() for name, p in own.items() if p in self.perturbed}
            if vectors and not any(module.children()) and all(p.ndim < 2 for p in own.values()):
                noise = {name: self.dense(own[name], pairs) for name in vectors}
                moved = {name: torch.stack([p + noise[name], p - noise[name]], dim=1) for name, p in vectors.items()}
                module.forward = partial(_with_vectors, module, {n: v.flatten(0, 1) for n, v in moved.items()}, batch)
        uses = _Uses(self, pairs, batch)
        hooks = [
            self.model.register_forward_pre_hook(lambda *_: uses.enter(1)),
            self.model.register_forward_hook(lambda *_: uses.enter(-1), always_call=True),
        ]
        try:
            with uses:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.model.modules():
                module.__dict__.pop("forward", None)
                if module in before:
                    module.forward = before[module]


def _with_vectors(module: Any, moved: dict[str, Tensor], batch: "_Batch", *args: Any, **kwargs: Any) -> Tensor:
    """A module of vectors, such as a norm, called with those [N, ...] of each member; ValueError if it is none of one input."""
    ours = module.__dict__.pop("forward")
    given = [*args, *kwargs.values()]
    try:
        if len(given) != 1:
            raise ValueError(
                f"EGGROLL calls a module of vectors with each member's, and does not know how to for {type(module).__name__}, which "
                "has several inputs; freeze its parameters"
            )
        y = vmap(partial(functional_call, module))(moved, batch.split(given[0]))
    finally:
        module.forward = ours
    return y.flatten(0, 1)


class _Uses(TorchFunctionMode):
    """Adds the noise of a pair wherever torch is called with a perturbed parameter."""

    def __init__(self, estimate: Eggroll, pairs: range, batch: "_Batch"):
        super().__init__()
        self.estimate, self.pairs, self.batch = estimate, pairs, batch
        self.inside = 0
        """How deep in calls of the model."""
        self.own: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """Tensors that follow from nothing that the model was given."""
        for buffer in estimate.model.buffers():
            self.own[buffer] = True
        self.forms: dict[Any, Callable[..., Tensor | None]] = {
            F.linear: self._linear,
            F.embedding: self._embedding,
            torch.addmm: self._addmm,
        }

    def enter(self, calls: int) -> None:
        self.inside += calls

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), output))
        if self.inside:
            follows = all(self.own.get(t, False) for t in given)
            for t in made:
                self.own[t] = follows and self.own.get(t, True)
        used = [p for p in given if isinstance(p, nn.Parameter) and p in self.estimate.perturbed]
        if not used or not made:
            return output  # a question such as W.shape
        noisy = self.forms[function](output, used, *args, **kwargs) if function in self.forms else None
        if noisy is None:
            names = " and ".join(self.estimate.names[p] for p in used)
            raise ValueError(
                f"the model uses {names} in {resolve_name(function) or function}, where EGGROLL does not know how to perturb "
                "it; known are F.linear, F.embedding and addmm, and modules of vectors alone; freeze it"
            )
        return noisy

    def _table(self, x: Tensor) -> bool:
        """Whether the rows of x are not the batch's, though they may be as many by chance, but some that the model has by itself."""
        return self.own.get(x, False) and not bool((x == x[:1]).all())

    def _linear(self, y: Tensor, used: list[Any], input: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
        """y + (x B) A'ᵀ, and the bias's own noise."""
        return self._product(y, used, input, weight, bias, transposed=False)

    def _addmm(self, y: Tensor, used: list[Any], input: Any, mat1: Tensor, mat2: Any) -> Tensor | None:
        """y + (x A') Bᵀ, where W is [d_in, d_out]."""
        return self._product(y, used, mat1, mat2, input, transposed=True)

    def _product(
        self, out: Tensor, used: list[Any], x: Tensor, W: Any, bias: Any, *, transposed: bool
    ) -> Tensor | None:
        if any(p is not W and p is not bias for p in used) or self._table(x):
            return None
        y = self.batch.by_pair(out)  # [K, 2, rows, d_out]
        if any(p is W for p in used):
            A, B = (factor.to(out.dtype) for factor in self.estimate.factors(W, self.pairs))
            down, up = (A, B) if transposed else (B, A)
            h = self.batch.signed(self.batch.by_pair(x.to(out.dtype)).flatten(1, 2) @ down)
            y = torch.baddbmm(y.flatten(1, 2), h, up.mT).view_as(y)
        if any(p is bias for p in used):
            noise = self.estimate.dense(bias, self.pairs).to(out.dtype)
            y = y + torch.stack([noise, -noise], dim=1)[:, :, None]
        return y.view_as(out)

    def _embedding(
        self, out: Tensor, used: list[Any], input: Tensor, weight: Any, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """W[t] + A'[t] Bᵀ; what is looked up once for all, as positions are, is looked up by each."""
        A, B = self.estimate.factors(weight, self.pairs)
        if self._table(input):
            return None
        input, out = (self.batch.of_each(t) for t in (input, out))
        at = self.batch.split(input).reshape(len(A), -1)  # [K, 2 * rows]
        h = self.batch.signed(A.gather(1, at[:, :, None].expand(-1, -1, A.shape[-1])))
        return (out.reshape(len(at), -1, B.shape[1]) + h @ B.mT).view_as(out)


def check_population(population: int, group_size: int, chunk: int | None, **others: Any) -> None:
    """Raises ValueError for numbers of members that do not go together, and for others that are no integers, or no booleans."""
    for name, value in {"population": population, "group_size": group_size, "chunk": chunk, **others}.items():
        if value is not None and not isinstance(value, int):
            raise ValueError(f"{name}={value!r} is no integer, true or false")
    if population < 2 or population % 2:
        raise ValueError(f"population={population} is not an even number of members, two to a pair")
    if group_size < 0 or group_size % 2 or (group_size and population % group_size):
        raise ValueError(f"group_size={group_size} is neither 0 nor an even divisor of population={population}")
    if chunk is not None and (chunk < 2 or chunk % 2):
        raise ValueError(f"chunk={chunk} is not an even number of members, two to a pair")


def check_whole(p: nn.Parameter, name: str) -> None:
    """Raises ValueError if a parameter is sharded."""
    if isinstance(p, DTensor):
        raise ValueError(
            f"{name} is sharded (FSDP2), and EGGROLL perturbs whole matrices; leave the model as it is in each "
            "process: it keeps no gradients, and fitness is taken over all processes"
        )


class _Batch:
    """How the rows of a chunk of members lie: one member after another."""

    def __init__(self, members: int):
        self.members = members
        self.rows = 0
        """Of what was looked up first: the batch."""

    def split(self, x: Tensor) -> Tensor:
        """Rows by member [N, rows of a member, ...]."""
        if x.shape[0] % self.members:
            raise ValueError(f"the model handles {x.shape[0]} rows, which are not those of {self.members} members")
        return x.reshape(self.members, -1, *x.shape[1:])

    def by_pair(self, x: Tensor) -> Tensor:
        """Vectors by pair [K, 2, vectors of a member, d]."""
        return self.split(x).reshape(self.members // 2, 2, -1, x.shape[-1])

    def of_each(self, x: Tensor) -> Tensor:
        """What is looked up, in as many rows as the batch has."""
        self.rows = self.rows or x.shape[0]
        if x.shape[0] not in (1, self.rows):
            raise ValueError(
                f"the model looks up {x.shape[0]} rows for a batch of {self.rows}; which are a member's is not known"
            )
        return x.expand(self.rows, *x.shape[1:])

    def signed(self, h: Tensor) -> Tensor:
        """h [K, 2 * rows, r], the second half negative."""
        first, second = h.chunk(2, dim=1)
        return torch.cat([first, -second], dim=1)
