import json
import re

import onnxruntime
import pytest
from PIL import Image

from zoo.errors import InputError
from zoo.exporting import onnx as export


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("export").main


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
    done = run_tool("export", path, "-o", tmp_path / "x.onnx")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path} would run code on loading")
    assert not created.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def one_model(load_tool, monkeypatch):
    """`main` of a tool that knows one model, quick to export."""
    monkeypatch.setattr("zoo.models.list_models", lambda pattern: ["test_resnet"])
    return load_tool("export").main


def test_exports_every_model_that_matches(one_model, tmp_path, capsys):
    assert one_model(["--all", "*", "-o", str(tmp_path / "all")]) == 0
    done = capsys.readouterr()
    assert "1/1 test_resnet: timing" in done.err
    assert f"1 of 1 exported; the table is {tmp_path / 'all' / 'exports.md'}" in done.out
    assert one_model(["--all", "-o", str(tmp_path / "all")]) == 0
    assert "1/1 test_resnet: is there already" in capsys.readouterr().err


def test_one_that_fails_is_exit_status_1_and_named(one_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert one_model(["--all", "-o", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "test_resnet: failed: ONNX Runtime differs from PyTorch" in said and "0 of 1 exported" in said


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give a model, or --all"),
    (["test_resnet", "--all"], "give a model, or --all"),
    (["--all", "resnet18"], "no registered model matches 'resnet18'"),
    (["--all", "--batch", "0"], "--batch is for one model"),
    (["--all", "--jobs", "0"], "jobs is 0"),
    (["test_resnet", "--jobs", "2"], "--jobs is for --all"),
    (["--all", "--precision", "int8"], "--precision is for one model"),
    (["test_resnet", "--precision", "int8"], "int8 has to be calibrated"),
    (["test_resnet", "--precision", "float16", "--pictures", "nowhere"], "there is no picture nowhere"),
    (["test_resnet", "--pictures", "nowhere"], "--pictures is for a lower --precision"),
])
def test_arguments_that_do_not_go_together(main, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        main([*arguments, "-o", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())


def test_int8_says_what_it_changes(main, checkpoint, tmp_path, capsys):
    for i, name in enumerate(("circle", "square", "star", "circle")):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (40 * i, 100, 200)).save(tmp_path / "pictures" / name / f"{i}.png")
    path = tmp_path / "x.onnx"
    assert main([str(checkpoint), "-o", str(path), "--static-size", "--precision", "int8", "--pictures", str(tmp_path / "pictures")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"int8 names the same class for \d of 2 pictures", said)
    assert re.search(r"accuracy: float32 \d+\.\d\d %, int8 \d+\.\d\d % \([+-]\d+\.\d\d\)", said)
    assert {path.name for path in tmp_path.iterdir()} == {"x.onnx", "pictures"}


def test_full_disk_is_one_sentence_and_leaves_nothing(main, checkpoint, tmp_path, full_disk):
    with full_disk(), pytest.raises(InputError, match=r"cannot write .*x\.onnx: File too large"):
        main([str(checkpoint), "-o", str(tmp_path / "x.onnx"), "--static-size"])
    assert not list(tmp_path.iterdir())
