import json

import onnxruntime
import pytest

from zoo import export
from zoo.errors import InputError


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("export_onnx").main


def test_exports_a_checkpoint_and_says_what_it_measured(main, checkpoint, tmp_path, capsys):
    path = tmp_path / "x.onnx"
    assert main([str(checkpoint), "-o", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:] if " x " in line]
    assert len({(row[1], row[3]) for row in rows}) >= 4
    worst = next(line for line in lines if line.startswith("worst: ")).split()[1]
    assert float(worst) == max(float(row[4]) for row in rows) < 1e-4
    assert "batch size: any; height and width: any" in lines
    assert str(path) in lines[-1]
    metadata = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["circle", "square", "star"]
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]


def test_says_why_a_size_is_fixed(main, tmp_path, capsys):
    assert main(["test_vit", "-o", str(tmp_path / "x.onnx"), "--batch", "2"]) == 0
    assert "batch size: fixed; height and width: fixed (test_vit does not take 161x161" in capsys.readouterr().out


def test_a_difference_is_exit_status_1_and_leaves_no_file(main, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert main([str(checkpoint), "-o", str(tmp_path / "x.onnx")]) == 1
    assert "error: ONNX Runtime differs from PyTorch by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "message"), [
    ("resnet_18", "'resnet_18'; did you mean .*resnet18"),
    ("nowhere.pth", "no checkpoint nowhere.pth"),
])
def test_unknown_models(main, tmp_path, model, message):
    with pytest.raises(InputError, match=message):
        main([model, "-o", str(tmp_path / "x.onnx")])
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(main, checkpoint, tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        main([str(checkpoint), "-o", str(tmp_path / "no" / "x.onnx")])
    with pytest.raises(InputError, match="it is a folder"):
        main([str(checkpoint), "-o", str(tmp_path)])


def test_malicious_checkpoint_is_one_line_and_exit_status_2(run_tool, malicious, tmp_path):
    path, created = malicious
    done = run_tool("export_onnx", path, "-o", tmp_path / "x.onnx")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path} would run code on loading")
    assert not created.exists()
    assert list(tmp_path.iterdir()) == [path]
