"""The second half of a bottleneck as one operation, which keeps A x alone for the backward pass.

    y = σ(z) Bᵀ + b        z = x Aᵀ [n, r]   B [d, r]   b [d]   y [n, d]        σ(z) = z s   s = 1 / (1 + e⁻ᶻ)   (SiLU)

    ∂z = (∂y B) ∘ σ'(z)    ∂B = ∂yᵀ σ(z)    ∂b = Σ ∂y        σ'(z) = s (1 + z (1 - s))

With an operation for σ and one for the product, σ(z) [n, r] is kept too: 7 n r numbers of a block. Here it is computed again where it
is used. On a GPU with Triton it is never in memory: lorank/speed/silu_kernel.py computes σ and σ' inside the three products.
Elsewhere torch's operations do that one after the other, and are what the kernel is tested against.

`fuse_bottlenecks` lets a model compute like this. Numbers are the same up to rounding.
"""

from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import register_flop_formula

from lorank.layers import LowRankLinear

try:
    from lorank.speed.silu_kernel import product
except ModuleNotFoundError:  # no Triton
    product = None  # type: ignore[assignment]

Model = TypeVar("Model", bound=nn.Module)
BY_KERNEL = (torch.float32, torch.bfloat16, torch.float16)


# ---- three operations, each a product with σ or σ' in it


@torch.library.custom_op("lorank::silu_linear", mutates_args=())
def silu_linear(z: Tensor, B: Tensor, b: Tensor | None) -> Tensor:
    """y = σ(z) Bᵀ + b, for z [..., r]."""
    if _by_kernel(z):
        return product(z, B.mT, bias=b, silu=True)
    return F.linear(F.silu(z), B, b)


@torch.library.custom_op("lorank::silu_linear_dz", mutates_args=())
def silu_linear_dz(dy: Tensor, z: Tensor, B: Tensor) -> Tensor:
    """∂z = (∂y B) ∘ σ'(z)."""
    if _by_kernel(z):
        return product(dy, B, slope_at=z)
    return torch.ops.aten.silu_backward(dy @ B, z)  # type: ignore[no-any-return]


@torch.library.custom_op("lorank::silu_linear_dB", mutates_args=())
def silu_linear_dB(dy: Tensor, z: Tensor) -> Tensor:
    """∂B = ∂yᵀ σ(z)."""
    z, dy = z.reshape(-1, z.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if _by_kernel(z):
        return product(z.mT, dy, silu=True).mT.contiguous()
    return dy.mT @ F.silu(z)


def _by_kernel(z: Tensor) -> bool:
    return z.is_cuda and z.dtype in BY_KERNEL and z.numel() > 0 and product is not None


silu_linear.register_fake(lambda z, B, b: z.new_empty(*z.shape[:-1], len(B)))
silu_linear_dz.register_fake(lambda dy, z, B: torch.empty_like(z, memory_format=torch.contiguous_format))
silu_linear_dB.register_fake(lambda dy, z: z.new_empty(dy.shape[-1], z.shape[-1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    z, B = ctx.saved_tensors
    for_z, for_B, for_b = ctx.needs_input_grad
    return (
        silu_linear_dz(dy, z, B) if for_z else None,
        silu_linear_dB(dy, z) if for_B else None,
        dy.reshape(-1, dy.shape[-1]).sum(0) if for_b else None,
    )


silu_linear.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.lorank.silu_linear)
def _flops(z: Any, B: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(z).numel() * B[0]


@register_flop_formula(torch.ops.lorank.silu_linear_dz)
def _flops_of_dz(dy: Any, z: Any, B: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(dy).numel() * B[1]


@register_flop_formula(torch.ops.lorank.silu_linear_dB)
def _flops_of_dB(dy: Any, z: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(dy).numel() * z[-1]


# ---- in a model


def fuse_bottlenecks(model: Model) -> Model:
    """Let the bottlenecks with SiLU of a converted model keep A x alone, in place. Their weights and files stay what they are.

    Call it after `lorank.convert`, and before DDP, FSDP2 or ``torch.compile``. A bottleneck computes as before while its B is another
    layer (an adapter's, or with a width that is no multiple of 8), has hooks, or is quantised or split by tensor parallelism.

    Returns:
        The model.

    Raises:
        ValueError: the model has no such bottleneck.
    """
    found = [module for module in model.modules() if _may_fuse(module)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} must have bottlenecks with SiLU to be fused, as method cola gives them, but it has none"
        )
    for layer in found:
        layer.at_once = _bottleneck
    return model


def _may_fuse(module: nn.Module) -> TypeGuard[LowRankLinear]:
    plain = isinstance(module, LowRankLinear) and type(module).forward is LowRankLinear.forward
    return plain and module.activation == "silu"


def _bottleneck(z: Tensor, B: nn.Module) -> Tensor:
    """B σ(z), for what B is now."""
    hooks = B._forward_hooks or B._forward_pre_hooks or B._backward_hooks or B._backward_pre_hooks
    if type(B) is not nn.Linear or hooks or is_traceable_wrapper_subclass(B.weight):
        return B(F.silu(z))  # type: ignore[no-any-return]
    W: Tensor = B.weight
    b: Tensor | None = B.bias
    if torch.is_autocast_enabled(z.device.type):
        dtype = torch.get_autocast_dtype(z.device.type)
        z, W, b = z.to(dtype), W.to(dtype), None if b is None else b.to(dtype)
    return silu_linear(z, W, b)
