"""The one product of all adapters: a frozen weight, and two factors with a gate between them.

    y = W x + s B (g ⊙ A x) (+ b)      x [..., d_in]   A [r, d_in]   B [d_out, r]   g [..., r] or [r]   W [d_out, d_in] frozen

A mixture of N adapters, Σ_i g_i B_i A_i x, is this product with the factors on top of each other and each g_i repeated for the rows
of A_i (`blockwise`). So adapters that choose by rank, by task, by user or by what a token says differ only in how g is computed.
A gate that is the same for all inputs merges, W + s B diag(g) A; one that depends on x does not.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.factors import Pair, prune
from lorank.fields import Rank
from lorank.layers import FrozenPlusLowRank, wide
from lorank.method import Method, Site, check_table, rank_at
from lorank.optim.shards import is_sharded
from lorank.rewriting import converted_with

# ---- the product


def gated(z: Tensor, gate: Tensor | None) -> Tensor:
    """g ⊙ z for z = A x [..., r]; without a gate, z. A layer multiplies all r ranks, also those whose gate is 0."""
    return z if gate is None else z * gate.to(z.dtype)


def gathered(x: Tensor, A: Tensor, B: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """B (g ⊙ A x) from the chosen ranks alone: Σ_j w_j B[:, c_j] (A[c_j] · x) for chosen c [..., k] and their weights w [..., k].

    It reads k rows of A and k columns of B for each token, where a layer reads all r of both once, for all tokens. So it pays where
    tokens are few, as in generation, and k is much less than r: on a CPU from r = 256 on (`benchmarks/gathered.py`). B is then best kept
    column by column (``B.T`` contiguous).
    """
    z = (A[chosen] @ x[..., None])[..., 0] * weights.to(x.dtype)  # [..., k]
    return (z[..., None, :] @ B.T[chosen])[..., 0, :]


def kept(scores: Tensor, k: int, least: int = 1) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of each row, all of them if there are no more than k; at least `least`."""
    return scores.topk(min(max(k, least), scores.shape[-1]), dim=-1)


def spread(values: Tensor, chosen: Tensor, r: int) -> Tensor:
    """A gate [..., r] with these values [..., k] at the chosen places, and 0 elsewhere."""
    return values.new_zeros(*values.shape[:-1], r).scatter(-1, chosen, values)


def blockwise(gate: Tensor, ranks: Sequence[int]) -> Tensor:
    """g [..., N] for N blocks as a gate [..., r_1 + ... + r_N]: each value repeated for the ranks of its block."""
    return gate.repeat_interleave(torch.tensor(ranks, device=gate.device), dim=-1, output_size=sum(ranks))


# ---- the layer


class Adapted(nn.Module):
    """A layer of an `Adapter`."""

    def trained(self) -> Iterator[nn.Parameter]:
        """What training moves; all else is frozen."""
        raise NotImplementedError

    def next_task(self) -> bool:
        """Prepare for the next stretch of data; returns whether what trains has begun anew."""
        return False


class GatedAdapter(FrozenPlusLowRank, Adapted):
    """y = W x + s B (g ⊙ A x) + b, with the dense layer itself as W and its bias, both frozen.

    A subclass overrides `gate`, or `static_gate` if its gate is the same for all inputs.
    """

    follows_input: ClassVar[bool] = False
    """Whether the gate depends on x."""

    def __init__(self, dense: nn.Linear, rank: int, *, scale: float = 1.0, dropout: float = 0.0):
        super().__init__(dense, rank, scale=scale, dropout=dropout)
        self.W.requires_grad_(False)

    @property
    def rank(self) -> int:
        return self.A.out_features

    def static_gate(self) -> Tensor | None:
        """g [r] if it is the same for all inputs; None: all ones."""
        return None

    def gate(self, x: Tensor, z: Tensor) -> Tensor | None:
        """g [..., r] for inputs x [..., d_in] and z = A x [..., r]; None: all ones."""
        return self.static_gate()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.dropout(x)
        z = self.latent(inner)
        return torch.add(self.W(x), self.lifted(gated(z, self.gate(inner, z))), alpha=self.scale)

    def latent(self, x: Tensor) -> Tensor:
        """A x [..., r] of all ranks, also those that no longer train."""
        z: Tensor = self.A(x)
        return z

    def lifted(self, z: Tensor) -> Tensor:
        """B z [..., d_out] for z [..., r] of all ranks."""
        y: Tensor = self.B(z)
        return y

    def product(self) -> Tensor:
        """s B diag(g) A [d_out, d_in], in single precision or better."""
        gate, A = self.static_gate(), wide(self.A.weight)
        return self.scale * (wide(self.B.weight) @ (A if gate is None else wide(gate)[:, None] * A))

    def trained(self) -> Iterator[nn.Parameter]:
        """All but W and its bias."""
        own = set(self.W.parameters())
        return (p for p in self.parameters() if p not in own)


