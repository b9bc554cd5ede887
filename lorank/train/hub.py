"""The hub of models and data sets: asked where there is a network, and where there is none not asked six times."""

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import datasets
from huggingface_hub import constants

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def is_reachable() -> bool:
    """Whether the hub's name can be resolved; behind a proxy, which resolves names itself, that is not tried."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def asked_if_reachable() -> Iterator[None]:
    """Inside, without a network the libraries look into their caches alone, as with HF_HUB_OFFLINE=1: they would wait for a
    minute else, and print a warning for each attempt."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not is_reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
