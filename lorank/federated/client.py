"""A client: it answers one message at a time, with its model and its text."""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorank.adapter_files import adapter_of, hash_without
from lorank.adapters.gated import GatedAdapter
from lorank.adapters.lora import LoRA
from lorank.conversion import convert
from lorank.factors import Pair
from lorank.federated import sparse
from lorank.federated.exchange import MERGED, Memory, Package, factors_of, tensors_of, without_prefix
from lorank.federated.private import drawn, per_sample, private_gradient
from lorank.federated.rule import Factors, begin, shortened
from lorank.federated.settings import Settings, Share, spent
from lorank.loss import balances_experts, next_token_loss
from lorank.method import seeded_generator
from lorank.train.data import collate
from lorank.train.data.corpus import load_corpus
from lorank.train.evaluation import evaluate
from lorank.train.model import check_causal, check_positions
from lorank.train.saved import load_model


@dataclass
class Base:
    """A dense model with LoRA on it, and how to bring it into any state."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    """Of the dense weights."""
    layers: dict[str, GatedAdapter]
    frozen: dict[str, Tensor]
    """Weights of the layers as they came."""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: (layer.W.out_features, layer.W.in_features) for name, layer in self.layers.items()}

    def set(self, factors: Factors, merged: Mapping[str, Tensor]) -> None:
        """Put factors, with the scale in B, and the sum of merged products into the model."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                B, A = factors[name]
                layer.B.weight.copy_(B / layer.scale)
                layer.A.weight.copy_(A)
                if merged or self.frozen:
                    frozen = self.frozen.setdefault(name, layer.W.weight.detach().clone())
                    layer.W.weight.copy_(frozen + merged[name].to(frozen) if merged else frozen)

    def factors(self) -> dict[str, Pair]:
        """Those of the model, with the scale in B, on the CPU in single precision."""
        return {
            name: (
                (layer.scale * layer.B.weight.detach()).float().cpu(),
                layer.A.weight.detach().float().cpu().clone(),
            )
            for name, layer in self.layers.items()
        }


@functools.lru_cache(maxsize=4)
def base_of(model: str, rank: int, alpha: float) -> Base:
    """A saved model with LoRA of a rank on it; one for all clients of a process.

    Raises:
        ValueError: there is no model, or it is not a dense causal one.
    """
    loaded, tokenizer = load_model(model)
    check_causal(loaded)
    sha256 = hash_without(loaded, ())
    inner: Any = loaded.to(torch.accelerator.current_accelerator() or torch.device("cpu"))  # type: ignore[arg-type]
    convert(inner, LoRA(rank=rank, alpha=alpha))
    layers: Any = adapter_of(inner).layers(inner)
    return Base(inner, tokenizer, sha256, layers, {})


@functools.lru_cache(maxsize=256)
def text_of(model: str, share: Share, sequence_length: int, text_column: str) -> tuple[Dataset, Dataset]:
    """Sequences of a share to train on, and those that are held out.

    Raises:
        ValueError: it is not local text.
        OSError: a file cannot be read.
    """
    sources, part, of = share
    corpus = load_corpus(
        sources[0] if len(sources) == 1 else [*sources],
        tokenizer=model,
        sequence_length=sequence_length,
        text_column=text_column,
    )
    if not isinstance(corpus.train, Dataset):
        raise ValueError(f"data must be local text, got {sources[0]}")
    train, held_out = corpus.train, corpus.validation
    train = train.shard(of, part, contiguous=False) if len(train) >= of else train.select([])
    return train, held_out.shard(of, part, contiguous=False) if len(held_out) >= of else held_out


