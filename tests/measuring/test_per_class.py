"""Tables of classes, against the libraries' own sums and numbers worked out by hand."""
import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from zoo.measuring import per_class
from zoo.measuring.per_class import Boxes


def _column(rows, name):
    return [row[name] for row in rows]


def test_classification_with_a_class_that_is_never_there_and_one_that_is_never_answered():
    rows = per_class.classification(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 2, 0, 0]), ["a", "<b>", "c", "c"])
    assert _column(rows, "class") == ["a", "<b>", "c", "c"]
    assert _column(rows, "images") == [3, 2, 0, 0] and _column(rows, "answers") == [4, 0, 1, 0]
    assert _column(rows, "precision") == pytest.approx([50, math.nan, 0, math.nan], nan_ok=True)
    assert _column(rows, "recall") == pytest.approx([200 / 3, 0, math.nan, math.nan], nan_ok=True)
    assert all(type(value) in (str, int, float) for row in rows for value in row.values())


def test_confusion_is_scikit_learns_and_leaves_out_what_is_not_labelled():
    rng = np.random.default_rng(0)
    targets, answers = rng.integers(0, 4, (2, 9, 11), dtype=np.uint8)
    expected = confusion_matrix(targets.ravel(), answers.ravel(), labels=range(5))
    np.testing.assert_array_equal(per_class.confusion(targets, answers, 5), expected)
    targets[0] = 255
    assert per_class.confusion(targets, answers, 5).sum() == 8 * 11


def test_areas():
    counts = np.array([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    rows = per_class.areas(counts, ["ground", "b", "c"])
    assert _column(rows, "pixels") == [8, 2, 0]
    assert _column(rows, "iou") == pytest.approx([100 * 6 / 9, 25, math.nan], nan_ok=True)
    assert _column(rows, "precision") == pytest.approx([600 / 7, 100 / 3, math.nan], nan_ok=True)
    assert _column(rows, "recall") == pytest.approx([75, 50, math.nan], nan_ok=True)


def test_overlaps_of_masks_and_volumes():
    target, answer = np.zeros((2, 12, 12), np.uint8)
    target[2:6, 2:6], answer[2:6, 4:8] = 1, 1  # half of either; outlines two apart
    answer[9, 9] = 2  # where there is none
    found = per_class.overlap(target, answer, 4)
    assert found.dice == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)
    assert found.hd95 == pytest.approx([2, math.nan, math.nan], nan_ok=True)
    deep = [np.stack([labels] * 3, -1) for labels in (target, answer)]
    assert per_class.overlap(*deep, 2, spacing=(1.0, 2.5, 1.0)).hd95 == pytest.approx([5])
    missed = per_class.overlap(target, np.zeros_like(target), 4)
    rows = per_class.overlaps([found, missed], ["ground", "a", "b", "c"])
    assert rows[0] == {"class": "a", "images": 2, "missed": 1, "dice": pytest.approx(25), "hd95": pytest.approx(2)}
    assert rows[1]["images"] == 0 and math.isnan(rows[1]["dice"]) and math.isnan(rows[1]["hd95"])
    target[:, 6:] = 255  # what is not labelled is neither right nor wrong
    assert per_class.overlap(target, answer, 2).dice == pytest.approx([2 * 8 / (16 + 8)])


def test_no_image_is_a_table_without_numbers():
    assert math.isnan(per_class.overlaps([], ["ground", "a"])[0]["dice"])


def _boxes(*edges, labels, scores=None, crowd=None):
    crowd = None if crowd is None else np.array(crowd, bool)
    return Boxes(np.array(edges, float).reshape(-1, 4), np.array(labels, int), None if scores is None else np.array(scores), crowd)


def test_which_boxes_are_missed_and_which_are_false():
    target = _boxes((0, 0, 10, 10), (0, 0, 10, 12), (50, 50, 60, 60), (70, 70, 99, 99), labels=[0, 0, 1, 0], crowd=[0, 0, 0, 1])
    answer = _boxes((0, 0, 10, 12), (0, 0, 10, 11), (0, 0, 10, 10), (50, 50, 60, 60), (75, 75, 80, 80), labels=[0, 0, 0, 0, 0],
                    scores=[0.9, 0.8, 0.7, 0.6, 0.5])
    missed, false = per_class.unmatched(target, answer)
    assert missed.tolist() == [False, False, True, False]  # the third is of another class, the last a crowd
    assert false.tolist() == [False, False, True, True, False]  # every box is found once; in a crowd nothing is false
    nothing = _boxes(labels=[], scores=[])
    assert per_class.unmatched(target, nothing)[0].tolist() == [True, True, True, False]
    assert per_class.unmatched(nothing, answer)[1].all()
