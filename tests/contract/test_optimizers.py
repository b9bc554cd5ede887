"""What every method that decides how weights move must satisfy (`lorank.testing.movement`), run over the table.

The equations are tested in ``tests/optim``.
"""

import pytest

from lorank.testing import Check, checks
from lorank.testing.driven import operations_of_a_step_are_those_of_the_counter
from tests.contract.conftest import METHODS, mover, named

CHECKS = [
    pytest.param(check, id=f"{named(method)}-{check.claim.__name__}")
    for method in METHODS
    for check in checks(method, lr=mover(method).lr)
    # the matrices there have no smaller rank than their product, so LORO takes no exact step; counted in tests/optim/test_loro.py
    if (method.name, check.claim) != ("loro", operations_of_a_step_are_those_of_the_counter)
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(check: Check) -> None:
    check()
