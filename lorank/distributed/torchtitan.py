"""CoLA and CoLA-M in torchtitan (0.3.0), from outside: two overrides that its command line names.

    torchtitan_train --module llama3 --config llama3_8b --override.imports 'lorank.distributed.torchtitan.cola={"rank": 0.25}' \\
        lorank.distributed.torchtitan.cola_m

Every linear layer of a block, y = W x, becomes y = B silu(A x). A query, key and value that torchtitan computes with one matrix become three
such maps, because one bottleneck for all three would be another method. Head and embedding stay dense. `cola_m` keeps of a block what
`lorank.checkpointing.keep_bottlenecks` keeps, in place of torchtitan's full or selective recomputation.

What works on a CPU is tested: parameters, losses of a layer, FSDP2. Tensor parallelism is refused, because torchtitan's plan for a layer
would cut the bottleneck after its non-linearity. Experts of a mixture are refused too. Keys of checkpoints are those of lorank,
`...w1.A.weight` and `...w1.B.weight`; torchtitan's own adapter for Hugging Face does not know them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torchtitan.config.override import derive, override
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing
from torchtitan.models.common.attention import BaseQKVLinear, FusedQKVLinear, QKVLinear
from torchtitan.models.common.decoder import TransformerBlock
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from lorank.checkpointing import keep_bottlenecks
from lorank.layers import ACTIVATIONS, entry_std
from lorank.method import rank_within


class LowRank(Module):
    """y = B σ(A x) + b, see `lorank.layers.LowRankLinear`, of torchtitan's linear layers."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        in_features: int
        out_features: int
        bias: bool = False
        rank: int
        activation: str | None = "silu"

    def __init__(self, config: Config):
        super().__init__()
        init = {"weight": partial(nn.init.normal_, std=entry_std(config.in_features, config.out_features, config.rank))}
        sizes = (config.in_features, config.rank), (config.rank, config.out_features)
        self.A, self.B = (
            Linear.Config(
                in_features=d_in,
                out_features=d_out,
                bias=bias,
                param_init={**init, "bias": nn.init.zeros_},
            ).build()
            for (d_in, d_out), bias in zip(sizes, (False, config.bias), strict=True)
        )
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x)
        return self.B(z if self.activation is None else ACTIVATIONS[self.activation](z))

    def parallelize(self, parallel_dims: Any) -> None:
        if parallel_dims.tp > 1:
            raise ValueError(
                "tensor_parallel_degree must be 1 with lorank.distributed.torchtitan.cola, "
                f"got {parallel_dims.tp}; shard parameters instead"
            )
        super().parallelize(parallel_dims)


class ThreeProjections(BaseQKVLinear):
    """A map each for query, key and value, [batch, tokens, heads, width of a head]."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseQKVLinear.Config):
        wq: LowRank.Config
        wkv: LowRank.Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.wq, self.wk, self.wv = config.wq.build(), config.wkv.build(), config.wkv.build()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.wq, self.wk, self.wv))
        return q, k, v


@override(target=TransformerBlock.Config, description="every projection becomes B silu(A x)")
def cola(block: Any, rank: float = 0.25, activation: str | None = "silu") -> Any:
    """A block's configuration with all linear layers factorised.

    Args:
        rank: an integer, or a fraction of the narrower side of each map.

    Raises:
        ValueError: the block has experts, or no linear layers that are known.
    """
    if block.moe is not None:
        raise ValueError(
            "a block must have no experts for lorank.distributed.torchtitan.cola; leave out --override.imports"
        )

    def factors(linear: Any) -> LowRank.Config:
        r = rank_within(rank, min(linear.in_features, linear.out_features))
        return derive(linear, LowRank.Config, rank=r, activation=activation, param_init=None, sharding_config=None)

    attention, feed_forward = block.attention, block.feed_forward
    qkv = attention.qkv_linear
    if isinstance(qkv, FusedQKVLinear.Config):
        one = qkv.wqkv
        d_q, d_kv = qkv.n_heads * qkv.head_dim, qkv.n_kv_heads * qkv.head_dim
        wq, wkv = (derive(one, Linear.Config, out_features=width) for width in (d_q, d_kv))
    elif isinstance(qkv, QKVLinear.Config):
        wq, wkv = qkv.wq, qkv.wkv
    else:
        raise ValueError(
            f"qkv_linear must be one of torchtitan's QKVLinear and FusedQKVLinear, got {type(qkv).__qualname__}"
        )
    attention.qkv_linear = ThreeProjections.Config(head_dim=qkv.head_dim, wq=factors(wq), wkv=factors(wkv))
    attention.wo = factors(attention.wo)
    for name in ("w1", "w2", "w3"):
        setattr(feed_forward, name, factors(getattr(feed_forward, name)))
    return block


class Bottlenecks(ActivationCheckpointing):
    """CoLA-M: of a block its input and its bottlenecks are kept, the rest is computed again."""

    @dataclass(kw_only=True, slots=True)
    class Config(ActivationCheckpointing.Config):
        pass

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        return checkpoint_wrapper(
            module,
            context_fn=partial(create_selective_checkpoint_contexts, keep_bottlenecks),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
        )


@override(target=ActivationCheckpointing.Config, description="keep block inputs and bottlenecks")
def cola_m(policy: Any) -> Any:
    """CoLA-M in place of the activation checkpointing that was chosen, of which there must be one."""
    return derive(policy, Bottlenecks.Config)
