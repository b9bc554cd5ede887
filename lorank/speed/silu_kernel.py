"""A matrix product in Triton with SiLU on the way in, or its derivative on the way out.

    out = σ(P) Q + b        or        out = (P Q) ∘ σ'(Z)        P [m, k]   Q [k, n]   b [n]   Z, out [m, n]

Each program computes a tile [ROWS, COLUMNS] of `out` and goes along k in pieces of DEPTH. Sums are in single precision. σ(P) is rounded
to the type of P before it is multiplied, as torch's two operations do. Matrices may be transposed: only their strides differ. That is
how one kernel serves for y, ∂z and ∂B in lorank/speed/bottleneck.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 128, 128, 32


@triton.jit
def tile(  # type: ignore[no-untyped-def]
    P,
    Q,
    bias,
    Z,
    out,
    m,
    n,
    k,
    p_row,
    p_column,
    q_row,
    q_column,
    z_row,
    z_column,
    o_row,
    o_column,
    SILU: tl.constexpr,
    BIAS: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    j = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, k, DEPTH):
        d = (start + tl.arange(0, DEPTH)).to(tl.int64)
        p = tl.load(P + i * p_row + d[None, :] * p_column, (i < m) & (d[None, :] < k), 0.0)
        q = tl.load(Q + d[:, None] * q_row + j * q_column, (d[:, None] < k) & (j < n), 0.0)
        if SILU:
            x = p.to(tl.float32)
            p = (x / (1.0 + tl.exp(-x))).to(p.dtype)
        total = tl.dot(p, q, total, input_precision=PRECISION)
    inside = (i < m) & (j < n)
    if BIAS:
        total += tl.load(bias + j, j < n, 0.0).to(tl.float32)
    if SLOPE:
        z = tl.load(Z + i * z_row + j * z_column, inside, 0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-z))
        total *= s * (1.0 + z * (1.0 - s))
    tl.store(out + i * o_row + j * o_column, total.to(out.dtype.element_ty), inside)


def product(
    P: Tensor, Q: Tensor, *, bias: Tensor | None = None, silu: bool = False, slope_at: Tensor | None = None
) -> Tensor:
    """σ(P) Q + b, or (P Q) ∘ σ'(Z) for Z = `slope_at`, of P [..., k] and Q [k, n] of one type of 32 or 16 bits."""
    shape = (*P.shape[:-1], Q.shape[-1])
    P = P.reshape(-1, P.shape[-1])
    Z = None if slope_at is None else slope_at.reshape(-1, Q.shape[-1])
    (m, k), n = P.shape, Q.shape[-1]
    out = P.new_empty(m, n)
    exact = P.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    with torch.cuda.device_of(P):
        tile[triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS)](
            P,
            Q,
            P if bias is None else bias,
            P if Z is None else Z,
            out,
            m,
            n,
            k,
            *P.stride(),
            *Q.stride(),
            *(P if Z is None else Z).stride(),
            *out.stride(),
            SILU=silu,
            BIAS=bias is not None,
            SLOPE=Z is not None,
            PRECISION="ieee" if exact else "tf32",
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            DEPTH=DEPTH,
            num_warps=8,
        )
    return out.view(shape)
