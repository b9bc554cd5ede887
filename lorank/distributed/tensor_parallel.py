"""Tensor parallelism cut at the bottleneck: the residual stream is split over p processes, and only bottlenecks are summed.

    x = [x_1 ... x_p]     A = [A_1 ... A_p]     B = [B_1; ...; B_p]          process i has x_i, A_i and B_i

    u = sum_i A_i x_i     the only message of a layer: r numbers per token, and as many backward for the gradient of u
    z = σ(u)              after the sum, in every process
    y_i = B_i z           this process's part of the output: its heads, or its part of the MLP or of the residual stream

RMSNorm in front of A needs the mean square of the whole x. It travels with the bottleneck, which is exact:

    u = (sum_i A_i (γ_i x_i)) / sqrt((sum_i |x_i|²) / d + ε)     before σ

    x [n, d]   A [r, d_in]   B [d_out, r]   u, z [n, r]   γ [d]   A is split by its columns, B and γ by rows

Projections that read the same x (query, key and value; gate and up) send one message, so a block of a Llama sends 4 forward and 4
backward: 3r + 1, r, 2r + 1 and r numbers per token, if all ranks are r. A dense block sends 2d (Megatron), and a low-rank one that is
cut between its layers, as if each were dense, 5d + 2f. After the last block x is gathered once; the final norm and the head are whole in every process.

The heads and the width of the model must divide by p; f and r need not. The bottlenecks, and what CoLA-M keeps of them, are whole in
every process, so that part of the activations does not become smaller with p.

Source: Wang et al., "BOOST", MLSys 2026, arXiv 2512.12131.

Departures from the authors' code. Its default norm uses the mean square of a process's own part, which is another model; here the norm
is always exact. Theirs sends sums of squares apart; here they share the bottleneck's, unless x has 16 bits, in
which the sum would lose its precision. All are DTensors, so a checkpoint of p processes is read by any number of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from lorank.auto import type_of
from lorank.conversion import method_of
from lorank.layers import ACTIVATIONS, LowRankLinear, wide
from lorank.sites import blocks

TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss", "smollm3", "granite", "helium", "ernie4_5")
"""Model types whose blocks are wired as `READERS` says; each is tested."""
READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    " ": ("mlp.down_proj",),
}
"""Which projections of a block read the same x, by the norm in front of them; a blank name is none."""
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms over the numbers of each head that a block may have."""


# ---- sums over the processes


