"""The model card: README.md next to the weights. It says what is known of the model, and nothing else.

Its metadata is huggingface_hub's `ModelCardData`. A comment at the end has a hash of the text, so that a card which somebody
has written or changed is known, and kept.
"""

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import xxhash
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import lorank
from lorank import accounting
from lorank.adapter_files import ABOUT, PEFT_ABOUT
from lorank.conversion import method_of
from lorank.method import Method
from lorank.portable import FILE
from lorank.train.data.sources import weighted
from lorank.train.evaluation import comparable
from lorank.train.folder import write_whole
from lorank.train.methods import DEFAULTS, methods_of
from lorank.train.recipe import Recipe
from lorank.train.text import recipe_of_run

logger = logging.getLogger(__name__)
NAME = "README.md"
MARK = re.compile(r"\n<!-- lorank wrote this card \((\w+)\).*-->\n$")
LOADED = {
    "dense": """```sh
pip install torch transformers
```

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```""",
    "portable": f"""```sh
pip install torch transformers
```

```python
from transformers import {{auto}}, AutoTokenizer

model = {{auto}}.from_pretrained("{{place}}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{{place}}", trust_remote_code=True)
```

`trust_remote_code=True` lets transformers run `{FILE}`, which has the model's layers; without it, transformers asks. After `import lorank` it is not needed.""",
    "lorank": """The model needs lorank (version {version} made it).

```sh
pip install .  # in a clone of lorank, or pip install with its git address or a wheel
```

```python
import lorank  # lets transformers know the model's layers
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

Programs that cannot be told to import lorank do so with `trust_remote_code=True`.""",
    "adapter": """The adapter needs lorank (version {version} made it), and the dense model that it adapts.

```sh
pip install .  # in a clone of lorank, or pip install with its git address or a wheel
```

```python
import lorank
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained("path/to/the/dense/model")
model = lorank.load_adapter("{place}", base)
tokenizer = AutoTokenizer.from_pretrained("{place}")
```""",
    "peft": """```sh
pip install peft transformers
```

```python
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

base = {auto}.from_pretrained("path/to/the/dense/model")
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```""",
    "onnx": """```sh
pip install onnxruntime transformers
```

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
session = onnxruntime.InferenceSession("{place}/model.onnx")
ids = np.array([tokenizer("a text")["input_ids"]])
empty = {{one.name: [1, int(one.shape[1]), 0, int(one.shape[3])] for one in session.get_inputs() if one.name.endswith(("keys", "values"))}}
cache = {{name: np.zeros(shape, np.float32) for name, shape in empty.items()}}{window}
text = {{"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}}
logits, *cache = session.run(None, {{**text, **cache}})
```

The graph reads the tokens that follow those of the cache. Its attention mask also covers the tokens in the cache.""",
}
"""How a model is loaded, by its form."""
FORMS = {"model.onnx": "onnx", ABOUT: "adapter", PEFT_ABOUT: "peft", FILE: "portable"}
"""By a file that a form has."""
WINDOW = """
cache |= {{one.name: np.array({}) for one in session.get_inputs() if "sliding_window" in one.name}}"""
"""What the graph of a model with a sliding window also reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a saved model."""

    form: str
    """One of `LOADED`."""
    auto: str
    """The Auto class that loads it."""
    parameters: int
    block_parameters: int
    methods: tuple[Method, ...]
    """Those it was trained with, as far as it is known; without what is PyTorch's own."""
    merged: bool = False
    license: str | None = None
    recipe: Recipe | None = None
    """Of a run."""
    summary: dict[str, Any] | None = None
    """Of a finished run."""
    corpus: str = ""
    window: int | None = None
    """Tokens of a sliding window of attention."""
    place: str = "path/to/this/folder"
    """Where the reader has it from: a folder, or a name on the hub."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        files: Sequence[str],
        *,
        run: str | Path,
        method: Method | None,
        license: str | None = None,
    ) -> Self:
        """The card of a model that was written to those files.

        Args:
            run: the folder or name that it comes from, which may be a run.
            method: the one that it was converted with; `model` may be merged.
        """
        recipe, folder = recipe_of_run(str(run)), Path(run).expanduser()
        own = (method,) if method is not None else ()
        counts = accounting.count_parameters(model)
        form = next((form for name, form in FORMS.items() if name in files), "lorank")
        return cls(
            form="dense" if form == "lorank" and type(model).__module__.startswith("transformers.") else form,
            auto=_auto_of(model),
            parameters=counts.total,
            block_parameters=counts.blocks,
            methods=own if recipe is None else tuple(m for m in methods_of(recipe) if m.name not in DEFAULTS),
            merged=method is not None and method_of(model) is None,
            license=license or (recipe.license if recipe else None),
            window=getattr(model.config, "sliding_window", None),
            recipe=recipe,
            summary=_json(folder / "summary.json"),
            corpus=(_json(folder / "run.json") or {}).get("corpus", "") if recipe else "",
        )

    @property
    def title(self) -> str:
        return "+".join(method.name for method in self.methods) or "dense"


def write_card(folder: Path, card: Card) -> None:
    """Write README.md, unless somebody else wrote the one that is there, or changed it."""
    there = folder / NAME
    if there.exists() and not is_ours(there.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s is not lorank's, so it stays as it is", there)
        return
    write_whole(there, marked(card_text(card)))


def marked(text: str) -> str:
    return f"{text}\n<!-- lorank wrote this card ({_hash(text)}). It keeps one that was changed. -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as lorank wrote it."""
    found = MARK.search(text)
    return found is not None and found[1] == _hash(text[: found.start()])


