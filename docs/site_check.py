"""Links of built pages: those within the site lead somewhere, those out of it are whole, and no page loads anything from there."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("link", "href")}
OUTWARD = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/\S*)?")


class Page(HTMLParser):
    """What a page can be linked at, links to, and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []
        """(target, whether a browser loads it unasked)."""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value or "")
            elif (tag, name) == ("a", "href") or (tag, name) in LOADS:
                self.links.append((value or "", tag != "a"))


def complaints(site: Path) -> list[str]:
    """One sentence for each link of the site's pages that is wrong, and for each style that comes from elsewhere."""
    found = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    wrong = []
    for path, page in found.items():
        where = path.relative_to(site.resolve())
        for target, loaded in page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if loaded and parts.scheme != "data":
                    wrong.append(f"{where} loads {target}")
                elif not loaded and not OUTWARD.fullmatch(target):
                    wrong.append(f"{where} links to {target}, which is no https address")
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                wrong.append(f"{where} links to {target}, and there is no such file")
            elif parts.fragment and file in found and unquote(parts.fragment) not in found[file].anchors:
                wrong.append(f"{where} links to {target}, and the page has no such place")
    for path in site.rglob("*.css"):
        for target in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", path.read_text()):
            wrong.append(f"{path.relative_to(site)} loads {target}")
    return wrong


def check(site: Path) -> None:
    """Raises ValueError that lists what is wrong with the links of a built site."""
    if wrong := sorted(set(complaints(site))):
        raise ValueError("\n".join(wrong))
