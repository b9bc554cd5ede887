"""Hiformer: attention over features of different kinds, with one low-rank projection of all features together.

    q_i = W_q,i e_i                                        a map for each feature
    [k_1 ... k_L] = K̂ [e_1 ... e_L]ᵀ,   K̂ ≈ B_k A_k      one map of the concatenation: every k_i reads all features
    [v_1 ... v_L] = V̂ [e_1 ... e_L]ᵀ,   V̂ ≈ B_v A_v
    y_i = W_o Σ_j softmax_j(q_iᵀ k_j / √d_k) v_j

    E [L, d] features, rows e_i   A_k [r_k, L d]   B_k [L d_k, r_k]   the same of v   y [L, d]

    K̂, V̂ full:                       the composite layer
    K̂, V̂ block-diagonal:             a map for each feature, as q has
    the same, with equal blocks:      usual attention

Cost of K̂ per head: r (L d + L d_k) parameters instead of L² d d_k: 1.14 M instead of 7.87 M at L = 62, d = 128, d_k = 16, r = 128.

Source: Gui et al., "Hiformer: Heterogeneous Feature Interactions Learning with Transformers for Recommender Systems", arXiv 2311.05884. There is no code
of the authors. Our reading: queries are made per feature, and heads share the factors A.

    python examples/blocks/hiformer.py [STEPS]     (60 steps take half a minute of one core; needs scikit-learn)

A click-like task from a real table, scikit-learn's breast cancer one: two samples are shown, ten measured features each, and they "click"
if both have the same diagnosis. A sum of effects of single features cannot say that both are ill. Pairs of held-out samples are asked about.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.layers import LowRankLinear


class PerFeature(nn.Module):
    """A linear map for each feature: [b, L, d_in] to [b, L, d_out]."""

    def __init__(self, features: int, d_in: int, d_out: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(features, d_out, d_in) * d_in**-0.5)

    def forward(self, E: Tensor) -> Tensor:
        return torch.einsum("loi,bli->blo", self.W, E)


class Composite(nn.Module):
    """One map of all features together, [b, L, d_in] to [b, L, d_out]; of rank r, or full if it is None."""

    def __init__(self, features: int, d_in: int, d_out: int, rank: int | None):
        super().__init__()
        self.features = features
        sizes = features * d_in, features * d_out
        self.map = nn.Linear(*sizes, bias=False) if rank is None else LowRankLinear(*sizes, rank)
        if rank is not None:
            nn.init.normal_(self.map.A.weight, std=sizes[0] ** -0.5)  # so that k has the size of e
            nn.init.normal_(self.map.B.weight, std=rank**-0.5)

    def forward(self, E: Tensor) -> Tensor:
        return self.map(E.flatten(1)).unflatten(1, (self.features, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[b, L, h d_k] each, head by head."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Hiformer(nn.Module):
    """A layer over features [b, L, d]; `keys` and `values` make [b, L, d] of them, by default of low rank.

    With `only_first`, as in a last layer, only the first place, that of the task, has a query: [b, 1, d] comes out.
    """

    def __init__(
        self,
        features: int,
        d: int,
        heads: int,
        *,
        rank: int | None = 8,
        keys: nn.Module | None = None,
        values: nn.Module | None = None,
        only_first: bool = False,
    ):
        super().__init__()
        asked = 1 if only_first else features
        self.heads, self.asked = heads, asked
        self.q = PerFeature(asked, d, d)
        self.k = Composite(features, d, d, rank) if keys is None else keys
        self.v = Composite(features, d, d, rank) if values is None else values
        self.o = nn.Linear(d, d, bias=False)
        self.up, self.down = PerFeature(asked, d, 2 * d), PerFeature(asked, 2 * d, d)
        self.norm, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, E: Tensor) -> Tensor:
        X = self.norm(E)
        y = E[:, : self.asked] + self.o(attention(self.q(X[:, : self.asked]), self.k(X), self.v(X), self.heads))
        return y + self.down(F.gelu(self.up(self.norm_mlp(y))))


# ---- the task

BINS, D, HEADS = 8, 8, 2


class Ranker(nn.Module):
    """Features in bins [b, L - 1] to one logit: embeddings, a place for the task, two layers, a linear map."""

    def __init__(self, features: int, kind: str, rank: int):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(features, BINS, D) * 0.3)
        self.task = nn.Parameter(torch.randn(D) * 0.3)
        total = features + 1

        def maps() -> dict[str, nn.Module]:
            if kind == "vanilla":
                return {"keys": nn.Linear(D, D, bias=False), "values": nn.Linear(D, D, bias=False)}
            if kind == "per feature":
                return {"keys": PerFeature(total, D, D), "values": PerFeature(total, D, D)}
            return {}

        chosen = None if kind == "composite" else rank
        self.layers = nn.Sequential(
            Hiformer(total, D, HEADS, rank=chosen, **maps()),
            Hiformer(total, D, HEADS, rank=chosen, only_first=True, **maps()),
        )
        self.head = nn.Linear(D, 1)

    def forward(self, bins: Tensor) -> Tensor:
        cells = self.cells[torch.arange(bins.shape[1]), bins]
        E = torch.cat([self.task.expand(len(bins), 1, -1), cells], 1)
        return self.head(self.layers(E))[:, 0, 0]


class Additive(nn.Module):
    """A weight for each feature's bin, summed: what a model without interactions can do."""

    def __init__(self, features: int):
        super().__init__()
        self.cells = nn.Parameter(torch.zeros(features, BINS))

    def forward(self, bins: Tensor) -> Tensor:
        return self.cells[torch.arange(bins.shape[1]), bins].sum(1)


def auc(score: Tensor, label: Tensor) -> float:
    """The chance that a click has a higher score than none."""
    order = score.argsort().argsort().double() + 1
    clicks = label.double().sum()
    return ((order[label].sum() - clicks * (clicks + 1) / 2) / (clicks * (len(label) - clicks))).item()


def main() -> None:
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        raise SystemExit("scikit-learn is missing; get it with: pip install scikit-learn") from None
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    table, diagnosis = load_breast_cancer(return_X_y=True)
    values, classes = torch.tensor(table[:, :10]), torch.tensor(diagnosis)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    learned, asked = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
    edges = values[learned].quantile(torch.arange(1, BINS, dtype=values.dtype) / BINS, dim=0)
    bins = (values[:, None, :] > edges).sum(1)

    def pairs(among: Tensor, number: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        first, second = among[torch.randint(len(among), (2, number), generator=draw)]
        return torch.cat([bins[first], bins[second]], 1), classes[first] == classes[second]

    X, Y = pairs(asked, 2000, torch.Generator().manual_seed(1))
    print(
        f"{len(learned)} samples to learn from, 2,000 pairs of {len(asked)} others, {Y.float().mean():.0%} of them click; three seeds"
    )
    rank = 16
    for kind in ("additive", "vanilla", "per feature", "composite", f"rank {rank}"):
        found = []
        for seed in range(3):
            torch.manual_seed(seed)
            draw = torch.Generator().manual_seed(seed)
            model = Additive(20) if kind == "additive" else Ranker(20, kind, rank)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
            for _ in range(steps):
                x, y = pairs(learned, 128, draw)
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(model(x), y.float()).backward()
                optimizer.step()
            with torch.no_grad():
                found.append(auc(model(X), Y))
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{kind:12} {parameters:8,} parameters, AUC {' '.join(f'{one:.3f}' for one in found)}", flush=True)


if __name__ == "__main__":
    main()
