"""The sources keep to the plan in docs/rooms.py: arrows lead down, nothing goes in a circle, and files stay short."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import rooms  # noqa: E402


def test_the_sources_keep_to_the_plan() -> None:
    if wrong := rooms.complaints():
        pytest.fail("\n".join([f"{len(wrong)} things break the plan in docs/rooms.py:", *wrong]), pytrace=False)
