"""Linear layers: one for output widths that matrix libraries are slow at, and one with memory of its own."""

import torch
from torch import Tensor, nn

ALIGNED = 8
"""Widths that are multiples of this start every row of a matrix at an address that vector units like."""


def linear(d_in: int, d_out: int, **options: object) -> nn.Linear:
    """An ``nn.Linear``; where `d_out` is not aligned, one that lays its output out column by column."""
    return (nn.Linear if d_out % ALIGNED == 0 else ColumnMajorLinear)(d_in, d_out, **options)  # type: ignore[arg-type]


def own_memory(layer: nn.Linear) -> nn.Linear:
    """The same layer, its tensors copied where they are views (parts of a fused matrix), which files cannot hold."""
    for name, value in list(layer.named_parameters()):
        if not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            copied = value.detach().clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(copied, requires_grad=value.requires_grad))
    return layer


class ColumnMajorLinear(nn.Linear):
    """y = x W^T (+ b) computed as (W x^T)^T, so that y's rows, as long as there are tokens, are aligned.

    The 1B Llama's MLP is 5,461 wide. A row-major y [n, 5461] makes every row but each eighth start off the grid, which
    costs BLAS a third of its speed; laid out as [5461, n] it does not. Autograd keeps the layout on the way back. Values
    are those of ``nn.Linear`` up to the order of sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // x.shape[-1]
        if n % ALIGNED:
            return super().forward(x)
        flat = x.reshape(n, -1)
        y = torch.bmm(self.weight[None], flat.T[None])[0].T  # [n, d_out], strides (1, n)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)
