"""LAMA: attention pooling with many heads, each of whose bilinear forms has rank one.

    c = mean of h_t over the tokens
    s_it = (p_iᵀ c) (q_iᵀ h_t) = cᵀ (p_i q_iᵀ) h_t
    F_t = tanh(s_t) / ‖tanh(s_t)‖₂                      over heads
    W = softmax(F) over tokens,    y = vec(W H)

    H [T, d] states of a recurrent network, rows h_t   c [d]   P, Q [h, d], rows p_i and q_i   s, F, W [h, T]   y [h d]

Cost: 2 d h parameters, where h full bilinear forms have h d². Each head's y_i is a mean of the states, with its own weights.

What follows from the equations: F lies in [-1, 1], so that no token has more than e² times the weight of another. Heads choose softly.

Source: Mehta, Rangwala, Ramakrishnan, "Low Rank Factorization for Compact Multi-Head Self-Attention", arXiv 1912.00835. The order of tanh, norm and softmax
is that of a third party's code. How P and Q are drawn is our choice.

    python examples/blocks/lama.py [STEPS]     (60 steps take a minute of one core)

To which part of Python's standard library do 48 words of a file belong? Other files are asked about than are learned from.
"""

import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.train.data.files import embedded_files


def masked_mean(H: Tensor, mask: Tensor) -> Tensor:
    """The mean [b, d] of states [b, T, d] over the tokens that are there, mask [b, T]."""
    weight = mask.to(H.dtype)[..., None]
    return (H * weight).sum(1) / weight.sum(1).clamp_min(1)


def scores(c: Tensor, H: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """s [b, h, T]: head i's bilinear form of c and of each state, without a matrix of d x d."""
    return (c @ P.T)[..., None] * (Q @ H.mT)


def weights(s: Tensor, mask: Tensor) -> Tensor:
    """What each head gives to each token [b, h, T]; tokens that are not there get zero."""
    bounded = F.normalize(torch.tanh(s), dim=1)
    return bounded.masked_fill(~mask[:, None], -torch.inf).softmax(-1)


class LAMA(nn.Module):
    """States [b, T, d] and their mask [b, T] become one vector [b, h d] per text."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.P = nn.Linear(d, heads, bias=False)
        self.Q = nn.Linear(d, heads, bias=False)

    def forward(self, H: Tensor, mask: Tensor) -> Tensor:
        s = scores(masked_mean(H, mask), H, self.P.weight, self.Q.weight)
        return (weights(s, mask) @ H).flatten(1)


class FullPooling(nn.Module):
    """The same with a matrix of d x d for each head, to compare with."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.forms = nn.Parameter(torch.randn(heads, d, d) / d)

    def forward(self, H: Tensor, mask: Tensor) -> Tensor:
        s = torch.einsum("bi,hij,btj->bht", masked_mean(H, mask), self.forms, H)
        return (weights(s, mask) @ H).flatten(1)


class MeanPooling(nn.Module):
    """The mean alone."""

    def forward(self, H: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(H, mask)


class Classifier(nn.Module):
    """Words, a GRU in both directions, a pooling, and a linear layer."""

    def __init__(self, vocabulary: int, classes: int, d: int, pooling: nn.Module, width: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, d, padding_idx=0)
        self.states = nn.GRU(d, d // 2, batch_first=True, bidirectional=True)
        self.pooling = pooling
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.pooling(self.states(self.words(ids))[0], ids != 0))


# ---- the task

PARTS = ("asyncio", "email", "encodings", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
LENGTH, VOCABULARY = 48, 2000


def texts() -> tuple[list[list[str]], list[int], list[list[str]], list[int]]:
    """Pieces of LENGTH words with their part: of three files in four to learn from, of the fourth to ask about."""
    root = Path(sysconfig.get_path("stdlib"))
    found: tuple[list[list[str]], list[int], list[list[str]], list[int]] = ([], [], [], [])
    for part, name in enumerate(PARTS):
        files = sorted(file for file in embedded_files() if file.relative_to(root).parts[0] == name)
        for number, file in enumerate(files):
            words = re.findall(r"[A-Za-z]+|[^\sA-Za-z]", file.read_text(encoding="utf-8"))
            pieces = [words[i : i + LENGTH] for i in range(0, len(words), LENGTH)][:60]
            side = 2 if number % 4 == 3 else 0
            found[side].extend(pieces)
            found[side + 1].extend([part] * len(pieces))
    return found


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    learned, parts, asked, wanted = texts()
    common = [word for word, _ in Counter(word for piece in learned for word in piece).most_common(VOCABULARY - 2)]
    number = {word: i + 2 for i, word in enumerate(common)}  # 0 pads, 1 is any other word

    def ids(pieces: list[list[str]]) -> Tensor:
        rows = [torch.tensor([number.get(word, 1) for word in piece]) for piece in pieces]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    X, Y, X_asked, Y_asked = ids(learned), torch.tensor(parts), ids(asked), torch.tensor(wanted)
    most = Y_asked.bincount().max().item() / len(Y_asked)
    print(
        f"{len(X):,} pieces to learn from, {len(X_asked):,} of other files to ask about; the largest of {len(PARTS)} parts has {most:.0%}"
    )
    d, heads = 64, 8
    for name, pooling, width in (
        ("mean", None, d),
        ("full bilinear", FullPooling, heads * d),
        ("LAMA", LAMA, heads * d),
    ):
        right = []
        for seed in range(3):
            torch.manual_seed(seed)
            pool = MeanPooling() if pooling is None else pooling(d, heads)
            model = Classifier(VOCABULARY, len(PARTS), d, pool, width)
            optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
            for _ in range(steps):
                rows = torch.randint(len(X), (64,))
                optimizer.zero_grad()
                F.cross_entropy(model(X[rows]), Y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                hit = torch.cat([model(X_asked[i : i + 512]).argmax(1) for i in range(0, len(X_asked), 512)]) == Y_asked
            right.append(hit.float().mean().item())
        shown = " ".join(f"{100 * one:.1f}" for one in right)
        print(
            f"{name:14} {sum(p.numel() for p in pool.parameters()):7,} parameters of the pooling, right {shown} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
