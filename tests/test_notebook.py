"""The notebook of first steps runs, from its first cell to its last, and does what it says."""
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "first_steps.ipynb"


@pytest.mark.long
def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None  # what it prints is the reader's own
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["metrics"]["accuracy/top1"] > 80
    assert names["exported"].worst < 1e-4 and names["exported"].free_size
    assert len(names["predictions"]) == 10 and names["seen"].picture.size and names["maps"]
