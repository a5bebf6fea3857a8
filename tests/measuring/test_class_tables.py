"""Numbers of every class against scikit-learn, MONAI, and sums worked out by hand."""
import csv
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from zoo.measuring import class_tables, per_class


def _column(rows, name):
    return [row[name] for row in rows]


def test_classes_against_scikit_learn():
    rng = np.random.default_rng(0)
    targets, answers = rng.integers(0, 4, (2, 50))
    rows = class_tables.classes(targets, answers, ["a", "b", "c", "d", "never"])
    expected = precision_recall_fscore_support(targets, answers, labels=range(5), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1"), expected, strict=False):
        np.testing.assert_allclose(_column(rows, name), 100 * values)
    assert _column(rows, "images") == expected[3].tolist()
    assert _column(rows, "accuracy") == pytest.approx([100 * accuracy_score(targets == i, answers == i) for i in range(5)])


def test_areas_have_dice_of_all_pixels():
    counts = np.array([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    rows = class_tables.areas(counts, ["ground", "b", "c"])
    assert _column(rows, "dice") == pytest.approx([1200 / 15, 40, math.nan], nan_ok=True)
    assert _column(rows, "iou") == pytest.approx([100 * 6 / 9, 25, math.nan], nan_ok=True)


def test_surfaces_are_compared_in_millimetres():
    target, answer = np.zeros((2, 9, 9, 9), np.uint8)
    target[2:6, 2:6, 2:6], answer[2:6, 2:6, 3:7] = 1, 1  # one voxel further along the last axis
    for spacing, dice in (((1.0, 1.0, 0.9), 1), ((1.0, 1.0, 1.1), None), ((0.5, 0.5, 1.1), None)):
        found = class_tables.surface_dice(target, answer, 3, spacing)
        assert math.isnan(found[1]) and (found[0] == 1 if dice else 0.3 < found[0] < 1)
        assert per_class.overlap(target, answer, 3, spacing).hd95[0] == pytest.approx(spacing[2])
    assert class_tables.surface_dice(target, np.zeros_like(target), 2, (1.0, 1.0, 1.0)).tolist() == [0]
    overlaps = [per_class.overlap(target, other, 2, (1, 1, 1)) for other in (target, np.zeros_like(target))]
    surfaces = [class_tables.surface_dice(target, other, 2, (1, 1, 1)) for other in (target, np.zeros_like(target))]
    row, = class_tables.volumes(overlaps, surfaces, ["ground", "a"])
    assert row == {"class": "a", "images": 2, "missed": 1, "dice": 50, "hd95": 0, "surface_dice": 50}


def test_calibration_error():
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.45, 0.5, 0.1])  # bins of 0.1: (0.9, 1], (0.4, 0.5] twice, (0, 0.1]
    right = np.array([1, 1, 1, 0, 0, 1, 0], bool)
    by_hand = (4 * abs(0.95 - 0.75) + 2 * abs(0.475 - 0.5) + 1 * abs(0.1 - 0)) / 7
    assert class_tables.calibration_error(confidences, right, bins=10) == pytest.approx(100 * by_hand)
    assert class_tables.calibration_error(np.ones(3), np.ones(3, bool)) == 0
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.2, 1, 200_000)
    assert class_tables.calibration_error(sure, rng.uniform(size=sure.size) < sure) < 1  # of probabilities that are meant
    assert class_tables.calibration_error(sure, rng.uniform(size=sure.size) < sure - 0.1) == pytest.approx(10, abs=1)


def test_means_leave_out_what_has_no_number_and_tables_say_so(tmp_path):
    rows = class_tables.with_mean([{"class": "a, b", "images": 3, "recall": 50.0}, {"class": "c", "images": 0, "recall": math.nan}])
    assert rows[-1]["class"] == "mean" and rows[-1]["recall"] == 50 and math.isnan(rows[-1]["images"])
    assert class_tables.table(rows) == ["class  images  recall", "a, b        3   50.00", "c           0       -", "mean        -   50.00"]
    class_tables.write_csv(rows, tmp_path / "x.csv")
    assert list(csv.reader((tmp_path / "x.csv").open())) == [
        ["class", "images", "recall"], ["a, b", "3", "50.0"], ["c", "0", ""], ["mean", "", "50.0"]]
