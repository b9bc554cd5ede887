"""Patterns in a model's configuration, which somebody else may have written, cannot hang what reads them."""

import re
import time

import pytest

from lorank.fields import compile_pattern

NAME = "model.layers.10.self_attn.q_proj" * 3


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(.|.)*X", r"(.*)*X", r"(\w+\.?)+X", "a?" * 40, ".*.*.*.*X", "(a?){30}X", r"(?=(.+)+X)q"]
)
def test_a_pattern_that_could_take_hours_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="targets must hold .* too many ways"):
        compile_pattern(pattern, "targets")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v|o)_proj|.*\.mlp\..*",
        r"layers\.(\d|1\d)\.",
        ".*.*.*X",
        r"(layers\.)+X",
        r"[^.]+_proj$",
        r"\w{1,20}X",
    ],
)
def test_a_pattern_that_is_allowed_is_quick(pattern: str) -> None:
    began = time.process_time()
    found = compile_pattern(pattern, "targets").search(NAME)
    assert time.process_time() - began < 1 and (found is None) == (re.search(pattern, NAME) is None)
