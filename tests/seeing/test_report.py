"""The page of a training, and what is drawn in it."""
import dataclasses
import math
import re

import numpy as np
import pytest
from html_pages import Page
from PIL import Image

from zoo.reading.scalars import Scalars
from zoo.seeing import mistakes
from zoo.seeing.curves import LINES, MOST, Chart, draw, ticks, training_charts
from zoo.seeing.report import PAIRS, ROWS, Mistake, Mistakes, Report, render

ODD = ["<script>alert(1)</script>", 'a&amp;b "c" \'d\'', "", "a name that is so long that it has to be broken", "猫/犬", "\udcff"]


def _rows(names):
    numbers = {"images": 3, "precision": 50.0, "recall": math.nan}
    return [{"class": name, **numbers, "f1": 10.0 * (i % 9)} for i, name in enumerate(names)]


def _report(names, **changes):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    counts = np.random.default_rng(1).integers(0, 9, (len(names), len(names)))
    report = Report(f"model on {names[0]}", {"top1": "50.0%"}, {"Classes": ", ".join(names[:3])}, ["A note & more."],
                    {"Go on": "zoo train <x>"},
                    [Chart(names[0], {name: [(1, 2.0), (2, 1.0)] for name in names[:LINES]}, "epoch", mark=1, marked="best")], "Written.",
                    table=_rows(names), by="f1", confusion=counts, classes=names,
                    mistakes=Mistakes("Worst.", [Mistake(name, "seen", [("what", picture)]) for name in names[:6]], {names[0]: (1, 2, 3)}))
    return dataclasses.replace(report, **changes)


def test_odd_names_are_text():
    page = Page(render(_report(ODD)).encode("utf-8", "replace").decode())
    for name in ODD[:2] + ODD[4:5]:
        assert page.texts.count(name) >= 3, name  # as a line's, a row's and a picture's
        assert any(name in alt for alt, _ in page.pictures)
    assert page.says("A note & more.") and page.says("zoo train <x>")


def test_one_class():
    page = Page(render(_report(["only"])))
    assert page.tags.count("table") == 2 and len(page.pictures) == 1


def test_what_there_is_no_number_for_is_a_dash():
    page = Page(render(_report(["a", "b"])))
    assert page.texts.count("–") == 2 and not page.says("nan")


def test_without_an_evaluation_there_are_curves_alone():
    page = Page(render(_report(["a"], table=(), confusion=None, mistakes=None)))
    assert "table" not in page.tags and "img" not in page.tags and page.tags.count("svg") == 1


def test_many_classes_stay_a_small_page():
    names = [f"class {i}" for i in range(3000)]
    text = render(_report(names))
    page = Page(text)
    assert len(text) < 300_000 and page.tags.count("tr") == 1 + ROWS + 1 + PAIRS
    assert page.says(f"The {ROWS} classes with the lowest F1 of 3000") and page.says(f"The {PAIRS} most frequent")


def test_confusions_of_many_classes_are_the_most_frequent_ones():
    counts = np.diag(np.full(30, 50))
    counts[3, 7], counts[8, 2] = 9, 4
    page = Page(render(_report([f"c{i}" for i in range(30)], confusion=counts)))
    first = page.texts.index("of the class, %") + 1
    assert page.texts[first:first + 8] == ["c3", "c7", "9", "15.3", "c8", "c2", "4", "7.4"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.0131), (-3, 5), (2, 2), (0, 0), (-1, -1), (1e-6, 1e-3), (0, 12345)])
def test_ticks_reach_over_the_values(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    assert found == sorted(set(found))


def _line(drawn):
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in re.findall(r'points="([^"]+)"', drawn)]


def test_a_line_is_broken_where_there_is_no_number_and_that_is_said():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 4.0), (5, math.inf), (6, 3.0), (7, 2.0)]
    drawn = draw(Chart("loss", {"a<b": points}, "epoch"))
    assert [len(piece) for piece in _line(drawn)] == [2, 1, 2] and "nan" not in drawn and ">inf" not in drawn
    assert "a&lt;b was not a finite number at 2 of 7 points" in drawn and "loss by epoch: a&lt;b from 1 to 2" in drawn
    (x1, y1), (x2, y2) = _line(drawn)[0]
    assert x2 > x1 and y2 < y1  # greater is higher
    assert "There is no finite number to draw." in draw(Chart("loss", {"a": [(1, math.nan)]}, "epoch"))


