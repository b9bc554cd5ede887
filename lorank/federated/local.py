"""Server and clients in one process, one client after another: for tests, and where Flower is not installed."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorank.federated.client import Client
from lorank.federated.exchange import Memory, Package
from lorank.federated.settings import Settings, shares_of_text
from lorank.train.watching import tell


class Local:
    """Clients of this process; a node is the index of one."""

    repeats = True

    def __init__(self, clients: Sequence[Client]):
        self.clients = clients
        self.memories = [Memory() for _ in clients]

    def nodes(self) -> Sequence[int]:
        return range(len(self.clients))

    def ask(self, packages: Mapping[Any, Package], what: str) -> dict[Any, Package | str]:
        answers: dict[Any, Package | str] = {}
        for done, (node, package) in enumerate(packages.items()):
            tell(what, done, len(packages), "clients")
            answers[node] = answered(self.clients[node], package, self.memories[node])
        tell(what, len(packages), len(packages), "clients")
        return answers


def answered(client: Client, package: Package, memory: Memory) -> Package | str:
    """The answer of a client, or what kept it from answering."""
    try:
        return client.answer(package, memory)
    except Exception as error:  # one client's trouble is not that of the others
        return " ".join(str(error).split()) or type(error).__name__


def clients_of(settings: Settings) -> list[Client]:
    """One for each share of the text."""
    return [
        Client(settings.model, share, f"client {i}", i, repeatable=True)
        for i, share in enumerate(shares_of_text(settings.data, settings.clients))
    ]
