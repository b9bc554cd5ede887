"""Wings: low-rank residual attention next to a frozen language model, for a second modality.

    q = (I + Q₂Q₁) x    k = (I + K₂K₁) f    v = (I + V₂V₁) f            x hidden states of the text   f features of the image
    a = softmax(q kᵀ / √d_h),    l = O₂O₁ (a v)                          O₂ = 0 at the start, so that l = 0
    x ← x + w_v l_v + w_t l_t,    (w_v, w_t) = softmax(SiLU(R a))        a router over a learner for images and one for text

    x [T, d]   f [S, d]   Q₁, K₁, V₁, O₁ [r, d] normal, cut, with deviation 0.02   Q₂, K₂, V₂, O₂ [d, r] zero   R [2, S] and a bias

Cost: 8 r d parameters per learner and layer: 2.10 M at d = 4096, r = 64.

Source: Zhang et al., "Wings: Learning Multimodal LLMs without Text-only Forgetting", arXiv 2406.03496. Our reading: the router reads the mean over heads of
the visual learner's attention, whose number of features S is fixed; the textual learner attends to the text before a token; a text without an image goes through
the model alone.

    python examples/blocks/wings.py [STEPS]     (150 steps take a minute and a half of one core; needs scikit-learn)

A model that has read Python's standard library sees handwritten digits, as 16 features of a small convolutional encoder that learns along, and
learns to say which one it is. Its loss on text is compared before and after, and with a model that learns the same by training all its weights,
with the features in front of the text.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorank.layers import LowRankLinear
from lorank.train.data.files import embedded_files


class LowRankResidual(LowRankLinear):
    """y = B A x with B = 0 at the start."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)


class Learner(nn.Module):
    """Cross-attention from x [b, T, d] to features [b, S, d]: what to add to x, and the mean attention of the heads [b, T, S]."""

    def __init__(self, d: int, rank: int, heads: int):
        super().__init__()
        self.heads = heads
        self.Q, self.K, self.V, self.O = (LowRankResidual(d, d, rank) for _ in range(4))
        for part in self.children():
            part.reset_parameters()

    def forward(self, x: Tensor, f: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (
            (y + part(y)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, y in ((self.Q, x), (self.K, f), (self.V, f))
        )
        s = q @ k.mT * q.shape[-1] ** -0.5
        a = (s if mask is None else s.masked_fill(~mask, -torch.inf)).softmax(-1)
        return self.O((a @ v).transpose(1, 2).flatten(2)), a.mean(1)


class Router(nn.Module):
    """From the attention to an image [b, T, S] to the weights of both learners [b, T, 2], which sum to one."""

    def __init__(self, features: int):
        super().__init__()
        self.map = nn.Linear(features, 2)

    def forward(self, a: Tensor) -> Tensor:
        return F.silu(self.map(a)).softmax(-1)


class Wings(nn.Module):
    """What stands next to one block: with the image alone in the first stage, with text and router in the second."""

    def __init__(self, d: int, rank: int, heads: int, features: int):
        super().__init__()
        self.visual, self.textual, self.router = Learner(d, rank, heads), Learner(d, rank, heads), Router(features)

    def forward(self, x: Tensor, image: Tensor, stage: int) -> Tensor:
        seen, a = self.visual(x, image)
        if stage == 1:
            return seen
        before = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        w = self.router(a)
        return w[..., :1] * seen + w[..., 1:] * self.textual(x, x, before)[0]


class Multimodal(nn.Module):
    """A frozen causal model whose blocks have wings, and an encoder of images to `features` vectors [b, S, d]."""

    def __init__(self, model: nn.Module, encoder: nn.Module, features: int, rank: int):
        super().__init__()
        d, heads = model.config.hidden_size, model.config.num_attention_heads
        self.model, self.encoder = model.requires_grad_(False), encoder
        self.wings = nn.ModuleList(Wings(d, rank, heads, features) for _ in model.model.layers)
        self.stage, self._image = 1, None
        for block, wing in zip(model.model.layers, self.wings, strict=True):
            block.self_attn.register_forward_hook(self._next_to(wing), with_kwargs=True)

    def _next_to(self, wing: Wings):
        def add(block: nn.Module, args, kwargs, out):
            x = args[0] if args else kwargs["hidden_states"]
            return out if self._image is None else (out[0] + wing(x, self._image, self.stage), *out[1:])

        return add

    def forward(self, ids: Tensor, image: Tensor | None = None) -> Tensor:
        self._image = None if image is None else self.encoder(image)
        try:
            return self.model(ids).logits
        finally:
            self._image = None


# ---- the task

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = b"digit: "


class Encoder(nn.Module):
    """Images [b, 1, 8, 8] to 16 features [b, 16, d], each of a part of the image and with its place."""

    def __init__(self, d: int):
        super().__init__()
        self.parts = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, d, 3, stride=2, padding=1), nn.ReLU()
        )
        self.places, self.norm = nn.Parameter(torch.randn(16, d) * 0.1), nn.LayerNorm(d)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.parts(images).flatten(2).mT + self.places)


