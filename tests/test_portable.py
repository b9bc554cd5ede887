"""A saved model is loaded where lorank is not installed: by the file next to its weights, in a process without lorank."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import lorank
from lorank import standalone
from lorank.evolution.egg_model import EggConfig, EggForCausalLM

SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
}
METHODS = {
    ("llama", "cola"): lorank.CoLA(rank=8, nonlinearity="low-rank"),
    ("gpt2", "cola"): lorank.CoLAM(rank=8),
    ("llama", "crnet"): lorank.CRNet(rank=8, beta=0.7),
    ("llama", "lax"): lorank.CoLA(rank=8, carry="tensor"),
    ("gpt2", "lax"): lorank.LowRank(rank=8, carry="linear", carry_norm=False),
    ("gpt2", "crnet"): lorank.CRNet(rank=8, first_block="low-rank"),
}
ELSEWHERE = """
import copy, json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    want = load_file(folder + "/want.st")
    assert "lorank" not in sys.modules
    assert torch.allclose(model(want["ids"]).logits, want["logits"], atol=1e-5), folder
    assert torch.equal(model.generate(want["ids"], max_new_tokens=6, do_sample=False), want["text"]), folder
    body, loading = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not loading["missing_keys"] and "lorank" not in sys.modules, folder
    assert torch.allclose(body.eval()(want["ids"]).last_hidden_state, want["states"], atol=1e-5), folder
    def gradients():
        model.zero_grad()
        outputs = [model(want["ids"] + n, labels=want["ids"]).loss for n in range(2)]  # two before their backward passes
        sum(outputs).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    kept = gradients()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.activation_checkpointing_enable()
    assert torch.allclose(gradients(), kept, rtol=1e-4, atol=1e-6), folder
    copy.deepcopy(model)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for block in blocks:  # turned on in another way
        block._gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
    try:
        gradients()
        assert "cola" in folder, folder
    except RuntimeError as error:
        assert "gradient_checkpointing_enable" in str(error), error
"""
NEEDED = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
def message(error, **trust):
    try:
        AutoModelForCausalLM.from_pretrained("model", **trust)
    except error as found:
        return str(found)
assert "trust_remote_code=True" in message(ValueError)
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "lorank":
            raise ModuleNotFoundError("No module named 'lorank'", name=name)
sys.meta_path.insert(0, Missing())
for words in ("needs lorank", "pip install", "import lorank", "method sltrain"):
    assert words in message(ImportError, trust_remote_code=True)
del sys.meta_path[0]
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
want = load_file("want.st")
assert torch.equal(model(want["ids"]).logits, want["logits"])
model.save_pretrained("again")
"""


def converted(kind: str, method: Any) -> Any:
    torch.manual_seed(0)
    shape = {**SHAPES[kind], "vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = lorank.convert(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)), method).eval()
    for p in model.parameters():
        p.data.mul_(2)  # far from ties
    return model


def test_a_process_without_lorank_computes_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folders, ids = [], torch.arange(1, 9)[None]
    for (kind, name), method in METHODS.items():
        model, folder = converted(kind, method), tmp_path / f"{kind}-{name}"
        with torch.no_grad():
            text = model.generate(ids, max_new_tokens=6, do_sample=False)
            model.save_pretrained(folder)
            states = model.base_model(ids).last_hidden_state
            save_file({"ids": ids, "logits": model(ids).logits, "text": text, "states": states}, folder / "want.st")
        folders.append(str(folder))
    run_elsewhere(tmp_path, ELSEWHERE, json.dumps(folders))


def run_elsewhere(folder: Path, program: str, *arguments: str, path: str = "") -> None:
    env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_that_needs_lorank_imports_it_or_says_so(tmp_path: Path) -> None:
    """transformers asks before it runs the file, and never advises an upgrade of itself."""
    from safetensors.torch import save_file

    model, ids = converted("llama", lorank.SLTrain(rank=8)), torch.arange(1, 9)[None]
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "want.st")
    run_elsewhere(tmp_path, NEEDED, path=str(Path(lorank.__file__).parents[1]))
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "needs_lorank.py"}


@pytest.mark.parametrize("case", ["egg", "experts", "a head that builds its body by type"])
def test_layers_that_cannot_be_written_ask_for_lorank(case: str, tmp_path: Path) -> None:
    """What another method left in a configuration goes."""
    model: Any
    if case == "egg":
        model = EggForCausalLM(EggConfig(hidden_size=16, num_hidden_layers=1))
    elif case == "experts":
        shape = {**SHAPES["llama"], "num_local_experts": 2, "num_experts_per_tok": 1}
        model = lorank.convert(MixtralForCausalLM(MixtralConfig(**shape, vocab_size=96)), lorank.CoLA(rank=8))
    else:
        model = lorank.convert(
            LlamaForSequenceClassification(LlamaConfig(**SHAPES["llama"], vocab_size=96)), lorank.CoLA(rank=8)
        )
    model.config.auto_map = {"AutoConfig": "modeling_lorank.Old", "AutoModel": "modeling_lorank.Older"}
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_lorank.py").exists()
    wanted = {"AutoConfig": f"needs_lorank.{type(model.config).__name__}"}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == wanted
    told = runpy.run_path(str(tmp_path / "needs_lorank.py"))
    assert told[type(model.config).__name__] is type(model.config)


def test_where_lorank_is_imported_the_file_is_not_run(tmp_path: Path) -> None:
    converted("llama", lorank.CoLA(rank=8)).save_pretrained(tmp_path)
    written = (tmp_path / "modeling_lorank.py").read_text()
    assert written.startswith(Path(standalone.__file__).read_text()) and str(tmp_path) not in written
    (tmp_path / "modeling_lorank.py").write_text("raise SystemExit('was run')\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__module__ == "lorank.pretrained"


def test_a_merged_model_names_no_file() -> None:
    model = converted("llama", lorank.LowRank(rank=8))
    model.config.auto_map = {"AutoConfig": "modeling_lorank.LorankLlamaConfig"}
    assert not hasattr(lorank.merge(model).config, "auto_map")


@pytest.mark.parametrize("beta", [-0.5, 0.0, 2.0])
def test_a_chain_adds_the_block_before(beta: float) -> None:
    chain = standalone.Chain()
    first = standalone.ChainStart(standalone.Place(chain, 0), 4, 6, True)
    link = standalone.ChainLink(standalone.Place(chain, 1), d_in=4, d_out=6, rank=2, bias=True)
    link.beta.data.fill_(beta)
    x = torch.randn(3, 4)
    b = beta - 1e-6 if beta < 0 else beta + 1e-6
    want = b * (x @ first.W.weight.T + first.W.bias) + x @ link.A.weight.T @ link.B.weight.T + link.B.bias
    first(x)
    assert torch.allclose(link(x), want, atol=1e-6)
