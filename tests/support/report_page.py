"""Reads a run's HTML page."""

from __future__ import annotations

from html.parser import HTMLParser

LOADING = {"src", "srcset", "data", "poster", "background", "action", "formaction", "xlink:href", "ping", "manifest"}


class Page(HTMLParser):
    """What a page says, and all by which it could load or run something."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.active, self.styles = "", [], ""
        self.figures: dict[tuple[str, ...], float] = {}
        self.nodes: set[str] = set()
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.active += [tag] if tag in ("script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "use") else []
        self.active += [name for name in given if name in LOADING or name.startswith("on")]
        self.active += [given["href"]] if not given.get("href", "#").startswith("#") else []
        self.styles += given.get("style", "")
        if "data-metric" in given:
            self.figures[given["data-model"], given["data-metric"]] = float(given["data-value"])
        if "data-figure" in given:
            self.figures[tuple(given["data-figure"].split(" "))] = float(given["data-value"])
        self.text += " "
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"<{tag}> is not closed in its place"

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.styles += data
        else:
            self.text += data
        if self._open[-2:] == ["a", "title"]:
            self.nodes.add(data)

    def close(self) -> None:
        super().close()
        assert not self._open

    def self_contained(self) -> bool:
        return not self.active and "url(" not in self.styles and "@import" not in self.styles