def said(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes [n, T] of question and name, and which of them are to be learned."""
    rows = [torch.tensor(list(QUESTION + NAMES[i].encode().ljust(6))) for i in digits.tolist()]
    ids = torch.stack(rows)
    return ids, torch.arange(ids.shape[1] - 1).expand(len(ids), -1) >= len(QUESTION) - 1


def main() -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("scikit-learn is missing; get it with: pip install scikit-learn") from None
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    files = sorted(embedded_files())
    text, held_out = (
        torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in some)), dtype=torch.uint8)
        for some in ([f for i, f in enumerate(files) if i % 10], files[::10])
    )
    images, digits = (torch.tensor(one) for one in load_digits(return_X_y=True))
    X, names, asked = images.float().view(-1, 1, 8, 8) / 16, digits, torch.arange(len(digits)) % 4 == 3
    torch.manual_seed(0)

    def piece(source: Tensor, rows: int, draw: torch.Generator | None = None) -> Tensor:
        return source[torch.randint(len(source) - 64, (rows, 1), generator=draw) + torch.arange(64)].long()

    def loss_on_text(call) -> float:
        ids = piece(held_out, 64, torch.Generator().manual_seed(1))
        with torch.no_grad():
            return F.cross_entropy(call(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    def trained(parameters, loss, number: int, lr: float) -> None:
        optimizer = torch.optim.Adam(parameters, lr=lr)
        for _ in range(number):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    def naming(call) -> Tensor:
        rows = torch.nonzero(~asked)[:, 0][torch.randint(int((~asked).sum()), (64,))]
        ids, wanted = said(names[rows])
        return F.cross_entropy(call(ids, X[rows])[:, :-1][wanted], ids[:, 1:][wanted])

    def right(call) -> float:
        """Which held-out images are named: the likeliest of the ten names, by the mean over its bytes."""
        with torch.no_grad():
            found = []
            for name in range(10):
                ids, wanted = said(torch.full((int(asked.sum()),), name))
                losses = F.cross_entropy(call(ids, X[asked])[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
                found.append((losses * wanted).sum(1))
        return (torch.stack(found).argmin(0) == names[asked]).float().mean().item()

    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(shape)

    def reading() -> Tensor:
        ids = piece(text, 16)
        return F.cross_entropy(base(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    trained(base.parameters(), reading, steps, 5e-3)
    before = loss_on_text(lambda ids: base(ids).logits)
    print(f"text loss of the model {before:.4f} nats per byte")

    model = Multimodal(copy.deepcopy(base), Encoder(64), 16, rank=16)
    learned = [p for p in model.parameters() if p.requires_grad]
    for stage in (1, 2):
        model.stage = stage
        trained(learned, lambda: naming(model), 2 * steps // stage, 1e-2)
        moved = loss_on_text(model) - before
        blank = loss_on_text(lambda ids: model(ids, X[:1].expand(len(ids), -1, -1, -1))) - before
        print(
            f"wings, stage {stage}: {right(model):.1%} of digits named; text loss moved by {moved:.4f}, next to an image by {blank:+.4f}"
        )
    print(f"{sum(p.numel() for p in learned):,} parameters trained")

    whole = copy.deepcopy(base).requires_grad_(True)
    encoder = Encoder(64)

    def in_front(ids: Tensor, image: Tensor) -> Tensor:
        inputs = torch.cat([encoder(image), whole.get_input_embeddings()(ids)], 1)
        return whole(inputs_embeds=inputs).logits[:, 16:]

    trained([*whole.parameters(), *encoder.parameters()], lambda: naming(in_front), 2 * steps, 5e-3)
    moved = loss_on_text(lambda ids: whole(ids).logits) - before
    print(
        f"all weights trained, features in front: {right(in_front):.1%} of digits named; text loss moved by {moved:+.4f}"
    )


if __name__ == "__main__":
    main()
