"""RecLoRA on a SYNTHETIC table of ratings: adapters mixed by a user's vector, against one LoRA and a bias for each user.

    python benchmarks/ratings.py

200 users have rated things that are described by three of 24 tags, from 1 to 5. A rating is drawn from what a thing is worth to all, what its tags
are worth to this user (four numbers for each user and tag), how kind the user is, and noise. So users differ in just the way that user vectors can
tell: that makes it a test of the code, and no evidence about people.

A conventional recommender (matrix factorisation by alternating least squares, four factors) sees a long history, 60 ratings of each user; its
factors and bias are the user's vector. The language model, a small Llama that reads tags, has learned the ratings of all users pooled; it is then
tuned on 20 ratings of each of 150 users. 50 users are new to it: it has their vectors and no rating of theirs.

Figures are root mean squared errors of the expected rating, on things that a user has not rated. Learning rates and seeds: benchmarks/rows.py.
"""

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rows import SEEDS, fit, row, title
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import lorank

USERS, NEW, THINGS, TAGS, FACTORS = 200, 50, 300, 24, 4
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Table(NamedTuple):
    tags: Tensor  # [things, 3]
    ratings: Tensor  # [users, things], from 0 to 4
    parts: dict[str, Tensor]  # pairs [n, 2] of a user and a thing
    users: Tensor  # [users, FACTORS + 1], of the recommender
    predicted: Tensor  # [users, things], by it


@functools.cache
def table(seed: int) -> Table:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    tags = torch.rand(THINGS, TAGS, generator=draw).topk(3).indices
    things = normal(TAGS, FACTORS)[tags].mean(1)
    score = things @ normal(FACTORS, 1) * 0.5 + (normal(USERS, FACTORS) @ things.T).T + 0.5 * normal(USERS)
    score = score.T + 0.3 * normal(USERS, THINGS)
    ratings = torch.bucketize(score, torch.tensor([-1.2, -0.4, 0.4, 1.2]))
    order = torch.rand(USERS, THINGS, generator=draw).argsort(1)  # of each user

    def cut(users: Tensor, first: int, last: int) -> Tensor:
        return torch.stack([users.repeat_interleave(last - first), order[users, first:last].flatten()], dim=1)

    old, new, everyone = torch.arange(USERS - NEW), torch.arange(USERS - NEW, USERS), torch.arange(USERS)
    parts = {
        "history": cut(everyone, 0, 60),
        "train": cut(old, 0, 20),
        "choose": cut(old, 60, 80),
        "known users": cut(old, 80, 120),
        "new users": cut(new, 80, 120),
    }
    return Table(tags, ratings, parts, *factorised(ratings, parts["history"]))


def factorised(ratings: Tensor, history: Tensor, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """Vectors of users, each entry with mean 0 and deviation 1 over users, and ratings of all by all, from the `history` alone."""
    seen = torch.zeros(ratings.shape)
    seen[history[:, 0], history[:, 1]] = 1
    mean = (seen * ratings).sum(0) / seen.sum(0).clamp(min=1)
    residual = seen * (ratings - mean)

    def solved(X: Tensor, Y: Tensor, weights: Tensor) -> Tensor:
        """For each row of Y the least squares, with a ridge, of it by X's rows."""
        gram = torch.einsum("un,nk,nl->ukl", weights, X, X) + ridge * torch.eye(X.shape[1])
        return torch.linalg.solve(gram, torch.einsum("un,nk->uk", weights * Y, X))

    things = 0.1 * torch.randn(THINGS, FACTORS, generator=torch.Generator().manual_seed(0))
    for _ in range(15):
        users = solved(F.pad(things, (0, 1), value=1.0), residual, seen)  # the last is the bias
        things = solved(users[:, :-1], (residual - users[:, -1:]).T, seen.T)
    predicted = mean + users @ F.pad(things, (0, 1), value=1.0).T
    return (users - users.mean(0)) / users.std(0), predicted


class Rater(nn.Module):
    """A language model that reads tags, and perhaps a bias for each user on each rating; it counts tenfold, so that one learning rate suits both."""

    def __init__(self, model: Any, *, bias: bool = False):
        super().__init__()
        self.model, self.bias = model, nn.Parameter(torch.zeros(USERS, 5)) if bias else None

    def forward(self, tags: Tensor, users: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tags).logits
        return logits if self.bias is None else logits + 10 * self.bias[users]


@functools.cache
def base(seed: int) -> Rater:
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, vocab_size=TAGS + 1, pad_token_id=TAGS, num_labels=5, max_position_embeddings=8)
    rater = Rater(LlamaForSequenceClassification(config))
    found = table(seed)
    fit(loss_on(rater, found, "history"), rater, 3e-3, seed, steps=200, batch=64, count=len(found.parts["history"]))
    return rater


def loss_on(rater: Rater, found: Table, part: str, given: Tensor | None = None) -> Any:
    def loss(i: Tensor, _: torch.Generator) -> Tensor:
        users, things = found.parts[part][i].T
        if given is not None:
            lorank.set_context(rater.model, given[users])
        return F.cross_entropy(rater(found.tags[things], users), found.ratings[users, things])

    return loss


def rated(lr: float, seed: int, *, method: Any, bias: bool = False, others: bool = False) -> Any:
    """With `others`, each user has the vector of another one."""
    found, model = table(seed), copy.deepcopy(base(seed).model)
    torch.manual_seed(seed)
    model = model.requires_grad_(False) if method is None else lorank.convert(model, method)
    rater = Rater(model, bias=bias)
    given = found.users[torch.randperm(USERS)] if others else found.users
    given = given if isinstance(method, lorank.RecLoRA) else None
    if lr:
        fit(
            loss_on(rater, found, "train", given), rater, lr, seed, steps=200, batch=64, count=len(found.parts["train"])
        )

    def measure(report: bool) -> list[float]:
        errors = []
        for part in ("known users", "new users") if report else ("choose",):
            users, things = found.parts[part].T
            if given is not None:
                lorank.set_context(model, given[users])
            expected = rater(found.tags[things], users).softmax(-1) @ torch.arange(5.0)
            errors.append(rms(expected, found.ratings[users, things]))
        return errors

    return rater.eval(), measure


def rms(x: Tensor, y: Tensor) -> float:
    return (x - y).square().mean().sqrt().item()


def recommended(_: float, seed: int) -> Any:
    found = table(seed)
    pairs = [found.parts[part].T for part in ("known users", "new users")]
    return nn.Module(), lambda _: [rms(found.predicted[u, t].clamp(0, 4), found.ratings[u, t]) for u, t in pairs]


def main() -> None:
    size = base(0).model.num_parameters()
    print(f"SYNTHETIC ratings; Llama of {size:,} parameters; torch {torch.__version__}, {len(SEEDS)} seeds")
    title("root mean squared error", ["known users", "new users"])
    one, mixed = lorank.LoRA(rank=16), lorank.RecLoRA(adapters=4, rank=4, user_width=FACTORS + 1)
    for name, how in (
        ("as it came", {"method": None}),
        ("bias for each user", {"method": None, "bias": True}),
        ("lora, rank 16", {"method": one}),
        ("lora and bias", {"method": one, "bias": True}),
        ("reclora, 4 of rank 4", {"method": mixed}),
        ("reclora and bias", {"method": mixed, "bias": True}),
        ("reclora, others' vectors", {"method": mixed, "others": True}),
    ):
        row(name, functools.partial(rated, **how), 0.0 if name == "as it came" else 3e-3, least=True, digits=3)
    row("the recommender itself", recommended, 0.0, least=True, digits=3)


if __name__ == "__main__":
    main()
