"""One small model of every architecture the core is examined on; no network, no progress bars.

One thread: at these sizes a second one does nothing but wait, and on busy cores it waits long.

All models have width 32, two blocks, four heads, MLP width 80 and no dropout, so that results can be compared bit by bit.
"""

import gc
import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import lorank
from lorank import conversion, table
from lorank.cli import main
from lorank.testing.structure import SMALL, TOKENS, VOCABULARY
from tests.prepared import prepared

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

D, D_FF, HEADS, KV, LAYERS = 32, 80, 4, 16, 2
"""KV is the width of two key (or value) heads under grouped-query attention."""

LLAMA_BLOCK = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D, KV),
    "self_attn.v_proj": (D, KV),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (D, D_FF),
    "mlp.up_proj": (D, D_FF),
    "mlp.down_proj": (D_FF, D),
}
BERT_BLOCK = {
    "attention.self.query": (D, D),
    "attention.self.key": (D, D),
    "attention.self.value": (D, D),
    "attention.output.dense": (D, D),
    "intermediate.dense": (D, D_FF),
    "output.dense": (D_FF, D),
}


class Architecture(NamedTuple):
    """How to build a small dense model, and what its blocks are known to hold."""

    name: str
    config_name: str
    settings: dict[str, Any]
    blocks: str
    """Name of the list of blocks inside the model with a head."""
    projections: dict[str, tuple[int, int]]
    """(d_in, d_out) of every linear map of one block, written down from the architecture's paper."""
    causal: bool = True

    def config(self, **changes: Any) -> transformers.PretrainedConfig:
        return getattr(transformers, self.config_name)(**{"vocab_size": VOCABULARY, **self.settings, **changes})

    @property
    def auto(self) -> Any:
        return transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForMaskedLM

    def dense(self, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return self.auto.from_config(self.config(**changes)).eval()


_llama = {"hidden_size": D, "intermediate_size": D_FF, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_grouped, _gpt2, _bert = (dict(small.settings) for small in SMALL)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "LlamaConfig", _grouped, "model.layers", LLAMA_BLOCK),
        Architecture("qwen3", "Qwen3Config", {**_grouped, "head_dim": 8}, "model.layers", LLAMA_BLOCK),
        Architecture("mistral", "MistralConfig", _grouped, "model.layers", LLAMA_BLOCK),
        Architecture(
            "gpt2",
            "GPT2Config",
            _gpt2,
            "transformer.h",
            {
                "attn.c_attn.query": (D, D),
                "attn.c_attn.key": (D, D),
                "attn.c_attn.value": (D, D),
                "attn.c_proj": (D, D),
                "mlp.c_fc": (D, D_FF),
                "mlp.c_proj": (D_FF, D),
            },
        ),
        Architecture(
            "gpt_neox",
            "GPTNeoXConfig",
            {**_llama, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0},
            "gpt_neox.layers",
            {
                "attention.query_key_value.query": (D, D),
                "attention.query_key_value.key": (D, D),
                "attention.query_key_value.value": (D, D),
                "attention.dense": (D, D),
                "mlp.dense_h_to_4h": (D, D_FF),
                "mlp.dense_4h_to_h": (D_FF, D),
            },
        ),
        Architecture(
            "opt",
            "OPTConfig",
            {
                "hidden_size": D,
                "word_embed_proj_dim": D,
                "ffn_dim": D_FF,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "max_position_embeddings": 64,
                "dropout": 0.0,
            },
            "model.decoder.layers",
            {
                "self_attn.k_proj": (D, D),
                "self_attn.v_proj": (D, D),
                "self_attn.q_proj": (D, D),
                "self_attn.out_proj": (D, D),
                "fc1": (D, D_FF),
                "fc2": (D_FF, D),
            },
        ),
        Architecture(
            "phi3",
            "Phi3Config",
            {**_grouped, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
            "model.layers",
            {
                "self_attn.qkv_proj.query": (D, D),
                "self_attn.qkv_proj.key": (D, KV),
                "self_attn.qkv_proj.value": (D, KV),
                "self_attn.o_proj": (D, D),
                "mlp.gate_up_proj.gate": (D, D_FF),
                "mlp.gate_up_proj.up": (D, D_FF),
                "mlp.down_proj": (D_FF, D),
            },
        ),
        Architecture("bert", "BertConfig", _bert, "bert.encoder.layer", BERT_BLOCK, causal=False),
        Architecture("roberta", "RobertaConfig", _bert, "roberta.encoder.layer", BERT_BLOCK, causal=False),
    )
}


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """The same tensors under the same names, bit by bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_stays() -> None:
    """Trainer and measurements collect garbage, which takes long with all of PyTorch and transformers to look through, and
    with what earlier modules of tests have loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _registered_here_only() -> Iterator[None]:
    """`convert` registers a method that the table does not know; other tests must not find it there."""
    before = dict(table._registered)
    yield
    table._registered.clear()
    table._registered.update(before)


@pytest.fixture(scope="session")
def architectures() -> dict[str, Architecture]:
    return ARCHITECTURES


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def small() -> Callable[..., Any]:
    """small("llama", num_hidden_layers=3): a dense model in evaluation mode, the same on every call."""

    def build(name: str, **changes: Any) -> Any:
        return ARCHITECTURES[name].dense(**changes)

    return build


@pytest.fixture
def tokens() -> Tensor:
    """Two sequences of twelve tokens, none of them a special one."""
    return TOKENS.clone()


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., str]:
    """Run a program in a new interpreter that finds this lorank; its standard output, or an error that shows all it said."""

    def run(program: str, *arguments: str) -> str:
        root = str(Path(lorank.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def forked_processes() -> Iterator[None]:
    """Python processes that a test starts need not import torch and transformers again."""
    with prepared():
        yield


TRIED = ("tests/conversion/*", "tests/contract/test_methods.py", "tests/hostile/*")
"""Tests whose conversions are tried on shapes, as all are outside the tests."""


@pytest.fixture(scope="module", autouse=True)
def untried(request: pytest.FixtureRequest) -> Iterator[None]:
    """Elsewhere they are not, because that takes a third of a conversion's time and most of a large model's."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(request.path.match(pattern) for pattern in TRIED):
            patch.setattr(conversion, "try_on_shapes", lambda *_: None)
        yield


@pytest.fixture
def in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """lorank ARGUMENTS: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorank", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run