# ---- the method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """Base of the methods that keep a trained model and freeze it: embeddings, norms and head too, so that only what they add trains."""

    adapts: ClassVar[bool] = True
    keeps_outputs: ClassVar[bool] = True
    layer: ClassVar[type[Adapted]] = GatedAdapter
    """The class of its layers, which are made of a dense layer, a rank and `options`."""

    rank: Rank = 16
    """Width of the factors: an integer, a fraction of the width, or {pattern: either}."""

    def check(self, sites: Sequence[Site]) -> None:
        check_table(self.rank, sites)
        check_width(self.rank, sites)

    def options(self, site: Site) -> dict[str, Any]:
        """Arguments of `layer` besides the dense layer and the rank."""
        return {}

    def build(self, site: Site) -> nn.Module:
        return self.layer(site.linear, rank_at(self.rank, site), **self.options(site))

    def layers(self, model: nn.Module) -> dict[str, Adapted]:
        return {name: module for name, module in model.named_modules() if isinstance(module, self.layer)}

    def finish(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        for layer in self.layers(model).values():
            for p in layer.trained():
                p.requires_grad_()

    def undo(self, model: nn.Module) -> None:
        model.requires_grad_()

    def merged(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        if isinstance(module, GatedAdapter) and module.follows_input:
            raise ValueError(f"{self.name} cannot be merged: its gate depends on the input")
        return super().merged(module)

    def inseparable(self, model: nn.Module) -> str | None:
        """Why the adapter means nothing without the frozen weights as they are now; None if those are as they were given."""
        return None

    def pair(self, module: nn.Module) -> Pair:
        """s B diag(g) and A of a layer whose update W + s B diag(g) A is, without ranks whose gate is zero.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(module, GatedAdapter) or module.follows_input:
            raise ValueError(f"{self.name} cannot be written as two factors: its gate depends on the input")
        B, A, gate = module.B.weight.detach(), module.A.weight.detach(), module.static_gate()
        if gate is None:
            return module.scale * B, A
        return prune((module.scale * gate.detach() * B, A), gate.detach() != 0)

    def next_task(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """What an optimizer remembers of parameters that begin anew is dropped, because it belongs to the old ones.

        Raises:
            ValueError: something would change, but weights are sharded.
        """
        changes = any(type(layer).next_task is not Adapted.next_task for layer in self.layers(model).values())
        if changes and is_sharded(model.parameters()):
            raise ValueError(
                f"{self.name} ends a task on whole weights, but they are sharded (FSDP2 or tensor parallelism); use DDP or one device"
            )
        for layer in self.layers(model).values():
            with draws_that_follow([*layer.trained()]):
                began = layer.next_task()
            if began and optimizer is not None:
                for p in layer.trained():
                    optimizer.state.pop(p, None)


@contextlib.contextmanager
def draws_that_follow(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Random draws inside are decided by the values of some parameters: replicas that are equal stay so, and a resumed run draws what it
    would have drawn. The global generator stays as it is."""
    digest = hashlib.sha256()
    for p in parameters:
        digest.update(p.detach().to("cpu", torch.float32).numpy().tobytes())
    with torch.random.fork_rng({p.device.index for p in parameters if p.is_cuda}):
        torch.manual_seed(int.from_bytes(digest.digest()[:8], "big") >> 1)
        yield


def check_width(rank: Rank, sites: Sequence[Site], option: str = "rank") -> None:
    """Raises ValueError for a rank above all inputs and outputs of the sites that have it: no product of two factors can use it."""
    widest: dict[int, int] = {}
    for site in sites:
        r = rank_at(rank, site)
        widest[r] = max(widest.get(r, 0), site.d_in, site.d_out)
    for r, width in widest.items():
        if r > width:
            raise ValueError(
                f"{option} must be at most {width}, the longest side of a projection that would have it, got {r}"
            )


def count_task(model: nn.Module) -> None:
    """One more in the setting `tasks` of a model's record, with which a saved model is built."""
    arguments = (converted_with(model) or {"arguments": {}})["arguments"]
    arguments["tasks"] = tasks_of(model) + 1


def tasks_of(model: nn.Module) -> int:
    """Tasks that a model has begun."""
    tasks: int = (converted_with(model) or {"arguments": {}})["arguments"].get("tasks", 1)
    return tasks
