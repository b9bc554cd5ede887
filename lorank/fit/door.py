"""`fit`: from a trained dense model to one whose matrices are of another form, with weights that keep what it computes."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorank.analysis.batches import Batch
from lorank.conversion import check_module, convert, sites_to_convert
from lorank.fields import unknown
from lorank.fit.budget import Policy, check_policy, choose_ranks, table
from lorank.fit.calibration import Calibration, Computes, blocks_with, joined
from lorank.fit.cola import FittedCoLA
from lorank.fit.dictionary import SparseDictionary
from lorank.fit.eora import EoRA
from lorank.fit.int2 import INT2
from lorank.fit.matrix_pca import MatrixPCA
from lorank.fit.pela import PELA
from lorank.fit.structure import Found, Metric, Structure, as_matrix, spectrum
from lorank.fit.svd import SVD
from lorank.fit.vector_quantised import VectorQuantised
from lorank.method import Method, Patterns, Site, rank_at
from lorank.rewriting import converted_with
from lorank.sites import find_sites, places

Model = TypeVar("Model", bound=nn.Module)
STRUCTURES: dict[str, type[Structure]] = {
    kind.name: kind for kind in (SVD, EoRA, FittedCoLA, SparseDictionary, PELA, MatrixPCA, INT2, VectorQuantised)
}
"""By the name that `fit` and the command line take."""


class Fitted(NamedTuple):
    """What became of one projection."""

    name: str
    d_in: int
    d_out: int
    rank: int
    parameters: int
    """In the factors, with its part of what several projections share."""
    weight_error: float | None
    """|W − W̃| / |W|; None if what stands for W is not linear."""
    output_error: float | None
    """|(W − W̃) Xᵀ| / |W Xᵀ| on the calibration text; None without one. If it is not linear, on a sample of the text."""


def as_structure(method: Structure | type[Structure] | str) -> Structure:
    """A structure from itself, its class or its name; ValueError for anything else."""
    if isinstance(method, str):
        if method not in STRUCTURES:
            raise ValueError(unknown("structure", method, list(STRUCTURES)))
        method = STRUCTURES[method]
    made = method() if isinstance(method, type) and issubclass(method, Structure) else method
    if not isinstance(made, Structure):
        raise ValueError(f"method must be a structure such as SVD(), its class or its name, got {method!r}")
    return made


def structure_making(method: Method) -> Structure | None:
    """The first structure that can make a model of a method from trained weights, None if there is none."""
    return next((found for kind in STRUCTURES.values() if (found := kind.making(method)) is not None), None)


def fit(
    model: Model,
    method: Structure | type[Structure] | str,
    data: Iterable[Tensor | Batch] | None = None,
    *,
    budget: float | str | None = None,
    policy: Policy = "uniform",
    becomes: Method | None = None,
    targets: Patterns = None,
    exclude: Patterns = None,
    finished: MutableMapping[str, Found] | None = None,
    see: Callable[[Fitted], None] = lambda fitted: None,
) -> Model:
    """Rewrite a trained model in place, with factors that approximate its weights.

    The result is a converted model as `lorank.convert` makes them: transformers saves and loads it, `lorank.merge` makes it dense
    again, and it can be trained further. Embeddings, head, norms and biases stay. It needs memory for the model, for its
    factors, and for one block's sums over inputs.

    Args:
        method: "svd", "eora", "cola", "dictionary", "pela", "masa", "int2" or
            "codebook", or a structure with settings, `lorank.fit.EoRA(base="int3")`.
        data: batches of token ids [b, n], or dictionaries with them under ``input_ids``, of text like that on which the model is used.
            Its activations say which errors matter; a projection of d inputs needs many more than d tokens. None: all
            errors of a weight count alike.
        budget: parameters of the factors, as a part of those of the matrices such as 0.5, or as a number such as "10M". Default: the
            structure's `usual`.
        policy: "uniform", the same part of every matrix; "energy", ranks where they keep most; "break-even", the largest rank at
            which the form is smaller than the matrix.
        becomes: the method of the fitted model, with ranks, in place of a budget; one that `structure_making` knows the structure for.
        targets, exclude: as in `lorank.convert`.
        finished: what was found for projections, by name, or for those that are fitted together, by the name of the first. They are
            not fitted again, and new ones are added, so that a mapping that writes to a disk lets an interrupted fit go on.
        see: called with each projection that is done.

    Raises:
        ValueError: as `lorank.convert`; a budget that no ranks fit; data that the model cannot read, or that do not reach a
            projection; weights or activations that are not finite; the experts of a mixture. The model is then unchanged.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = LlamaConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    >>> fit(LlamaForCausalLM(shape), "svd", budget=0.5).model.layers[1].mlp.down_proj
    LowRankLinear(
      d_in=96, d_out=32, rank=12
      (A): Linear(in_features=96, out_features=12, bias=False)
      (B): Linear(in_features=12, out_features=32, bias=False)
    )
    """
    structure = as_structure(method)
    check_policy(structure, policy, budget)
    check_module(model)
    _check_kind(model)
    sites = sites_to_convert(model, structure.method(1), targets, exclude)
    _check_sites(sites)
    if data is None and structure.needs_text:
        raise ValueError(
            f"data must be given with {structure.name}, which is fitted to what layers give on a text, got None"
        )
    calibration = None if data is None else Calibration(model, data, structure.sample)
    structure = structure.before(model, calibration.batches if calibration else [], sites)
    wanted = {site.name: site for site in sites}
    groups = [[site.name for site in group] for group in structure.gathered(sites)]
    chain = joined(blocks_with(model, [place for place in places(model) if place.name in wanted]), groups)
    inside = [[group for group in groups if group[0] in {place.name for place in block.places}] for block in chain]

    def spectra() -> dict[str, Tensor]:
        found = {}
        for block, here in zip(chain, inside, strict=True):
            metrics = {} if calibration is None else calibration.visit(block, {}, ())
            for group in here:
                targets = structure.targets([wanted[name].linear.weight.detach() for name in group])
                for name, target in zip(group, targets, strict=True):
                    found[name] = spectrum(target, metrics.get(name, Metric()).R).cpu()
        return found

    if policy != "break-even" and budget is None:
        budget = structure.usual
    if becomes is not None:
        ranks, chosen = {site.name: rank_at(becomes.rank, site) for site in sites}, becomes  # type: ignore[attr-defined]
    else:
        ranks = choose_ranks(structure, sites, budget, policy, spectra)
        chosen = structure.method(table(sites, ranks))
    _try(model, chosen, targets, exclude)
    finished = {} if finished is None else finished
    found: dict[str, Found] = {}
    computes: dict[str, Computes] = {}
    for number, (block, here) in enumerate(zip(chain, inside, strict=True)):
        behind = [place for one in chain[:number] for place in one.places]
        metrics = {} if calibration is None else calibration.visit(block, computes, behind)
        for group in here:
            for name, each in _solved(structure, group, wanted, ranks, metrics, finished):
                found[name] = each
                computes[name] = partial(structure.apply, each)
                see(_judged(structure, wanted[name], each, ranks[name], metrics.get(name, Metric()), len(group)))
    biases = {name: None if (b := site.linear.bias) is None else b.detach().clone() for name, site in wanted.items()}
    parent = copy.deepcopy(model) if structure.needs_parent else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trained weights are dropped; `_try` has shown the others
        convert(model, chosen, targets=targets, exclude=exclude)
    for name, each in found.items():
        structure.fill(model.get_submodule(name), each, biases[name])
    if parent is not None and calibration is not None:
        structure.after(model, parent, calibration.batches)
    return model


def _check_kind(model: nn.Module) -> None:
    """Raises ValueError for a model of convolutions, and says what fits them."""
    convolutions = sum(isinstance(module, nn.Conv1d | nn.Conv2d) for module in model.modules())
    if convolutions and not find_sites(model) and not any(map(converted_with, model.modules())):
        raise ValueError(
            f"model must have linear layers in its blocks, got one with {convolutions} convolutions instead; use "
            "lorank.fit.convolutions.fit_convolutions"
        )


def _check_sites(sites: list[Site]) -> None:
    if experts := list(dict.fromkeys(site.role.partition(".*.")[2] for site in sites if site.experts)):
        raise ValueError(
            f"lorank.fit does not replace the experts of a mixture, {', '.join(experts)}; exclude them (exclude={experts})"
        )
    for site in sites:
        weight = site.linear.weight
        if weight.is_meta:
            raise ValueError(f"the weights must be in memory, but those of {site.name} are on the meta device")
        if not weight.isfinite().all():
            raise ValueError(f"the weights must be finite numbers, but those of {site.name} are not")


def _try(model: nn.Module, method: Method, targets: Patterns, exclude: Patterns) -> None:
    """Convert an empty model of the same kind, so that what would fail in the end fails before the work."""
    if isinstance(model, PreTrainedModel):
        with torch.device("meta"):
            twin: Any = type(model)(copy.deepcopy(model.config))
        convert(twin, method, targets=targets, exclude=exclude)


@torch.no_grad()
def _solved(
    structure: Structure,
    group: Sequence[str],
    wanted: Mapping[str, Site],
    ranks: Mapping[str, int],
    metrics: Mapping[str, Metric],
    finished: MutableMapping[str, Found],
) -> Iterable[tuple[str, Found]]:
    """What stands for each matrix of a group: found before, or now."""
    weights = [wanted[name].linear.weight.detach() for name in group]
    whole = finished.get(group[0])
    if whole is None:
        mine = [metrics.get(name, Metric()) for name in group]
        whole = together(structure.solve_together(weights, mine, [ranks[name] for name in group]))
        finished[group[0]] = whole
    moved = {key: tensor.to(weights[0].device) for key, tensor in whole.items()}
    yield from zip(group, apart(moved, len(group)), strict=True)


def together(found: Sequence[Found]) -> Found:
    """The tensors of a group's members as one dictionary: those that are the same tensor in all once, others as "0.A", "1.A", ..."""
    shared = {key: one for key, one in found[0].items() if all(each[key] is one for each in found)}
    own = {f"{i}.{key}": one for i, each in enumerate(found) for key, one in each.items() if key not in shared}
    return {**shared, **own}


