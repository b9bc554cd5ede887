"""What do the low-rank optimizers cost per step, in time and in state, beside torch's fused AdamW and the original GaLore?

    pip install --no-deps galore-torch                     (the original; left out of the table if it is not there)
    python benchmarks/optimizers.py [--layers 12] [--rounds 9] [--compile]

The 130M model in fp32: its blocks' matrices at rank 256; embeddings, head and norms without rank. All optimizers move the same
weights by the same gradients in turns, in another order each round, in one process; a step without and a step with a new basis are timed apart, and "mean"
is what a step costs on average at the usual gap of 200 (DCT-AdamW and Trion choose anew at each step). EGGROLL is what follows
the forward passes of 256 members: their noise drawn anew, the estimate in one product per matrix, and fused AdamW. `--compile`
adds the steps that ``torch.compile`` takes.

The second table is of the matrices of two blocks alone, with "two products": what no GaLore can do without, G Qᵀ and W + N Q
for every matrix, and nothing else. Below it stands how exact each basis is, and how far updates of our GaLore are from the
original's. Where a spectrum has gaps, a basis is one up to signs. In one basis they change nothing, and what is left is the
error of single precision, in which the original decomposes: where Adam's first step goes by the sign of a number near 0, all that
it moves. From one basis to the next signs matter, as moments stay: ours are always those that `lorank.optim.bases` chooses, the original's
those of LAPACK; and without gaps the same basis comes from the same call only. So both use that call in the other two rows.
"""

import argparse
import contextlib
import importlib
import importlib.util
import random
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

from lorank import DCTAdamW, Fira, GaLore, Trion
from lorank.architectures import llama_config
from lorank.evolution.eggroll import Eggroll
from lorank.optim import low_rank_groups
from lorank.optim.bases import BASES

RANK, GAP = 256, 200

Groups = list[dict[str, Any]]


