"""Regular expressions that somebody else may have written, into a saved model's configuration, and that must not take hours.

Python tries every way in which a pattern can match before it says that none does. (a+)+$ has 2ⁿ ways on n letters. A bound on their number
follows from the pattern alone: a part that repeats, of at most L letters, has as many ways as it has lengths, alternatives add
up, and parts in a row multiply.
"""

import re
from re import _constants as code  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 100
"""L, letters of a name."""
MOST = 10_000_000
"""Ways that are allowed: four parts such as .* in a row have too many, three do not."""


def ways(pattern: str) -> int:
    """A bound on the ways in which a pattern can match some of a name, at most 2 `MOST`.

    >>> ways(r"mlp\\.(gate|up)_proj$"), ways(r"layers\\.[0-9]+\\..*down"), ways(r"(a+)+$") > MOST
    (2, 10000, True)
    """
    return _of(parser.parse(pattern))


def _of(parts: Any) -> int:
    found = 1
    for op, given in parts:
        found = min(found * _ways(op, given), 2 * MOST)
    return found


def _ways(op: Any, given: Any) -> int:
    if op in (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT):
        least, most, body = given
        lengths, inside = min(int(most), least + LONGEST) - least + 1, _of(body)
        if inside == 1:
            return max(1, lengths if int(most) != code.MAXREPEAT else lengths - 1)
        return min(lengths * inside ** min(int(most), LONGEST), 2 * MOST)
    if op is code.BRANCH:
        return sum(_of(body) for body in given[1])
    if op is code.SUBPATTERN:
        return _of(given[-1])
    if op is code.ATOMIC_GROUP:
        return _of(given)
    if op in (code.ASSERT, code.ASSERT_NOT):
        return _of(given[1])
    if op is code.GROUPREF_EXISTS:
        return _of(given[1]) + (_of(given[2]) if given[2] else 1)
    return 1


def compiled(pattern: str) -> re.Pattern[str]:
    """The compiled pattern.

    Raises:
        ValueError: it is no regular expression (`re.error`), or one that could take hours.
    """
    found = re.compile(pattern)
    if ways(pattern) > MOST:
        raise ValueError(
            "it could match in too many ways, which can take hours; repeat no part that repeats or has alternatives, and use .* at most "
            "three times"
        )
    return found
