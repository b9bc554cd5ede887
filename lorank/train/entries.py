"""Entries of a configuration, as its class takes them: an integer is a number too, and rotary positions are a table."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorank.auto import PREFIX

ROTARY = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
"""Older names of entries of `rope_parameters`."""
MOST_LABELS = 1 << 20
"""Of a classifier: its configuration class makes a name for each, and a number takes no space in a file."""


def as_classes_take(settings: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json, without what its class only computes, and with numbers of the types that it has. Of a
    type that transformers does not know nothing changes."""
    kind = str(settings.get("model_type", "")).removeprefix(PREFIX)
    return _taken_by(CONFIG_MAPPING[kind], settings) if kind in CONFIG_MAPPING else settings


def _taken_by(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    parts, taken = getattr(config, "sub_configs", {}), {}
    for name, value in settings.items():
        found = inspect.getattr_static(config, name, None)
        if isinstance(found, property) and found.fset is None:
            continue
        nested = isinstance(value, dict) and name in parts
        taken[name] = _taken_by(parts[name], value) if nested else as_number(config, name, value)
    return taken


def as_number(config: Any, name: str, value: Any) -> Any:
    """A value, with floating-point numbers in place of integers where a configuration class takes only those.

    Raises:
        ValueError: more labels than `MOST_LABELS`.
    """
    if name == "num_labels" and isinstance(value, int | float) and value > MOST_LABELS:
        raise ValueError(
            f"num_labels must be at most {MOST_LABELS:,}, got {value:,}; set it to the number of the labels"
        )
    name = getattr(config, "attribute_map", {}).get(name, name)
    for check in getattr(config, "__validators__", {}).get(name, [])[:1]:  # that of its type
        if not _passes(check, value) and _passes(check, number := _as_float(value)):
            return number
    return value


def _passes(check: Any, value: Any) -> bool:
    try:
        check(value)
    except (TypeError, ValueError):
        return False
    return True


def _as_float(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_float(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def set_rotary(config: PretrainedConfig, name: str, value: Any) -> bool:
    """Set an entry that belongs to `rope_parameters`, or the table itself, whose base and rotated part stay if it leaves them out.

    Returns:
        False if the entry is another one, which this function leaves alone.

    Raises:
        ValueError: the entry is not a positive number, or the configuration has a table for each type of layer.
    """
    now, whole = getattr(config, "rope_parameters", None), name in ("rope_parameters", "rope_scaling")
    if not isinstance(now, Mapping) or not (whole or name in ROTARY) or (not whole and name in vars(config)):
        return False
    nested = any(isinstance(one, Mapping) for one in now.values())
    if whole:
        if (
            nested
            or not isinstance(value or {}, Mapping)
            or any(isinstance(one, Mapping) for one in (value or {}).values())
        ):
            return False
        kept = {key: now[key] for key in ROTARY if key in now}
        given = {key: one if key.startswith("original") else _as_float(one) for key, one in (value or {}).items()}
    elif not nested and ROTARY[name] not in now:
        return False
    elif nested:
        raise ValueError(
            f"shape.{name} has one value for each type of layer; set shape.rope_parameters, which is {now!r}"
        )
    elif isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"shape.{name} must be a positive number, got {value!r}")
    else:
        kept, given = dict(now), {ROTARY[name]: float(value)}
    config.rope_parameters = {**kept, **given}
    config.standardize_rope_params()
    return True


def last_line(error: BaseException) -> str:
    """The last line of an error, in which configuration classes say what is wrong."""
    return re.sub(r"^\w+Error: ", "", (str(error).strip() or type(error).__name__).splitlines()[-1].strip())
