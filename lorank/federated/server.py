"""The server: rounds of messages, the rule, and a state that is saved after each round.

OUT/federated.json             settings, rounds so far, and for each round losses, bytes, ε and who was left out
OUT/factors-0003.safetensors   factors after round 3 (but for rules whose clients draw new ones)
OUT/merged-0003.safetensors    what round 3 merged (flora)
"""

import json
import reprlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorank.conversion import merge
from lorank.factors import Pair
from lorank.federated import sparse
from lorank.federated.client import base_of
from lorank.federated.exchange import MERGED, Package, factors_of, number, tensors_of, whole, why_unfit, with_prefix
from lorank.federated.rule import begin, shortened
from lorank.federated.settings import Settings
from lorank.method import seeded_generator
from lorank.train.folder import check_apart, read_json, write_whole
from lorank.train.saved import save_model
from lorank.whole import made_whole, without_link

FILE = "federated.json"
Node = Hashable


class Link(Protocol):
    """How the server reaches its clients."""

    repeats: bool
    """Whether clients that are asked again answer with the same noise, as in a simulation. Then a round that is repeated costs no privacy."""

    def nodes(self) -> Sequence[Node]:
        """Those that are there now."""

    def ask(self, packages: Mapping[Node, Package], what: str) -> Mapping[Node, Package | str]:
        """Their answers, or in words why there is none. `what` is being done, for whoever watches."""


