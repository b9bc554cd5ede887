"""RecLoRA: a personal adapter, mixed from a few shared ones by what is known of the user.

    y = W x + s Σ_k α_k(u) B_k A_k x (+ b)      α(u) = softmax(G u + c),   u [d_user]   G [N, d_user]   c [N]

Saves: gradients, optimizer state.

`lorank.set_context(model, u)` gives the vector u of each sample's user [batch, d_user], or one for all [d_user]: in the paper that of a
conventional recommender, which sees long histories. Users with the same α have the same weights, and the number of users costs
nothing. Without a context u is a vector that is trained too, for users of whom nothing is known. Merged for one user, the model is
dense.

Cost of a layer: N r (d_in + d_out) trained parameters, and N (d_user + 1) + d_user once for the gate; for n tokens 2 n (d_in d_out + N r (d_in +
d_out)) operations forward; backward the first term once more and the second twice.

Source: Zhu et al., "Lifelong Personalized Low-Rank Adaptation of Large Language Models for Recommendation", arXiv 2408.03533.

Confirmed in summaries of the paper: the sum over N meta adapters with a soft gate that is fed by the recommender. Our reading: the
softmax, one linear gate for all layers, the unknown user, N = 4, r, and the scale. The paper's retriever and its way of making data are not here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorank.adapters.blocks import BlockAdapter, Contextual
from lorank.adapters.gated import Adapted
from lorank.fields import Count, Positive, Rank
from lorank.layers import Gate, like, scale_at
from lorank.method import SHARED, Site, rank_at

GATE = f"{SHARED}gate"


# ---- the layer


class UserGate(Gate):
    """α(u) [batch, N] or [N]."""

    def __init__(self, d_user: int, adapters: int, **options: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(adapters, d_user, **options))
        self.bias = nn.Parameter(torch.empty(adapters, **options))
        self.unknown = nn.Parameter(torch.empty(d_user, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All adapters alike for a user of zeros."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.unknown)

    def forward(self, u: Tensor | None) -> Tensor:
        # a gradient of zero for the unknown user, since DDP waits for one of every parameter
        users = self.unknown if u is None else u.to(self.weight) + 0 * self.unknown
        return torch.softmax(nn.functional.linear(users, self.weight, self.bias), dim=-1)


class RecLoRALinear(BlockAdapter):
    def __init__(self, *dense_and_ranks: Any, **options: Any):
        super().__init__(*dense_and_ranks, **options)
        self.shared: list[UserGate] = []  # no child: it is the whole model's
        self.reset_parameters()

    def mixture(self) -> Tensor:
        n = len(self.ranks)
        return self.shared[0](self.context.value) if self.shared else self.A.weight.new_full((n,), 1 / n)


# ---- the method


@dataclass(frozen=True, kw_only=True)
class RecLoRA(Contextual):
    """Adapters mixed by user; ``lorank.convert(model, RecLoRA(user_width=64))``, then `lorank.set_context(model, users)`."""

    name: ClassVar[str] = "reclora"
    layer: ClassVar[type[Adapted]] = RecLoRALinear

    rank: Rank = 8
    """r of each adapter: an integer, a fraction of the width, or {pattern: either}."""
    adapters: Count = 4
    """N."""
    user_width: Count = 64
    """d_user."""
    alpha: Positive = 16.0
    """s is this over r."""

    def build(self, site: Site) -> nn.Module:
        rank = rank_at(self.rank, site)
        return RecLoRALinear(site.linear, [rank] * self.adapters, scale=scale_at(self.alpha, None, rank))

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        layers: list[Any] = [*self.layers(model).values()]
        gate = UserGate(self.user_width, self.adapters, **like(layers[0].A.weight))
        setattr(getattr(model, "base_model", model), GATE, gate)
        for layer in layers:
            layer.shared = [gate]

    def undo(self, model: nn.Module) -> None:
        super().undo(model)
        delattr(getattr(model, "base_model", model), GATE)

    def context(self, value: Any) -> Tensor:
        users = torch.as_tensor(value)
        if users.ndim not in (1, 2) or users.shape[-1] != self.user_width or not users.is_floating_point():
            raise ValueError(
                f"a user must be a vector of user_width={self.user_width} numbers, or one for each sample, got {[*users.shape]}"
            )
        return users
