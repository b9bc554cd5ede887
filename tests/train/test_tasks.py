"""lm-evaluation-harness, the real one, on a task of a local file: what it says of a model is what the model says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lorank.train import run, tasks
from lorank.train.recipe import Recipe
from lorank.train.saved import load_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is optional: pip install lm-eval")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own warnings are not ours to avoid

LINES = [(f"line {i}: the quick brown fox counts", f" {i * i} lazy dogs") for i in range(400)]
SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Ten lines to be finished, as a YAML file in the harness's format."""
    asked = [json.dumps({"text": text, "end": end}) for text, end in LINES[:400:40]]
    (tmp_path / "lines.jsonl").write_text("\n".join(asked))
    settings = {
        "task": "foxes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{end}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (tmp_path / "foxes.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "foxes.yaml"


def test_the_harness_says_what_the_model_says(task: Path, tmp_path: Path, in_this_process: Any) -> None:
    (tmp_path / "fox.txt").write_text("\n".join(text + end for text, end in LINES))
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 4}))
    recipe = Recipe(
        model=str(tmp_path / "config.json"),
        rank=8,
        data=str(tmp_path / "fox.txt"),
        vocab_size=300,
        sequence_length=32,
        steps=30,
        warmup_steps=3,
        lr=1e-2,
        eval_every=0,
        save_every=0,
    )
    run.pretrain(recipe, tmp_path / "run")
    tasks.check_tasks([str(task)])
    found = tasks.run_tasks(tmp_path / "run", [str(task)])
    code, out, err = in_this_process("evaluate", tmp_path / "run", "--tasks", task, "--json")
    assert code == 0 and json.loads(out) == found, err

    model, tokenizer = load_model(str(tmp_path / "run"))
    sums = []
    for text, end in LINES[:400:40]:
        whole, start = tokenizer(text + end, return_tensors="pt").input_ids, len(tokenizer(text).input_ids)
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0].log_softmax(-1)
        sums.append(sum(logits[i - 1, whole[0, i]].item() for i in range(start, whole.shape[1])))
    assert found["foxes"]["perplexity,none"] == pytest.approx(math.exp(-sum(sums) / len(sums)), rel=1e-3)
    assert set(found) == {"foxes"} and "sample_len" not in found["foxes"]


def test_what_cannot_be_run_is_told_before_anything_is_trained(task: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: this file does not exist"):
        tasks.check_tasks(["nowhere.yaml"])
    task.write_text(task.read_text().replace("lines.jsonl", "gone.jsonl"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        tasks.check_tasks([str(task)])
    task.write_text("task: [")
    with pytest.raises(ValueError, match="cannot be loaded"):
        tasks.check_tasks([str(task)])
