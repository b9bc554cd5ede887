"""What a block remembers for its backward pass: CoLA-M and its neighbours as policies of selective checkpointing.

A policy is asked about every operation of a block's forward pass and answers whether its result is kept or computed
again. `keep_bottlenecks` is CoLA-M, and works on any architecture and any low-rank method because it looks at shapes
alone.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lorank.tape import Tape, contexts

Policy = Callable[..., CheckpointPolicy]
_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def keep_bottlenecks(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """CoLA-M (arXiv 2502.10940, section 4): keep what a linear map narrower than its input gives, recompute the rest.

    Of a CoLA block on [n, d] tokens the seven A x [n, r] are kept, and the block's input [n, d] by the checkpoint
    itself: n d + 7 n r numbers. The paper keeps the residual stream between attention and MLP too (2 n d + 7 n r); here
    it comes for free out of recomputing B. Backward re-runs the B factors and attention, but no A: 2 n r (4 d + 2 d_ff)
    + 4 n² d FLOPs, where re-running all would cost twice the part in r. (The block's last B is not run again: backward
    needs its input only.) A rank above the width of a grouped-query key makes that key's B narrower than its input too,
    and its output is then kept as well.
    """
    if op is _aten.mm.default:
        x, w = args
    elif op is _aten.addmm.default:
        _, x, w = args[:3]
    else:
        return CheckpointPolicy.PREFER_RECOMPUTE
    narrower = w.shape[1] < x.shape[1]  # x [n, d_in], w [d_in, d_out]
    return CheckpointPolicy.MUST_SAVE if narrower else CheckpointPolicy.PREFER_RECOMPUTE


def keep_bottlenecks_and_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """`keep_bottlenecks`, and the outputs of (fused) attention: n d more numbers per block, 4 n² d fewer FLOPs."""
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else keep_bottlenecks(ctx, op, *args, **kwargs)


def keep_recurrence(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """CR-Net's recomputation (arXiv 2509.18993): `keep_bottlenecks`, and what layers hand to one another is rebuilt.

    Under the other policies the previous block's outputs, which a layer of CR-Net adds to its own, are kept too. Here
    only those of every eighth block are, and more where β is small (`lorank.tape`), and the rest come out of the recurrence run backwards,
    Y_prev = (Y - B z) / b. That is the one B product which `keep_bottlenecks` re-runs anyway, so it costs nothing.
    Gradients agree up to rounding: to 1e-6 in fp32, and in bf16 within some 3 % as a whole, while a single β's, which is small
    and a difference of large sums, may be off by its own size. In a model whose layers hand nothing over it is `keep_bottlenecks`.
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

    Losses and gradients do not change (on CPU and without dropout not by a bit, but for `keep_recurrence`), only memory
    and time do. May be called again to switch. CR-Net needs its blocks checkpointed by this function and no other.

    Args:
        model: a transformers model, dense or converted.
        policy: `keep_bottlenecks`, `keep_bottlenecks_and_attention`, `keep_recurrence`, `keep_nothing`, or any policy
            function of ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
        every: checkpoint each `every`-th block and let the others keep all their activations.

    Raises:
        ValueError: `policy` is no function, `every` is not a positive integer, the model has no blocks that transformers
            can checkpoint, or it has no fused attention (``attn_implementation="sdpa"``) whose output could be kept.

    Warns:
        UserWarning: attention dropout, under which attention on a CPU is not fused and its output not kept.
    """
    if policy is not None and not callable(policy):
        raise ValueError(f"policy={policy!r} is not a function; the named ones are lorank.checkpointing.POLICIES[name]")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every} is not a positive integer; 1 checkpoints each block, 2 every other one")
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} has no blocks that transformers can checkpoint")
    if policy is keep_bottlenecks_and_attention:
        _check_attention(model)
    if policy is None:
        model.activation_checkpointing_disable()
        return
    has_tapes = any(isinstance(getattr(module, "tape", None), Tape) for module in model.modules())
    if has_tapes:
        context_fn = partial(contexts, policy, rebuilds=policy is keep_recurrence)
    else:
        context_fn = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context_fn}, every_n_layers=every)
    model.disable_input_require_grads()  # a hook for reentrant checkpointing, one more at each call


def _check_attention(model: PreTrainedModel) -> None:
    """What cannot be kept should not be promised."""
    if (kind := model.config._attn_implementation) != "sdpa":
        raise ValueError(
            f"attention outputs can be kept with attn_implementation='sdpa', not {kind!r}; load the model with it, or use "
            "keep_bottlenecks"
        )
    dropout = max(
        getattr(model.config, name, None) or 0
        for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    )
    if dropout > 0:
        warnings.warn(
            f"with attention dropout {dropout} attention is not fused on a CPU: its outputs are computed again, not kept",
            stacklevel=3,
        )
