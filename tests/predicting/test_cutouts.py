"""Objects cut out of pictures of any size: what is written, how much is looked at, and what the command says."""
import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from zoo.checkpoints import load_model
from zoo.errors import InputError
from zoo.models.inspyrenet import Pyramid
from zoo.predicting.cutouts import CutOut, cut_each, cut_out, look_at
from zoo.tools.predict import main

STATISTICS = dict(mean=(0.5,) * 3, std=(0.25,) * 3)


class Bright(nn.Module):
    """Finds what is bright, and counts the pixels that it looks at."""

    base_size = (96, 96)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        return 20 * x.mean(1, keepdim=True)

    def pyramid(self, x):
        d0 = self(x)
        p2, p1, p0 = (torch.zeros(1, 1, x.shape[2] // step, x.shape[3] // step) for step in (4, 2, 1))
        return Pyramid(torch.zeros(1, 1, x.shape[2] // 8, x.shape[3] // 8), p2, p2, p1, p1, p0, d0)


def square(width: int, height: int) -> Image.Image:
    """White on black: the second third of both sides."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("size", "looks"), [
    ((60, 90), [(96, 96)]), ((500, 120), [(96, 96)]), ((300, 200), [(96, 96), (192, 288)]), ((1500, 1000), [(96, 96), (320, 480)]),
    ((20000, 400), [(96, 96)]),
])
def test_one_look_or_two(size, looks):
    model = Bright()
    alpha, certainty = cut_out(model, square(*size), **STATISTICS)
    assert model.seen == looks and alpha.shape == size[::-1] and alpha.dtype == np.uint8 and certainty > 0.99
    expected = np.asarray(square(*size))[..., 0]
    assert (np.abs(alpha.astype(int) - expected) > 128).mean() < 0.03


@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (700, 30000), (40000, 33), (1280, 1280), (2560, 1281), (100, 100)], ids=str)
def test_what_is_looked_at_is_bounded(size):
    height, width = look_at(size, 1280)
    assert height % 32 == width % 32 == 0 and 32 <= min(height, width) <= 1280 and height * width <= 2 * 1280**2
    assert (height > width) == (size[0] > size[1]) or abs(size[0] - size[1]) < 32


def test_networks_without_a_pyramid_look_once():
    model = nn.Conv2d(3, 1, 1)
    alpha, _ = cut_out(model, square(300, 200), base_size=(64, 64), **STATISTICS)
    assert alpha.shape == (200, 300) and alpha.min() == 0 and alpha.max() == 255


class Detailed(Bright):
    def pyramid(self, x):
        found = super().pyramid(x)
        return found._replace(p0=torch.full_like(found.p0, -40.0))


def test_details_are_in_the_answer_at_edges():
    plain, detailed = (cut_out(model, square(300, 300), **STATISTICS)[0] for model in (Bright(), Detailed()))
    changed = np.argwhere(plain != detailed)
    assert len(changed) and np.abs(changed - 149.5).max(1).min() > 25 and np.abs(changed - 149.5).max() < 70


def test_where_the_object_is():
    alpha = np.zeros((40, 60), np.uint8)
    assert CutOut(None, alpha, 0.1).box() == (0, 0, 0, 0) and CutOut(None, alpha, 0.1).share() == 0
    alpha[10:20, 30:60] = 200
    assert CutOut(None, alpha, 1.0).box() == (30, 10, 60, 20) and CutOut(None, alpha, 1.0).share() == 0.125


@pytest.fixture
def released(tmp_path):
    """A file as authors leave them, and two pictures in a folder."""
    model = timm.create_model("inspyrenet_nano")
    torch.save(model.state_dict(), tmp_path / "latest.pth")
    (tmp_path / "photos").mkdir()
    square(70, 50).save(tmp_path / "photos" / "a.png")
    square(64, 200).convert("L").save(tmp_path / "photos" / "b.jpg")
    return tmp_path


def test_the_command_writes_cutouts_and_masks(released, capsys):
    out = released / "cutouts"
    assert main([str(released / "latest.pth"), str(released / "photos"), "--model", "inspyrenet_nano", "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_mask.png", "b.png", "b_mask.png", "cutouts.csv"]
    for name, size in (("a", (70, 50)), ("b", (64, 200))):
        cut, mask = Image.open(out / f"{name}.png"), Image.open(out / f"{name}_mask.png")
        assert cut.mode == "RGBA" and mask.mode == "L" and cut.size == mask.size == size
        assert (np.asarray(cut)[..., 3] == np.asarray(mask)).all()
    assert (np.asarray(Image.open(out / "a.png"))[..., :3] == np.asarray(square(70, 50))).all()
    rows = list(csv.DictReader((out / "cutouts.csv").open()))
    assert [row["picture"][-5:] for row in rows] == ["a.png", "b.jpg"] and 0 <= float(rows[0]["share"]) <= 1
    assert "certain to" in capsys.readouterr().out
    assert main([str(released / "latest.pth"), str(released / "photos" / "a.png"), "--model", "inspyrenet_nano",
                 "-o", str(released / "one.png")]) == 0
    assert Image.open(released / "one.png").mode == "RGBA" and (released / "one_mask.png").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["latest.pth", "photos", "-o", "x", "--model", "inspyrenet_nona"], "no model 'inspyrenet_nona'; did you mean inspyrenet_nano"),
    (["latest.pth", "photos", "-o", "x", "--model", "inspyrenet_swin_b"], "does not hold the weights of inspyrenet_swin_b"),
    (["latest.pth", "photos", "--model", "inspyrenet_nano"], "cuts out objects, and these have to go somewhere"),
    (["latest.pth", "photos", "-o", "x", "--model", "inspyrenet_nano", "--top", "3"], "--top is for networks that name classes"),
    (["latest.pth", "photos", "-o", "x", "--model", "inspyrenet_nano", "--resolution", "8"], "resolution is 8; it has to be at least 32"),
    (["latest.pth", "photos", "-o", "x.png", "--model", "inspyrenet_nano"], "2 answers are too many for one file"),
])
def test_what_cannot_be_is_one_sentence(released, monkeypatch, arguments, message):
    monkeypatch.chdir(released)
    with pytest.raises(InputError, match=message):
        main(arguments)


def test_a_picture_that_cannot_be_read_is_told_and_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    square(40, 40).save(tmp_path / "b.png")
    failed = []
    model, info = load_model("inspyrenet_nano")
    found = list(cut_each(model, info, [tmp_path / "a.png", tmp_path / "b.png"], failed=lambda path, error: failed.append(path.name)))
    assert failed == ["a.png"] and [answer.path.name for answer in found] == ["b.png"]
