"""Markdown of the repository as Markdown of the site: links, pictures, sections, and prose that was none."""

import re
from pathlib import Path

PICTURE = re.compile(
    r"""<picture>\s*<source media="[^"]*dark[^"]*" srcset="([^"]*)">\s*<img src="([^"]*)" alt="([^"]*)">\s*</picture>"""
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)\)")
SITE = {
    "CONTRIBUTING.md": "add-a-method.md",
    "README.md": "index.md",
    "examples/": "own-loop.md",
    "recipes/": "methods/index.md",
}


def twins(found: re.Match[str]) -> str:
    """A picture for light and one for dark screens, as the theme of the site tells them apart."""
    dark, light, words = found.groups()
    both = ((light, "only-light"), (dark, "only-dark"))
    return "\n\n".join(f"```{{image}} {file}\n:class: {kind}\n:alt: {words}\n```" for file, kind in both)


def section(path: Path, title: str | None) -> str:
    """What stands under a heading of a file, or without one between its first line and its first section."""
    start = rf"## {re.escape(title)}" if title else r"# [^\n]+"
    found = re.search(rf"^{start}\n+(.*?)\s*(?=^## |\Z)", path.read_text(), re.M | re.S)
    if found is None:
        raise ValueError(f"{path.name} has no section {title!r}")
    return found[1]


def relinked(text: str, depth: int) -> str:
    """Links within the repository as links within the site, from a page that lies `depth` folders down."""
    up = "../" * depth

    def link(found: re.Match[str]) -> str:
        picture, label, target = found.groups()
        if target.startswith("https://"):
            return found[0]
        if target.startswith("docs/"):
            return f"{picture}[{label}]({up}{target.removeprefix('docs/')})"
        if target.startswith("lorank/"):
            return f'<a href="{up}_modules/{target.removesuffix(".py")}.html">{label}</a>'
        if target.startswith("benchmarks/results/"):
            return f"[{label}]({up}results.md#{slug(Path(target).stem)})"
        if target in SITE:
            return f"[{label}]({up}{SITE[target]})"
        raise ValueError(f"the documentation has no page for {target}; give it one in docs/markup.py")

    return LINK.sub(link, text)


def slug(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def escaped(text: str) -> str:
    """Prose that is no Markdown, between its code in backticks, as Markdown."""
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_\[\]<>$|{}])", r"\\\1", part) for i, part in enumerate(parts))
