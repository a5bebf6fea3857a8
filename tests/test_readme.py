"""The README's promises: its Python runs, its table is the generated one, its commands name what exists."""
import re
import shlex
from pathlib import Path

import pytest

import zoo
from zoo.measuring import model_table
from zoo.mm.config import find_config, load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", [line for line in SHELL if "zoo" in shlex.split(line)])
def test_commands_name_programs_and_options_that_exist(line, load_tool_help):
    words = shlex.split(line)
    program, *arguments = words[words.index("zoo") + 1:]
    said = load_tool_help(program)
    for word in arguments:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said), f"zoo {program} has no {word}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"zoo t(?:rain|est) (\S+)", README))))
def test_configs_exist(name):
    path = find_config(str(ROOT / name) if "/" in name else name)
    if "::" in path.read_text():  # it inherits from a toolbox's
        pytest.importorskip("mmdet", reason="needs mmdetection and mmsegmentation: make mm")
    model = load_config(path).model
    assert model.get("backbone", model).name in zoo.list_models()


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_targets_exist(line):
    assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text()


def test_tables_are_generated():
    for text, generate in ((README, model_table.table), ((ROOT / "docs/models.md").read_text(), model_table.whole_table)):
        written = text.split(model_table.BEGIN)[1].split(model_table.END)[0].strip()
        names = re.findall(r"^\| `(\w+)`", written, re.M)
        assert names == model_table.listed()
        light = [name for name in names if "_nano" in name]
        lines = {line.split("`")[1]: line for line in written.splitlines()[2:]}
        assert [lines[name] for name in light] == generate(light).splitlines()[2:]


def test_linked_files_exist():
    assert all((ROOT / target).exists() for target in re.findall(r"\]\(((?!http)[^)]+)\)", README))
