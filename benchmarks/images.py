"""Adapters on pictures: tasks (MTLoRA), quality (PETALface) and convolutions (CP form), each against plain LoRA and full tuning.

    pip install '.[benchmarks]'
    python benchmarks/images.py [--only tasks]

The pictures are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which come with the package: 900 to train on, 300 to choose learning
rates by, and the rest, from which all figures are. Every seed has its own split, its own base and its own order. Learning rates and seeds:
benchmarks/rows.py.

- convolutions: a U-Net has learned which pixels are ink in noisy digits. From 30 pictures it learns it in blurred negatives. Dice in per cent.
- quality: a ViT of transformers has learned the class of clean, upright digits. It learns that of digits that are blurred by a Gaussian of σ = 0
  to 2 pixels, q = 1 - σ / 2. Accuracy in per cent by σ.
- tasks: the same ViT learns class, parity and rotation of turned digits, with a linear head for each. Accuracy in per cent.
"""

import argparse
import copy
import functools
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rows import SEEDS, fit, row, title
from sklearn.datasets import load_digits  # type: ignore[import-not-found]
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import lorank

HEADS = {"class": 10, "parity": 2, "rotation": 4}
SHAPE = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
}


# ---- pictures


class Digits(NamedTuple):
    x: Tensor  # [N, 1, 8, 8], from 0 to 1
    y: Tensor  # [N]


@functools.cache
def split(seed: int) -> tuple[Digits, Digits, Digits]:
    """To train on, to choose by, to report."""
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, second, third = order.split([900, 300, len(x) - 1200])
    return Digits(x[first], y[first]), Digits(x[second], y[second]), Digits(x[third], y[third])


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Each picture [N, 1, 8, 8] through a Gaussian of its own σ [N], in pixels."""
    between = torch.arange(8.0)[:, None] - torch.arange(8.0)
    kernel = torch.exp(-0.5 * (between / sigma.clamp(min=1e-3)[:, None, None]) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True))[:, None]
    return kernel @ x @ kernel.mT


def turned(x: Tensor, quarters: Tensor) -> Tensor:
    """Each picture by its own number of quarter turns [N]."""
    return torch.stack([torch.rot90(x, k, (-2, -1)) for k in range(4)])[quarters, torch.arange(len(x))]


def share(right: Tensor) -> float:
    """In per cent."""
    return 100 * right.float().mean().item()


# ---- the ViT


class Classifier(nn.Module):
    """A ViT, and linear heads on its first token."""

    def __init__(self, vit: ViTModel, heads: Sequence[str]):
        super().__init__()
        self.vit = vit
        self.heads = nn.ModuleDict({name: nn.Linear(SHAPE["hidden_size"], HEADS[name]) for name in heads})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if "mtlora" not in str(getattr(self.vit.config, "lorank", "")):
            state = self.vit(pixel_values=x).last_hidden_state[:, 0]
            return {name: head(state) for name, head in self.heads.items()}
        logits = {}
        for name, head in self.heads.items():  # a stream for each task
            lorank.set_context(self.vit, [*HEADS].index(name))
            logits[name] = head(self.vit(pixel_values=x).last_hidden_state[:, 0])
        return logits


@functools.cache
def vit_base(seed: int) -> Classifier:
    torch.manual_seed(seed)
    model, (x, y) = Classifier(ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False), ["class"]), split(seed)[0]
    fit(lambda i, _: F.cross_entropy(model(x[i])["class"], y[i]), model, 3e-3, seed, steps=300, count=len(x))
    return model


def about_the_vit() -> None:
    bases = [vit_base(seed) for seed in SEEDS]
    with torch.no_grad():
        right = [
            share(m(split(s)[2].x)["class"].argmax(-1) == split(s)[2].y) for s, m in zip(SEEDS, bases, strict=True)
        ]
    size = sum(p.numel() for p in bases[0].parameters())
    print(f"ViT of {size:,} parameters; as it came, {mean(right):.1f} ± {stdev(right):.1f} % of clean, upright digits")


def tuned(seed: int, method: Any) -> ViTModel:
    """The base's ViT, frozen under an adapter, or frozen (None), or all of it trained ("full")."""
    vit = copy.deepcopy(vit_base(seed).vit)
    torch.manual_seed(seed)
    return vit.requires_grad_(method == "full") if method in (None, "full") else lorank.convert(vit, method)


# ---- tasks


def labels(y: Tensor, quarters: Tensor) -> dict[str, Tensor]:
    return {"class": y, "parity": y % 2, "rotation": quarters}


def tasks_run(lr: float, seed: int, *, method: Any, together: bool = True) -> Any:
    """One model for all tasks, or one for each."""
    x, y = split(seed)[0]
    groups = [[*HEADS]] if together else [[name] for name in HEADS]
    models = nn.ModuleList(Classifier(tuned(seed, method), group) for group in groups)

    for model in models:

        def loss(i: Tensor, draw: torch.Generator, model: Any = model) -> Tensor:
            quarters = torch.randint(4, (len(i),), generator=draw)
            pictures, wanted = turned(x[i], quarters), labels(y[i], quarters)
            losses = [F.cross_entropy(found, wanted[head]) for head, found in model(pictures).items()]
            return torch.stack(losses).sum()

        fit(loss, model, lr, seed, steps=100, count=len(x))

    def measure(report: bool) -> list[float]:
        part = split(seed)[2 if report else 1]
        quarters = torch.randint(4, (len(part.x),), generator=torch.Generator().manual_seed(9))
        pictures, wanted = turned(part.x, quarters), labels(part.y, quarters)
        found = {head: logits for model in models for head, logits in model(pictures).items()}
        right = [share(found[head].argmax(-1) == wanted[head]) for head in HEADS]
        return [*right, mean(right)]

    return models, measure


