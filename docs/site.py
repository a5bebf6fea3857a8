"""Hooks of MkDocs: what of the site is not a page of docs/ as it stands, and where links of the repository lead on it.

The start page is the README; first steps are the notebook; the gallery is made of the mechanisms' pages, the reference of what the rooms
make public; measurements are the pages of benchmarks/.
"""
import inspect
import json
import os
import re
import shutil
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import zoo.kernels
import zoo.layers
from zoo.measuring.model_table import read_page

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("installing", "models", "layers", "attention", "training", "data", "segmentation", "detection", "restoration", "robustness",
          "predicting", "bags", "exporting", "frameworks", "yolo", "probing", "seeing", "speed")  # in the order of reading
WIDE = ("gallery.md", "models.md")
SHIM = '<script src="https://unpkg.com/iframe-worker/shim"></script>'  # which Material's offline plugin would fetch
SOURCES = {  # pages of the site that do not stand in docs/, by their files in the repository
    "README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
    "docs/first_steps.ipynb": "first_steps.md",
    **{f"benchmarks/{path.name}": f"benchmarks/{path.name}" for path in sorted(ROOT.glob("benchmarks/*.md"))},
}


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Navigation, and where mkdocstrings finds the package: it does not follow links, so in a copy without any."""
    package = Path(config.site_dir).resolve().with_name("package")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "zoo", package / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(package)]
    guides = {path.stem for path in ROOT.glob("docs/guides/*.md")}
    if guides != set(GUIDES):
        raise ValueError(f"docs/guides/ and GUIDES in {__file__} differ in {', '.join(sorted(guides ^ set(GUIDES)))}")
    config.nav = [
        {"Start": ["index.md", "first_steps.md", "changelog.md", "contributing.md"]},
        {"Mechanisms": ["gallery.md", *(f"{mechanism}.md" for mechanism in zoo.MECHANISMS)]},
        {"Models": ["models.md", *(f"cards/{mechanism}.md" for mechanism in zoo.MECHANISMS)]},
        {"Guides": [f"guides/{guide}.md" for guide in GUIDES]},
        {"Reference": [f"reference/{name}.md" for name in _reference()]},
        {"Measurements": [page for source, page in SOURCES.items() if source.startswith("benchmarks/")]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {page: _notebook(ROOT / source) if source.endswith(".ipynb") else (ROOT / source).read_text()
             for source, page in SOURCES.items()}
    pages["gallery.md"] = _gallery()
    pages |= {f"reference/{name}.md": text for name, text in _reference().items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    files.remove(files.get_file_from_path("first_steps.ipynb"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead from page to page as they do from file to file; what the site does not hold is named without a link."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    here = next((source for source, target in SOURCES.items() if target == page.file.src_uri), f"docs/{page.file.src_uri}")

    def relink(match: re.Match) -> str:
        image, text, target, anchor = match.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(here), target))
        if not (ROOT / path).exists():
            return match[0]
        on_site = SOURCES.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(on_site) is None:
            return text
        return f"{image}[{text}]({os.path.relpath(on_site, os.path.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    markdown = re.sub(r"^(```\w+) [\w-]+$", r"\1", markdown, flags=re.M)  # names of blocks, by which tests find them
    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", relink, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The site's own worker.js does the work of what would be fetched."""
    return output.replace(SHIM, f'<script src="{os.path.relpath("worker.js", os.path.dirname(page.file.dest_uri) or ".")}"></script>')


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    return output.replace(SHIM, '<script src="/worker.js"></script>')  # of 404.html, which only a server shows


def _notebook(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
                       for cell in cells for text in ["".join(cell["source"])])


def _gallery() -> str:
    pages = {mechanism: read_page(mechanism) for mechanism in zoo.MECHANISMS}
    cards = [f"-   [![{page.title}](pictures/{mechanism}.png)]({mechanism}.md)\n\n    ---\n\n    **[{page.title}]({mechanism}.md)**\n\n"
             f"    {page.lead}\n\n    {page.paper}\n" for mechanism, page in pages.items()]
    return "# Mechanisms\n\n<div class=\"grid cards\" markdown>\n\n" + "\n".join(cards) + "\n</div>\n"


def _reference() -> dict[str, str]:
    """Pages of mkdocstrings' directives, by name."""
    top = [name for name in zoo.__all__ if not inspect.ismodule(getattr(zoo, name)) and callable(getattr(zoo, name))]
    families = [_documented(family.__name__, family.__name__, members=family.__all__) for family in zoo.MECHANISMS.values()]
    return {
        "layers": _page("Layers", "zoo.layers", zoo.layers.__all__),
        "operators": _page("Operators", "zoo.kernels", zoo.kernels.__all__),
        "models": _page("Models", "zoo", top) + "\n" + "\n".join(families),
    }


def _page(title: str, room: str, names: list[str]) -> str:
    objects = {name: inspect.unwrap(getattr(sys.modules[room], name)) for name in sorted(names, key=str.lower)}
    return f"# {title}\n\n" + "\n".join(_documented(f"{o.__module__}.{o.__qualname__}", f"{room}.{name}") for name, o in objects.items())


def _documented(path: str, heading: str, members: list[str] | None = None) -> str:
    options = f"        heading: {heading}\n        toc_label: {heading.rpartition('.')[2]}\n"
    return f"::: {path}\n    options:\n{options}" + (f"        members: {json.dumps(members)}\n" if members else "")
