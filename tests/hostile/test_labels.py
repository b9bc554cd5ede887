"""A number of labels, of which each would get a name."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorank.train.hub import read_config


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "llama", "num_labels": 10**12},
        {"model_type": "llama", "id2label": {"0": "a"}, "num_labels": 10**12},
        {"model_type": "llava", "text_config": {"model_type": "llama", "num_labels": 10**12}},
    ],
)
def test_names_for_too_many_labels_are_not_made(entries: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"num_labels must be at most 1,048,576, got 1,000,000,000,000; set it to"):
        read_config(str(tmp_path))
