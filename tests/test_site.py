"""The site of the documentation: it is built without a warning, holds every mechanism and public name, and needs nobody else."""
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import zoo.kernels
import zoo.layers

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser fetches to show it."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag == "link" and attrs["rel"] not in ("canonical", "next", "prev") or tag == "use":
            self.fetched.append(attrs.get("href") or attrs.get("xlink:href"))
        elif attrs.get("src"):
            self.fetched.append(attrs["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("documentation") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and not done.stdout + done.stderr
    return {path: Page(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_every_mechanism_and_public_name_is_there(site):
    pages = {path.name: page for path, page in site.items()}
    assert {f"{mechanism}.html" for mechanism in zoo.MECHANISMS} <= set(pages["gallery.html"].links) & set(pages)
    for name, room in (("layers.html", zoo.layers), ("operators.html", zoo.kernels)):
        reference = next(page for path, page in site.items() if path.parts[-2:] == ("reference", name))
        assert set(room.__all__) <= {anchor.rpartition(".")[2] for anchor in reference.anchors}


def test_links_lead_somewhere(site):
    for path, page in site.items():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if not re.match(r"\w+:", target):
                file = (path.parent / target).resolve() if target else path
                assert file.is_file(), f"{path.name}: {link}"
                assert not anchor or file not in site or anchor in site[file].anchors | {"__skip"}, f"{path.name}: {link}"


def test_nothing_is_fetched_from_anybody_else(site):
    for path, page in site.items():
        for target in page.fetched:
            file = (path.parent / target.partition("#")[0].partition("?")[0]).resolve()
            assert "//" not in target and file.is_file(), f"{path.name}: {target}"
    folder = next(path for path in site if path.name == "index.html").parent
    for style in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style
