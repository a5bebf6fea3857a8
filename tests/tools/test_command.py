"""The command `zoo`: every program by its name, however it is started, and help without delay."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo import toolboxes
from zoo.errors import InputError
from zoo.tools._cli import FOLDER, command, programs

ROOT = Path(__file__).parents[2]
PROGRAMS = programs()
# Whatever takes long to import is an error.
LIGHT = """
import sys
for name in ("torch", "timm", "numpy", "mmengine"):
    sys.modules[name] = None
"""


def run(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd,
                          env=os.environ | environment)


@pytest.fixture
def light(tmp_path) -> dict[str, str]:
    """The environment of a Python in which nothing heavy can be imported."""
    (tmp_path / "sitecustomize.py").write_text(LIGHT)
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_helps_alike_and_at_once_as_part_of_the_command_and_as_a_script(name, light, tmp_path):
    part = run("-m", "zoo", name, "--help", **light)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("raise AssertionError('not the zoo that the script lies in')")
    script = run(FOLDER.resolve() / f"{name.replace('-', '_')}.py", "--help", cwd=tmp_path, **light)
    assert part.returncode == script.returncode == 0, part.stderr + script.stderr
    assert part.stdout == script.stdout
    assert part.stdout.startswith(f"usage: zoo {name} ") and f"\n  zoo {name}" in part.stdout
    assert "python " not in part.stdout and "tools/" not in part.stdout


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_command_lists_its_programs(arguments, light):
    done = run("-m", "zoo", *arguments, **light)
    assert done.returncode == 0 and done.stderr == ""
    for name, text in PROGRAMS.items():
        assert f"  {name} " in done.stdout and text in done.stdout and text.endswith(".") and len(text) < 120
    assert {"train", "test", "predict", "export", "visualize", "report", "benchmark", "models", "prepare-digits",
            "install-mm"} <= set(PROGRAMS)


def test_version(light):
    assert run("-m", "zoo", "--version", **light).stdout == f"zoo {zoo.__version__}\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["tain"], "error: there is no program 'tain'; did you mean train?"),
    (["prepare_digits"], "did you mean prepare-digits"),
    (["_cli"], "there is no program '_cli'; programs are bags, benchmark, "),
    (["train", "biformer_nano_digit"], "did you mean biformer_nano_digits"),
    (["models", "biformer_tny"], "no model matches 'biformer_tny'; did you mean biformer_tiny"),
    (["models", "*_tiny", "--mechanism", "das"], "no model of the mechanism das matches '*_tiny'"),
    (["models", "--mechanism", "rooting"], "did you mean routing?"),
])
def test_what_is_not_there_is_one_line_and_exit_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command(arguments)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(("text", "expected"), [
    ("from zoo.__main__ import main\nprint(hasattr(zoo, 'attach'))\natexit.register(lambda: print(zoo.attach.__name__))\nmain()",
     "False\nattention_unet_nano\nattach\n"),
    ("print(zoo.list_models('attention_unet_nano'))", "['attention_unet_nano']\n"),
])
def test_pips_script_puts_the_import_off_and_others_of_its_name_do_not(text, expected, tmp_path):
    script = tmp_path / "zoo"
    script.write_text(f"import atexit, zoo\n{text}\n")
    done = run(script, "models", "attention_unet_nano", PYTHONPATH=str(ROOT))
    assert done.stdout == expected, done.stderr


def test_what_a_program_imports_is_whole(tmp_path):
    """In the command's process the package is at first empty; what it then runs finds all of it."""
    (tmp_path / "rival.py").write_text(
        "import timm, zoo\ndef build(name):\n    return zoo.attach(timm.create_model('test_resnet'), zoo.layers.DAS)\n")
    done = run("-m", "zoo", "benchmark", "test_resnet", "--against", "rival:build", "--rounds", 1, "--size", 32, 32, "--forward-only",
               cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "| test_resnet | forward |" in done.stdout, done.stderr


def test_a_script_uses_the_checkout_that_it_lies_in(tmp_path):
    """Wherever the environment's zoo is; and no program takes the place of a module of its name."""
    other, modules = tmp_path / "other", tmp_path / "modules"
    for folder in (other / "zoo", other / "tools", modules):
        folder.mkdir(parents=True)
    (other / "zoo" / "__init__.py").write_text("name = 'other'")
    (other / "tools" / "_checkout.py").write_text((FOLDER / "_checkout.py").read_text())
    (other / "tools" / "test.py").write_text("raise AssertionError('imported')")
    (other / "tools" / "where.py").write_text("if __name__ == '__main__':\n    import _checkout\n\nimport test, zoo\nprint(zoo.name)\n")
    done = run(other / "tools" / "where.py", cwd=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{modules}")
    assert done.stdout == "other\n", done.stderr


def test_models_are_listed_with_what_is_known(capsys):
    with pytest.raises(SystemExit):
        command(["models", "sk_resnet50", "--details"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "model" and "licence of the authors' weights" in head
    for cell in ("sk_resnet50", "26.15 M", "4.15 G", "224", "77.54 %", "not stated", "arXiv:1903.06586"):
        assert row.index(cell) >= 0
    assert row.index("26.15 M") == head.index("parameters") and row.index("77.54 %") == head.index("reported top-1")


@pytest.fixture
def pips(monkeypatch, tmp_path) -> list[tuple[list[str], dict[str, str]]]:
    """What pip is asked to do, instead of doing it."""
    asked = []

    def run(command, env, check):
        asked.append((command[3:], env))
        return subprocess.CompletedProcess(command, int("fail" in str(toolboxes.MMCV)))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def test_the_toolboxes_are_installed_in_order(pips, tmp_path):
    steps = []
    toolboxes.install(steps.append)
    folder = toolboxes.wheel_folder()
    words = [" ".join(command) for command, _ in pips]
    assert [word for word in words[0].split() if word.startswith("zoo-attention[mm]==")] and str(ROOT / "constraints.txt") in words[0]
    assert "wheel --no-build-isolation --no-deps" in words[1] and str(folder) in words[1]
    assert pips[1][1]["MMCV_WITH_OPS"] == "1" and "--no-index" in words[2] and toolboxes.MMCV in words[2]
    assert words[3].endswith(" ".join(toolboxes.ON_TOP)) and "--no-deps" in words[3] and "is compiled" in steps[0]

    pips.clear()
    (folder / f"onedl_mmcv-2.3.6-{toolboxes._tag()}-{toolboxes._tag()}-linux_x86_64.whl").touch()
    toolboxes.install(steps.append)
    assert len(pips) == 3 and "from the wheel kept in" in steps[1]


def test_what_pip_cannot_do_is_a_sentence(pips, monkeypatch):
    monkeypatch.setattr(toolboxes, "MMCV", "fail==1")
    with pytest.raises(InputError, match="this did not work, for the reason above: .*-m pip .* install"):
        toolboxes.install()
    monkeypatch.setattr(toolboxes, "PROJECT", "zoo-that-is-not-there")
    with pytest.raises(InputError, match="zoo-that-is-not-there is not installed in the environment of"):
        toolboxes.install()