class Server:
    """The state of a federated run, and what changes it.

    Args:
        out: folder of the run; what it has already is gone on with.

    Raises:
        ValueError: the model or the settings cannot be used, or `out` is a file or has a run with other settings.
    """

    def __init__(self, settings: Settings, out: Path, say: Callable[[str], object] = lambda line: None):
        check_apart(out, settings.data)
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; give --out a folder")
        self.settings, self.out, self.say, self.rule = settings, out, say, settings.rule
        self.base = base_of(settings.model, max(settings.ranks), settings.alpha)
        self.layers = [*self.base.layers]
        if too_wide := next(
            (name for name, shape in self.base.shapes.items() if min(shape) < max(settings.ranks)), None
        ):
            raise ValueError(
                f"rank must be at most {min(self.base.shapes[too_wide])}, the width of {too_wide}, got {max(settings.ranks)}"
            )
        self.rounds: list[dict[str, Any]] = [_row(0)]
        self.asked: dict[str, int] = {}
        """In how many rounds each client was asked to train."""
        self.factors: dict[str, Pair] | None = None
        """None: those that the seed says."""
        self.merged: list[dict[str, Pair]] = []
        self.names: dict[Node, dict[str, Any]] = {}
        """What each node said of itself."""
        self.refused: dict[Node, str] = {}
        self._check_densities()
        self._resume()

    @property
    def done(self) -> int:
        """Rounds that were trained."""
        return len(self.rounds) - 1

    def run(self, link: Link) -> list[dict[str, Any]]:
        """All rounds that are left, and the last evaluation. Returns one row for each round, the first for the model as it came.

        Raises:
            ValueError: no client can be used.
        """
        while self.done < self.settings.rounds:
            self._round(link, train=True)
        if not is_done(self.settings, self.rounds):
            self._round(link, train=False)
        return self.rounds

    def model(self) -> Any:
        """The dense model of the state, with all factors merged into its weights."""
        merged: dict[str, Tensor] = {}
        for name, (m, n) in self.base.shapes.items():
            for pairs in self.merged:
                B, A = pairs[name]
                merged[name] = merged.get(name, B.new_zeros(m, n)) + B @ A
        self.base.set(self._now(max(self.settings.ranks)), merged)
        return merge(self.base.model)

    def save_model(self) -> Path:
        """Write the dense model to OUT/model."""
        folder = without_link(self.out / "model")
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model(), self.base.tokenizer, folder)
        return folder

    # ---- one round

    def _round(self, link: Link, train: bool) -> None:
        began, round = time.perf_counter(), self.done
        notes: dict[str, str] = {}
        self._greet(link, notes)
        nodes = sorted((node for node in self.names if node in set(link.nodes())), key=lambda n: self.names[n]["index"])
        for name in {one["name"] for one in self.names.values()} - {self.names[node]["name"] for node in nodes}:
            notes[name] = "it is no longer there"
        packages = {node: self._package(self.names[node], train) for node in nodes}
        for node in nodes if train else ():
            name = self.names[node]["name"]
            self.asked[name] = self.asked.get(name, 0) + 1
        if train and self.settings.private and not link.repeats:
            self._save()  # what is asked for now is spent, also if this server does not live to see the answers
        what = f"round {round + 1} of {self.settings.rounds}" if train else "last evaluation"
        answers = link.ask(packages, what)
        losses, good = {}, []
        for node in nodes:
            about, answer = self.names[node], answers.get(node, "it did not answer")
            why = self._why_unfit(about, answer, train)
            if isinstance(answer, Package) and whole(answer.values.get("version"), 0, len(self.merged)):
                about["version"] = answer.values["version"]
            if why is not None:
                notes[about["name"]] = why
                continue
            assert isinstance(answer, Package)
            losses[about["name"]] = answer.values["loss"]
            good.append((about, answer))
        if not good:
            reasons = "; ".join(
                f"{', '.join(name for name, one in notes.items() if one == why)}: {why}"
                for why in dict.fromkeys(notes.values())
            )
            raise ValueError(f"no client could be used in round {round + 1} ({reasons})")
        row = self.rounds[-1]
        row |= {"losses": losses, "loss": mean(losses.values())}
        self._say(row)
        if not train:
            row["left_out"] |= {name: f"in the last evaluation, {why}" for name, why in notes.items()}
            self._save()
            return self._say_left_out("the last evaluation", notes)
        after = _row(round + 1)
        after |= {
            "down": sum(packages[node].bytes for node in nodes),
            "up": sum(answer.bytes for _, answer in good),
            "epsilon": {about["name"]: answer.values.get("epsilon") for about, answer in good},
            "left_out": notes,
        }
        self._reduce(good)
        after["seconds"] = time.perf_counter() - began
        self.rounds.append(after)
        self._save()
        self._say_left_out(f"round {round + 1}", notes)

    def _greet(self, link: Link, notes: dict[str, str]) -> None:
        """Ask new nodes who they are, and refuse those that have another model."""
        new = [node for node in link.nodes() if node not in self.names and node not in self.refused]
        if not new:
            return
        answers = link.ask({node: Package(self._values("hello")) for node in new}, "greeting clients")
        for node in new:
            answer = answers.get(node, "it did not answer")
            if isinstance(answer, str):
                notes[f"node {node}"] = answer
                continue
            said, taken = answer.values, {one["name"] for one in self.names.values()}
            name, index = str(said.get("name")), said.get("index")
            why = None
            if said.get("base") != self.base.sha256:
                why = f"it has another base model, with SHA-256 {str(said.get('base'))[:12]}... and not {self.base.sha256[:12]}..."
            elif not whole(index, 0) or not whole(said.get("version"), 0):
                why = "it did not say its place and version"
            elif name in taken:
                why = "another client has its name"
            if why is None:
                self.names[node] = {"name": name, "index": index, "version": said["version"]}
            else:
                self.refused[node] = why
                notes[name] = why

    def _values(self, do: str) -> dict[str, Any]:
        return {"do": do, "settings": self.settings.to_dict()}

    def _package(self, about: Mapping[str, Any], train: bool) -> Package:
        """What a client gets for this round."""
        since = about["version"] if about["version"] <= len(self.merged) else 0
        tensors: dict[str, Tensor] = {}
        for version in range(since, len(self.merged)):
            tensors |= with_prefix(f"{MERGED}{version}", tensors_of(self.merged[version]))
        if self.factors is not None:
            sent = tensors_of(self._now(self.settings.rank_of(about["index"])), self.rule.sends)
            payload = sparse.packed(sent, self.settings.down if train else 1.0)
            tensors |= with_prefix("factors", payload)
        values = {
            **self._values("train" if train else "evaluate"),
            "round": self.done,
            "rounds": self.asked.get(about["name"], 0),
            "since": since,
            "version": len(self.merged),
            "factors_seed": self._seed(),
        }
        return Package(values, tensors)

    def _seed(self) -> list[int]:
        """Of the factors that clients draw: those of the run, or of the round after a merge."""
        return [self.settings.seed, len(self.merged)]

    def _now(self, rank: int) -> dict[str, Pair]:
        """The factors with which this round begins."""
        now = self.factors
        if now is None:
            generator = seeded_generator("federated", *self._seed())
            now = begin(self.base.shapes, max(self.settings.ranks), generator)
        return shortened(now, rank)

    def _why_unfit(self, about: Mapping[str, Any], answer: Package | str, train: bool) -> str | None:
        if isinstance(answer, str):
            return answer
        if answer.values.get("base") != self.base.sha256:
            return "it has another base model"
        if not whole(answer.values.get("version"), 0, len(self.merged)):
            return f"its version must be an integer from 0 to {len(self.merged)}, got {_short(answer.values.get('version'))}"
        if answer.values.get("behind"):
            return "it has missed what earlier rounds merged, and gets it next"
        if number(answer.values.get("loss")) is None:
            return f"its loss must be a finite number, got {_short(answer.values.get('loss'))}"
        if not train:
            return None
        if not whole(answer.values.get("samples"), 1):
            return f"its samples must be a positive integer, got {_short(answer.values.get('samples'))}"
        if (cost := answer.values.get("epsilon")) is not None and number(cost) is None:
            return f"its epsilon must be a number, got {_short(cost)}"
        like = tensors_of(self._now(self.settings.rank_of(about["index"])), self.rule.trains)
        try:
            return why_unfit(sparse.unpacked(answer.tensors, like), like)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            return f"its sparse numbers cannot be used: {error}"

    def _reduce(self, good: Sequence[tuple[Mapping[str, Any], Package]]) -> None:
        """The next state from the clients' factors."""
        states = []
        for about, answer in good:
            before = self._now(self.settings.rank_of(about["index"]))
            like = tensors_of(before, self.rule.trains)
            sent = sparse.unpacked(answer.tensors, like)
            state = sent if self.settings.up == 1 == self.settings.down else sparse.changed(like, sent)
            states.append(factors_of(state, self.layers, before))
        weights = [answer.values["samples"] for _, answer in good]
        found = self.rule.reduce(self._now(max(self.settings.ranks)), states, weights)
        if found.merged is not None:
            pairs = found.merged
            if self.settings.down < 1:
                tensors = tensors_of(pairs)
                pairs = factors_of(sparse.unpacked(sparse.packed(tensors, self.settings.down), tensors), self.layers)
            self.merged.append(pairs)
        self.factors = found.factors

    def _check_densities(self) -> None:
        now, trains = self._now(min(self.settings.ranks)), self.rule.trains
        for name, density, sides in (
            ("down", self.settings.down, self.rule.sends or trains),
            ("up", self.settings.up, trains),
        ):
            numbers = sum(tensor.numel() for tensor in tensors_of(now, sides).values())
            if density * numbers + 1e-9 < 1:
                raise ValueError(f"{name} must be at least 1 / {numbers:,}, so that a number is sent, got {density:g}")

    # ---- what is said, and the folder

    def _say(self, row: Mapping[str, Any]) -> None:
        cost = f", {row['down']:,} B down, {row['up']:,} B up" if row["round"] else ", as it came"
        if spent := [one for one in row["epsilon"].values() if one is not None]:
            cost += f", epsilon {max(spent):.2f}"
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in row["losses"].items())
        self.say(f"after round {row['round']} of {self.settings.rounds}: loss {row['loss']:.3f} ({each}){cost}")

    def _say_left_out(self, when: str, notes: Mapping[str, str]) -> None:
        for name, why in notes.items():
            self.say(f"{when}: {name} was left out, {why}")

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.factors is not None:
            self._write(f"factors-{self.done:04d}", self.factors)
        if self.merged:
            self._write(f"merged-{len(self.merged):04d}", self.merged[-1])
        about = {
            "settings": self.settings.to_dict(),
            "base": self.base.sha256,
            "merged": len(self.merged),
            "has_factors": self.factors is not None,
            "asked": self.asked,
            "rounds": self.rounds,
        }
        write_whole(self.out / FILE, json.dumps(about, indent=1))
        for old in self.out.glob("factors-*.safetensors"):
            if old.name != f"factors-{self.done:04d}.safetensors":
                old.unlink()

    def _write(self, name: str, factors: Mapping[str, Pair]) -> None:
        tensors = {key: tensor.contiguous() for key, tensor in tensors_of(factors).items()}
        with made_whole(self.out / f"{name}.safetensors") as half:
            save_file(tensors, half)

    def _read(self, name: str) -> dict[str, Pair]:
        path = self.out / f"{name}.safetensors"
        try:
            return factors_of(load_file(path), self.layers)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error}); the run cannot be resumed without it") from None

    def _resume(self) -> None:
        """Go on with what the folder has."""
        if not (self.out / FILE).exists():
            return
        saved = read_json(self.out / FILE, settings=dict, rounds=list, asked=dict, merged=int, has_factors=bool)
        asked = self.settings.to_dict()
        if saved.get("base") != self.base.sha256:
            raise ValueError(
                f"{self.out} has a run of another model than {self.settings.model}; choose another folder with --out"
            )
        changed = [name for name, value in asked.items() if saved["settings"].get(name) != value]
        if changed and not (
            changed == ["rounds"] and asked["rounds"] >= len(saved["rounds"]) - 1 and asked["epsilon"] is None
        ):
            raise ValueError(
                f"{self.out} has a run with {changed[0]}={saved['settings'].get(changed[0])!r}, got {asked[changed[0]]!r}; choose another "
                "folder with --out"
            )
        self.rounds, self.asked = saved["rounds"], saved["asked"]
        self.merged = [self._read(f"merged-{version + 1:04d}") for version in range(saved["merged"])]
        self.factors = self._read(f"factors-{self.done:04d}") if saved["has_factors"] else None


def is_done(settings: Settings, rounds: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rounds are trained, and the last state is evaluated."""
    return len(rounds) > settings.rounds and rounds[-1]["loss"] is not None


def _short(value: Any) -> str:
    """What a client sent, for a message."""
    return reprlib.repr(value)


def _row(round: int) -> dict[str, Any]:
    return {
        "round": round,
        "losses": {},
        "loss": None,
        "down": 0,
        "up": 0,
        "epsilon": {},
        "left_out": {},
        "seconds": 0.0,
    }
