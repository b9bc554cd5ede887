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


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def load(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: it is not valid, or a mapping has a key twice.

    >>> load("lr: 1e-3"), load("[0.9, 95e-2]"), load("low-rank")
    ({'lr': 0.001}, [0.9, 0.95], 'low-rank')
    """
    return yaml.load(text, Loader)
