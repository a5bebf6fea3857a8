"""A page for every mechanism, whose example runs."""
import re
from pathlib import Path

import pytest

import zoo

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("mechanism", zoo.MECHANISMS)
def test_every_mechanism_has_a_page_with_idea_formula_picture_and_example(mechanism):
    text = (DOCS / f"{mechanism}.md").read_text()
    idea = re.search(r"\*\*Idea\.\*\*(.*?)\n\n", text, re.S).group(1)
    assert 4 <= len(idea.splitlines()) <= 6
    assert 0 < (DOCS / "pictures" / f"{mechanism}.png").stat().st_size < 60_000 and f"](pictures/{mechanism}.png)" in text
    assert "**Formula.**" in text and f'mechanism="{mechanism}"' in text
    example, = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 11
    exec(compile(example, f"{mechanism}.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page):
    assert all((DOCS / target).exists() for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()))
