"""Adapters of convolutions: an update of few numbers, as products of vectors or of two matrices, and a magnitude for each channel.

    y = (W + s ΔW) * x + b                  W, ΔW [c_out, c_in, k_h, k_w],  * a convolution,  W and b frozen
    "cp":      ΔW[o, i, h, w] = Σ_q a_q[o] b_q[i] c_q[h] d_q[w]                                                (1)
    "conv":    ΔW = B A,  A a k_h x k_w convolution to r channels, B [c_out, r] one of 1 x 1                   (2)
    "matrix":  ΔW = B A, reshaped,  B [c_out k_h, r],  A [r, c_in k_w]                                         (3)
    magnitude: W' = μ ⊙ (W + s ΔW) / |W + s ΔW|,  |.| and μ for each output channel                             (4)

Saves: gradients, optimizer state.

(1) is computed as four convolutions: 1 x 1 to r channels, k_h x 1 and 1 x k_w on each of them, and 1 x 1. The others, and all with
(4), add ΔW to W first. Everything else of the model is frozen.

Cost of a layer, trained parameters for each rank: c_in + c_out + k_h + k_w; c_in k_h k_w + c_out; c_in k_w + c_out k_h. For 64 to 64
channels and 3 x 3 these are 134, 640 and 384. (4) adds c_out. Merged, it is the convolution it was.

Source: a study of CP-LoRA, DoRA-C and other adapters of a U-Net, arXiv 2508.01772; (2) is peft's layout, (3) that of microsoft/LoRA; (4)
is Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

Confirmed: (1) and (4). Which name the paper gives to (2) and (3), and how it draws the vectors, is not known to us: here a, and B, are
zero at the start, and all else is drawn so that what reaches a has the size of x.
"""

import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorank.layers import like
from lorank.rewriting import put

Structure = Literal["cp", "conv", "matrix"]


# ---- the mathematics