def tasks() -> None:
    title("tasks", [*HEADS, "mean"])
    for name, method, together in (
        ("heads alone", None, True),
        ("lora, rank 6", lorank.LoRA(rank=6), True),
        ("lora for each, rank 6", lorank.LoRA(rank=6), False),
        ("mtlora, 4 + 2 for each", lorank.MTLoRA(tasks=3, rank=4, task_rank=2), True),
        ("full", "full", True),
    ):
        row(name, functools.partial(tasks_run, method=method, together=together), 3e-3)


# ---- quality


def quality_run(lr: float, seed: int, *, method: Any, known: bool = True) -> Any:
    (x, y), model = split(seed)[0], copy.deepcopy(vit_base(seed))
    model.vit = tuned(seed, method)

    def logits(pictures: Tensor, sigma: Tensor) -> Tensor:
        if isinstance(method, lorank.PETALface):
            lorank.set_context(model.vit, 1 - sigma / 2 if known else 0.5)
        found: Tensor = model(blurred(pictures, sigma))["class"]
        return found

    def loss(i: Tensor, draw: torch.Generator) -> Tensor:
        return F.cross_entropy(logits(x[i], 2 * torch.rand(len(i), generator=draw)), y[i])

    def measure(report: bool) -> list[float]:
        part = split(seed)[2 if report else 1]
        right = [share(logits(part.x, torch.full((len(part.x),), s)).argmax(-1) == part.y) for s in (0.0, 1.0, 2.0)]
        return [*right, mean(right)]

    if lr:
        fit(loss, model, lr, seed, steps=100, count=len(x))
    else:
        model.eval().requires_grad_(False)
    return model, measure


def quality() -> None:
    about_the_vit()
    title("quality", ["σ = 0", "σ = 1", "σ = 2", "mean"])
    row("as it came", functools.partial(quality_run, method=None), 0.0)
    for name, method, known in (
        ("lora, rank 4", lorank.LoRA(rank=4), True),
        ("petalface, 2 + 2", lorank.PETALface(rank=2, scale=4.0), True),
        ("petalface, all q = 1/2", lorank.PETALface(rank=2, scale=4.0), False),
        ("full", "full", True),
    ):
        row(name, functools.partial(quality_run, method=method, known=known), 3e-3)


# ---- convolutions


class UNet(nn.Module):
    """Two scales: 16 channels at 8 x 8 pixels, 32 at 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        three = lambda i, o: nn.Conv2d(i, o, 3, padding=1)  # noqa: E731
        self.fine, self.coarse, self.back = (
            nn.Sequential(three(i, o), nn.SiLU(), three(o, o), nn.SiLU()) for i, o in ((1, 16), (16, 32), (48, 16))
        )
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = F.interpolate(self.coarse(F.avg_pool2d(fine, 2)), scale_factor=2.0)
        out: Tensor = self.head(self.back(torch.cat([fine, coarse], dim=1)))
        return out


def ink(x: Tensor) -> Tensor:
    return (x >= 0.5).float()


@functools.cache
def unet_base(seed: int) -> UNet:
    torch.manual_seed(seed)
    model, (x, _) = UNet(), split(seed)[0]

    def loss(i: Tensor, draw: torch.Generator) -> Tensor:
        noise = torch.randn(x[i].shape, generator=draw)
        return F.binary_cross_entropy_with_logits(model(x[i] + 0.3 * noise), ink(x[i]))

    fit(loss, model, 1e-2, seed, steps=300, count=len(x))
    return model


def convolutions_run(lr: float, seed: int, *, adapter: Any) -> Any:
    x, model = split(seed)[0].x[:30], copy.deepcopy(unet_base(seed))
    torch.manual_seed(seed)
    if isinstance(adapter, dict):
        lorank.adapt_convolutions(model, targets="fine|coarse|back", **adapter)
    seen = lambda x: 1 - blurred(x, torch.ones(len(x)))  # noqa: E731

    def loss(i: Tensor, _: torch.Generator) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(seen(x[i])), ink(x[i]))

    def measure(report: bool) -> list[float]:
        part = split(seed)[2 if report else 1]
        found, wanted = model(seen(part.x)) > 0, ink(part.x) > 0
        return [100 * 2 * (found & wanted).sum().item() / (found.sum() + wanted.sum()).item()]

    if lr:
        fit(loss, model, lr, seed, steps=100, count=len(x), batch=10)
    else:
        model.requires_grad_(False)
    return model, measure


def convolutions() -> None:
    print(f"U-Net of {sum(p.numel() for p in unet_base(0).parameters()):,} parameters")
    title("convolutions", ["Dice"])
    row("as it came", functools.partial(convolutions_run, adapter=None), 0.0)
    rows: dict[str, Any] = {f"cp, rank {r}": {"structure": "cp", "rank": r} for r in (1, 4, 16)}
    rows["conv, rank 4"] = {"structure": "conv", "rank": 4}
    rows |= {f"{name}, magnitude": {**given, "magnitude": True} for name, given in [*rows.items()] if "rank 4" in name}
    for name, adapter in {**rows, "full": "full"}.items():
        row(name, functools.partial(convolutions_run, adapter=adapter), 1e-2 if adapter == "full" else 3e-2)


PARTS = {"convolutions": convolutions, "quality": quality, "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*PARTS], default=None)
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {len(SEEDS)} seeds")
    for part in asked.only or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