def original() -> type[Optimizer] | None:
    """galore_torch's AdamW, imported without the rest of its package, which wants bitsandbytes."""
    if "galore_torch.adamw" in sys.modules:
        return sys.modules["galore_torch.adamw"].AdamW
    found = importlib.util.find_spec("galore_torch")
    if found is None or found.submodule_search_locations is None:
        return None
    package = types.ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def optimizers(gap: int, compile: bool = False) -> dict[str, Callable[[Groups], Optimizer]]:
    """Each is made of groups with and without rank."""

    def theirs(groups: Groups) -> Groups:
        settings = {"update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        return [{**group, **settings} if group["rank"] else {"params": group["params"]} for group in groups]

    table: dict[str, Callable[[Groups], Optimizer]] = {
        "AdamW (fused)": lambda g: torch.optim.AdamW(g, lr=0.01, weight_decay=0.0, fused=True),
        "GaLore": lambda g: GaLore(update_gap=gap).optimizer(g, lr=0.01, eps=1e-6),
        "GaLore, by SVD": lambda g: GaLore(update_gap=gap, basis="svd").optimizer(g, lr=0.01, eps=1e-6),
        "GaLore, randomised": lambda g: GaLore(update_gap=gap, basis="randomised").optimizer(g, lr=0.01, eps=1e-6),
        "Fira": lambda g: Fira(update_gap=gap).optimizer(g, lr=0.01),
        "DCT-AdamW": lambda g: DCTAdamW().optimizer(g, lr=0.01),
        "DCT-AdamW, FFT": lambda g: DCTAdamW(transform="fft").optimizer(g, lr=0.01),
        "Trion": lambda g: Trion().optimizer(g, lr=0.01),
        "EGGROLL": EggrollAdamW,
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        table["GaLore, 8-bit AdamW"] = lambda g: GaLore(update_gap=gap, rule="adamw-8bit").optimizer(g, lr=0.01)
    if compile:
        for name in ("DCT-AdamW", "DCT-AdamW, FFT", "Trion"):
            table[f"{name}, comp."] = lambda g, make=table[name]: compiled(make(g))  # type: ignore[misc]
    table["two products"] = TwoProducts
    if (reference := original()) is not None:
        table["GaLore, original"] = lambda g: reference(theirs(g), lr=0.01, no_deprecation_warning=True)
    return table


class TwoProducts(Optimizer):
    """The floor: into the subspace and back, with a basis that never changes and no rule in between."""

    def __init__(self, groups: Groups):
        super().__init__(groups, {})
        projected = [p for group in groups if group["rank"] for p in group["params"]]
        self.bases = {p: torch.randn(RANK, min(p.shape)) * 1e-3 for p in projected}

    @torch.no_grad()
    def step(self) -> None:
        for p, Q in self.bases.items():
            if p.shape[0] >= p.shape[1]:
                p.addmm_(p.grad @ Q.mT, Q, alpha=1e-6)
            else:
                p.addmm_(Q.mT, Q @ p.grad, alpha=1e-6)


def layer_of(p: nn.Parameter) -> nn.Module:
    """A layer that has a matrix or a vector as its weight."""
    layer: Any = nn.Linear(1, 1, bias=False) if p.ndim == 2 else nn.RMSNorm(1)
    layer.weight = p
    return layer


class EggrollAdamW(torch.optim.AdamW):
    """What EGGROLL does after the members' forward passes, and AdamW."""

    def __init__(self, groups: Groups):
        super().__init__(groups, lr=0.01, weight_decay=0.0, fused=True)
        self.estimate = Eggroll(nn.ModuleList(map(layer_of, everything(groups))), population=256, sigma=0.01)
        self.z = torch.randn(256, generator=torch.Generator().manual_seed(0))

    def step(self) -> None:  # type: ignore[override]
        given = [p.grad for p in self.estimate.perturbed]
        with torch.no_grad():
            self.estimate.write_gradients(self.z)
        super().step()
        for p, gradient in zip(self.estimate.perturbed, given, strict=True):
            p.grad = gradient


@contextlib.contextmanager
def bases_due(optimizer: Optimizer) -> Iterator[None]:
    """Inside, a step finds new bases, of ours and of the original."""
    projectors = [state["projector"] for state in optimizer.state.values() if "projector" in state]
    for group in optimizer.param_groups:
        if "update_gap" in group:
            group["update_gap"] = 1
    for projector in projectors:
        projector.update_proj_gap = 1
    yield
    for group in optimizer.param_groups:
        if "update_gap" in group:
            group["update_gap"] = GAP
    for projector in projectors:
        projector.update_proj_gap = GAP


def compiled(optimizer: Optimizer) -> Optimizer:
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def bytes_of(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, vars(state).values())) if hasattr(state, "ortho_matrix") else 0  # the original's projector


def model_groups(layers: int) -> Groups:
    """Of the 130M model with so many blocks, and with gradients."""
    torch.manual_seed(0)
    config = llama_config("130m")
    config.num_hidden_layers = layers
    groups = low_rank_groups(LlamaForCausalLM(config), RANK)
    for p in everything(groups):
        p.grad = torch.randn_like(p) * 1e-3
    return groups


def everything(groups: Groups) -> list[nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def basis_as_the_original(X: Tensor, rank: int) -> Tensor:
    """Of a gradient or its transpose, as `lorank` asks for it; the original decomposes the gradient itself in both cases."""
    if X.mT.is_contiguous() and not X.is_contiguous():
        return torch.linalg.svd(X.mT, full_matrices=False).Vh[..., :rank, :].mT
    return torch.linalg.svd(X, full_matrices=False).U[..., :rank]


def with_gaps(shape: torch.Size, seed: int) -> Tensor:
    """A gradient whose singular values fall in a line, so that its basis is one up to signs."""
    generator = torch.Generator().manual_seed(seed)
    least = min(shape)
    U, V = (torch.linalg.qr(torch.randn(size, least, generator=generator, dtype=torch.float64)).Q for size in shape)
    return ((U * torch.linspace(1, 1 / least, least)) @ V.T).float()


def without_gaps(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moves(name: str, gradient: Callable[[torch.Size, int], Tensor], gap: int, **changes: Any) -> list[Tensor]:
    """Of the projected matrices of one block, over four steps."""
    groups = [group for group in model_groups(1) if group["rank"]]
    before = [p.detach().clone() for p in everything(groups)]
    if name == "GaLore":
        optimizer: Optimizer = GaLore(update_gap=gap, **changes).optimizer(groups, lr=0.01, eps=1e-6)
    else:
        optimizer = optimizers(gap)[name](groups)
    for step in range(4):
        for i, p in enumerate(everything(groups)):
            p.grad = gradient(p.shape, step * 100 + i)
        optimizer.step()
    return [p.detach() - b for p, b in zip(everything(groups), before, strict=True)]


def differences() -> None:
    """Print how far updates of our GaLore are from the original's: all of it together, and the largest of one weight."""
    same = {"basis": basis_as_the_original}
    cases: list[tuple[str, Any, int, dict[str, Any]]] = [
        ("as it is measured, four steps in one basis, spectra with gaps", with_gaps, 4, {}),
        ("by the original's call of LAPACK, two bases, spectra with gaps", with_gaps, 2, same),
        ("by the original's call of LAPACK, two bases, random gradients", without_gaps, 2, same),
    ]
    print("updates of GaLore, off from the original's")
    for what, gradient, gap, changes in cases:
        ours, theirs = moves("GaLore", gradient, gap, **changes), moves("GaLore, original", gradient, gap)
        off = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
        all_of_it = sum(b.square().sum() for b in theirs)
        largest = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))
        print(f"{what:64} {(off / all_of_it) ** 0.5:.0e} in norm, {largest:.0e} at most")


def accuracy() -> None:
    """Print how far each basis is from the exact one, by an SVD in float64: of the projectors, relative; and its share of the energy
    that the exact one holds."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(768, 2048, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(random, full_matrices=False)
    for spectrum, G in (("1/i", (U / torch.arange(1, 769)) @ Vh), ("Gaussian", random)):
        P = torch.linalg.svd(G.float().double()).U[:, :RANK]
        for name, basis in BASES.items():
            found = basis(G.float()[None], RANK)[0].double()
            error = (found @ found.T - P @ P.T).norm() / (P @ P.T).norm()
            energy = (found.T @ G).square().sum() / (P.T @ G).square().sum()
            print(
                f"basis {name:11} of a 768 x 2048 gradient, {spectrum:8} spectrum: projector off by {error:.0e}, energy {energy:.4f}"
            )


def measured(groups: Groups, wanted: Callable[[str], bool], rounds: int, compile: bool = False) -> None:
    """Step the wanted optimizers in turns, and print the table."""
    made = {name: make(groups) for name, make in optimizers(GAP, compile).items() if wanted(name)}
    refresh, plain = {}, {name: list[float]() for name in made}
    for name, optimizer in made.items():
        for _ in range(
            4 if name.endswith("comp.") else 1
        ):  # until all state is there, and nothing is compiled any more
            optimizer.step()
    for name, optimizer in made.items():
        with bases_due(optimizer):
            start = time.perf_counter()
            optimizer.step()
            refresh[name] = time.perf_counter() - start
    for number in range(rounds):
        for name in random.Random(number).sample(list(made), len(made)):  # none always follows the same other
            start = time.perf_counter()
            made[name].step()
            plain[name].append(time.perf_counter() - start)
    print(
        f"{'':21} {'state MiB':>9} {'step ms':>8} {'with new basis':>14} {'mean ms':>8} {'/ AdamW':>8} {'/ original':>10}"
    )
    mean = {}
    for name, times in plain.items():
        median = statistics.median(times)
        every_step = name.startswith(("AdamW", "DCT", "Trion", "EGGROLL", "two"))
        mean[name] = median if every_step else ((GAP - 1) * median + refresh[name]) / GAP
    for name, optimizer in made.items():
        state = sum(bytes_of(optimizer.state.get(p)) for p in everything(groups)) / 2**20
        against = f"{mean[name] / mean['GaLore, original']:10.2f}" if "GaLore, original" in mean else ""
        print(
            f"{name:21} {state:9.1f} {statistics.median(plain[name]) * 1e3:8.1f} {refresh[name] * 1e3:14.1f} "
            f"{mean[name] * 1e3:8.1f} {mean[name] / mean['AdamW (fused)']:8.2f} {against}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()

    print(
        f"the 130M model, {options.layers} blocks, rank {RANK}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    measured(model_groups(options.layers), lambda name: name != "two products", options.rounds, options.compile)
    print("the matrices of two of its blocks alone")
    matrices = [group for group in model_groups(2) if group["rank"]]
    measured(matrices, lambda name: name.startswith(("AdamW", "GaLore", "two")), 3 * options.rounds)
    accuracy()
    if original() is not None:
        differences()


if __name__ == "__main__":
    main()