def everywhere(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all processes' parts, in each of them; so are the gradients, of which each process has what its own use gave."""
    summed = DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return summed.to_local(grad_placements=[Partial()])


def gathered(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """All of x, of which this process has its part of the last dimension; what uses it is the same in all processes."""
    return DTensor.from_local(part, mesh, [Shard(-1)], run_check=False).full_tensor(grad_placements=[Replicate()])


def bottlenecks(
    x: Tensor, factors: Sequence[Tensor], mesh: DeviceMesh, gain: Tensor | None = None, eps: float = 0.0
) -> Sequence[Tensor]:
    """A x of every A, or A RMSNorm(x) with a norm's `gain` γ, in each process; one message.

    x [..., d/p]   factors: A_i [r, d/p]   gain [d/p]
    """
    scaled = x if gain is None else x * gain
    parts = [F.linear(scaled, A) for A in factors]
    if gain is None:
        return everywhere(torch.cat(parts, -1), mesh).split([len(A) for A in factors], -1)
    square = wide(x).square().sum(-1, keepdim=True)
    if square.dtype == parts[0].dtype:
        *sums, square = everywhere(torch.cat([*parts, square], -1), mesh).split([*map(len, factors), 1], -1)
    else:
        sums = list(everywhere(torch.cat(parts, -1), mesh).split([len(A) for A in factors], -1))
        square = everywhere(square, mesh)
    rescale = torch.rsqrt(square / (x.shape[-1] * mesh.size()) + eps)
    return [(u * rescale).to(u.dtype) for u in sums]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """γ x / sqrt(mean of x² + ε) over the last dimension."""
    return gain * (wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)).to(x.dtype)


# ---- modules


class PassedNorm(nn.Module):
    """The place of an RMSNorm, whose gain γ is applied by the bottlenecks that read x; it passes x on."""

    def __init__(self, norm: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.eps: float = norm.variance_epsilon  # type: ignore[assignment]
        self.weight = split(norm.weight, mesh, Shard(0))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x


class HeadNorm(nn.Module):
    """An RMSNorm over the numbers of one head, of which this process has some: [b, n, heads/p, d_head]."""

    def __init__(self, norm: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.eps: float = norm.variance_epsilon  # type: ignore[assignment]
        self.weight = split(norm.weight, mesh, Replicate())  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if isinstance(weight, DTensor):  # whose gradient is the sum of what the heads of all processes give
            weight = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return rms_norm(x, weight, self.eps)


class LastNorm(nn.Module):
    """Gathers x, and is the model's last RMSNorm."""

    def __init__(self, norm: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.eps: float = norm.variance_epsilon  # type: ignore[assignment]
        self.weight = split(norm.weight, mesh, Replicate())  # type: ignore[arg-type]
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(gathered(x, self.mesh), own(self.weight), self.eps)


class Head(nn.Linear):
    """A head with whole weights, which computes the same in all processes."""

    def __init__(self, head: nn.Linear, mesh: DeviceMesh):
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = split(head.weight, mesh, Replicate())
        self.bias = None if head.bias is None else split(head.bias, mesh, Replicate())  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, own(self.weight), None if self.bias is None else own(self.bias))


class Group:
    """Bottlenecks that read the same x, in whose message they share. The first that is called computes those of all."""

    def __init__(self, layers: Sequence["CutLinear"], norm: PassedNorm | None, mesh: DeviceMesh):
        self.layers, self.norm, self.mesh = layers, norm, mesh
        self.read: Tensor | None = None
        self.waiting: dict[nn.Module, Tensor] = {}

    def take(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A x of one of the layers."""
        if layer not in self.waiting or not _same(self.read, x):
            factors = [own(each.A.weight) for each in self.layers]
            if self.norm is None:
                found = bottlenecks(x, factors, self.mesh)
            else:
                found = bottlenecks(x, factors, self.mesh, own(self.norm.weight), self.norm.eps)
            self.read, self.waiting = x, dict(zip(self.layers, found, strict=True))
        u = self.waiting.pop(layer)
        if not self.waiting:
            self.read = None
        return u


def _same(x: Tensor | None, y: Tensor) -> bool:
    """Whether two tensors are one, or one that a hook on a module's gradients has wrapped."""
    alike = lambda a: (a.shape, a.stride(), a.storage_offset(), a._version)  # noqa: E731
    return x is y or (
        x is not None and alike(x) == alike(y) and x.untyped_storage()._cdata == y.untyped_storage()._cdata
    )


class CutLinear(LowRankLinear):
    """A process's part of a `LowRankLinear`: x_i to y_i = B_i σ(sum_i A_i x_i) + b_i."""

    group: Group

    def __init__(self, layer: LowRankLinear, mesh: DeviceMesh):
        nn.Module.__init__(self)
        self.activation, self.A, self.B = layer.activation, layer.A, layer.B
        self.stands_for_linear = vars(layer).get("stands_for_linear")  # said by `lorank.rewriting`
        self.A.weight = split(self.A.weight, mesh, Shard(1))
        for name, p in list(self.B.named_parameters()):
            setattr(self.B, name, split(p, mesh, Shard(0)))

    def forward(self, x: Tensor) -> Tensor:
        u = self.group.take(self, x)
        z = u if self.activation is None else ACTIVATIONS[self.activation](u)
        return F.linear(z, own(self.B.weight), None if self.B.bias is None else own(self.B.bias))


def split(p: Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """The parameter as a DTensor; the values are those of the first process."""
    return nn.Parameter(distribute_tensor(p.detach(), mesh, [placement]), requires_grad=p.requires_grad)


def own(p: Tensor) -> Tensor:
    """This process's part of a parameter, as it is here."""
    return p.to_local() if isinstance(p, DTensor) else p


# ---- the model


def parallelize(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Split a low-rank model over the processes of a mesh, in place. It computes what it did: every process takes the same batch and
    returns the same logits. Names of parameters stay; each becomes a DTensor.

    Make the optimizer afterwards. Blocks may be given to ``fully_shard`` then, over another dimension of the mesh.

    Args:
        model: of one of the types in `TYPES`, all projections of its blocks converted with a method whose layers are two factors: cola,
            cola-m or low-rank.
        mesh: of one dimension, such as ``init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "tensor"))["tensor"]``.

    Raises:
        ValueError: the mesh has more dimensions, the model's type or a layer is not supported, or the width or the heads do not
            divide by the number of processes.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}; take one by its name, such as mesh['tensor']")
    check(model, mesh.size())
    body: Any = model.base_model
    for _, _, block in blocks(model):
        _cut(block, mesh)
    _embed_parts(model, mesh)
    body.norm = LastNorm(body.norm, mesh)
    return model


def check(model: nn.Module, processes: int) -> None:
    """Raises ValueError if the model cannot be split over that many processes, with the reason."""
    kind = type_of(model.config) if isinstance(model, PreTrainedModel) else type(model).__name__
    if kind not in TYPES:
        raise ValueError(f"model must be a converted {', '.join(TYPES[:-1])} or {TYPES[-1]} model, got {kind}")
    config: Any = model.config
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        if (size := getattr(config, name)) % processes:
            raise ValueError(f"{name} must be a multiple of the {processes} processes that share a model, got {size}")
    method = method_of(model)
    if getattr(method, "decay_to", None) == "reuse":
        raise ValueError(
            "decay_to must be 'zero' for a model that processes share, got 'reuse', which acts on whole layers"
        )
    for stack, depth, block in blocks(model):
        for name in (name for group in READERS.values() for name in group):
            layer = block.get_submodule(name)
            if not isinstance(layer, LowRankLinear) or type(layer).forward is not LowRankLinear.forward:
                raise ValueError(
                    f"{stack}.{depth}.{name} must be two factors to be cut between them (cola, cola-m or low-rank, without carry, on "
                    f"all projections), got {type(layer).__name__}"
                )


def _cut(block: nn.Module, mesh: DeviceMesh) -> None:
    """Take a block's projections and norms apart; what else it has is whole in every process."""
    for norm_name, names in READERS.items():
        norm = None
        if norm_name.strip():
            norm = PassedNorm(block.get_submodule(norm_name), mesh)
            block.set_submodule(norm_name, norm)
        layers: list[CutLinear] = []
        for name in names:
            layer = block.get_submodule(name)
            assert isinstance(layer, LowRankLinear)
            layers.append(CutLinear(layer, mesh).train(layer.training))
            block.set_submodule(name, layers[-1])
        group = Group(layers, norm, mesh)
        for cut in layers:
            cut.group = group
    for name in HEAD_NORMS:
        if (norm_of_heads := _submodule(block, name)) is not None:
            block.set_submodule(name, HeadNorm(norm_of_heads, mesh))


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    return dict(block.named_modules()).get(name)


def _embed_parts(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Each process has its columns of the embedding, or all of them if they are the head's weights too."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    embedding.weight = split(embedding.weight, mesh, Replicate() if tied else Shard(1))
    embedding.register_forward_pre_hook(
        lambda module, ids: (DTensor.from_local(ids[0], mesh, [Replicate()], run_check=False),)
    )
    embedding.register_forward_hook(lambda module, ids, x: x.redistribute(placements=[Shard(-1)]).to_local())
    if head is not None:
        model.set_output_embeddings(Head(head, mesh))
        if tied:
            model.get_output_embeddings().weight = embedding.weight
