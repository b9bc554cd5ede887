"""lorank cache: a list, and deleting."""

from collections.abc import Callable
from pathlib import Path

import pytest


def test_the_cache_is_listed_and_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    place = tmp_path / "lorank"
    code, said, _ = in_this_process("cache")
    assert code == 0 and said == f"{place}: 0 entries, 0 B\n" and not place.exists()
    (place / "rows").mkdir(parents=True)
    for name, size in (("a.arrow", 10**6), ("a.ratio", 200), ("b.arrow", 500)):
        (place / "rows" / name).write_bytes(bytes(size))
    _, said, _ = in_this_process("cache")
    assert "rows of tokens" in said and said.endswith(f"{place}: 2 entries, 1.0 MB\n")
    _, said, _ = in_this_process("cache", "--older-than", "1")
    assert said.startswith("deleted 0 entries")
    assert in_this_process("cache", "--clear", "--older-than", "1")[0] == 2
    _, said, _ = in_this_process("cache", "--clear")
    assert said == f"deleted 2 entries, 1.0 MB\n{place}: 0 entries, 0 B\n"
