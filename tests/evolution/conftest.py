"""Members of a population one by one with their weights written out, small EGG models, and short runs on a text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorank.evolution.egg_model import EggConfig, EggForCausalLM
from lorank.evolution.eggroll import Eggroll
from lorank.train.folder import history
from lorank.train.recipe import Recipe

TEXT = "".join(
    f"line {i}: the {'quick' if i % 3 else 'slow'} brown fox counts {i * i} lazy dogs\n" for i in range(1500)
)
SHORT = {"steps": 6, "log_every": 1, "eval_every": 0, "save_every": 1, "keep": 20, "eval_tokens": 500}
KINDS: dict[str, dict[str, Any]] = {
    "float": {
        "method": "eggroll",
        "options": {"population": 8, "sigma": 0.02, "chunk": 4, "noise_reuse": 2},
        "vocab_size": 300,
        "sequence_length": 16,
        "batch_size": 4,
        "warmup_steps": 1,
    },
    "egg": {
        "model": "egg",
        "options": {"hidden_size": 8, "population": 16},
        "batch_size": 8,
        "sequence_length": 16,
    },
}


def _moves(estimate: Eggroll, member: int) -> dict[nn.Parameter, Tensor]:
    pairs, sign = range(member // 2, member // 2 + 1), 1 - 2 * (member % 2)
    found = {}
    for p in estimate.perturbed:
        if p.ndim == 2:
            A, B = estimate.factors(p, pairs)
            found[p] = sign * (A[0] @ B[0].T)
        else:
            found[p] = sign * estimate.dense(p, pairs)[0]
    return found


@pytest.fixture(scope="session")
def moves() -> Callable[[Eggroll, int], dict[nn.Parameter, Tensor]]:
    """s σ E of a member for each parameter, by the equation."""
    return _moves


@pytest.fixture(scope="session")
def one_by_one() -> Callable[[Eggroll, Callable[[int], Tensor]], Iterator[Tensor]]:
    """Each member's output, called with its weights written out."""

    def members(estimate: Eggroll, call: Callable[[int], Tensor]) -> Iterator[Tensor]:
        for member in range(estimate.population):
            moved = _moves(estimate, member)
            with torch.no_grad():
                before = {p: p.clone() for p in moved}
                for p, move in moved.items():
                    p.add_(move)
                yield call(member)
                for p, old in before.items():
                    p.copy_(old)

    return members


@pytest.fixture(scope="session")
def egg() -> Callable[..., EggForCausalLM]:
    """egg(width, layers=2, spread=6.0): a small model, its weights `spread` times as large as the initial ones."""

    def build(D: int = 8, layers: int = 2, seed: int = 0, spread: float = 1.0) -> EggForCausalLM:
        torch.manual_seed(seed)
        model = EggForCausalLM(EggConfig(hidden_size=D, num_hidden_layers=layers))
        with torch.no_grad():  # norms and biases that are not all alike
            for p in model.parameters():
                p.copy_((p * spread + (torch.randint(-9, 10, p.shape) if p.ndim == 1 else 0)).clamp(-127, 127))
        return model

    return build


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def recipe(text: Path) -> Callable[..., Recipe]:
    """recipe("float", lr=0.1): a short run of EGGROLL on a Llama, or of EGG ("egg")."""

    def build(kind: str, **changes: Any) -> Recipe:
        given = {**KINDS[kind], **changes, "options": {**KINDS[kind]["options"], **changes.get("options", {})}}
        return Recipe.from_dict({"data": str(text), **SHORT, **given})

    return build


@pytest.fixture(scope="session")
def figures() -> Callable[[Path], list[tuple[float, ...]]]:
    """Step, loss, gradient norm and learning rate of each logged step of a run."""
    names = ("step", "loss_nats_per_token", "gradient_norm", "lr")
    return lambda folder: [tuple(r[name] for name in names) for r in history(folder) if "loss_nats_per_token" in r]
