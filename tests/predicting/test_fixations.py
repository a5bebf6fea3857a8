"""Maps of pictures of any size: as they are seen, cut back, and written; and the same from an ONNX file."""
import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import zoo  # noqa: F401  registers the models
from zoo.checkpoints import load_released
from zoo.errors import InputError
from zoo.exporting.onnx import export_onnx
from zoo.predicting.exported import ExportedNetwork, exported_info
from zoo.predicting.fixations import Looked, cut_back, heat, look
from zoo.reading.fixations import GREY, fitted, fitted_points, within
from zoo.tools import predict

SIZE = (48, 64)


class Brightness(nn.Module):
    """What it sees, scaled, as the map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True)


def spot(width: int, height: int, x: float, y: float) -> Image.Image:
    """Black, and white around a place."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    reach = max(3.0, 0.1 * min(width, height))
    values = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2 / reach**2)
    return Image.fromarray(np.rint(255 * values).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("size", [(64, 48), (640, 480), (500, 120), (90, 400), (31, 17), (3000, 20)], ids=str)
def test_a_map_lies_on_its_picture(size):
    """Whatever its sides: what is bright is where it was, and the grey around the picture is cut off."""
    width, height = size
    x, y = 0.7 * width, 0.4 * height
    picture = spot(width, height, x, y)
    left, top, w, h = within(size, SIZE)
    seen = fitted(picture, SIZE)
    assert seen.size == SIZE[::-1]
    assert (min(w, h) < 6 or abs(w / h - width / height) < 0.2 * width / height) and (w == SIZE[1] or h == SIZE[0])
    inside = np.zeros(SIZE, bool)
    inside[top:top + h, left:left + w] = True
    assert (np.asarray(seen)[~inside] == GREY).all()
    saliency = look(Brightness(), picture, (0.0,) * 3, (1.0,) * 3, SIZE)
    assert saliency.shape == (height, width) and saliency.dtype == np.uint8
    if min(size) < 30:
        return
    found = Looked(None, saliency).peak()
    assert abs(found[0] + 0.5 - x) <= 1.5 * max(1, width / w) and abs(found[1] + 0.5 - y) <= 1.5 * max(1, height / h)
    difference = np.abs(saliency.astype(int) - np.asarray(picture.convert("L")).astype(int))
    assert difference.mean() < 12


def test_what_is_seen_as_it_is_comes_back_as_it_is():
    answer = torch.rand(*SIZE)
    assert torch.equal(cut_back(answer, SIZE), answer)
    picture = spot(64, 48, 10, 10)
    assert fitted(picture, SIZE).tobytes() == picture.tobytes()


def test_fixated_pixels_go_where_the_picture_goes():
    points = torch.zeros(100, 400)
    points[50, 300] = points[0, 0] = points[99, 399] = 1
    found = fitted_points(points, SIZE)
    left, top, width, height = within((400, 100), SIZE)
    assert (left, top, width, height) == (0, 16, 64, 16)
    assert found.nonzero().tolist() == [[16, 0], [24, 48], [31, 63]]


def test_heat_and_what_is_said():
    saliency = np.zeros((10, 20), np.uint8)
    saliency[4, 7] = 255
    grey = Image.new("RGB", (20, 10), (100, 100, 100))
    covered = np.asarray(heat(grey, saliency)).astype(int)
    assert (covered[0, 0] == 100).all() and covered[4, 7, 0] > 180
    assert Looked(None, saliency).peak() == (7, 4) and Looked(None, saliency).focus() == pytest.approx(0.5 / 200)
    assert Looked(None, np.full((10, 20), 9, np.uint8)).focus() == pytest.approx(0.5) and Looked(None, 0 * saliency).focus() == 1


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("msinet_nano").state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_the_command_and_the_exported_file_say_the_same(weights, tmp_path, capsys):
    spot(200, 90, 50, 40).save(tmp_path / "a.png")
    spot(33, 70, 10, 60).save(tmp_path / "b.jpg")
    given = [str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    assert predict.main([str(weights), *given, "--model", "msinet_nano", "-o", str(tmp_path / "torch")]) == 0
    assert "most at column" in capsys.readouterr().out
    model, info = load_released("msinet_nano", weights)
    assert info.task == "fixations" and info.output == "saliency"
    exported = export_onnx(model, info, tmp_path / "w.onnx")
    assert exported.free_size and exported.free_batch and exported.worst < 1e-4, exported.reason
    network = ExportedNetwork(tmp_path / "w.onnx")
    assert network.num_classes == 1 and exported_info(network).task == "fixations"
    assert predict.main([str(tmp_path / "w.onnx"), *given, "-o", str(tmp_path / "onnx")]) == 0
    for name, size in (("a", (200, 90)), ("b", (33, 70))):
        maps = [np.asarray(Image.open(tmp_path / folder / f"{name}.png")).astype(int) for folder in ("torch", "onnx")]
        assert maps[0].shape == size[::-1] and np.abs(maps[0] - maps[1]).max() <= 1
        assert Image.open(tmp_path / "torch" / f"{name}_overlay.png").size == size
    rows = list(csv.DictReader((tmp_path / "torch" / "answers.csv").open()))
    assert [row["picture"] for row in rows] == given and all(0 < float(row["half_in"]) < 0.5 for row in rows)


def test_the_kind_of_pictures_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("sum_nano")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.save({f"salu_mamba.{name}": value for name, value in model.state_dict().items()}, tmp_path / "w.pth")
    spot(60, 40, 10, 20).save(tmp_path / "a.png")
    maps = []
    for kind in ([], ["--condition", "0"], ["--condition", "2"]):
        given = [str(tmp_path / "w.pth"), str(tmp_path / "a.png"), "--model", "sum_nano", "-o", str(tmp_path / "o.png")]
        assert predict.main([*given, *kind]) == 0
        maps.append(np.asarray(Image.open(tmp_path / "o.png")).astype(int))
    assert (maps[0] == maps[1]).all() and (maps[0] != maps[2]).any()
    with pytest.raises(InputError, match="--condition is a kind of pictures that sum_nano knows, 0 to 3, got 4"):
        predict.main([str(tmp_path / "w.pth"), str(tmp_path / "a.png"), "--model", "sum_nano", "-o", "x.png", "--condition", "4"])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "msinet_nano", "-o", "x.png", "--condition", "1"], "--condition is for networks .* of several kinds, and msinet_nano is"),
    (["--model", "msinet_nano"], "its maps have to go somewhere: name a file or folder with -o"),
    (["--model", "msinet_nano", "-o", "x.png", "--top", "3"], "--top is for networks that name classes"),
    (["--model", "resnet18"], "is for networks that .*say where people look, and resnet18 is none"),
    (["--model", "msinet_nan"], "there is no model 'msinet_nan'; did you mean msinet_nano"),
])
def test_what_cannot_be_is_named(weights, tmp_path, arguments, message):
    spot(20, 20, 5, 5).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        predict.main([str(weights), str(tmp_path / "a.png"), *arguments])


def test_numbers_that_are_not_finite_are_told():
    with pytest.raises(InputError, match="not finite"):
        look(Brightness(), spot(20, 20, 5, 5), (float("nan"),) * 3, (1.0,) * 3, SIZE)