class Client:
    """One owner of text.

    Args:
        model: a run, a folder or a hub name.
        share: its text.
        name: by which the server speaks of it; unique.
        index: its place among the clients, which decides its rank.
        repeatable: draw the noise of privacy from the run's seed, which the server knows. Only where server and clients are one process.
    """

    def __init__(self, model: str, share: Share, name: str, index: int, *, repeatable: bool = False):
        self.model, self.share, self.name, self.index, self.repeatable = model, share, name, index, repeatable

    def answer(self, asked: Package, memory: Memory) -> Package:
        """Answer a message of the server; `memory` changes.

        Raises:
            ValueError: model, text or message cannot be used.
            OSError: a file cannot be read.
        """
        settings = Settings.from_dict(asked.values["settings"])
        base = base_of(self.model, settings.rank_of(self.index), settings.alpha)
        known = {"name": self.name, "index": self.index, "base": base.sha256, "version": memory.version}
        if asked.values["do"] == "hello":
            return Package(known)
        check_positions(base.model, settings.sequence_length)
        train, held_out = self._text(settings)
        if asked.values["version"] != memory.version:
            if asked.values["since"] == 0:
                memory.version, memory.merged = 0, {}
            if asked.values["since"] != memory.version:
                return Package({**known, "behind": True})
            self._merge(asked, memory, base)
        received = self._factors(asked, settings, base)
        base.set(received, memory.merged)
        found: dict[str, Any] = {**known, "version": memory.version, "loss": self._loss(base, held_out, settings)}
        if asked.values["do"] == "evaluate":
            return Package(found)
        memory.rounds = max(memory.rounds, asked.values["rounds"]) + 1
        which = settings.rule.trains
        self._train(base, train, which, settings, asked.values["round"])
        before, after = tensors_of(received, which), tensors_of(base.factors(), which)
        sent = after if settings.up == 1 == settings.down else sparse.change(after, before)
        found |= {"samples": len(train), "epsilon": spent(settings, len(train), memory.rounds)}
        return Package(found, sparse.packed(sent, settings.up))

    def _text(self, settings: Settings) -> tuple[Dataset, Dataset]:
        train, held_out = text_of(self.model, self.share, settings.sequence_length, settings.text_column)
        if len(train) < settings.batch_size:
            raise ValueError(
                f"the text of {self.name} must fill a batch of {settings.batch_size} sequences, got {len(train)}"
            )
        return train, held_out

    def _merge(self, asked: Package, memory: Memory, base: Base) -> None:
        """Add what was merged since this client's version."""
        for name, (m, n) in base.shapes.items():
            total = memory.merged.get(name, torch.zeros(m, n))
            for version in range(memory.version, asked.values["version"]):
                pairs = without_prefix(f"{MERGED}{version}", asked.tensors)
                total = total + pairs[f"{name}.B"] @ pairs[f"{name}.A"]
            memory.merged[name] = total
        memory.version = asked.values["version"]

    def _factors(self, asked: Package, settings: Settings, base: Base) -> dict[str, Pair]:
        """With which the round begins: what the server sent, and for the rest what the seed says."""
        seed, rank = asked.values["factors_seed"], settings.rank_of(self.index)
        new = shortened(begin(base.shapes, max(settings.ranks), seeded_generator("federated", *seed)), rank)
        payload = without_prefix("factors", asked.tensors)
        sides = settings.rule.sends if payload else ""
        sent = sparse.unpacked(payload, tensors_of(new, sides)) if payload else {}
        return factors_of(sent, [*base.layers], new)

    def _loss(self, base: Base, held_out: Dataset, settings: Settings) -> float:
        rows: Any = DataLoader(held_out, batch_size=settings.batch_size, collate_fn=collate)  # type: ignore[arg-type]
        return evaluate(base.model, rows, max_tokens=settings.eval_tokens).loss

    def _train(self, base: Base, rows: Dataset, which: str, settings: Settings, round: int) -> None:
        """Train the factors of a model in place."""
        model, seed = base.model, (settings.seed, round, self.index)
        modules: list[nn.Linear] = [getattr(layer, side) for layer in base.layers.values() for side in which]
        for layer in base.layers.values():
            layer.A.weight.requires_grad_("A" in which)
        weights = [module.weight for module in modules]
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
        moving = kind(weights, lr=settings.lr, weight_decay=0.0)
        if settings.private:
            if balances_experts(model):
                raise ValueError(
                    "privacy needs a loss that is a sum over samples, but this model balances its experts over a batch"
                )
            gradients = self._private(model, modules, rows, settings, seed)
        else:
            gradients = self._plain(model, weights, rows, settings, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seeded_generator("federated dropout", *seed).initial_seed() % 2**31)
            model.train()
            for loss in gradients:
                if not math.isfinite(loss):
                    raise FloatingPointError(f"its loss became {loss} in round {round + 1}; use a lower lr")
                moving.step()
                moving.zero_grad()
            model.eval()

    def _plain(
        self, model: Any, weights: list[Any], rows: Dataset, settings: Settings, seed: tuple[int, ...]
    ) -> Iterator[float]:
        """Losses of the steps of a round, each when the gradient is there."""
        order, done = seeded_generator("federated batches", *seed), 0
        while done < settings.steps:
            shuffled = torch.randperm(len(rows), generator=order)
            for indices in shuffled.split(settings.batch_size):
                if len(indices) < settings.batch_size or done == settings.steps:
                    break
                loss = next_token_loss(model, _batch(model, rows, indices), use_cache=False).total
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, settings.clip)
                done += 1
                yield loss.item()

    def _private(
        self, model: Any, modules: list[nn.Linear], rows: Dataset, settings: Settings, seed: tuple[int, ...]
    ) -> Iterator[float]:
        q = min(1.0, settings.batch_size / len(rows))
        sigma = settings.sigma(q)
        chance = torch.Generator()
        if self.repeatable:
            chance = seeded_generator("federated noise", *seed)
        else:
            chance.seed()
        for _ in range(settings.steps):
            indices, loss = drawn(len(rows), q, chance), torch.zeros(())
            gradients = [module.weight.new_zeros(0, *module.weight.shape) for module in modules]
            if len(indices):
                with per_sample(modules) as found:
                    loss = next_token_loss(model, _batch(model, rows, indices), use_cache=False).nats
                    (len(indices) * loss).backward()
                gradients = [found[module] for module in modules]
            for module, gradient in zip(
                modules, private_gradient(gradients, settings.clip, sigma, q * len(rows), chance), strict=True
            ):
                module.weight.grad = gradient
            yield loss.item()


def _batch(model: Any, rows: Dataset, indices: Tensor) -> dict[str, Tensor]:
    entries: int = model.get_input_embeddings().weight.shape[0]
    batch = collate([rows[i] for i in indices.tolist()], vocab_size=entries)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
