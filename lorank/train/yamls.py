"""YAML as recipes and flags have it: 1e-3 is a number, as it is since YAML 1.2, and a key is given once."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Of what `load` reads."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen = set[str]()
        for key in keys:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
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
        yaml.YAMLError: it is not valid, a mapping has a key twice, or a value contains itself.

    >>> load("lr: 1e-3"), load("[0.9, 95e-2]"), load("low-rank")
    ({'lr': 0.001}, [0.9, 0.95], 'low-rank')
    """
    found = yaml.load(text, Loader)
    _check_finite(found, (), set())
    return found


def _check_finite(value: Any, inside: tuple[int, ...], seen: set[int]) -> None:
    """Raises YAMLError if a value, by its aliases, is one of those that it is inside of. What many aliases name is visited once."""
    if id(value) in inside:
        raise yaml.YAMLError("a value must not contain itself")
    if isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, dict) else value:
            _check_finite(part, (*inside, id(value)), seen)
