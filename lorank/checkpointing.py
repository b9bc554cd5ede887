"""What a block keeps for its backward pass: CoLA-M and similar policies of selective checkpointing.

For every operation of a block's forward pass, a policy decides whether its result is kept or computed again.
`keep_bottlenecks` is CoLA-M. It works on any architecture and any low-rank method, because it depends on shapes alone.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lorank.fields import Count, check_value
from lorank.tape import Tape, contexts

Policy = Callable[..., CheckpointPolicy]
_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_SUMS = {torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default}
"""A sum over processes, which is asked for and then waited for."""


def keep_bottlenecks(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """CoLA-M (arXiv 2502.10940, section 4): keep the output of linear maps that are narrower than their input, recompute the rest.

    Of a CoLA block on [n, d] tokens the seven A x [n, r] are kept, and the block's input [n, d] by the checkpoint itself:
    n d + 7 n r numbers. The paper also keeps the residual stream between attention and MLP (2 n d + 7 n r); here it follows
    at no cost from recomputing B. The backward pass recomputes the B factors and attention, but no A: 2 n r (4 d + 2 d_ff) +
    4 n² d FLOPs, where recomputing all would cost twice the part in r. (The block's last B is not computed again, because
    backward needs only its input.) If the rank is above the width of a grouped-query key, that key's B is narrower than its
    input, and its output is kept as well. Under tensor parallelism the sums over the processes are kept too, so that backward sends none
    of them again.
    """
    if op in _SUMS:
        return CheckpointPolicy.MUST_SAVE
    if op is _aten.mm.default:
        x, w = args
    elif op is _aten.addmm.default:
        _, x, w = args[:3]
    elif op is _aten._grouped_mm.default:  # experts, w [E, d_in, d_out]
        x, w = args[:2]
    else:
        return CheckpointPolicy.PREFER_RECOMPUTE
    narrower = w.shape[-1] < x.shape[-1]  # x [n, d_in], w [d_in, d_out]
    return CheckpointPolicy.MUST_SAVE if narrower else CheckpointPolicy.PREFER_RECOMPUTE


def keep_bottlenecks_and_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """`keep_bottlenecks`, and the outputs of (fused) attention: n d more numbers per block and 4 n² d fewer FLOPs."""
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else keep_bottlenecks(ctx, op, *args, **kwargs)


def keep_recurrence(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """CR-Net's recomputation (arXiv 2509.18993): `keep_bottlenecks`, and outputs passed between blocks are rebuilt.

    Under the other policies the previous block's outputs, which a layer of CR-Net adds to its own, are kept too. Here only
    those of every eighth block are, and more where β is small (`lorank.tape`). The rest follow from the recurrence run
    backwards, Y_prev = (Y - B z) / b. `keep_bottlenecks` computes this B product again anyway, so it costs nothing. Gradients
    agree up to rounding: to 1e-6 in fp32, and in bf16 within about 3 % as a whole. That of a single β is small and a
    difference of large sums, so its error may be as large as itself. In other models, also those with `carry`, this policy is
    `keep_bottlenecks`.
    """
    return keep_bottlenecks(ctx, op, *args, **kwargs)


def keep_nothing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Vanilla block checkpointing: keep the block's input [n, d] only and recompute the whole block."""
    return CheckpointPolicy.PREFER_RECOMPUTE


POLICIES: dict[str, Policy | None] = {
    "none": None,
    "bottlenecks": keep_bottlenecks,
    "bottlenecks+attention": keep_bottlenecks_and_attention,
    "blocks": keep_nothing,
    "recurrence": keep_recurrence,
}
"""Names of the policies on the command line and in recipes."""


def checkpoint(model: nn.Module, policy: Policy | None, *, every: int = 1) -> None:
    """Train the model's blocks under a checkpoint policy; None turns checkpointing off.

    Only memory and time change, not losses and gradients (on a CPU and without dropout they stay the same bit for bit,
    except with `keep_recurrence`). It may be called again to switch. CR-Net's blocks and those with `carry` must be checkpointed by this function.

    Args:
        model: a transformers model, dense or converted.
        policy: `keep_bottlenecks`, `keep_bottlenecks_and_attention`, `keep_recurrence`, `keep_nothing`, or any policy
            function of ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
        every: checkpoint every `every`-th block; the others keep all their activations.

    Raises:
        ValueError: `policy` is not a function, `every` is not a positive integer, the model has no blocks that transformers
            can checkpoint, or it has no fused attention (``attn_implementation="sdpa"``) whose output could be kept.

    Warns:
        UserWarning: there is attention dropout; attention on a CPU is then not fused and its output not kept.
    """
    if policy is not None and not callable(policy):
        raise ValueError(
            f"policy must be a function or None, got {policy!r}; lorank.checkpointing.POLICIES has them by name"
        )
    check_value("every", every, Count)
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ValueError(f"model must have blocks that transformers can checkpoint, got {type(model).__name__}")
    if policy is keep_bottlenecks_and_attention:
        _check_attention(model)
    if policy is None:
        model.activation_checkpointing_disable()
        return
    if has_tapes(model):
        context_fn = partial(contexts, policy, rebuilds=policy is keep_recurrence)
    else:
        context_fn = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn}, every_n_layers=every)
    model.disable_input_require_grads()  # removes a hook for reentrant checkpointing, which each call adds


def first_run() -> int | None:
    """Autograd's number of an operation in the first run of a block, while the block runs again for the backward pass; else None.

    It holds for every kind of ``torch.utils.checkpoint``. In a compiled model the compiler decides what is computed again, and from
    what the first run saw.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:  # not inside a backward pass
        return None
    return torch._C._current_autograd_node()._sequence_nr()


def has_tapes(model: nn.Module) -> bool:
    """Whether layers read what the block before left for them (CR-Net, LaX)."""
    return any(isinstance(getattr(module, "tape", None), Tape) for module in model.modules())


def policy_is_on(model: nn.Module) -> bool:
    """Whether a block is checkpointed under a policy."""
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules() if _is_checkpointed(m)]
    return any(isinstance(function, partial) and "context_fn" in function.keywords for function in functions)


def _is_checkpointed(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True


def _check_attention(model: PreTrainedModel) -> None:
    """Raises or warns if the output of attention cannot be kept."""
    if (kind := model.config._attn_implementation) != "sdpa":
        raise ValueError(
            f"attn_implementation must be 'sdpa' to keep attention outputs, got {kind!r}; load the model with it, or use "
            "keep_bottlenecks"
        )
    dropout = max(
        getattr(model.config, name, None) or 0
        for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )
    if dropout > 0:
        warnings.warn(
            f"attention dropout is {dropout}, so attention is not fused on a CPU; its outputs are computed again, not kept",
            stacklevel=3,
        )
