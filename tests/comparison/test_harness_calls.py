"""How lm-evaluation-harness is called, with a stand-in for it; test_tasks.py has the real one, if it is installed."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorank.train import tasks
from lorank.train.recipe import Recipe
from lorank.train.run import pretrain


def test_the_harness_is_called_with_the_model(base: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def evaluate(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}

    manager = SimpleNamespace(all_tasks=["arc_easy"], load=lambda tasks: None)
    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=evaluate),
        "lm_eval.tasks": SimpleNamespace(TaskManager=lambda include_defaults: manager),
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=lambda **arguments: arguments),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    tasks.check_tasks(["arc_easy"])
    with pytest.raises(ValueError, match="has no task 'arc_hard'"):
        tasks.check_tasks(["arc_hard"])
    pretrain(dataclasses.replace(base, method="cola"), tmp_path / "run")
    assert tasks.run_tasks(tmp_path / "run", ["arc_easy"]) == {"arc_easy": {"acc,none": 0.25}}
    assert asked["tasks"] == ["arc_easy"] and asked["model"]["pretrained"].config.lorank["method"] == "cola"
