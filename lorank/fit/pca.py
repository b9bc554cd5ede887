"""Matrix PCA: the attention of a trained model written as MASA writes it, without training.

    W_l ≈ Ŵ_l + B_l A_l    Ŵ_l = Σ_s c_ls D_s    for the blocks l of a group; W_l [d_out, d_in], D [S, d_out, d_in]

There are three steps. The first and the last run the model on some text, forward only.

    groups     p_l = softmax(head(mean over tokens of the output of block l))        [V]
               drift_l = KL(p_{l-1} ‖ p_l)       G groups: cuts before the G − 1 blocks of largest drift
    atoms      the S leading eigenvectors of the Gram matrix of a group's W_l, c_ls = ⟨D_s, W_l⟩
    residual   min |(W_l − Ŵ_l − B_l A_l) X_lᵀ| over rank r, X_l [n, d_in] the input of W_l: with the Cholesky factor
               R Rᵀ = X_lᵀ X_l / n and the SVD (W_l − Ŵ_l) R = U Σ Vᵀ,   B_l = U_r Σ_r^½,   A_l = Σ_r^½ V_rᵀ R⁻¹

The cuts minimise the sum of the drifts within groups. The error of the residual on the data is then √(σ²_{r+1} + …), the
least that rank r can have. A dictionary with as many atoms as matrices is exact: no residual. Memory in addition to the
model: one matrix [d_in, d_in] in float64 for each input of a projection (query, key and value have the same), and the weights
until the end.

Source: Zhussip et al., arXiv 2508.04581, "Matrix Weight-Sharing for Pretrained Models"; structure and ranks are those of
`lorank.methods.masa`. We have not seen the paper's appendix, with the steps of grouping and the allocation of ranks. Our
choices are: where to cut; the direction of KL; that the head is all that follows the last block, final norm included; square
roots of Σ on either side; and the ridge, `lorank.factors.RIDGE`.
"""

import dataclasses
import warnings
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorank.analysis.streams import Streams
from lorank.conversion import convert, sites_to_convert
from lorank.dictionary import CoefficientTable, Dictionary, matrix_pca
from lorank.factors import nearest, whitening
from lorank.fit.calibration import check_ids
from lorank.method import Patterns
from lorank.methods.masa import MASA, MASALinear
from lorank.sites import blocks, places

Model = TypeVar("Model", bound=nn.Module)


# ---- the mathematics


def drifts(logits: Tensor) -> Tensor:
    """KL(p_{l-1} ‖ p_l) in nats [L - 1] of distributions p_l that follow one another, from their logits [L, V]."""
    log = logits.double().log_softmax(-1)
    return (log[:-1].exp() * (log[:-1] - log[1:])).sum(-1)


def cuts(drift: Tensor, groups: int) -> tuple[int, ...]:
    """First block of each of that many groups of consecutive blocks, for drifts [L - 1]; the earlier one if two are equal.

    >>> cuts(torch.tensor([0.9, 0.1, 0.2, 0.8]), 3)
    (0, 1, 4)

    Raises:
        ValueError: more groups than blocks, or none.
    """
    if not 1 <= groups <= len(drift) + 1:
        raise ValueError(f"groups must be from 1 to {len(drift) + 1}, the number of blocks, got {groups}")
    largest = drift.sort(descending=True, stable=True).indices[: groups - 1]
    return (0, *sorted(int(index) + 1 for index in largest))


# ---- what the data tell


class Calibration(NamedTuple):
    """What `calibrate` found."""

    drift: Tensor
    """How much each block but the first changes what the model would predict, in nats [L - 1]."""
    whitening: dict[str, Tensor]
    """R [d_in, d_in] of each projection's input."""


@torch.no_grad()
def calibrate(
    model: nn.Module, data: Iterable[Tensor], projections: Collection[str], *, drift: bool = True, inputs: bool = True
) -> Calibration:
    """Run `data`, batches of token ids [b, n], through a language model, once and in evaluation mode.

    Args:
        projections: names of those that are to be rewritten.
        drift: measure the outputs of the blocks, which must be one stack in a model with its head.
        inputs: measure the inputs of the projections.

    Raises:
        ValueError: there are no batches, or something else than batches that the model can read, several stacks, no head, or
            activations that are not finite.
    """
    stacks = {stack for stack, depth, _ in blocks(model) if any(n.startswith(f"{stack}.{depth}.") for n in projections)}
    if drift and len(stacks) > 1:
        raise ValueError(
            f"the blocks must be one stack to be grouped, got {', '.join(sorted(stacks))}; give the first block of each group"
        )
    chain = [block for stack, _, block in blocks(model) if stack in stacks]
    streams = Streams([place for place in places(model) if inputs and place.name in projections], outputs=False)
    sums: dict[int, Tensor] = {}
    plain = [False] * len(chain)

    def see(depth: int, output: Any) -> None:
        plain[depth] = isinstance(output, Tensor)
        state = (output if plain[depth] else output[0]).double().flatten(0, -2).sum(0)
        sums[depth] = sums[depth] + state if depth in sums else state

    training, device = model.training, next(model.parameters()).device
    hooks = [
        block.register_forward_hook(lambda module, args, output, depth=depth: see(depth, output))
        for depth, block in enumerate(chain if drift else [])
    ]
    model.eval()
    try:
        with streams.attached():
            for batch in data:
                check_ids(model, batch)
                streams.add(model, {"input_ids": batch.to(device)})
        if not streams.tokens:
            raise ValueError("data must have at least one batch, got none")
        for hook in hooks:
            hook.remove()
        moved = torch.zeros(0)
        if drift:
            means = torch.stack([sums[depth] / streams.tokens for depth in range(len(chain))])
            moved = drifts(_predictions(model, chain, means, plain[0]))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if not all(gram.isfinite().all() for gram in streams.inputs.values()) or not moved.isfinite().all():
        raise ValueError("the model's activations must be finite numbers; it has diverged, use an earlier checkpoint")
    factors = {reader: whitening(gram / streams.tokens) for reader, gram in streams.inputs.items()}
    return Calibration(moved, {name: factors[reader] for name, reader in streams.reads.items()})


