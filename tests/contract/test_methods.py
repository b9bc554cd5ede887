"""What every method of structure must satisfy (`lorank.testing.structure`), run over the one table: each on Llama, GPT-2 and BERT, and
CoLA and CR-Net on every architecture.

What is particular to a method is tested in ``tests/methods``.
"""

from typing import Any

import pytest
from torch import nn

import lorank
from lorank.method import Method, Site
from lorank.table import find, method_names
from lorank.testing import Check, check_method, checks
from lorank.testing.structure import EVERYWHERE, Subject
from tests.conftest import ARCHITECTURES

METHODS = [name for name in method_names("method") if name != "dense"]
IN_FP32 = {"crnet": "beta$"}
"""Parameters that a method keeps in single precision, as a pattern of their names."""
WITHOUT_NOISE: dict[str, Any] = {"relora": {"dropout": 0.0}}
"""Settings without which two calls of one model would differ."""
FACTORISED = ("cola", "cola-m", "low-rank")
"""Methods whose layers have r (d_in + d_out) weights; others state their count in their own test file."""
FURTHER = [ARCHITECTURES[name] for name in ARCHITECTURES if name not in ("llama", "gpt2", "bert")]


def examined(name: str) -> list[Check]:
    """All adapters are one layer with other gates: LoRA stands for what they share, and the compiler sees all gates in
    tests/adapters. Sparse codes are plain factors with a mask, compiled in tests/methods."""
    if (find(name).adapts and name != "lora") or name in ("sparse-codes", "codebook"):
        found = checks(find(name)())
        return [c for c in found if c.subject.architecture.name == "llama" and "compiler" not in str(c)]
    method, fp32 = find(name)(**WITHOUT_NOISE.get(name, {})), IN_FP32.get(name)
    further = FURTHER if name in ("cola", "crnet") else []
    return checks(method, fp32=fp32) + [Check(claim, Subject(method, a, fp32)) for a in further for claim in EVERYWHERE]


@pytest.mark.parametrize("check", [check for name in METHODS for check in examined(name)], ids=str)
def test_the_contract(check: Check) -> None:
    check()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FACTORISED)
def test_the_number_of_parameters_is_the_closed_form(name: str, architecture: str) -> None:
    """At the default rank, a quarter of each projection's narrower side."""
    method, here = find(name)(), ARCHITECTURES[architecture]
    assert method.rank == 0.25
    model, dense = lorank.convert(here.dense(), method), here.dense().num_parameters()
    saved = sum(d_in * d_out - min(d_in, d_out) // 4 * (d_in + d_out) for d_in, d_out in here.projections.values())
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) == dense - 2 * saved  # two blocks


class Forgetful(nn.Linear):
    """Its gain is no parameter and no buffer, so it is not saved."""

    stands_for_linear = True

    def __init__(self, dense: nn.Linear):
        options: Any = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, **options)
        self.gain = 1.0

    def forward(self, x: Any) -> Any:
        self.gain += 0.1
        return self.gain * super().forward(x)


class Forgets(Method):
    name = "forgets"

    def build(self, site: Site) -> nn.Module:
        return Forgetful(site.linear)


def test_a_method_that_falls_short_is_told_where() -> None:
    with pytest.raises(Exception, match=".") as caught:
        check_method(Forgets)
    assert caught.value.__notes__[0].startswith("This was found by the check forgets-llama-")
    with pytest.raises(ValueError, match="^method must decide what the weights are or how they move, got Dense"):
        check_method(find("dense")())


def test_what_is_no_method_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        TypeError, match="method must be a subclass of lorank.method.Method or an instance of one, got 'cola'"
    ):
        checks("cola")  # type: ignore[arg-type]
