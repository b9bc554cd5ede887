"""A text, a shape and a recipe that train in a second, and callbacks that end a run early."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from lorank import accounting
from lorank.train import run
from lorank.train.folder import history
from lorank.train.recipe import Recipe


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file; next to it, config.json is the shape of a small Llama."""
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    fox = "line {}: the {} brown fox counts {} lazy dogs\n"
    path.write_text("".join(fox.format(i, "quick" if i % 3 else "slow", i * i) for i in range(400)))
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    path.with_name("config.json").write_text(json.dumps({**shape, "num_attention_heads": 2, "num_key_value_heads": 2}))
    return path


@pytest.fixture(scope="session")
def recipe(text: Path) -> Callable[..., Recipe]:
    """recipe(steps=3): a run of eight short steps on `text`, with changes."""

    def make(**changes: Any) -> Recipe:
        settings: dict[str, Any] = {"data": str(text), "model": str(text.with_name("config.json"))}
        if changes.get("method", "cola") != "dense":
            settings["rank"] = 8
        settings |= {
            "vocab_size": 300,
            "sequence_length": 32,
            "batch_size": 4,
            "steps": 8,
            "warmup_steps": 2,
            "lr": 1e-2,
        }
        return Recipe(**{**settings, "log_every": 1, "eval_every": 4, "save_every": 4, **changes})

    return make


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[tuple[int, float, float]]]:
    """losses(folder): step, loss and gradient norm of each step of a run."""

    def read(folder: Path) -> list[tuple[int, float, float]]:
        steps = [record for record in history(folder) if "loss_nats_per_token" in record]
        return [(one["step"], one["loss_nats_per_token"], one["gradient_norm"]) for one in steps]

    return read


@pytest.fixture(scope="session")
def before_step() -> Callable[..., TrainerCallback]:
    """before_step(3, action): a callback that acts before the step after the third; by default it kills the run."""

    def killed() -> None:
        raise MemoryError("killed by the test")

    class Act(TrainerCallback):
        def __init__(self, step: int, action: Callable[[], Any] = killed):
            self.step, self.action = step, action

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                self.action()

    return Act


@pytest.fixture(scope="session")
def poison() -> Callable[..., TrainerCallback]:
    """poison(4, 7): a callback with which the gradients of these steps are not finite, from the loss on."""

    class Poison(TrainerCallback):
        def __init__(self, *steps: int):
            self.steps = steps

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            head = model.get_output_embeddings()
            if state.global_step + 1 in self.steps:
                self.handle = head.register_forward_hook(lambda module, args, logits: logits * float("nan"))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 in self.steps:
                self.handle.remove()

    return Poison


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Runs count and measure no FLOPs and write no sample, which take half of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounting, "flops_per_token", lambda *_, **__: 1.0)
        patch.setattr(accounting, "achievable_flops", lambda: (1e12, "assumed"))
        patch.setattr(run, "generate_text", lambda *_, **__: "")
        yield
