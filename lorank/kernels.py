"""Which code for attention and experts a configuration may name.

transformers reads a name such as "owner/kernel" as a repository of the hub. Where the package `kernels` is installed it downloads
that repository and runs what is in it, and it does the same for its own names "flash_attention_2", "sonicmoe" and the like if
their package is missing. A configuration comes from somebody else, so it may name only what is installed already. One of transformers'
own names without its package is forgotten: the model runs with what there is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KEYS = {
    f"{start}{key}{end}": key
    for key in ("attn_implementation", "experts_implementation")
    for start in ("", "_")
    for end in ("", "_internal")
}
"""The entries of a configuration that name code, and the public name of each."""
FROM_THE_HUB = ("deepgemm", "sonicmoe")
"""Experts of transformers that are downloaded before they run."""


def check_kernels(settings: Mapping[str, Any], where: str) -> None:
    """Refuse code that would be downloaded.

    Args:
        settings: the content of a config.json, of any depth.
        where: what the settings belong to, for the message.

    Raises:
        ValueError: an attention or experts implementation that is not one of transformers' or whose package is not installed.
    """
    for path, key, value in _named(settings):
        known = implementations(key)
        if value is not None and value not in known:
            raise ValueError(
                f"{path} in {where} must be one of {', '.join(known)}, got {value!r}, which is not in the installed "
                "packages; lorank downloads no code"
            )


def without_missing(settings: Any) -> Any:
    """A copy of settings without the names of transformers' own code whose package is missing: what remains of another machine."""
    if not isinstance(settings, Mapping):
        return [without_missing(one) for one in settings] if isinstance(settings, list | tuple) else settings
    return {
        name: _installed(KEYS[name], value) if name in KEYS else without_missing(value)
        for name, value in settings.items()
    }


def _installed(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {part: _installed(key, name) for part, name in value.items()}
    own = ALL_EXPERTS_FUNCTIONS if key == "experts_implementation" else ALL_ATTENTION_FUNCTIONS
    missing = "/" not in str(value) and value in own.valid_keys() and value not in implementations(key)
    return None if missing else value


def implementations(key: str) -> list[str]:
    """The installed implementations of "attn_implementation" or "experts_implementation"."""
    if key == "experts_implementation":
        return ["eager", *sorted(name for name in ALL_EXPERTS_FUNCTIONS.valid_keys() if name not in FROM_THE_HUB)]
    missing = [
        f"flash_attention_{version}"
        for version, checks in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
        if not checks["general_availability_check"]()  # type: ignore[operator]
    ]
    names = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    return sorted(name for name in names if "/" not in name and name.rpartition("|")[2] not in missing)


def _named(settings: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each place where settings name code, as its path, its public key and one name."""
    items = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
    for name, value in items:
        here = f"{path}.{name}" if path else str(name)
        if name in KEYS:
            for one in _names(value):
                yield here, KEYS[name], one
        elif isinstance(value, Mapping | list | tuple):
            yield from _named(value, here)


def _names(value: Any) -> Iterator[Any]:
    """A name, or those of a table with one for each part of a model."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _names(one)
    else:
        yield value
