"""The field's protocol: made small, enlarged, and measured, with bicubic interpolation's numbers, which need no weights."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from zoo.errors import InputError
from zoo.measuring.restoration import luminance, measured, psnr, ssim
from zoo.reading.photographs import HELD_OUT, PHOTOGRAPHS, photographs
from zoo.reading.shrinking import cut, enlarge, shrink

TRAINED = json.loads((Path(__file__).parents[1] / "golden" / "a2n" / "trained.json").read_text())["values"]


@pytest.fixture(scope="module")
def pictures():
    return photographs("train") | photographs("val")


def test_whole_pictures_are_held_out(pictures):
    assert set(PHOTOGRAPHS["val"]) == set(HELD_OUT) and not set(HELD_OUT) & set(PHOTOGRAPHS["train"])
    assert len(pictures) == 10 and all(p.dtype == torch.uint8 and p.shape[0] == 3 for p in pictures.values())
    with pytest.raises(InputError, match="split"):
        photographs("test")


@pytest.mark.parametrize("case", [case for case in TRAINED if not case.endswith("_")])  # the others are Set5's, which no package ships
def test_bicubic_has_the_numbers_of_the_protocol(pictures, case):
    scale, name = int(case[1]), case.partition("/")[2]
    true = cut(pictures[name], scale)
    assert measured(enlarge(shrink(true, scale), scale), true, scale)["psnr"] == pytest.approx(TRAINED[case]["bicubic"], abs=6e-5)


def test_shrinking_is_pillows(pictures):
    from PIL import Image

    true = cut(pictures["chelsea"], 3)
    pillow = Image.fromarray(true.permute(1, 2, 0).numpy()).resize((150, 100), Image.Resampling.BICUBIC)
    difference = shrink(true, 3).permute(1, 2, 0).int().numpy() - np.asarray(pillow).astype(int)
    assert true.shape == (3, 300, 450) and np.abs(difference).max() <= 1


def test_ssim_is_skimages():
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (40, 33, 3), dtype=np.uint8)
    b = np.clip(a + generator.normal(0, 20, a.shape), 0, 255).round().astype(np.uint8)
    given = [torch.from_numpy(x).permute(2, 0, 1) for x in (a, b)]
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, win_size=11)
    _, full = structural_similarity(a, b, channel_axis=2, full=True, **options)
    assert ssim(*given) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)


def test_luminance_and_psnr_by_hand():
    white, black = (torch.full((3, 30, 30), value) for value in (255, 0))
    assert luminance(white).unique().item() == pytest.approx(235, abs=0.01) and luminance(black).unique().item() == 16
    assert psnr(white, black) == 0 and psnr(white, white) == math.inf
    found = measured(white - 1, white, 2)
    assert found["psnr_rgb"] == pytest.approx(20 * math.log10(255)) and found["ssim"] > 0.99
    assert set(found) == {"psnr", "ssim", "psnr_rgb", "ssim_rgb"}


def test_the_border_does_not_count():
    true = torch.randint(256, (3, 40, 30), dtype=torch.uint8)
    other = true.clone()
    other[:, :2], other[:, -2:], other[:, :, :2], other[:, :, -2:] = 0, 0, 0, 0
    assert measured(other, true, 2)["psnr"] == math.inf and measured(other, true, 2)["ssim"] == pytest.approx(1)
    assert measured(other, true, 1)["psnr"] < 40


@pytest.mark.parametrize(("a", "b", "message"), [
    ((3, 20, 20), (3, 20, 21), "pictures of 3×20×20 and 3×20×21 values"),
    ((3, 20, 14), (3, 20, 14), "14×20 pixels has less than 11 inside a border of 2")])
def test_pictures_that_cannot_be_compared(a, b, message):
    with pytest.raises(InputError, match=message):
        measured(torch.zeros(a), torch.zeros(b), 2)
    with pytest.raises(InputError, match="too small to be made 3 times smaller"):
        cut(torch.zeros(3, 2, 9), 3)