def apart(whole: Mapping[str, Tensor], members: int) -> list[Found]:
    """The tensors of each member again."""
    shared = {key: one for key, one in whole.items() if "." not in key}
    own = {key: one for key, one in whole.items() if "." in key}
    return [
        {**shared, **{key.partition(".")[2]: one for key, one in own.items() if key.startswith(f"{i}.")}}
        for i in range(members)
    ]


@torch.no_grad()
def _judged(structure: Structure, site: Site, found: Found, rank: int, metric: Metric, members: int) -> Fitted:
    weight, R = site.linear.weight.detach().double(), metric.R
    parameters = structure.parameters(rank, site.d_in, site.d_out, members)
    if not structure.is_linear:
        assert metric.rows is not None
        wanted = metric.rows @ weight.to(metric.rows.dtype).mT
        lack = wanted - structure.apply(_in(found, wanted.dtype), metric.rows)
        return Fitted(site.name, site.d_in, site.d_out, rank, parameters, None, _ratio(lack, wanted))
    lack = weight - as_matrix(structure, _in(found, torch.float64), site.d_in)
    on_text = None if R is None else _ratio(lack @ R, weight @ R)
    return Fitted(site.name, site.d_in, site.d_out, rank, parameters, _ratio(lack, weight), on_text)


def _in(found: Found, dtype: torch.dtype) -> Found:
    """With numbers of that type; bits stay."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def _ratio(lack: Tensor, whole: Tensor) -> float:
    return float(lack.norm() / whole.norm().clamp(min=torch.finfo(whole.dtype).tiny))
