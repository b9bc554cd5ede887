"""Models for people without lorank: merged to dense ones, as they were trained, and as ONNX graphs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import lorank
from lorank.train.export import as_adapter, as_dense, as_peft, as_trained, export
from lorank.train.saved import load_model, save_model

SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
MERGED = [
    ("gpt2", lorank.LowRank(rank=8)),
    ("llama", lorank.ReLoRA(rank=4)),
    ("llama", lorank.SwitchLoRA(rank=4)),
    ("gpt2", lorank.SST(rank=4)),
    ("mixtral", lorank.SLTrain(rank=4)),
    ("llama", lorank.MASA(atoms=1)),
    ("llama", lorank.SelfGuided(rank=8)),
    ("llama", None),
]
ELSEWHERE = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    want = load_file(folder + "/../want.st")
    assert "lorank" not in sys.modules and not any(loading.values()), (folder, loading)
    assert torch.allclose(model.eval()(want["ids"]).logits, want["logits"], atol=1e-5), folder
"""


def saved(folder: Path, kind: str, method: Any) -> Any:
    """A model far from its initial values, in a folder."""
    torch.manual_seed(0)
    shape = {**SHAPES[kind], "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    model = (model if method is None else lorank.convert(model, method)).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


def test_plain_transformers_loads_what_is_merged(tmp_path: Path) -> None:
    folders, ids = [], torch.arange(1, 9)[None]
    for kind, method in MERGED:
        place = tmp_path / f"{kind}-{method.name if method else 'dense'}"
        model = saved(place / "model", kind, method)
        export(str(place / "model"), place / "dense", as_dense, tokenizer="bytes")
        names = {one.name for one in (place / "dense").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
            names
        ) and "modeling_lorank.py" not in names
        with torch.no_grad():
            save_file({"ids": ids, "logits": model(ids).logits}, place / "want.st")
        folders.append(str(place / "dense"))
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE, json.dumps(folders)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "method", [lorank.CoLA(rank=8), lorank.CRNet(rank=8), lorank.LowRank(rank=8, carry="identity")]
)
def test_what_is_no_dense_model_says_so(tmp_path: Path, method: Any) -> None:
    """And is exported as it is, with the file that plain transformers needs."""
    model = saved(tmp_path / "model", "llama", method)
    with pytest.raises(ValueError, match=r"cannot be merged.*--format trained, or as a graph with --format onnx"):
        export(str(tmp_path / "model"), tmp_path / "dense", as_dense, tokenizer="bytes")
    assert not (tmp_path / "dense").exists()
    export(str(tmp_path / "model"), tmp_path / "own", as_trained, tokenizer="bytes")
    assert (tmp_path / "own/modeling_lorank.py").exists()
    again, _ = load_model(str(tmp_path / "own"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_an_adapter_goes_alone_with_a_card_that_loads_it(tmp_path: Path) -> None:
    saved(tmp_path / "base", "llama", None)
    dense, reader = load_model(str(tmp_path / "base"), tokenizer="bytes")
    model = lorank.convert(dense, lorank.LoRA(rank=4)).eval()
    model.model.layers[0].mlp.up_proj.B.weight.data.normal_()
    (tmp_path / "model").mkdir()
    save_model(model, reader, tmp_path / "model")
    for write, line in (
        (as_adapter, f'lorank.load_adapter("{tmp_path / "as_adapter"}", base)'),
        (as_peft, f'PeftModel.from_pretrained(base, "{tmp_path / "as_peft"}")'),
    ):
        export(str(tmp_path / "model"), tmp_path / write.__name__, write)
        names = {one.name for one in (tmp_path / write.__name__).iterdir()}
        card = (tmp_path / write.__name__ / "README.md").read_text()
        assert "config.json" not in names and "tokenizer.json" in names
        assert line.replace(str(tmp_path / write.__name__), "path/to/this/folder") in card
    loaded = lorank.load_adapter(tmp_path / "as_adapter", load_model(str(tmp_path / "base"), tokenizer="bytes")[0])
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"has adapter.json; choose another one"):
        export(str(tmp_path / "model"), tmp_path / "as_adapter", as_adapter)


def test_no_export_replaces_a_model(tmp_path: Path) -> None:
    saved(tmp_path / "model", "llama", lorank.LowRank(rank=8))
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="must be another folder than the model's"):
        export(str(tmp_path / "model"), tmp_path / "x/../model", as_dense, tokenizer="bytes")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("")
    with pytest.raises(ValueError, match="has recipe.yaml; choose another one"):
        export(str(tmp_path / "model"), tmp_path / "run", as_dense, tokenizer="bytes")
    assert before == (tmp_path / "model/model.safetensors").read_bytes()


@pytest.mark.filterwarnings("default")  # of the exporter, and of what it is built on
def test_an_onnx_graph_continues_from_its_cache(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="optional: pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="optional: pip install onnx onnxscript")
    from lorank.train.onnx import as_onnx

    model = saved(tmp_path / "model", "llama", lorank.CoLA(rank=8))
    export(str(tmp_path / "model"), tmp_path / "onnx", as_onnx, tokenizer="bytes")
    assert json.loads((tmp_path / "onnx/config.json").read_text())["model_type"] == "llama"
    session, ids = runtime.InferenceSession(tmp_path / "onnx/model.onnx"), torch.randint(1, 96, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # a shorter text, padded on the left
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = {one.name: np.zeros((3, 4, 0, 8), np.float32) for one in session.get_inputs() if "past" in one.name}
    found = []
    for begin, end in ((0, 5), (5, 6), (6, 11)):
        new = {"input_ids": ids[:, begin:end], "position_ids": positions[:, begin:end], "attention_mask": mask[:, :end]}
        got = session.run(None, {**{name: value.numpy() for name, value in new.items()}, **cache})
        found.append(got[0])
        names = (one.name.replace("output.", "input.") for one in session.get_outputs())
        cache = {name: value for name, value in zip(names, got, strict=True) if name in cache}
    want = model(ids, attention_mask=mask, position_ids=positions).logits.detach()
    seen = mask.bool()
    assert torch.allclose(torch.from_numpy(np.concatenate(found, 1))[seen], want[seen], atol=1e-4)
    [snippet] = re.findall(r"```python\n(.*?)```", (tmp_path / "onnx/README.md").read_text(), re.S)
    names = {}
    exec(snippet.replace("path/to/this/folder", str(tmp_path / "onnx")), names)
    want = model(torch.from_numpy(names["ids"])).logits.detach().numpy()
    assert np.allclose(names["logits"], want, atol=1e-4), "what the card shows"


@pytest.mark.filterwarnings("default")  # of bitsandbytes, about its casts
def test_factors_are_quantised_as_other_linear_layers(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="optional: pip install bitsandbytes")
    model, ids = saved(tmp_path, "llama", lorank.CoLA(rank=8)), torch.arange(1, 9)[None]
    eight = BitsAndBytesConfig(load_in_8bit=True)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=eight, device_map="cpu")
    kinds = {name: type(one) for name, one in small.named_modules() if name.endswith((".A", ".B"))}
    assert len(kinds) == 2 * 7 * 2 and set(kinds.values()) == {bitsandbytes.nn.Linear8bitLt}
    with torch.no_grad():
        assert torch.allclose(small(ids).logits.softmax(-1), model(ids).logits.softmax(-1), atol=0.01)
