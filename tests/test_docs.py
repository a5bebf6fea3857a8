"""What the pages promise: their Python runs, their commands, configs and files exist, their tables are the generated ones."""
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import timm
import yaml

import zoo
from benchmarks import cards
from zoo.measuring import model_table
from zoo.mm.config import find_config, load_config
from zoo.models import released

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]
BLOCKS = [(page, kind, block) for page in PAGES for kind, block in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)]
CODE = [pytest.param(block, id=f"{page.stem}-{i}") for i, (page, kind, block) in enumerate(BLOCKS) if kind == "python"]
SHELL = sorted({line.split(" #")[0].strip() for _, kind, block in BLOCKS if kind == "sh" for line in block.splitlines()})
COMMANDS = [line for line in SHELL if "zoo" in shlex.split(line)]


@pytest.mark.parametrize("code", CODE)
def test_python_runs(code):
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_name_programs_and_options_that_exist(line, load_tool_help):
    words = shlex.split(line)
    program, *arguments = words[words.index("zoo") + 1:]
    said = load_tool_help(program)
    for word in arguments:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said), f"zoo {program} has no {word}"


def named(pattern: str) -> list[str]:
    """What stands in commands where the pattern has a group."""
    return sorted({match[1] for line in COMMANDS if (match := re.search(pattern, line))})


@pytest.mark.parametrize("name", named(r"zoo train (\S+) [^-\s]"))
def test_models_that_are_trained_on_data_of_ones_own_exist(name):
    assert timm.is_model(name)


@pytest.mark.parametrize("name", named(r"zoo (?:train(?= \S+(?: -|$))|test) (\S+)"))
def test_configs_exist(name):
    path = find_config(name)
    if "::" in path.read_text():  # it inherits from a toolbox's
        pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
    model = load_config(path).model
    assert model.get("backbone", model).name in zoo.list_models()


@pytest.mark.parametrize("target", sorted({line.split()[1] for line in SHELL if line.startswith("make ")}))
def test_make_targets_exist(target):
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        assert (page.parent / target.split("#")[0]).exists(), target


NAMES = {name for page in PAGES if page.name != "CHANGELOG.md" for name in re.findall(r"\bzoo(?:\.[A-Za-z_]\w*)+", page.read_text())}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_names_exist(name):
    """Also where no code runs that mentions them."""
    if name.startswith("zoo.mm.deploy"):
        pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
    pkgutil.resolve_name(name)


@pytest.mark.parametrize("mechanism", zoo.MECHANISMS)
def test_every_mechanism_has_a_page_with_idea_formula_picture_and_example(mechanism):
    text = (DOCS / f"{mechanism}.md").read_text()
    assert 20 < len(model_table.read_page(mechanism).lead) < 120
    idea = re.search(r"\*\*Idea\.\*\*(.*?)\n\n", text, re.S).group(1)
    assert 4 <= len(idea.splitlines()) <= 6
    assert 0 < (DOCS / "pictures" / f"{mechanism}.png").stat().st_size < 60_000 and f"](pictures/{mechanism}.png)" in text
    assert "**Formula.**" in text and f'mechanism="{mechanism}"' in text
    example, = re.findall(r"```python\n(.*?)```", text, re.S)  # runs as every page's does
    assert len([line for line in example.splitlines() if line.strip()]) <= 11


def test_every_family_has_its_name_at_the_top():
    assert {family.__name__.rpartition(".")[2] for family in zoo.MECHANISMS.values()} <= set(zoo.__all__)


def _written(page: Path, table: str) -> str:
    begin, end = model_table.marks(table)
    return page.read_text().split(begin)[1].split(end)[0].strip()


def test_the_table_of_mechanisms_is_generated():
    assert _written(ROOT / "README.md", "mechanisms") == model_table.mechanism_table()


def test_the_table_of_models_is_generated():
    written = _written(DOCS / "models.md", "models")
    names = re.findall(r"^\| `(\w+)`", written, re.M)
    assert names == model_table.listed()
    light = [name for name in names if "_nano" in name]
    lines = {line.split("`")[1]: line for line in written.splitlines()[2:]}
    assert [lines[name] for name in light] == model_table.model_table(light).splitlines()[2:]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190


def test_every_paper_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == zoo.__version__
    cited = {number["value"]: paper["title"] for paper in citation["references"] for number in paper["identifiers"]}
    for name in zoo.list_models():
        cfg = timm.get_pretrained_cfg(name)
        assert cited.get(cfg.paper_ids) == cfg.paper_name, name


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == zoo.__version__


@pytest.mark.parametrize("mechanism", zoo.MECHANISMS)
def test_every_mechanism_has_a_card_that_is_the_generated_one_and_whose_tests_exist(mechanism):
    card = DOCS / "cards" / f"{mechanism}.md"
    assert _written(card, "card") == cards.card(mechanism)
    text = card.read_text()
    assert "**Which weights.**" in text and "**What was not verified.**" in text
    named = re.findall(r"`(tests/[^`]+)`", text)
    assert named and all((ROOT / test).exists() for test in named)


def test_every_released_file_is_on_a_card_with_its_licence():
    rows = [line.split(" | ") for mechanism in zoo.MECHANISMS for line in cards.card(mechanism).splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip("| `") for row in rows) == sorted(released.names())
    for row in rows:
        assert row[3] == (timm.get_pretrained_cfg(row[0].strip("| `")).license or "none stated")


CLAIMING = [path for folder in ("configs", "docs", "kernels", "layers", "zoo") for path in sorted((ROOT / folder).rglob("*"))
            if path.suffix in (".py", ".md") and "authors" in path.read_text()]


@pytest.mark.parametrize("path", CLAIMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_said_of_authors_names_where_to_look(path):
    """An address, a file of a repository (OWNER/NAME, PATH), a test of ours, a card or table, or the list of what they released."""
    text = " ".join(path.read_text().split())
    places = (r"https://github\.com/\w", r"\b[\w-]+/[\w-]+, [\w/-]+\.py\b", r"\btests/[\w/]+\.py\b", r"\bcards/\w*", r"\bmodels\.md\b",
              r"\bzoo\.models\.released\b", r"\btake_authors_names\b")
    assert any(re.search(place, text) for place in places), "it says something of authors and not where that can be seen"
