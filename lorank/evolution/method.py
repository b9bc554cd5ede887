"""EGGROLL as a method: it answers where the gradient comes from, for any language model and, in integers, for EGG."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from lorank.evolution.egg_model import EggForCausalLM
from lorank.evolution.eggroll import Eggroll
from lorank.evolution.integers import EggEggroll, Exponent, IntegerEggroll
from lorank.evolution.language_model import LanguageModelEggroll
from lorank.evolution.noise import Members, check_population
from lorank.fields import Count, Positive, Whole
from lorank.method import Method

SHARED = ("population", "group_size", "chunk")
INTEGERS = ("sig", "carry")
"""Settings of the integer variant alone; all others that are not shared are those of floating-point models."""


@dataclass(frozen=True, kw_only=True)
class EGGROLL(Method):
    """Gradients estimated by evolution (`lorank.evolution.eggroll`), or votes of an int8 EGG model's population."""

    name: ClassVar[str] = "eggroll"
    key: ClassVar[str] = "gradient"

    population: Members = 64
    """Members, an even number."""
    chunk: Members = 16
    """Members in one forward pass, an even number. This, and not micro_batch_size, sets the memory of a step."""
    group_size: Whole = 0
    """Consecutive members that see the same sequences and are compared with each other; 0: all members do."""
    sigma: Positive = 0.01
    """Size of the noise."""
    rank: Count = 1
    """Rank of a matrix's noise."""
    baseline: bool = False
    """Compare with a pair without noise in each group, and clip the estimate to norm 1."""
    noise_reuse: Whole = 1
    """Steps with the same noise; 0: all."""
    freeze_others: bool = False
    """Train matrices only."""
    sig: Exponent = 4
    """Of an integer model: the size of the noise is 2^-sig."""
    carry: bool = True
    """Of an integer model: rows of a batch continue where the same rows of the batch before ended, in the same states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_population(self.population, self.group_size, self.chunk)

    @property
    def sources(self) -> tuple[str, ...]:
        return ("lorank.evolution.eggroll",)

    def gradient(
        self, model: nn.Module, *, batch_size: int, sequence_length: int, seed: int, compile: bool = False
    ) -> LanguageModelEggroll | EggEggroll:
        if isinstance(model, EggForCausalLM):
            settings = self._settings(lambda name: name in SHARED + INTEGERS, "an integer model")
            estimate = IntegerEggroll(model, **settings, compile=compile, seed=seed)
            return EggEggroll(estimate, batch_size, sequence_length)
        if compile:
            raise ValueError(
                "compile must be false with eggroll: members draw their noise inside each layer, and every draw would "
                "break the compiled graph"
            )
        settings = self._settings(lambda name: name not in INTEGERS, "a floating-point model")
        return LanguageModelEggroll(model, Eggroll(model, **settings, seed=seed), batch_size, sequence_length)

    def _settings(self, belongs: Any, kind: str) -> dict[str, Any]:
        for field in fields(self):
            if not belongs(field.name) and getattr(self, field.name) != field.default:
                raise ValueError(f"eggroll has no setting {field.name!r} for {kind}; leave it out")
        return {field.name: getattr(self, field.name) for field in fields(self) if belongs(field.name)}
