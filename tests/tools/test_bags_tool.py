"""`zoo bags` from folders and files to heads, tables and sheets, and answers of a head that was trained."""
import csv
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from zoo.bags.training import area, read_head
from zoo.errors import InputError
from zoo.reading.bags import discover_bags, read_features

QUICK = ("--size", "32", "--epochs", "2", "--lr", "0.003", "--masked", "2")


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("bags").main


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Bags of grey pictures, in one class with one that is red."""
    root, random = tmp_path_factory.mktemp("slides"), np.random.default_rng(0)
    for i in range(16):
        folder = root / ("none", "red")[i % 2] / f"slide {i}"
        folder.mkdir(parents=True)
        for j in range(random.integers(3, 7)):
            pixels = np.full((24, 24, 3), random.integers(60, 200), np.uint8)
            if i % 2 and j == 1:
                pixels[..., 1:] = 0
            Image.fromarray(pixels).save(folder / f"{j}.png")
    return root


@pytest.fixture(scope="module")
def trained(main, slides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bags") / "run"
    main([str(slides), "--model", "test_resnet", *QUICK, "--work-dir", str(folder)])
    return folder


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_heads_the_table_and_sheets(trained):
    rows = rows_of(trained / "heads.csv")
    assert [row["head"] for row in rows] == ["abmil", "acmil", "acmil_multi_head"]
    assert all(0 <= float(row["accuracy"]) <= 100 and 0 <= float(row["auc"]) <= 100 for row in rows)
    answers = rows_of(trained / "acmil.csv")
    assert len(answers) == 4 and set(answers[0]) == {"bag", "folder", "answer", "none", "red"}
    sheets = sorted((trained / "acmil").glob("*.png"))
    assert len(sheets) == 4 and Image.open(sheets[0]).width > 300
    head, classes = read_head(trained / "acmil.pth")
    assert classes == ("none", "red") and head.masked == 2 and not head.training


def test_features_are_computed_once_and_again_where_pictures_changed(main, slides, trained, tmp_path, capsys, monkeypatch):
    from zoo.bags import features
    copied, run = tmp_path / "slides", tmp_path / "run"
    shutil.copytree(slides, copied)
    arguments = [str(copied), "--model", "test_resnet", *QUICK, "--heads", "abmil", "--work-dir", str(run)]
    main(arguments)
    found = rows_of(run / "abmil.csv")
    assert found == rows_of(trained / "abmil.csv")  # the same in every run
    computed = []
    compute = features.CachedFeatures._compute
    monkeypatch.setattr(features.CachedFeatures, "_compute", lambda self, bag: computed.append(bag.name) or compute(self, bag))
    main(arguments)
    assert not computed
    Image.new("RGB", (24, 24), "blue").save(copied / "red" / "slide 7" / "0.png")
    next((run / "features").glob("slide 3-*.safetensors")).write_bytes(b"damaged")
    main(arguments)
    assert sorted(computed) == ["slide 3", "slide 7"]
    computed.clear()
    main([*arguments[:4], "48", *arguments[5:]])
    assert len(computed) == 16
    assert "the weights of test_resnet are random" in capsys.readouterr().err


def test_a_head_answers_for_other_bags(main, slides, trained, tmp_path, capsys):
    main([str(slides), "--model", "test_resnet", "--size", "32", "--head", str(trained / "acmil.pth"), "--work-dir", str(tmp_path / "run")])
    answers = {row["bag"]: row for row in rows_of(tmp_path / "run" / "acmil.csv")}
    assert len(answers) == 16
    for row in rows_of(trained / "acmil.csv"):
        assert answers[row["bag"]] == row


@pytest.fixture
def files(tmp_path):
    """As CLAM and TRIDENT write them."""
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        values = torch.randn(5 + i, 8, generator=generator)
        values[2, 0] += 8 * (i % 2)
        folder = tmp_path / "features" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        if i < 6:
            torch.save(values if i < 3 else {"features": values, "coords": torch.zeros(len(values), 2)}, folder / f"{i}.pt")
        else:
            with h5py.File(folder / f"{i}.h5", "w") as file:
                file["features"] = (values if i % 3 else values[None]).numpy()
                file["coords"] = np.zeros((len(values), 2))
    return tmp_path / "features"


def test_files_of_features(main, files, tmp_path, capsys):
    assert [tuple(read_features(path).shape) for path in sorted(files.glob("a/*"))] == [(5, 8), (15, 8), (7, 8), (9, 8), (11, 8), (13, 8)]
    main([str(files), "--heads", "acmil", "abmil", "--epochs", "4", "--lr", "0.01", "--folds", "3", "--work-dir", str(tmp_path / "run")])
    assert "bags as files of features, 8 for train, 4 for val; 2 classes (a, b)" in capsys.readouterr().out
    assert not (tmp_path / "run" / "acmil").exists() and len(rows_of(tmp_path / "run" / "acmil.csv")) == 4
    table = tmp_path / "bags.csv"
    lines = [f"features/{path.parent.name}/{path.name},{path.parent.name},{'val' if i < 2 else 'train'}"
             for i, path in enumerate(sorted(files.glob("*/*"), key=lambda path: path.name))]
    table.write_text("\n".join(["path,label,split", *lines]))
    bags = discover_bags(table)
    assert {split: len(found) for split, found in bags.splits.items()} == {"val": 2, "train": 10}
    assert discover_bags(files).classes == bags.classes


def test_bad_input_is_named(main, slides, files, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.tensor([[float("nan")]]), tmp_path / "nan.pt")
    (tmp_path / "damaged.h5").write_bytes(b"x")
    (tmp_path / "table.csv").write_text("features/a/0.pt,a,somewhere\n")
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "there is no .*nowhere"), ([str(tmp_path / "empty")], "holds no bags: folders of classes"),
        ([str(slides)], "--model names the network that computes their features"),
        ([str(files), "--model", "test_resnet"], "--model computes features of pictures"),
        ([str(tmp_path / "table.csv")], "rows are of a bag, its label, and maybe train, val or test"),
        ([str(files), "--epochs", "0"], "there has to be 1 epoch or more"),
        ([str(files), "--folds", "13"], "12 different samples cannot be divided into 13 folds"),
        ([str(files), "--head", str(tmp_path / "list.pt")], "is no head that `zoo bags` wrote"),
        ([str(files), "--head", str(trained / "acmil.pth")], r"the head takes features of width \d+, and these have 8"),
    ]:
        with pytest.raises(InputError, match=message):
            main([*arguments, "--work-dir", str(tmp_path / "run")])
    for name, message in [("list.pt", r"holds a list, where features \(N, D\)"), ("nan.pt", "not all finite numbers"),
                          ("damaged.h5", "cannot be read")]:
        with pytest.raises(InputError, match=message):
            read_features(tmp_path / name)
    assert not list(tmp_path.glob("run/*.pth"))


def test_area_under_the_curve():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.4, 0.6]])
    assert area(probabilities, torch.tensor([0, 0, 1, 1])) == 100
    assert area(probabilities, torch.tensor([0, 1, 0, 1])) == 50
    assert np.isnan(area(probabilities, torch.tensor([0, 0, 0, 0])))
    assert re.match(r"\d", f"{area(torch.eye(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 2]))}")
