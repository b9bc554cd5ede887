"""Phrases that read as a translation are in no document, message or docstring."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
AVOIDED = re.compile(
    r"\bbeside\b|\bof (its|their|one's) own\b|\bsuch an? |\b(is|are) none of\b|\btold of\b|\bmend(s|ed|ing)?\b|\blooked at\b|\bshall\b"
    r"|\bfor ever\b|\bwithout a word\b",
    re.I,
)
"""Use: next to; separate; that; must be X, Y or Z; told about; repair; read; must; forever; silently."""


def test_documents_and_messages_are_plain_english() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.yaml")]
    files += [path for folder, end in (("docs", "md"), ("lorank", "py")) for path in (ROOT / folder).rglob(f"*.{end}")]
    found = [
        f"{path.relative_to(ROOT)}:{number} {words[0]!r}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (words := AVOIDED.search(line))
    ]
    assert not found, "\n".join(found)
