"""Does a method from outside satisfy what all methods here do?

    from lorank.testing import check_method
    check_method(MyMethod)

As scikit-learn's `check_estimator`. To see each check as a separate test:

    @pytest.mark.parametrize("check", lorank.testing.checks(MyMethod(rank=8)), ids=str)
    def test_the_contract(check):
        check()
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.utils import logging

from lorank.method import Method
from lorank.optim.driver import LowRankOptimizer
from lorank.testing import driven, movement, structure

__all__ = ["Check", "check_method", "checks"]


class Check(NamedTuple):
    """One claim about one method: called, it raises AssertionError if the claim does not hold."""

    claim: Callable[[Any], None]
    subject: Any

    def __call__(self) -> None:
        self.claim(self.subject)

    def __str__(self) -> str:
        where = f"-{self.subject.architecture.name}" if isinstance(self.subject, structure.Subject) else ""
        return f"{self.subject.method.name}{where}-{self.claim.__name__}"


def checks(method: Method | type[Method], *, fp32: str | None = None, lr: float = 0.01) -> list[Check]:
    """All that a method is examined for, on small models; a method of structure on a Llama, a GPT-2 and a BERT.

    Args:
        method: a method, or its class for the default settings, which draw nothing at random in training (``dropout=0``).
        fp32: a pattern of the parameters that it keeps in single precision in a model of 16 bits.
        lr: a learning rate with which an optimizer trains two matrices of 12 to 80 rows.

    Raises:
        TypeError: it is no method.
        ValueError: it decides neither what the weights are nor how they move.
    """
    method = method() if isinstance(method, type) else method
    if not isinstance(method, Method):
        raise TypeError(f"method must be a subclass of lorank.method.Method or an instance of one, got {method!r}")
    answers, found = method.answers(), []
    if "method" in answers:
        llama, *others = (structure.Subject(method, small, fp32) for small in structure.SMALL)
        found += [Check(claim, subject) for subject in (llama, *others) for claim in structure.EVERYWHERE]
        found += [Check(claim, llama) for claim in structure.ONCE]
    elif "optimizer" in answers or method.key == "optimizer":
        mover = movement.Mover(method, lr)
        by_the_driver = isinstance(mover.make(movement.net()), LowRankOptimizer)
        found += [Check(claim, mover) for claim in movement.ANY + (driven.DRIVEN if by_the_driver else ())]
    if not found:
        raise ValueError(
            f"method must decide what the weights are or how they move, got {method!r}, which does neither"
        )
    return found


def check_method(method: Method | type[Method], *, fp32: str | None = None, lr: float = 0.01) -> None:
    """Run all `checks` of a method; the arguments are theirs.

    Raises:
        AssertionError: a claim does not hold; a note names the check. Other exceptions come from the method itself.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of each small model that is saved and loaded
    try:
        for check in checks(method, fp32=fp32, lr=lr):
            try:
                check()
            except Exception as error:
                error.add_note(f"This was found by the check {check}.")
                raise
    finally:
        if bars:
            logging.enable_progress_bar()
