"""BiPFT: a low-rank correction, in full precision, of the attention scores of a binary BERT.

    x̂ = a sign(x / a),   Ŵ = a_w sign(W)                  activations and weights of one bit, with learned scales a
    S = Q̂ K̂ᵀ + m_q p_kᵀ + p_q m_kᵀ + p_q p_kᵀ            Q, K = X̂ Ŵ_qᵀ, X̂ Ŵ_kᵀ
      = Q̂ K̂ᵀ + [m_q, p_q] [p_k, m_k + p_k]ᵀ              so the correction has rank 2 at most
    Y = softmax(S / √d_h) (V̂ + p_v 1ᵀ)

    X [T, d] hidden states   Q, K, V [T, d_h] per head   m_q, m_k, p_q, p_k, p_v [T] each a linear map d -> 1 of X, for all heads the same

The reason: if q = q̂ + p_q and k = k̂ + p_k, each number added to all entries of its row, then q kᵀ has these three terms next to q̂ k̂ᵀ.
Gradients go straight through the signs: to x where |x| ≤ a, and to W everywhere.

Cost: 5 (d + 1) parameters per layer. With p_q = p_k = p_v = 0 it is plain binary attention; here it starts so.

Source: Xing et al., "BiPFT: Binary Pre-trained Foundation Transformer with Low-rank Estimation of Binarization Residual Polynomials", arXiv 2312.08937. Our
reading: the softmax's output stays real, the correction is divided by √d_h as the scores are, and p starts at zero.

    python examples/blocks/bipft.py [STEPS]     (200 steps take a minute of one core)

A BERT of two blocks learns to fill in bytes of Python's standard library: binary, binary with the correction, and real.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.train.data.files import embedded_files


def sign(x: Tensor) -> Tensor:
    """-1 or 1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class Sign(nn.Module):
    """x̂ = a sign(x / a); the gradient passes where |x| ≤ a, and a learns too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        z = x / self.a
        straight = z.clamp(-1, 1)
        return self.a * (straight + (sign(z) - straight).detach())


class BinaryLinear(nn.Linear):
    """y = x̂ Ŵᵀ + b with a scale for each row of W, which begins as its mean absolute value."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True):
        super().__init__(d_in, d_out, bias=bias)
        self.sign = Sign()
        self.a = nn.Parameter(self.weight.detach().abs().mean(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        W = self.a * sign(self.weight) + (self.weight - self.weight.detach())
        return F.linear(self.sign(x), W, self.bias)


def correction(m_q: Tensor, p_q: Tensor, m_k: Tensor, p_k: Tensor) -> Tensor:
    """The three terms [..., T, T] of estimates [..., T], as a product of two factors of width two."""
    return torch.stack([m_q, p_q], -1) @ torch.stack([p_k, m_k + p_k], -1).mT


class Attention(nn.Module):
    """Attention over X [b, T, d] with `linear` maps and Q, K and V as `bits` makes them; corrected or not."""

    def __init__(self, d: int, heads: int, *, corrected: bool, linear: type[nn.Linear] = BinaryLinear, bits=Sign):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (linear(d, d) for _ in range(4))
        self.bits = nn.ModuleList(bits() for _ in range(3))
        self.estimates = nn.Linear(d, 5) if corrected else None  # m_q, m_k, p_q, p_k, p_v
        if self.estimates is not None:
            with torch.no_grad():
                self.estimates.weight[2:] = 0
                self.estimates.bias[2:] = 0

    def forward(self, X: Tensor) -> Tensor:
        Q, K, V = (
            bit(map_(X).unflatten(-1, (self.heads, -1)).transpose(1, 2))  # [b, heads, T, d_h]
            for bit, map_ in zip(self.bits, (self.q, self.k, self.v), strict=True)
        )
        S = Q @ K.mT
        if self.estimates is not None:
            m_q, m_k, p_q, p_k, p_v = self.estimates(X).unbind(-1)  # [b, T]
            S = S + correction(m_q, p_q, m_k, p_k)[:, None]
            V = V + p_v[:, None, :, None]
        Y = (S * Q.shape[-1] ** -0.5).softmax(-1) @ V
        return self.o(Y.transpose(1, 2).flatten(2))


class Bert(nn.Module):
    """Bytes [b, T] to scores of bytes [b, T, 256]; embeddings, norms and the head are real in all kinds."""

    def __init__(self, kind: str, d: int = 64, heads: int = 4, layers: int = 2, length: int = 32):
        super().__init__()
        linear, bits = (nn.Linear, nn.Identity) if kind == "real" else (BinaryLinear, Sign)
        self.bytes, self.places = nn.Embedding(257, d), nn.Embedding(length, d)  # 256 is what is to be filled in
        self.attentions = nn.ModuleList(
            Attention(d, heads, corrected=kind == "corrected", linear=linear, bits=bits) for _ in range(layers)
        )
        self.mlps = nn.ModuleList(nn.Sequential(linear(d, 2 * d), nn.GELU(), linear(2 * d, d)) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2 * layers + 1))
        self.head = nn.Linear(d, 256)

    def forward(self, ids: Tensor) -> Tensor:
        X, norms = self.bytes(ids) + self.places.weight[: ids.shape[1]], iter(self.norms)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            X = X + attention(next(norms)(X))
            X = X + mlp(next(norms)(X))
        return self.head(next(norms)(X))


def masked(text: Tensor, rows: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pieces of a text [rows, length], the same with 15 % of the bytes hidden, and where."""
    starts = torch.randint(len(text) - length, (rows, 1), generator=draw)
    piece = text[starts + torch.arange(length)].long()
    hidden = torch.rand(piece.shape, generator=draw) < 0.15
    return piece, piece.masked_fill(hidden, 256), hidden


def loss_of(model: nn.Module, piece: Tensor, shown: Tensor, hidden: Tensor) -> Tensor:
    return F.cross_entropy(model(shown)[hidden], piece[hidden])


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    files = sorted(embedded_files())
    learned, asked = (
        torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in some)), dtype=torch.uint8)
        for some in ([f for i, f in enumerate(files) if i % 10], files[::10])
    )
    print(
        f"{len(learned):,} bytes to learn from; nats per hidden byte of {len(asked):,} others, three seeds, {steps} steps"
    )
    for kind in ("binary", "corrected", "real"):
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            model, draw = Bert(kind), torch.Generator().manual_seed(seed)
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
            for _ in range(steps):
                optimizer.zero_grad()
                loss_of(model, *masked(learned, 16, 32, draw)).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                losses.append(loss_of(model, *masked(asked, 512, 32, torch.Generator().manual_seed(9))).item())
        extra = sum(p.numel() for n, p in model.named_parameters() if "estimates" in n)
        print(
            f"{kind:10} {' '.join(f'{one:.3f}' for one in losses)}   {extra} parameters of the correction", flush=True
        )


if __name__ == "__main__":
    main()
