"""Files that somebody else wrote, or that broke: whatever is in them, the answer is a value or one of the errors that become a sentence.

`benchmarks/hostile.py` runs the same with thousands of examples.
"""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState

from lorank import CoLA, convert, load_adapter
from lorank.cli.errors import sentence
from lorank.comparison.repro import find, judge
from lorank.comparison.runner import Comparison
from lorank.train import continual
from lorank.train.compress import unfinished
from lorank.train.data import load_corpus, load_tokenizer
from lorank.train.folder import last_whole_checkpoint, read_json
from lorank.train.model import empty_model
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model, save_model
from lorank.train.text import recipe_of_text

EXAMPLES = int(os.environ.get("LORANK_HOSTILE", "12"))
"""For each test."""
SENTENCES = (ValueError, OSError, FloatingPointError, ImportError)
"""What `lorank.cli.errors` says in one sentence, with exit code 2."""
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES < 100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
WORDS = [
    "",
    "cola",
    "1e400",
    "-1",
    "../../x",
    "null",
    "a/b",
    "[",
    "{}",
    "\x00",
    "ü",
    "nan",
    "auto",
    "(a+)+$",
    "silu",
    "llama",
]
numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**62, 2**64, -(2**63), 10**30]) | st.floats(width=32)
leaves: Any = st.none() | st.booleans() | numbers | st.sampled_from(WORDS) | st.text(max_size=6)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=5,
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CONFIG |= {
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
CONFIG |= {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CONFIG |= {
    "attn_implementation": "sdpa",
    "auto_map": None,
    "quantization_config": None,
    "head_dim": 16,
    "layer_types": None,
}
TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "vocab_size": 300}
KINDS = ("llama", "gpt2", "qwen3_moe", "bert", "mamba", "t5", "gemma3", "lorank_llama")


def answered(what: Any, place: Path) -> None:
    """Runs `what`, which may only write below `place`; any error must be one that becomes a sentence."""
    before = {path for path in place.parent.iterdir()}
    try:
        what()
    except SENTENCES as error:
        said = sentence(error)
        assert said and "Traceback" not in said, repr(error)
    assert {path for path in place.parent.iterdir()} == before


@st.composite
def changed(draw: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """A mapping with some entries put in, replaced or left out."""
    found = copy.deepcopy(whole)
    for name in draw(st.lists(st.sampled_from([*whole, *WORDS]), min_size=1, max_size=3)):
        if draw(st.integers(0, 5)):
            found[name] = draw(values)
        else:
            found.pop(name, None)
    return found


@st.composite
def broken(draw: Any, content: bytes) -> bytes:
    """Bytes with some flipped, cut, repeated or put in."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "zero", "repeat"]))
        if kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[at:]
        elif kind == "insert":
            found[at:at] = draw(st.binary(max_size=12))
        elif kind == "zero":
            found[at : at + 8] = bytes(len(found[at : at + 8]))
        else:
            found[at:at] = found[at : at + 40]
    return bytes(found)


RECIPE = {name: value for name, value in Recipe().to_dict().items() if value is not None}


@fuzz
@given(data=st.data())
def test_a_recipe(data: Any, tmp_path: Path) -> None:
    text = json.dumps(data.draw(changed(RECIPE))).encode()
    if data.draw(st.booleans()):
        text = data.draw(broken(text))
    (place := tmp_path / "in").mkdir(exist_ok=True)
    (place / "recipe.yaml").write_bytes(text)
    answered(lambda: Recipe.read(place / "recipe.yaml"), place)


@fuzz
@given(data=st.data())
def test_a_configuration(data: Any, tmp_path: Path) -> None:
    config = data.draw(changed({**CONFIG, "model_type": data.draw(st.sampled_from(KINDS))}))
    for name in (
        "num_hidden_layers",
        "n_layer",
        "encoder_layers",
    ):  # a model of 70 layers is a matter of minutes, not of faults
        if isinstance(config.get(name), int) and config[name] > 4:
            config[name] = 4
    (place := tmp_path / "in").mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    answered(lambda: empty_model(Recipe(model=str(place), vocab_size=300, rank=4, sequence_length=16)), place)


LINES = (
    '{"text": "one two three"}\n\r\n{"text": null}\n{"text": 7}\n{"other": "x"}\n\ufeff{"text": "\\ud800 é"}\r{"text": ""}\n'
    * 20
)
TEXTS = {
    "txt": "one, two\r\nthree\r\ufeff\x00 é\n" * 40,
    "jsonl": LINES,
    "csv": 'text,n\n"a ""b""",1\nc\n,\n"open\n' * 20,
    "md": "# é\n\n" * 60,
}


@fuzz
@given(data=st.data())
def test_text(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = data.draw(st.sampled_from(sorted(TEXTS)))
    end = data.draw(st.sampled_from(["", ".gz", ".bz2", ".xz", ".zst"]))
    (place := tmp_path / "in").mkdir(exist_ok=True)
    shutil.rmtree(place)
    place.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    content = data.draw(broken(TEXTS[kind].encode(errors="surrogatepass")))
    (place / f"a.{kind}{end}").write_bytes(content)
    settings: Any = {
        "stream": data.draw(st.booleans()),
        "documents": data.draw(st.sampled_from(["packed", "padded", "separate"])),
    }
    answered(lambda: read_some(str(place / f"a.{kind}{end}"), **settings), place)


def read_some(source: str, **settings: Any) -> None:
    corpus = load_corpus(source, tokenizer="bytes", sequence_length=16, seed=0, **settings)
    for _, row in zip(range(3), corpus.train, strict=False):
        assert max(row["input_ids"]) <= corpus.largest_id


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model with its tokenizer."""
    out = tmp_path_factory.mktemp("saved")
    save_model(convert(LlamaForCausalLM(LlamaConfig(**TINY)), CoLA(rank=4)), load_tokenizer("bytes"), out)
    return out


@fuzz
@given(data=st.data())
def test_a_saved_model(data: Any, saved: Path, tmp_path: Path) -> None:
    place = tmp_path / "in"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved, place)
    file = data.draw(st.sampled_from(sorted(path for path in place.iterdir() if path.suffix != ".py")))
    if file.suffix == ".json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
    else:
        file.write_bytes(data.draw(broken(file.read_bytes())))
    answered(lambda: load_model(str(place)), place)


ODD = [
    ({"layer_types": ["x"]}, "no model could be loaded from .*layer_types"),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "must not be .* quantised weights",
    ),
]


@pytest.mark.parametrize(("entries", "words"), ODD, ids=["layer types", "quantised"])
def test_an_odd_entry_of_a_converted_model_is_named(entries: Any, words: str, saved: Path, tmp_path: Path) -> None:
    """Before its first forward pass, which failed without a word about the entry."""
    place = shutil.copytree(saved, tmp_path / "in")
    (place / "config.json").write_text(json.dumps({**json.loads((place / "config.json").read_text()), **entries}))
    with pytest.raises(ValueError, match=words):
        load_model(str(place))


ASKED: dict[str, Any] = {"model": "m", "tasks": ["a", "b"], "weights": "w", "texts": ["x", "y"]}
STREAM = {
    "method": "full",
    "seed": 0,
    "lr": 1e-3,
    "parameters": 9,
    "trained": 9,
    "losses": [[1.0, 2.0]] * 3,
    "seconds": 1.0,
}


@fuzz
@given(data=st.data())
def test_results(data: Any, tmp_path: Path) -> None:
    """results.json of `lorank continual`, the only one that is read again; a stream that it has is one."""
    place = tmp_path / "in"
    place.mkdir(exist_ok=True)
    streams = [data.draw(st.just(STREAM) | changed(STREAM) | values)]
    whole = data.draw(st.just({**ASKED, "streams": streams}) | changed({**ASKED, "streams": streams}) | values)
    text = json.dumps(whole).encode()
    (place / "results.json").write_bytes(data.draw(st.just(text) | broken(text) | st.just(b"[" * 100_000)))

    def read() -> None:
        for one in continual._earlier(place, ASKED):
            assert len(one.perplexities) == 3 and isinstance(one.learned, float)

    answered(read, place)


@pytest.mark.parametrize("written", ["{}", "3", '{"streams": [{}]}', '{"streams": 1}'])
def test_damaged_results_are_named(written: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(written)
    with pytest.raises(ValueError, match=r"results\.json (is damaged|must hold names)"):
        continual._earlier(tmp_path, ASKED)


NESTED = {
    "adapter.json": lambda folder: load_adapter(folder, LlamaForCausalLM(LlamaConfig(**TINY))),
    "trained_on.json": lambda folder: recipe_of_text(str(folder)),
    "comparison.json": Comparison.open,
    "unfinished.json": unfinished,
    "summary.json": lambda folder: judge(find("cola-60m"), folder),
    "run.json": lambda folder: read_json(folder / "run.json"),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize(
    "written", [b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", b"[]"], ids=["[", "{", "bytes", "list"]
)
def test_brackets_without_end_are_a_sentence(name: str, written: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(written)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        NESTED[name](tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    """A folder with a checkpoint of lorank 0.3, which has no checksums."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-3"
    shutil.copytree(saved, folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": {0: torch.ones(3)}, "lr": 0.1}, folder / name)
    state = TrainerState(global_step=3, train_batch_size=4, stateful_callbacks=[TrainerControl()])  # type: ignore[list-item]
    state.save_to_json(str(folder / "trainer_state.json"))
    assert last_whole_checkpoint(folder.parent) == folder
    return folder


@fuzz
@given(data=st.data())
def test_a_checkpoint(data: Any, checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "in"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(checkpoint, place / "checkpoint-3")
    file = data.draw(st.sampled_from(sorted((place / "checkpoint-3").iterdir())))
    file.write_bytes(data.draw(broken(file.read_bytes())))
    answered(lambda: last_whole_checkpoint(place), place)