def _predictions(model: nn.Module, chain: list[nn.Module], states: Tensor, plain: bool) -> Tensor:
    """Logits [L, V] when each state [L, d] in turn replaces the output of the last block, for a single token."""
    found = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=states.device)
    for state in states.to(next(model.parameters()).dtype):
        output = state[None, None] if plain else (state[None, None], None)
        hooks = [block.register_forward_hook(lambda *_, output=output: output) for block in chain]
        try:
            logits = getattr(model(input_ids=token, use_cache=False), "logits", None)
            if logits is None:
                raise ValueError(
                    f"model must predict tokens, got {type(model).__name__}; give the model with its head, or the first block of "
                    "each group"
                )
            found.append(logits[0])
        finally:
            for hook in hooks:
                hook.remove()
    return torch.cat(found)


# ---- the conversion


def fit_masa(
    model: Model,
    *,
    data: Iterable[Tensor] | None = None,
    targets: Patterns = None,
    exclude: Patterns = None,
    **fields: Any,
) -> Model:
    """Rewrite an existing model in place as MASA's, with atoms, coefficients and residuals that keep its weights.

    A number of `groups` in `fields` is replaced by the groups that drift suggests; the model's configuration records them.

    Args:
        model: as in `lorank.convert`; to group its blocks, a language model with its head.
        data: batches of token ids [b, n] of text like that on which the model is used, for a number of groups above one and
            for residuals. A residual of d inputs needs many more than d tokens.
        targets, exclude: as in `lorank.convert`.
        fields: as in `lorank.MASA`; coefficients are a table, and where atoms are as many as matrices there is no residual.

    Raises:
        ValueError: as `lorank.convert` and `calibrate`, or data are missing or not needed. The model is then unchanged.
    """
    method = MASA(**{"coefficients": "table", **fields})
    if method.coefficients != "table":
        raise ValueError("coefficients must be 'table' with Matrix PCA, which computes a table, got 'network'")
    to_group, to_whiten = isinstance(method.groups, int) and method.groups > 1, method.residual_rank is not None
    if (data is None) == (to_group or to_whiten):
        raise ValueError(
            "data must be batches of token ids [b, n] for a number of groups or for residuals, got None"
            if data is None
            else "data must be left out without residual_rank or a number of groups, which alone need it"
        )
    dense = {site.name: site.linear for site in sites_to_convert(model, method, targets, exclude)}
    found = None if data is None else calibrate(model, data, dense, drift=to_group, inputs=to_whiten)
    if found is not None and to_group:
        method = dataclasses.replace(method, groups=cuts(found[0], method.groups))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* drops the trained weights")  # they are in `dense`
        convert(model, method, targets=targets, exclude=exclude)
    _fit(model, dense, found[1] if found else {})
    return model


@torch.no_grad()
def _fit(model: nn.Module, dense: dict[str, nn.Linear], factors: dict[str, Tensor]) -> None:
    groups: dict[Dictionary, list[tuple[nn.Linear, MASALinear, Tensor | None]]] = {}
    for name, linear in dense.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MASALinear)
        groups.setdefault(layer.dictionary, []).append((linear, layer, factors.get(name)))
    for dictionary, members in groups.items():
        members.sort(key=lambda member: member[1].depth)  # number of the matrix in the dictionary
        assert isinstance(dictionary.coefficients, CoefficientTable)
        atoms, coefficients, _ = matrix_pca(
            torch.stack([linear.weight for linear, *_ in members]), len(dictionary.atoms)
        )
        dictionary.atoms.copy_(atoms)
        dictionary.coefficients.values.copy_(coefficients)
        for linear, layer, R in members:
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
            if R is not None and layer.A is not None:  # else atoms alone are exact
                B, A = nearest(linear.weight - dictionary(layer.depth), layer.A.out_features, R)
                layer.B.weight.copy_(B)
                layer.A.weight.copy_(A)
