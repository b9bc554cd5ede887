"""The settings of a federated run, and which text each client has."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from lorank.federated.private import epsilon, noise_for
from lorank.federated.rule import Rule
from lorank.federated.table import find
from lorank.fields import Bounds, Positive, check_fields, unknown
from lorank.train.data.files import found_files

Whole = Annotated[int, Bounds(least=1)]
Density = Annotated[float, Bounds(above=0, most=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server decides. Clients get it with each message, but for `model` and `data`, which may be others on their machines."""

    model: str
    """A run, a folder or a hub name of a dense causal model, the same everywhere."""
    data: str
    """Sources of text, with commas; see `shares_of_text`."""
    method: str = "flora"
    """A rule of the table."""
    clients: Whole = 4
    rounds: Whole = 5
    rank: str = "8"
    """Of the factors; one for each client with commas, where a rule allows it."""
    alpha: Positive = 16.0
    """The low-rank term is multiplied by α/r."""
    steps: Whole = 20
    """Optimizer steps of a client in a round."""
    batch_size: Whole = 8
    sequence_length: Annotated[int, Bounds(least=2)] = 128
    lr: Positive = 1e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    eval_tokens: Whole = 20_000
    """Held-out tokens of each client."""
    text_column: str = "text"
    down: Density = 1.0
    """Share of the numbers that go down, the largest ones."""
    up: Density = 1.0
    """Share of the numbers that go up."""
    epsilon: Positive | None = None
    """Privacy that all rounds may cost each client; the noise follows from it. None: as `noise` says."""
    noise: Annotated[float, Bounds(least=0)] | None = None
    """σ, noise in units of `clip`. None: no privacy, unless `epsilon` is given."""
    clip: Positive = 1.0
    """Under privacy the most that the gradient of a sample may be; else of a batch."""
    delta: Annotated[float, Bounds(above=0, below=1)] = 1e-5
    accountant: Literal["rdp", "opacus-rdp", "opacus-prv"] = "rdp"
    seed: Annotated[int, Bounds(least=0)] = 0
    timeout: Positive = 3600.0
    """Seconds after which a client that has not answered is left out of a round."""

    def __post_init__(self) -> None:
        check_fields(self)
        ranks = self.ranks
        if len(ranks) not in (1, self.clients):
            raise ValueError(f"rank must be one number, or one for each of {self.clients} clients, got {self.rank!r}")
        if len(set(ranks)) > 1 and not self.rule.any_ranks:
            raise ValueError(
                f"rank must be one number for all clients with {self.method}, got {self.rank!r}; use flora or best"
            )
        if self.epsilon is not None and self.noise is not None:
            raise ValueError("epsilon and noise must not both be given, because the noise follows from epsilon")

    @property
    def rule(self) -> Rule:
        return find(self.method)

    @property
    def ranks(self) -> list[int]:
        try:
            ranks = [int(part) for part in self.rank.split(",")]
        except ValueError:
            ranks = [0]
        if min(ranks) < 1:
            raise ValueError(f"rank must be a positive integer, or several with commas, got {self.rank!r}")
        return ranks

    def rank_of(self, client: int) -> int:
        """The rank of a client's factors."""
        return self.ranks[client % len(self.ranks)]

    @property
    def private(self) -> bool:
        return self.epsilon is not None or self.noise is not None

    def sigma(self, q: float) -> float:
        """σ of a client whose samples are each drawn with probability q in a step."""
        if self.epsilon is None:
            return self.noise or 0.0
        return noise_for(self.epsilon, q, self.rounds * self.steps, self.delta, accountant=self.accountant)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Settings":
        """From JSON, or from Flower's run config, whose names have dashes and which knows no None but "".

        Raises:
            ValueError: a setting is unknown or does not fit.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        settings = {name.replace("-", "_"): value for name, value in given.items()}
        for name in settings:
            if name not in fields:
                raise ValueError(unknown("setting", name, [*fields]))
        settings = {n: value for n, value in settings.items() if value != "" or fields[n].default is not None}
        if missing := [name for name in ("model", "data") if name not in settings]:
            raise ValueError(f"{missing[0]} must be given")
        if "rank" in settings:
            settings["rank"] = str(settings["rank"])
        return cls(**settings)


class Share(NamedTuple):
    """The text of a client: all sequences of some sources, or every `of`-th of them."""

    sources: tuple[str, ...]
    part: int = 0
    of: int = 1


def shares_of_text(data: str, clients: int) -> list[Share]:
    """Who has which text. Several sources, or the files of one folder or glob, are dealt to the clients in turn; the sequences of a single
    file or hub data set are.

    Raises:
        ValueError: there are fewer sources than clients.
        OSError: there is no such file.
    """
    sources = [source for source in data.split(",") if source]
    if not sources:
        raise ValueError(f"data must be sources of text with commas, got {data!r}")
    if len(sources) == 1:
        try:
            files = [str(file) for file in found_files(sources[0])[0]]
        except OSError:
            if sources[0].startswith((".", "/", "~")) or sources[0].count("/") != 1:
                raise
            files = sources  # a hub data set
        if len(files) == 1:
            return [Share((sources[0],), i, clients) for i in range(clients)]
        sources = files
    if len(sources) < clients:
        raise ValueError(
            f"data must have a source for each of {clients} clients, got {len(sources)}; use --clients {len(sources)}"
        )
    return [Share(tuple(sources[i::clients])) for i in range(clients)]


def spent(settings: Settings, samples: int, rounds: int) -> float | None:
    """ε of a client with so many samples after so many rounds; None without privacy."""
    if not settings.private:
        return None
    q = min(1.0, settings.batch_size / samples)
    steps = rounds * settings.steps
    found = epsilon(settings.sigma(q), q, steps, settings.delta, accountant=settings.accountant)
    return found if math.isfinite(found) else None
