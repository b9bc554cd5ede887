"""Forward hooks that compute each member of an EGGROLL population with its own weights.

    nn.Linear, Conv1D                  y + s (x B) A'ᵀ, and the bias's own noise
    nn.Embedding                       W[t] + s A'[t] Bᵀ
    a module of vectors, e.g. a norm   called with each member's vectors

The rows of a chunk of members lie one member after another; s is a member's sign and A' = σ / √r A. A parameter anywhere
else is refused by name when the estimator is made. The first forward pass is watched as well: what it does with a
parameter outside of these modules, such as a product with a bare ``embedding.weight``, is refused before any step.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from lorank.architectures import is_linear
from lorank.layers import ColumnMajorLinear

if TYPE_CHECKING:
    from lorank.evolution.eggroll import Eggroll

KNOWN = "nn.Linear, Conv1D, nn.Embedding and modules that hold only vectors, such as norms"
Hook = Callable[["_Chunk", Any, tuple[Any, ...], dict[str, Any], Tensor], Tensor]


def hooked_modules(model: nn.Module, perturbed: Mapping[nn.Parameter, int]) -> dict[nn.Module, Hook]:
    """The modules that hold perturbed parameters, each with what perturbs its output.

    Raises:
        ValueError: a perturbed parameter that no hook can perturb, by its name.
    """
    found: dict[nn.Module, Hook] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        moved = {name: p for name, p in own.items() if p in perturbed}
        if not moved:
            continue
        if is_linear(module) or isinstance(module, ColumnMajorLinear):
            found[module] = _Chunk.linear
        elif isinstance(module, nn.Embedding) and list(own) == ["weight"]:
            found[module] = _Chunk.embedding
        elif not any(module.children()) and all(p.ndim < 2 for p in own.values()):
            found[module] = _Chunk.vectors
        else:
            names = " and ".join(f"{prefix}.{name}" if prefix else name for name in moved)
            way_out = " or set freeze_others=true" if all(p.ndim < 2 for p in moved.values()) else ""
            raise ValueError(
                f"EGGROLL perturbs only the parameters of {KNOWN}; freeze {names} of {type(module).__name__} with "
                f"requires_grad_(False){way_out}"
            )
    return found


@contextlib.contextmanager
def perturbed_model(estimate: "Eggroll", members: range) -> Iterator[None]:
    """Inside, the estimator's model computes each member's rows with that member's weights."""
    for name, module in estimate.model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} normalises over the rows of all members; call eval() or use another norm"
            )
    watch = None if estimate.watched else _Watch(estimate)
    chunk = _Chunk(estimate, members, watch)
    # first of all hooks, so that a hook of the user's sees what a member computes
    handles = [
        module.register_forward_hook(partial(chunk.after, hook), with_kwargs=True, prepend=True)
        for module, hook in estimate.modules.items()
    ]
    if watch is not None:
        handles += watch.register()
    try:
        with watch or contextlib.nullcontext():
            yield
        estimate.watched = watch is None or watch.ran
    finally:
        for handle in handles:
            handle.remove()


