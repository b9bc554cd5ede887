"""The hub of models and data sets, which is asked only if there is a network."""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import datasets
from huggingface_hub import constants
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorank.auto import PREFIX
from lorank.kernels import check_kernels, without_missing
from lorank.train.entries import as_classes_take, last_line

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def is_reachable() -> bool:
    """Whether the hub's name can be resolved. True behind a proxy, which resolves names itself."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def asked_if_reachable() -> Iterator[None]:
    """Without a network, let the libraries read their caches only, as with HF_HUB_OFFLINE=1. Otherwise they would try for a
    minute and print a warning for each attempt."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not is_reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


class ForeignCode(ValueError):
    """A model that transformers can only build, or would build, with code that its author chose."""


def own_code(place: str) -> ForeignCode:
    """The error for a model that transformers can only build with code from its folder."""
    return ForeignCode(
        f"{place} needs code from its folder (auto_map in config.json), which lorank never runs; use a model type that transformers has"
    )


def read_config(place: str) -> PretrainedConfig:
    """The configuration in a folder, a file or on the hub, its entries as their class takes them. Code next to it is never run, and
    nobody is asked whether it may.

    Raises:
        ForeignCode: transformers has no class for it, or it names code that would be downloaded.
        OSError, KeyError: it could not be read, or names what transformers does not know.
        ValueError: its class refuses an entry, or fails with one.
    """
    try:
        return _read_config(place)
    except (ForeignCode, OSError, ValueError, KeyError):
        raise
    except Exception as error:  # each class reads its entries in its own way
        raise ValueError(last_line(error)) from error


def _read_config(place: str) -> PretrainedConfig:
    with asked_if_reachable():
        found, _ = PretrainedConfig.get_config_dict(place)
        if found.get("auto_map") and found.get("model_type") not in CONFIG_MAPPING:
            raise own_code(place)
        wanted = as_classes_take(without_missing(found))
        try:
            check_kernels(wanted, f"the configuration of {place}")
        except ValueError as error:
            raise ForeignCode(str(error)) from None
        if json.dumps(wanted) == json.dumps(found):
            return _checked(AutoConfig.from_pretrained(place, trust_remote_code=False))
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(wanted), encoding="utf-8")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.name_or_path = place
        return _checked(config)


def _checked(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a converted model, checked as that of the dense one is, which its class does not do of itself."""
    if config.model_type.startswith(PREFIX):
        config.validate()  # type: ignore[attr-defined]
    return config
