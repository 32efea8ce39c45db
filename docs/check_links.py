"""Follow every internal link of the built site: ``python docs/check_links.py docs/_build/html``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page offers as targets, and what it points at."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect identifiers, links and the sources of pictures, scripts and styles."""
        for name, value in attrs:
            if value and name in {"id", "name"}:
                self.anchors.add(value)
            elif value and name in {"href", "src"}:
                self.links.append(value)


def read(folder: Path) -> dict[Path, Page]:
    """Every page of the site."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        if "_static" not in path.parts:
            pages[path] = Page()
            pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def broken(folder: Path) -> list[str]:
    """Every link to a file or an anchor that is not there."""
    folder = folder.resolve()
    pages, found = read(folder), []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                found.append(f"{path.relative_to(folder)}: {link}: no such file")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{path.relative_to(folder)}: {link}: no such anchor")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1])
    lines = broken(site)
    count = sum(len(page.links) for page in read(site).values())
    sys.exit("\n".join(lines) if lines else print(f"{count} links followed") if count else f"no page in {site}")
