"""What every class of held-out data gets, from plain arrays: tables with a row for each class.

A row is a dict: `class`, the name, then counts, then numbers in percent but for distances. NaN stands for what there is no number for:
the recall of a class without samples, the precision of one that is never answered.
"""
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from zoo.errors import require

Row = dict[str, str | float]


def classification(targets: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> list[Row]:
    """Images, answers, precision, recall and F1 of every class, from class indices (N,)."""
    from sklearn.metrics import precision_recall_fscore_support

    counts = [np.bincount(indices, minlength=len(names)) for indices in (targets, answers)]
    numbers = precision_recall_fscore_support(targets, answers, labels=range(len(names)), zero_division=cast(Any, np.nan))
    precision, recall, f1 = (100 * np.asarray(values) for values in numbers[:3])
    return _rows(names, images=counts[0], answers=counts[1], precision=precision, recall=recall, f1=f1)


def confusion(targets: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """How often class j was answered where class i is right, (classes, classes), from class indices of one shape.

    Targets that are no class, such as 255 for what is not labelled, do not count. The sum over images is what `areas` takes.
    """
    labelled = (targets >= 0) & (targets < classes)
    pairs = targets[labelled].astype(np.int64) * classes + answers[labelled]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def areas(counts: np.ndarray, names: Sequence[str]) -> list[Row]:
    """Pixels, intersection over union, precision and recall of every class over all pixels, from a `confusion`."""
    hits, right, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou, precision, recall = (hits / of for of in (right + answered - hits, answered, right))
    return _rows(names, pixels=right, iou=100 * iou, precision=100 * precision, recall=100 * recall)


@dataclass(frozen=True)
class Overlap:
    """What the mask of one image is worth, by class without the first, the background: arrays (classes - 1,).

    `dice` is a share, NaN where the image does not hold the class; `hd95` the 95th percentile of the distances between the outlines, NaN
    where one of them is missing.
    """

    dice: np.ndarray
    hd95: np.ndarray


def overlap(target: np.ndarray, answer: np.ndarray, classes: int, spacing: Sequence[float] | None = None) -> Overlap:
    """MONAI's Dice and Hausdorff distance of one image, from class indices (*sizes); distances are in units of `spacing`, or positions.

    Targets that are no class do not count.
    """
    require("measuring masks", "volumes", "monai")
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance

    answer = np.where((target >= 0) & (target < classes), answer, target)
    dice, hd95 = np.full(classes - 1, np.nan), np.full(classes - 1, np.nan)
    for i in range(1, classes):
        found, right = (torch.from_numpy(labels == i)[None, None] for labels in (answer, target))
        dice[i - 1] = compute_dice(found, right).item()
        if found.any() and right.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of MONAI about arguments that it passes itself
                distance = compute_hausdorff_distance(found, right, include_background=True, percentile=95, spacing=spacing)
            hd95[i - 1] = distance.item()
    return Overlap(dice, hd95)


def overlaps(found: Sequence[Overlap], names: Sequence[str]) -> list[Row]:
    """Of every class but the first: the images that hold it, in how many of them it was not found, and means of Dice and HD95.

    Dice over the images that hold the class, HD95 over those of them where it was found.
    """
    dice, hd95 = (np.array([getattr(each, name) for each in found]).reshape(len(found), len(names) - 1) for name in ("dice", "hd95"))
    held, outlined = np.isfinite(dice), np.isfinite(hd95)
    return _rows(names[1:], images=held.sum(0), missed=(held & ~outlined).sum(0), dice=100 * _mean(dice, held), hd95=_mean(hd95, outlined))


@dataclass(frozen=True)
class Boxes:
    """Boxes in one image: `boxes` (n, 4) as left, top, right, bottom, class indices `labels` (n,), and `scores` (n,) of answers.

    `crowd` (n,) marks boxes of targets that hold many objects: answers inside are neither right nor wrong.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None


def unmatched(target: Boxes, answer: Boxes, iou: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes of the target no answer finds, and which answers are of no box of the target: two arrays of bool.

    The answer with the highest score chooses first, the box of its class that it overlaps most, by at least `iou`. Answers within
    a crowd of their class are neither; nor is the crowd.
    """
    require("measuring boxes", "mm", "pycocotools")
    from pycocotools import mask

    assert answer.scores is not None
    crowd = _crowd(target)
    missed, false = ~crowd, np.ones(len(answer.labels), bool)
    if not len(target.labels) or not len(answer.labels):
        return missed, false
    found, given = (np.concatenate([each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2]], 1) for each in (answer, target))
    shared = np.asarray(mask.iou(found, given, crowd.astype(np.uint8).tolist()))
    shared[answer.labels[:, None] != target.labels] = 0
    for i in np.argsort(-answer.scores, kind="stable"):
        open_to = np.where(missed, shared[i], 0)
        if open_to.max() >= iou:
            missed[open_to.argmax()] = false[i] = False
        elif (shared[i][crowd] >= iou).any():
            false[i] = False
    return missed, false


def _crowd(boxes: Boxes) -> np.ndarray:
    return np.zeros(len(boxes.labels), bool) if boxes.crowd is None else boxes.crowd


def _mean(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is valid; NaN where nothing is."""
    with np.errstate(invalid="ignore"):
        return np.where(valid, values, 0).sum(0) / valid.sum(0)


def _rows(names: Sequence[str], **columns: np.ndarray) -> list[Row]:
    return [{"class": name, **{column: values[i].item() for column, values in columns.items()}} for i, name in enumerate(names)]
