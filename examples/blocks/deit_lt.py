"""DeiT-LT: a transformer learns long-tailed classes from a convolutional teacher, through a second token.

    L = ½ CE(CLS head, y) + ½ Σ_i w(ŷ_i) CE(DIST head, ŷ_i) / Σ_i w(ŷ_i),    ŷ = argmax teacher(strongly augmented x)
    w(c) = 1 until late, then ∝ (1 - β) / (1 - β^n_c)          deferred re-weighting; n_c images of class c
    prediction: mean of both heads' softmax

    rank of features Z [n, d] = least k whose k largest σ² of Z - mean hold the share α of all       lorank.analysis.feature_rank

Nothing here is factorised: "low rank" is what the paper sees in the features of the DIST token if the teacher is flat, that is, trained with
sharpness-aware minimisation: the gradient is taken at W + ρ g / |g|.

Source: Rangwani et al., "DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed Datasets", arXiv 2404.02900. Our
reading: β and the shape of w are those of the class-balanced loss (arXiv 1901.05555). Not here: the teacher's contrastive loss.

    python examples/blocks/deit_lt.py [STEPS]     (500 steps take two minutes of one core; needs scikit-learn)

Handwritten digits with 100 zeros down to 5 nines; the held-out ones are balanced. A ViT learns alone, from a plain teacher and from a flat one.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.analysis import feature_rank


def class_weights(counts: Tensor, beta: float = 0.999) -> Tensor:
    """w [classes] with mean 1: the inverse of the effective number of images (1 - β^n) / (1 - β)."""
    w = (1 - beta) / (1 - beta ** counts.double())
    return (w * len(w) / w.sum()).float()


def distillation_loss(cls: Tensor, dist: Tensor, y: Tensor, taught: Tensor, w: Tensor | None) -> Tensor:
    """Half the loss of the CLS head by labels and half that of the DIST head by what the teacher says, weighted or not."""
    return F.cross_entropy(cls, y) / 2 + F.cross_entropy(dist, taught, w) / 2


def flat_step(model: nn.Module, loss, optimizer: torch.optim.Optimizer, rho: float) -> None:
    """A step by the gradient at W + ρ g / |g|; plain if ρ is zero."""
    optimizer.zero_grad()
    loss().backward()
    if rho:
        moved = [p for p in model.parameters() if p.grad is not None]
        size = torch.stack([p.grad.norm() for p in moved]).norm() + 1e-12
        away = [rho * p.grad / size for p in moved]
        torch._foreach_add_([p.data for p in moved], away)
        optimizer.zero_grad()
        loss().backward()
        torch._foreach_sub_([p.data for p in moved], away)
    optimizer.step()


class ViT(nn.Module):
    """Images [b, 1, 8, 8] in 16 patches, with a CLS and a DIST token in front; their features [b, 2, d] and both heads' logits."""

    def __init__(self, d: int = 48, layers: int = 2, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(1, d, 2, stride=2)
        self.tokens = nn.Parameter(torch.randn(2, d) * 0.02)
        self.places = nn.Parameter(torch.randn(18, d) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, 4, 2 * d, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.cls, self.dist = nn.LayerNorm(d), nn.Linear(d, classes), nn.Linear(d, classes)

    def features(self, x: Tensor) -> Tensor:
        z = torch.cat([self.tokens.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1) + self.places
        for block in self.blocks:
            z = block(z)
        return self.norm(z)[:, :2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.features(x)
        return self.cls(z[:, 0]), self.dist(z[:, 1])


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 48, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10))


def augmented(x: Tensor) -> Tensor:
    """Turned, scaled and moved, with noise."""
    b = len(x)
    turn, scale = (torch.rand(b) - 0.5) * 0.5, 1 + (torch.rand(b) - 0.5) * 0.3
    cos, sin, shift = turn.cos() * scale, turn.sin() * scale, (torch.rand(2, b) - 0.5) * 0.4
    where = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(b, 2, 3)
    x = F.grid_sample(x, F.affine_grid(where, list(x.shape), align_corners=False), align_corners=False)
    return x + 0.1 * torch.randn_like(x)


# ---- the task


def long_tailed(y: Tensor, largest: int, smallest: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of images to learn from, n_c = largest (smallest / largest)^(c / 9) of class c, and 70 of each class to ask about."""
    learned, asked = [], []
    for c in range(10):
        places = torch.nonzero(y == c)[:, 0]
        places = places[torch.randperm(len(places), generator=draw)]
        asked.append(places[:70])
        learned.append(places[70 : 70 + round(largest * (smallest / largest) ** (c / 9))])
    return torch.cat(learned), torch.cat(asked)


def main() -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("scikit-learn is missing; get it with: pip install scikit-learn") from None
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    images, y = (torch.tensor(one) for one in load_digits(return_X_y=True))
    x = images.float().view(-1, 1, 8, 8) / 16
    learned, asked = long_tailed(y, 100, 5, torch.Generator().manual_seed(0))
    counts = y[learned].bincount()
    w, late = class_weights(counts), steps - steps // 12  # as 1,100 of 1,200 epochs
    tail = y[asked] >= 7
    print(f"images per class {counts.tolist()}, {len(asked)} balanced ones asked; two seeds")

    def batch() -> tuple[Tensor, Tensor]:
        rows = learned[torch.randint(len(learned), (32,))]
        return augmented(x[rows]), y[rows]

    def taught(rho: float) -> nn.Module:
        model = convolutional()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps // 2):
            seen, label = batch()
            flat_step(model, lambda s=seen, t=label: F.cross_entropy(model(s), t), optimizer, rho)
        return model.eval().requires_grad_(False)

    def student(teacher: nn.Module | None) -> ViT:
        model = ViT()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            seen, label = batch()
            said = label if teacher is None else teacher(seen).argmax(1)
            optimizer.zero_grad()
            distillation_loss(*model(seen), label, said, w if step >= late else None).backward()
            optimizer.step()
            schedule.step()
        return model.eval()

    @torch.no_grad()
    def shares(probabilities: Tensor) -> str:
        hit = probabilities.argmax(1) == y[asked]
        return f"{100 * hit.float().mean():.1f} / {100 * hit[tail].float().mean():.1f}"

    print("right, all / classes 7 to 9 alone; rank of features at 99 % of the energy of 48")
    for name, rho in (("alone", None), ("plain teacher", 0.0), ("flat teacher", 0.1)):
        for seed in range(2):
            torch.manual_seed(seed)
            teacher = None if rho is None else taught(rho)
            model = student(teacher)
            with torch.no_grad():
                cls, dist = model(x[asked])
                z = model.features(x[asked])
                of_teacher = "" if teacher is None else f"   teacher {shares(teacher(x[asked]))}"
            said = f"CLS {shares(cls)}, DIST {shares(dist)}, both {shares(cls.softmax(1) + dist.softmax(1))}"
            ranks = [feature_rank(z[:, token], 0.99) for token in (0, 1)]
            print(f"{name:14} {said}; rank of CLS {ranks[0]}, of DIST {ranks[1]}{of_teacher}", flush=True)


if __name__ == "__main__":
    main()