def cp_kernel(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(1) [c_out, c_in, k_h, k_w] of a [c_out, r], b [c_in, r], c [k_h, r], d [k_w, r]."""
    return torch.einsum("oq,iq,hq,wq->oihw", a, b, c, d)


LEAST = 1e-12
"""|kernel| of a channel is at least this."""


def channel_norms(kernel: Tensor) -> Tensor:
    """|.| of (4), [c_out, 1, 1, 1]."""
    return torch.linalg.vector_norm(kernel, dim=(1, 2, 3), keepdim=True)


# ---- the layer


class AdaptedConv2d(nn.Module):
    """A frozen convolution and its update."""

    def __init__(self, dense: nn.Conv2d, rank: int, *, structure: Structure, scale: float, magnitude: bool):
        super().__init__()
        self.W, self.rank, self.structure, self.scale = dense.requires_grad_(False), rank, structure, scale
        o, i, h, w = dense.weight.shape
        new = lambda *shape: nn.Parameter(torch.empty(shape, **like(dense.weight)))  # noqa: E731
        if structure == "cp":
            self.a, self.b, self.c, self.d = new(o, rank), new(i, rank), new(h, rank), new(w, rank)
        elif structure == "conv":
            self.A, self.B = new(rank, i, h, w), new(o, rank)
        else:
            self.A, self.B = new(rank, i * w), new(o * h, rank)
        self.mu = nn.Parameter(channel_norms(dense.weight).detach()) if magnitude else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No update, and the magnitudes of W."""
        first = self.a if self.structure == "cp" else self.B
        nn.init.zeros_(first)
        for factor in (self.b, self.c, self.d) if self.structure == "cp" else (self.A,):
            fan_in = len(factor) if self.structure == "cp" else factor[0].numel()
            nn.init.normal_(factor, std=fan_in**-0.5)

    def update(self) -> Tensor:
        """ΔW."""
        shape = self.W.weight.shape
        if self.structure == "cp":
            return cp_kernel(self.a, self.b, self.c, self.d)
        return (self.B @ self.A.flatten(1)).view(shape)

    def kernel(self) -> Tensor:
        """W', which a plain convolution would have."""
        kernel = self.W.weight + self.scale * self.update()
        return kernel if self.mu is None else kernel * (self.mu / channel_norms(kernel).clamp(min=LEAST))

    def forward(self, x: Tensor) -> Tensor:
        conv = self.W
        if self.structure != "cp" or self.mu is not None:
            return F.conv2d(x, self.kernel(), conv.bias, conv.stride, conv.padding, conv.dilation)
        (sh, sw), (dh, dw) = conv.stride, conv.dilation
        ph, pw = (int(n) for n in conv.padding)
        z = F.conv2d(x, self.b.T[:, :, None, None])
        z = F.conv2d(z, self.c.T[:, None, :, None], None, (sh, 1), (ph, 0), (dh, 1), self.rank)
        z = F.conv2d(z, self.d.T[:, None, None, :], None, (1, sw), (0, pw), (1, dw), self.rank)
        return torch.add(conv(x), F.conv2d(z, self.a[:, :, None, None]), alpha=self.scale)

    def settings(self) -> dict[str, Any]:
        """Arguments of `adapt_convolutions` that make this layer."""
        return {
            "rank": self.rank,
            "structure": self.structure,
            "scale": self.scale,
            "magnitude": self.mu is not None,
        }

    def pair(self) -> tuple[Tensor, Tensor]:
        """B [c_out, r, 1, 1] and A [r, c_in, k_h, k_w] of two convolutions whose product s ΔW is: (2), of which (1) is a special case.

        Raises:
            ValueError: its structure is "matrix".
        """
        if self.structure == "matrix":
            raise ValueError("structure must be 'cp' or 'conv' to give two convolutions, got 'matrix'")
        A = torch.einsum("iq,hq,wq->qihw", self.b, self.c, self.d) if self.structure == "cp" else self.A
        B = self.a if self.structure == "cp" else self.B
        return self.scale * B[:, :, None, None].detach(), A.detach()

    def merged(self) -> nn.Conv2d:
        """The convolution that computes the same; it is the frozen one, changed in place."""
        with torch.no_grad():
            self.W.weight.copy_(self.kernel())
        return self.W.requires_grad_()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, structure={self.structure}, scale={self.scale:g}"


# ---- for a whole model


def adapt_convolutions(
    model: nn.Module,
    *,
    rank: int = 4,
    structure: Structure = "cp",
    scale: float = 1.0,
    magnitude: bool = False,
    targets: str | None = None,
) -> nn.Module:
    """Give the ``nn.Conv2d`` of any model, a U-Net for example, an update each, in place, and freeze all else.

    Args:
        structure: "cp", "conv" or "matrix", as in the head of `lorank.adapters.cp_conv`.
        magnitude: train the length of each output channel's kernel too (DoRA).
        targets: a regular expression searched in names of modules; only matching convolutions are adapted.

    Raises:
        ValueError: nothing matches, a matching convolution has groups or pads with something else than a number of zeros, or the model
            has adapted convolutions already.
    """
    if structure not in ("cp", "conv", "matrix"):
        raise ValueError(f"structure must be 'cp', 'conv' or 'matrix', got {structure!r}")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if adapted(model):
        raise ValueError(
            "model must have no adapted convolutions yet; name all in one call, or use merge_convolutions first"
        )
    found = {name: m for name, m in model.named_modules() if type(m) is nn.Conv2d and re.search(targets or "", name)}
    if not found:
        raise ValueError(f"targets must match an nn.Conv2d of the model, got {targets!r}, which matches none")
    for name, conv in found.items():
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"{name} must be a convolution without groups, padded by a number of zeros, got {conv}; leave it out with targets"
            )
    model.requires_grad_(False)
    settings: dict[str, Any] = {"structure": structure, "scale": scale, "magnitude": magnitude}
    for name, conv in found.items():
        put(model, name, AdaptedConv2d(conv, rank, **settings).train(conv.training))
    return model


def adapted(model: nn.Module) -> dict[str, AdaptedConv2d]:
    """The adapted convolutions of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedConv2d)}


def merge_convolutions(model: nn.Module) -> nn.Module:
    """Turn adapted convolutions, in place, into ordinary ones with the same outputs; everything trains again."""
    for name, module in adapted(model).items():
        put(model, name, module.merged())
    return model.requires_grad_()
