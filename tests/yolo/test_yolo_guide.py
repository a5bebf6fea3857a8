"""docs/guides/yolo.md: its examples are the files of examples/, which are run as they stand and ask no network."""
import re
import runpy
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = dict(re.findall(r"```(?:python|yaml) (yolo_\w+)\n(.*?)```", (ROOT / "docs/guides/yolo.md").read_text(), re.S))


def test_every_example_is_on_the_page():
    assert set(BLOCKS) == {path.stem for path in (ROOT / "examples").glob("yolo_*.py")}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_page_says_what_is_run(name):
    """Every line of a block stands in its file, in this order; none takes more than fifteen."""
    lines = [line.rstrip() for line in BLOCKS[name].splitlines() if line.strip()]
    assert len(lines) <= 15
    file = iter(line.rstrip() for line in (ROOT / "examples" / f"{name}.py").read_text().splitlines())
    for line in lines:
        assert line in file, f"examples/{name}.py lacks, or has at another place: {line}"


@pytest.mark.parametrize("name", BLOCKS)
def test_examples_run(name, tmp_path, monkeypatch):
    def refused(self, address):
        raise AssertionError(f"the example asks {address}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refused)
    made = runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    best = made["model"].trainer.best if name != "yolo_ready" else made["file"]
    assert Path(best).is_file()
    if name == "yolo_ready":
        assert made["metrics"].box.map50 >= 0 and len(made["found"]) == 1
