"""What every HTML page here has to be."""
import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

VOID = {"br", "hr", "img", "input", "link", "meta"}
FROM_OUTSIDE = {"script", "link", "iframe", "object", "embed", "base"}


class Page(HTMLParser):
    """A page that has been checked: tags are balanced, nothing is run or fetched, pictures are inside it and have alternative texts.

    `texts` are its pieces of text, `pictures` the alternative texts and the pictures.
    """

    def __init__(self, path_or_text: Path | str):
        super().__init__()
        self.text = path_or_text.read_text(encoding="utf-8") if isinstance(path_or_text, Path) else path_or_text
        self.open, self.texts, self.pictures, self.tags = [], [], [], []
        self.feed(self.text)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert self.text.startswith("<!doctype html>") and 'name="viewport"' in self.text and "prefers-color-scheme:dark" in self.text
        assert not re.search(r"url\(|@import|https?://", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in FROM_OUTSIDE and not any(name.startswith("on") for name in given), (tag, given)
        assert len(given) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append(tag)
        if tag == "img":
            head, data = given["src"].split(",", 1)
            assert head in ("data:image/png;base64", "data:image/jpeg;base64")
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert given["alt"].strip() and picture.size == (int(given["width"]), int(given["height"]))
            self.pictures.append((given["alt"], picture))
        if tag == "svg":
            assert given["role"] == "img" and given["aria-label"].strip()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1:] != ["style"]:
            self.texts.append(" ".join(data.split()))

    def says(self, text: str) -> bool:
        return any(text in piece for piece in self.texts)