def test_long_curves_are_means_of_neighbours():
    drawn = draw(Chart("loss", {"a": [(i, float(i % 2)) for i in range(100 * MOST)]}, "iteration"))
    line, = _line(drawn)
    assert len(line) == MOST and len({y for _, y in line}) == 1 and len(drawn) < 10_000


def test_charts_of_a_training():
    scalars = Scalars(
        {"lr": [(2, 0.1), (4, 0.2), (6, 0.1)], "loss": [(2, 3.0), (4, 2.0), (6, 1.0)], "loss_cls": [(2, 1.0), (4, 1.0), (6, 1.0)]},
        {"iou/mean": [(1, 50.0)], **{f"iou/a/{i}": [(1, float(i))] for i in range(20)}, "coco/bbox_mAP": [(1, 0.5), (2, -1.0)],
         "coco/segm_mAP": [(1, 0.4)], "coco/bbox_mAP_l": [(1, -1.0)], "mIoU": [(1, 7.0)]},
        {2: 1, 4: 1, 6: 2})
    charts = {chart.title: chart for chart in training_charts(scalars, 2)}
    loss = charts["loss, in training"]
    assert list(loss.lines) == ["loss", "loss_cls"] and loss.lines["loss"] == [(0.5, 3.0), (1, 2.0), (1.5, 1.0)] and loss.mark == 2
    iou = charts["iou, held-out data (the 7 lowest of 20 classes)"]
    assert list(iou.lines) == ["mean", *(f"a/{i}" for i in range(7))] and iou.unit == "%"
    assert charts["coco bbox, held-out data"].lines == {"bbox_mAP": [(1, 0.5)]} and charts["coco segm, held-out data"].unit == ""
    assert charts["held-out data"].lines == {"mIoU": [(1, 7.0)]}
    assert training_charts(Scalars(), None) == []


def test_pictures_of_masks_show_where_they_differ():
    target, answer = np.zeros((2, 10, 20), np.int64)
    target[:, :5], answer[:, 15:] = 1, 1
    target[0, 10], answer[0, 10] = 1, 2
    target[9, 10] = 255  # not labelled
    answer[9, 10] = 2
    colours = np.array([(0, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)
    shown = {what: np.asarray(picture) for what, picture in mistakes.masks(Image.new("RGB", (20, 10), "white"), target, answer, colours)}
    difference = shown["difference"]
    assert (difference[5, 2] == mistakes.MISSED).all() and (difference[5, 17] == mistakes.FALSE).all()
    assert (difference[0, 10] == mistakes.CONFUSED).all() and (difference[9, 10] == 127).all() and (difference[5, 10] == 127).all()
    assert (shown["given"][5, 2] == (102, 252, 102)).all() and (shown["given"][5, 17] == 255).all()
    assert (shown["answer"][9, 10] == 255).all()
    large = dict(mistakes.masks(Image.new("RGB", (4000, 2000)), *np.zeros((2, 2000, 4000), np.uint8), colours))
    assert {picture.size for picture in large.values()} == {(320, 160)}


def test_boxes_are_drawn_where_they_are():
    drawn = np.asarray(mistakes.boxes(Image.new("RGB", (960, 480)), [((200, 100, 600, 300), "cat 90%", mistakes.FALSE),
                                                                     ((0, 0, 960, 480), "dog", mistakes.MISSED)]))
    assert drawn.shape == (240, 480, 3) and (drawn[100, 100] == mistakes.FALSE).all() and (drawn[120, 300] == mistakes.FALSE).all()
    assert (drawn[:, 0] == mistakes.MISSED).all(1).any() and not (drawn[:, 0] == mistakes.MISSED).all()  # dashed