class _Chunk:
    """A chunk of members in one forward pass, their rows one member after another."""

    def __init__(self, estimate: "Eggroll", members: range, watch: "_Watch | None"):
        self.estimate, self.watch = estimate, watch
        self.members, self.pairs = len(members), range(members.start // 2, members.stop // 2)
        self.rows = 0
        """Rows of the batch: those of the first lookup."""
        self.inside = False
        """Whether a module is being called again, with the members' own tensors."""

    def after(self, hook: Hook, module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        if self.inside:
            return None
        found = hook(self, module, args, kwargs, out)
        if self.watch is not None:
            self.watch.running.pop()
        return found

    def linear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        [x] = [*args, *kwargs.values()]
        W, bias = module.weight, module.bias
        self.check_rows(module, x)
        y = self.by_pair(out)  # [K, 2, rows, d_out]
        if W in self.estimate.perturbed:
            A, B = (factor.to(out.dtype) for factor in self.estimate.factors(W, self.pairs))
            down, up = (A, B) if isinstance(module, Conv1D) else (B, A)  # Conv1D's weight is [d_in, d_out]
            h = self.signed(self.by_pair(x.to(out.dtype)).flatten(1, 2) @ down)
            y = torch.baddbmm(y.flatten(1, 2), h, up.mT).view_as(y)
        if bias in self.estimate.perturbed:
            noise = self.estimate.dense(bias, self.pairs).to(out.dtype)
            y = y + torch.stack([noise, -noise], dim=1)[:, :, None]
        return y.reshape(out.shape)

    def embedding(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        """What is looked up once for all members, as positions are, becomes one lookup for each."""
        A, B = self.estimate.factors(module.weight, self.pairs)
        K, r = len(A), A.shape[-1]
        if type(module).forward is nn.Embedding.forward:
            [ids] = [*args, *kwargs.values()]
            self.check_rows(module, ids)
            at = self.split(self.of_each(ids)).reshape(K, -1)  # [K, 2 * rows]
            h = A.gather(1, at[:, :, None].expand(-1, -1, r))
        else:  # it scales its output or counts positions: linear in W, so all of A' is looked up in W's place
            table = A.transpose(0, 1).flatten(1)  # [vocabulary, K r]
            found = self.split(self.of_each(self.again(module, {"weight": table}, *args, **kwargs)))
            pairs = torch.arange(K, device=A.device)
            h = found.reshape(K, -1, K, r)[pairs, :, pairs]  # each pair's own
        out = self.of_each(out)
        return (out.reshape(K, -1, B.shape[1]) + self.signed(h) @ B.mT).view_as(out)

    def vectors(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
        given = [*args, *kwargs.values()]
        if len(given) != 1:
            raise ValueError(
                f"EGGROLL cannot perturb {self.names_of(module)}: {type(module).__name__} has {len(given)} inputs, and a "
                "module of vectors must have one; freeze its parameters"
            )
        moved = {}
        for name, p in module.named_parameters(recurse=False):
            if p in self.estimate.perturbed:
                noise = self.estimate.dense(p, self.pairs)
                moved[name] = torch.stack([p.detach() + noise, p.detach() - noise], dim=1).flatten(0, 1)  # [N, ...]
        return vmap(partial(self.again, module))(moved, self.split(given[0])).flatten(0, 1)

    def again(self, module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The module called with other tensors for its parameters, without noise."""
        self.inside = True
        try:
            return functional_call(module, tensors, args, kwargs)
        finally:
            self.inside = False

    def check_rows(self, module: nn.Module, x: Tensor) -> None:
        if self.watch is not None and self.watch.is_table(x):
            raise ValueError(
                f"EGGROLL cannot perturb {self.names_of(module)}: the model computes {type(module).__name__} of a table that "
                "does not come from the batch, so its rows belong to no member; freeze its parameters"
            )

    def names_of(self, module: nn.Module) -> str:
        return " and ".join(
            self.estimate.names[p] for p in module.parameters(recurse=False) if p in self.estimate.perturbed
        )

    def split(self, x: Tensor) -> Tensor:
        """Rows by member [N, rows of a member, ...]."""
        if x.shape[0] % self.members:
            raise ValueError(
                f"the model handles {x.shape[0]} rows, which cannot be divided among {self.members} members"
            )
        return x.reshape(self.members, -1, *x.shape[1:])

    def by_pair(self, x: Tensor) -> Tensor:
        """Vectors by pair [K, 2, vectors of a member, d]."""
        return self.split(x).reshape(self.members // 2, 2, -1, x.shape[-1])

    def of_each(self, x: Tensor) -> Tensor:
        """What is looked up, in as many rows as the batch has."""
        self.rows = self.rows or x.shape[0]
        if x.shape[0] not in (1, self.rows):
            raise ValueError(
                f"the model looks up {x.shape[0]} rows for a batch of {self.rows}, so it is not known which rows belong to which "
                "member"
            )
        return x.expand(self.rows, *x.shape[1:])

    def signed(self, h: Tensor) -> Tensor:
        """h [K, 2 * rows, r], the second half negative."""
        first, second = h.chunk(2, dim=1)
        return torch.cat([first, -second], dim=1)


class _Watch(TorchFunctionMode):
    """Refuses a perturbed parameter that torch uses outside of the modules with hooks, and remembers which tensors do not
    come from the model's inputs."""

    def __init__(self, estimate: "Eggroll"):
        super().__init__()
        self.estimate = estimate
        self.ran = False
        """Whether a module with a hook was called."""
        self.calls = 0
        """How deep in calls of the model."""
        self.running: list[nn.Module] = []
        """The module with a hook that is being called."""
        self.own: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """Tensors that do not depend on what the model was given."""
        for buffer in estimate.model.buffers():
            self.own[buffer] = True

    def register(self) -> list[Any]:
        model: Any = self.estimate.model
        return [
            model.register_forward_pre_hook(lambda *_: self.enter(1)),
            model.register_forward_hook(lambda *_: self.enter(-1), always_call=True),
            *(module.register_forward_pre_hook(self.start) for module in self.estimate.modules),
        ]

    def enter(self, calls: int) -> None:
        self.calls += calls

    def start(self, module: nn.Module, args: Any) -> None:
        self.ran = True
        if not self.running:  # else it is called again inside its hook
            self.running.append(module)

    def is_table(self, x: Tensor) -> bool:
        """Whether the rows of x are not those of the batch, though there may be equally many."""
        return self.own.get(x, False) and not bool((x == x[:1]).all())

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), output))
        if self.calls:
            from_own = all(self.own.get(t, False) for t in given)
            for t in made:
                self.own[t] = from_own and self.own.get(t, True)
        if not made:
            return output  # a question such as W.shape
        allowed = [p for module in self.running for p in module.parameters(recurse=False)]
        used = [p for p in given if isinstance(p, nn.Parameter) and p in self.estimate.perturbed]
        if names := [self.estimate.names[p] for p in used if not any(p is other for other in allowed)]:
            raise ValueError(
                f"the model uses {' and '.join(names)} in {resolve_name(function) or function}, where EGGROLL cannot perturb "
                f"it; it perturbs only what {KNOWN} compute, so freeze it"
            )
        return output
