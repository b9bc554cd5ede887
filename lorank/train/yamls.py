"""YAML as recipes and flags have it: 1e-3 is a number, as it is since YAML 1.2, and a key is given once."""

import re
from typing import Any

import yaml

LARGEST = 1_000_000
"""Characters and values of a text with what its aliases stand for in their place; a few hundred bytes can stand for more than any memory holds."""
DEEPEST = 100
"""Values inside each other."""
UNREADABLE = (ArithmeticError, AttributeError, LookupError, ValueError)
"""What PyYAML raises for words that are not what they look like: a date in month 13, a number of 5,000 digits, !!bool of "x"."""


class Loader(yaml.SafeLoader):
    """Of what `load` reads."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._size = self._depth = self._deepest = 0
        self._measured: dict[Any, tuple[int, int]] = {}
        """Size and height of each node that is complete."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Measured before anything is built from the nodes, because even to join mappings (<<) their aliases are followed."""
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        size, deepest = self._size, self._deepest
        self._depth += 1
        self._deepest = self._depth
        self._check_depth(mark)
        node = super().compose_node(parent, index)
        if is_alias:
            self._follow(node, mark)
        else:
            self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self._measured[node] = self._size - size, self._deepest - self._depth
        self._depth -= 1
        self._deepest = max(self._deepest, deepest)
        return node

    def _follow(self, node: Any, mark: Any) -> None:
        if node not in self._measured:
            raise _error("a value must not contain itself", mark)
        size, height = self._measured[node]
        self._size += size
        self._deepest += height
        self._check_depth(mark)
        if self._size > LARGEST:
            raise _error(f"its aliases stand for more than {LARGEST:,} characters; write out what they stand for", mark)

    def _check_depth(self, mark: Any) -> None:
        if self._deepest > DEEPEST:
            raise _error(f"values must be at most {DEEPEST} deep inside each other", mark)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except UNREADABLE:
            kind, words = node.tag.rpartition(":")[2], repr(node.value[:40])
            raise _error(f"{words} cannot be read as {kind}; correct or quote it", node.start_mark) from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen = set[str]()
        for key in keys:
            if key.value in seen:
                raise _error(f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)$",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.inf$|\.nan$",
}
"""YAML 1.2's; 1.1 reads 1:30 as 90, 0x10 as 16 and 010 as 8, which here are words."""
Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in NUMBERS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for kind, pattern in NUMBERS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern, re.IGNORECASE), list("-+.0123456789"))


def load(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not valid, a mapping has a key twice, or a value contains itself or is far too deep or, by its aliases, too large.

    >>> load("lr: 1e-3"), load("[0.9, 95e-2]"), load("low-rank")
    ({'lr': 0.001}, [0.9, 0.95], 'low-rank')
    """
    return yaml.load(text, Loader)


def _error(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)
