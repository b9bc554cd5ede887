"""Linformer's attention, whose keys and values are shortened to k positions, next to low-rank projections.

    K' = E K   V' = F V   y = softmax(Q K'ᵀ / √d) V'     K, V [T, d]   E, F [k, T], trained

Scores are T x k instead of T x T. E and F fix the length T, and mix later positions into earlier ones, so the form is for encoders.
Greenformers (arXiv 2108.10808) compares it with low-rank weights: those save at every length, this one at great length. Wang et al., "Linformer:
Self-Attention with Linear Complexity", arXiv 2006.04768.

    python examples/linformer.py
"""

import torch
from torch import Tensor, nn

import lorank


class LinformerAttention(nn.Module):
    """Self-attention of one head [b, T, d] with keys and values of k positions."""

    def __init__(self, width: int, length: int, kept: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.E, self.F = (nn.Parameter(torch.randn(kept, length) / length**0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.E @ self.key(x), self.F @ self.value(x)
        return nn.functional.scaled_dot_product_attention(self.query(x), keys, values)


class Encoder(nn.Module):
    def __init__(self, width: int, length: int, kept: int, blocks: int = 2):
        super().__init__()
        attention = [LinformerAttention(width, length, kept) for _ in range(blocks)]
        self.layers = nn.ModuleList(nn.Sequential(one, nn.LayerNorm(width)) for one in attention)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def main() -> None:
    torch.manual_seed(0)
    T, d, k = 64, 32, 8
    x = torch.randn(2, T, d)
    exact = LinformerAttention(d, T, T)
    with torch.no_grad():  # E = F = I is plain attention
        exact.E.copy_(torch.eye(T))
        exact.F.copy_(torch.eye(T))
    plain = nn.functional.scaled_dot_product_attention(exact.query(x), exact.key(x), exact.value(x))
    torch.testing.assert_close(exact(x), plain)
    model = Encoder(d, T, k)
    dense = sum(p.numel() for p in model.parameters())
    lorank.fit(model, "svd", budget=0.5)  # both savings at once
    small = sum(p.numel() for p in model.parameters())
    print(
        f"scores of {T} x {k} instead of {T} x {T}; {small:,} of {dense:,} parameters; outputs {list(model(x).shape)}"
    )


if __name__ == "__main__":
    main()
