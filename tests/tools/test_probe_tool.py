"""`zoo probe` from pictures to the table and back, through the other commands."""
import csv
import re
import shutil

import numpy as np
import pytest
import timm
from PIL import Image

from zoo.errors import InputError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        pixels = random.integers(0, 160, (32, 32, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 90
        (root / ("red", "blue")[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / ("red", "blue")[i % 2] / f"{i}.png")
    return root


QUICK = ("--size", "32", "--epochs", "8", "--batch", "8", "--lr", "0.01")


@pytest.fixture(scope="module")
def probed(pictures, load_tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    load_tool("probe").main(["test_vit", str(pictures), *QUICK, "--work-dir", str(folder)])
    return folder


def test_the_table_and_the_files(probed, pictures, load_tool, capsys):
    """A second run finds the tokens, and gives the same numbers."""
    load_tool("probe").main(["test_vit", str(pictures), *QUICK, "--work-dir", str(probed)])
    said = capsys.readouterr()
    assert "class folders, 32 for train, 8 for val" in said.out and "the weights of test_vit are random" in said.err
    with (probed / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["head"] for row in rows] == ["attentive", "simpool", "linear", "class"]
    for row in rows:
        assert re.search(rf"{row['head']} +{row['parameters']} +{float(row['accuracy']):.2f} %", said.out)
        assert (probed / f"{row['head']}.pth").is_file()
    assert max(float(row["accuracy"]) for row in rows) == 100
    assert "tokens" not in said.err and sorted(path.name for path in (probed / "tokens").iterdir()) == [
        "train-00000.safetensors", "val-00000.safetensors"]


def test_other_commands_take_the_heads(probed, pictures, load_tool, tmp_path, capsys):
    picture = str(pictures / "red" / "0.png")
    assert load_tool("predict").main([str(probed / "attentive.pth"), picture]) == 0
    assert re.search(r"red +\d+\.\d+%", capsys.readouterr().out)
    assert load_tool("export").main([str(probed / "attentive.pth"), "-o", str(tmp_path / "probe.onnx")]) == 0
    assert "wrote test_vit" in capsys.readouterr().out
    for head in ("attentive", "simpool"):
        seen = tmp_path / head
        assert load_tool("visualize").main([str(probed / f"{head}.pth"), picture, "-o", str(seen), "--attributions", "gradcam"]) == 0
        page = (seen / "index.html").read_text()
        assert page.count("on a map of 2x2 tokens") == 2  # the caption, and the picture's alternative


def test_heads_of_a_checkpoint(checkpoint, pictures, load_tool, tmp_path, capsys):
    load_tool("probe").main([str(checkpoint), str(pictures), "--heads", "linear", "--epochs", "2", "--work-dir", str(tmp_path / "run")])
    said = capsys.readouterr()
    width = timm.create_model("test_resnet").num_features
    assert "random" not in said.err and re.search(rf"linear +{2 * width + 2} ", said.out)  # 2 classes and not the checkpoint's 3
    with pytest.raises(InputError, match="is a probe already; give the network that it was made of, test_resnet"):
        load_tool("probe").main([str(tmp_path / "run" / "linear.pth"), str(pictures)])


def test_wrong_input_leaves_nothing(pictures, checkpoint, load_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = load_tool("probe").main
    data = str(pictures)
    for arguments, message in (
            (["test_vitt", data], "neither a model nor a file called 'test_vitt'; did you mean test_vit"),
            (["attention_unet_nano", data], "attention_unet_nano is for segmentation, and heads are put on"),
            (["test_vit", f"{data}s"], "there is no data"),
            (["test_vit", data, "--heads", "attentive", "--queries", "7"], "queries can be 1, 2, 4"),
            (["test_resnet", data, "--heads", "class"], "no class token, of which --heads class could be made"),
            (["test_resnet", data, "--before-norm"], "no norm called `norm`"),
            (["test_vit", data, "--batch", "1"], "batches of 2 or more"),
            (["test_vit", data, "--size", "30"], r"Input height \(30\) should be divisible by patch size"),
            (["biformer_nano", data, "--pretrained"], "biformer_nano cannot be had"),
            (["test_vit", data, "--pretrained", "--weights", "x.pth"], "give one"),
            ([str(checkpoint), data, "--size", "32"], "--size goes with a model's name")):
        with pytest.raises(InputError, match=message):
            main(arguments)
        assert not list(tmp_path.iterdir()), arguments


def test_a_picture_that_cannot_be_read_is_named(pictures, load_tool, tmp_path):
    copy = shutil.copytree(pictures, tmp_path / "copy")
    (copy / "red" / "broken.png").write_bytes((copy / "red" / "0.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"picture .*broken.png cannot be read"):
        load_tool("probe").main(["test_vit", str(copy), *QUICK, "--work-dir", str(tmp_path / "run")])
    assert not list((tmp_path / "run" / "tokens").iterdir())
