"""What do the low-rank optimizers cost per step, in time and in state, beside torch's fused AdamW and the original GaLore?

    pip install --no-deps galore-torch                     (the original; left out of the table if it is not there)
    python benchmarks/optimizers.py [--layers 2] [--rounds 5] [--compile]

The matrices of blocks of the 130M model (d 768, d_ff 2048), fp32, rank 256. All optimizers move the same weights by the same
gradients in turns in one process; a step without and a step with a new basis are timed apart, and "mean" is what a step costs
on average at the usual gap of 200 (DCT-AdamW and Trion choose anew at each step). "two products" is what no implementation of
GaLore can do without: G Qᵀ and W + N Q for every matrix, nothing else. EGGROLL is what follows the forward passes of 256
members: their noise drawn anew, the estimate in one product per matrix, and fused AdamW. `--compile` adds the steps that
``torch.compile`` takes. Below it stands how exact each basis is. The table ends with the largest difference between the updates of our GaLore and of the original over four steps with two bases, found by the same call of LAPACK: random
gradients have no gaps in their spectrum, so that bases by different routines differ, and each is one up to signs.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorank.optim import DCTAdamW, Eggroll, FiraAdamW, GaLoreAdamW, Subspace, Trion
from lorank.optim.bases import BASES

RANK, GAP = 256, 200
BLOCK = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]


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


def optimizers(gap: int, compile: bool = False) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    ours: dict[str, Any] = {"rank": RANK, "update_gap": gap}
    theirs = {"rank": RANK, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    table: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "AdamW (fused)": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True),
        "GaLore": lambda p: GaLoreAdamW([{"params": p, **ours}], lr=0.01, eps=1e-6),
        "GaLore, by SVD": lambda p: GaLoreAdamW([{"params": p, **ours}], lr=0.01, eps=1e-6, basis="svd"),
        "GaLore, randomised": lambda p: GaLoreAdamW([{"params": p, **ours}], lr=0.01, eps=1e-6, basis="randomised"),
        "Fira": lambda p: FiraAdamW([{"params": p, **ours}], lr=0.01),
        "DCT-AdamW": lambda p: DCTAdamW([{"params": p, "rank": RANK}], lr=0.01),
        "DCT-AdamW, FFT": lambda p: DCTAdamW([{"params": p, "rank": RANK}], lr=0.01, transform="fft"),
        "Trion": lambda p: Trion([{"params": p, "rank": RANK}], lr=0.01),
        "EGGROLL": EggrollAdamW,
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim import AdamW8bit

        table["GaLore, 8-bit AdamW"] = lambda p: Subspace([{"params": p, **ours}], AdamW8bit, lr=0.01)
    if compile:
        for name in ("DCT-AdamW", "DCT-AdamW, FFT", "Trion"):
            table[f"{name}, comp."] = lambda p, make=table[name]: compiled(make(p))  # type: ignore[misc]
    table["two products"] = TwoProducts
    if (reference := original()) is not None:
        table["GaLore, original"] = lambda p: reference([{"params": p, **theirs}], lr=0.01, no_deprecation_warning=True)
    return table


class TwoProducts(Optimizer):
    """The floor: into the subspace and back, with a basis that never changes and no rule in between."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__(params, {})
        self.bases = {p: torch.randn(RANK, min(p.shape)) * 1e-3 for p in params}

    @torch.no_grad()
    def step(self) -> None:
        for p, Q in self.bases.items():
            if p.shape[0] >= p.shape[1]:
                p.addmm_(p.grad @ Q.mT, Q, alpha=1e-6)
            else:
                p.addmm_(Q.mT, Q @ p.grad, alpha=1e-6)


class EggrollAdamW(torch.optim.AdamW):
    """What EGGROLL does after the members' forward passes, and AdamW."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__(params, lr=0.01, weight_decay=0.0, fused=True)
        self.estimate = Eggroll(nn.ParameterList(params), population=256, sigma=0.01)
        self.z = torch.randn(256, generator=torch.Generator().manual_seed(0))

    def step(self) -> None:  # type: ignore[override]
        given = [p.grad for p in self.estimate.perturbed]
        with torch.no_grad():
            self.estimate.write_gradients(self.z)
        super().step()
        for p, gradient in zip(self.estimate.perturbed, given, strict=True):
            p.grad = gradient


def compiled(optimizer: Optimizer) -> Optimizer:
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def bytes_of(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, vars(state).values())) if hasattr(state, "ortho_matrix") else 0  # the original's projector


def weights(layers: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in BLOCK * layers]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return parameters


def basis_as_the_original(X: Tensor, rank: int) -> Tensor:
    """Of a gradient or its transpose, as `lorank` asks for it; the original decomposes the gradient itself in both cases."""
    if X.mT.is_contiguous() and not X.is_contiguous():
        return torch.linalg.svd(X.mT, full_matrices=False).Vh[..., :rank, :].mT
    return torch.linalg.svd(X, full_matrices=False).U[..., :rank]


def difference(layers: int, steps: int = 4) -> float | None:
    """Largest difference between the weights after some steps of ours and of the original, as a part of the largest move."""
    moved = []
    for name in ("ours", "GaLore, original"):
        table = optimizers(gap=2)
        ours = {"rank": RANK, "update_gap": 2}
        table["ours"] = lambda p: GaLoreAdamW([{"params": p, **ours}], lr=0.01, eps=1e-6, basis=basis_as_the_original)  # noqa: B023
        if name not in table:
            return None
        parameters = weights(layers)
        before = [p.detach().clone() for p in parameters]
        optimizer = table[name](parameters)
        for step in range(steps):
            for i, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 100 + i))
            optimizer.step()
        moved.append([p.detach() - b for p, b in zip(parameters, before, strict=True)])
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*moved, strict=True))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()

    parameters = weights(options.layers)
    made = {name: make(parameters) for name, make in optimizers(GAP, options.compile).items()}
    refresh, plain = {}, {name: [] for name in made}
    for name, optimizer in made.items():
        start = time.perf_counter()
        optimizer.step()
        refresh[name] = time.perf_counter() - start
        for _ in range(3 if name.endswith("comp.") else 0):  # until nothing is compiled any more
            optimizer.step()
    for _ in range(options.rounds):
        for name, optimizer in made.items():
            start = time.perf_counter()
            optimizer.step()
            plain[name].append(time.perf_counter() - start)

    print(
        f"{options.layers} blocks of the 130M model, rank {RANK}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(
        f"{'':20} {'state MiB':>10} {'step ms':>9} {'with new basis':>15} {'mean ms':>9} {'/ AdamW':>9} {'/ original':>11}"
    )
    mean = {}
    for name, times in plain.items():
        median = statistics.median(times)
        every_step = name.startswith(("AdamW", "DCT", "Trion", "EGGROLL", "two"))
        mean[name] = median if every_step else ((GAP - 1) * median + refresh[name]) / GAP
    for name, optimizer in made.items():
        state = sum(bytes_of(optimizer.state.get(p)) for p in parameters) / 2**20
        against = f"{mean[name] / mean['GaLore, original']:11.2f}" if "GaLore, original" in mean else ""
        print(
            f"{name:20} {state:10.1f} {statistics.median(plain[name]) * 1e3:9.1f} {refresh[name] * 1e3:15.1f} "
            f"{mean[name] * 1e3:9.1f} {mean[name] / mean['AdamW (fused)']:9.2f} {against}"
        )
    accuracy()
    if (off := difference(1)) is not None:
        print(f"updates of GaLore and of the original differ by {off:.1e} of the largest")


if __name__ == "__main__":
    main()
