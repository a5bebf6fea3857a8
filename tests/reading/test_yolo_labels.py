"""Masks as YOLO's text files: outlines whose area is the ink's, boxes and key points, exact to the pixel."""
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from zoo.errors import InputError
from zoo.reading.coco import box
from zoo.reading.digits import Digits, colourful_scene, write_digit_scenes
from zoo.reading.yolo import outline, pose_line, segment_line


def area(polygon) -> float:
    x, y = np.array(polygon).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def winding(polygon, x: float, y: float) -> int:
    """How often the polygon goes round a point."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) > x:
            crossings += 1 if y1 > y0 else -1
    return crossings


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.booleans()).filter(np.any))
def test_an_outline_goes_once_round_every_pixel_and_no_other(mask):
    polygon = outline(mask)
    assert area(polygon) == mask.sum()
    inside = [[winding(polygon, x + 0.37, y + 0.41) for x in range(mask.shape[1])] for y in range(mask.shape[0])]
    assert np.array_equal(np.array(inside), mask.astype(int))


def test_lines_are_shares_of_the_sides():
    mask = np.zeros((4, 8), bool)
    mask[1:3, 2:6] = True
    assert segment_line(7, mask) == "7 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75"
    ends = "0.3125 0.375 2 0.6875 0.375 2 0.3125 0.625 2 0.3125 0.375 2"
    assert pose_line(7, mask) == f"7 0.5 0.5 0.5 0.5 {ends}"


def test_scenes_are_written_with_exact_labels(tmp_path):
    write_digit_scenes(tmp_path, 3, 2, size=64, layout="yolo")
    assert [len(list((tmp_path / part / split).iterdir())) for part in ("images", "labels", "pose/images", "pose/labels")
            for split in ("train", "val")] == [3, 2] * 4
    digits = Digits("val")
    scene = colourful_scene(digits, 64, np.random.default_rng((0, 1, 1)))
    lines = (tmp_path / "labels" / "val" / "000001.txt").read_text().splitlines()
    for line, label, mask in zip(lines, scene.labels, scene.masks, strict=True):
        name, *numbers = line.split()
        corners = np.array(numbers, float).reshape(-1, 2) * 64
        left, top, width, height = box(mask)
        assert int(name) == label and area(corners) == pytest.approx(mask.sum())
        assert (*corners.min(0), *corners.max(0)) == pytest.approx((left, top, left + width, top + height))
    for name, folder in (("digits", tmp_path), ("digits-pose", tmp_path / "pose")):
        data = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert data["path"] == str(folder) and data["names"][9] == "9"
    assert data["kpt_shape"] == [4, 3] and data["flip_idx"] == [0, 3, 2, 1]


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(InputError, match="coco, yolo, not 'voc'"):
        write_digit_scenes(tmp_path, 1, 1, layout="voc")
    assert not list(tmp_path.iterdir())
