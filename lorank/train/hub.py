"""The hub of models and data sets, which is asked only if there is a network."""

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import datasets
from huggingface_hub import constants

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