def _hash(text: str) -> str:
    return xxhash.xxh64(text.encode("utf-8", "backslashreplace")).hexdigest()


def card_text(card: Card) -> str:
    """README.md of a model, without the mark."""
    base = card.recipe.start_from if card.recipe else None
    data = ModelCardData(
        library_name=card.form if card.form in ("onnx", "peft") else "transformers",
        license=card.license,
        pipeline_tag=PIPELINES.get(card.auto),
        datasets=_datasets(card.recipe) or None,
        base_model=base if base and _name(base) == base else None,
        tags=["lorank", *(method.name for method in card.methods)],
    )
    parts = [f"---\n{data.to_yaml()}\n---\n# {card.title}, {card.parameters:,} parameters"]
    if card.corpus:
        begun = f"Trained on from {_name(base)}" if base else "Pre-trained from scratch"
        parts.append(f"{begun} with lorank on {_without_folders(card.corpus, card.recipe)}.")
    parts += [f"## Use\n\n{_use(card)}"]
    rows = {name: value for name, value in _rows(card).items() if value}
    parts += ["## Training\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())]
    if cited := citations(card.methods):
        parts += ["## Citation\n\nPlease cite the source of each method:\n\n" + "\n".join(f"- {one}" for one in cited)]
    return "\n\n".join(parts) + "\n"


def _use(card: Card) -> str:
    window = WINDOW.format(card.window) if card.window else ""
    return LOADED[card.form].format(auto=card.auto, place=card.place, version=lorank.__version__, window=window)


PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask"}


def _auto_of(model: PreTrainedModel) -> str:
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM):
        classes: Any = auto._model_mapping.get(type(model.config), ())
        if isinstance(model, classes):
            return auto.__name__
    return "AutoModel"


def _rows(card: Card) -> dict[str, str]:
    summary = card.summary or {}
    known = lambda name, form: "unknown" if summary.get(name) is None else format(summary[name], form)  # noqa: E731
    figures = {
        "training FLOPs per token": known("flops_per_token", ",.0f"),
        "tokens": f"{known('tokens', ',')} in {known('steps', ',')} steps",
        "validation perplexity (unbiased)": known("validation_perplexity", ".2f"),
        "bits per byte": known("validation_bits_per_byte", ".3f"),
    }
    unbiased, biased = (summary.get(f"{name}_perplexity") for name in ("validation", "published_compatible"))
    if unbiased is not None and biased is not None and comparable(unbiased, biased):
        figures["published-compatible perplexity, N/(N+1)"] = f"{biased:.2f}"
    return {
        "method": ", ".join(map(_named, card.methods)) + (", merged into dense layers" if card.merged else ""),
        "parameters (in blocks)": f"{card.parameters:,} ({card.block_parameters:,})",
        **(figures if summary else {}),
    }


def _named(method: Method) -> str:
    rank = getattr(method, "rank", None)
    return f"{method.name}, rank {rank}" if rank is not None else method.name


def _datasets(recipe: Recipe | None) -> list[str]:
    """The data sets of the hub that a run was trained on."""
    local = lambda name: name == "embedded" or os.path.isabs(name)  # noqa: E731 - a run has whole paths
    return [name.partition(":")[0] for name in _sources(recipe) if not local(name)]


def _sources(recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    return [recipe.data] if isinstance(recipe.data, str) else [weighted(one)[0] for one in recipe.data]


def _without_folders(corpus: str, recipe: Recipe | None) -> str:
    """A description of data without the places where they are on this machine."""
    for name in _sources(recipe):
        if os.path.isabs(name):
            corpus = corpus.replace(name, os.path.basename(name.rstrip("/")))
    return corpus


def _name(place: str) -> str:
    """Of a folder its last part and a slash, of the hub all."""
    here = os.path.isabs(place) or os.path.exists(os.path.expanduser(place))
    return f"{os.path.basename(place.rstrip('/'))}/" if here else place


def citations(methods: Sequence[Method]) -> list[str]:
    """The papers of some methods, as their files name them.

    >>> from lorank.methods.low_rank import LowRank
    >>> citations([LowRank()])
    ['Kamalakara et al., "Exploring Low Rank Training of Deep Neural Networks", [arXiv 2209.13569](https://arxiv.org/abs/2209.13569)']
    """
    modules = dict.fromkeys(module for method in methods for module in method.sources)
    found = (
        re.search(r"^Source: (.+?(arXiv\s\d{4}\.\d{5}|(?=[.;]\s|\n\n|\Z)))", _docstring(m), re.M | re.S)
        for m in modules
    )
    texts = (re.sub(r"\s+", " ", one[1]).strip().rstrip(".") for one in found if one)
    return [re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text) for text in texts]


def _docstring(module: str) -> str:
    return (sys.modules[module].__doc__ if module in sys.modules else None) or ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
