"""What `zoo test --per-class` says of every class, and how far a classifier's probabilities can be trusted.

Rows are those of `zoo.measuring.per_class`: numbers in percent but for counts and distances, NaN for what there is no number for.
"""
import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zoo.errors import require
from zoo.files import replacing
from zoo.measuring import per_class
from zoo.measuring.per_class import Row

BINS = 15  # of calibration
TOLERANCE = 1.0  # millimetres, of surface Dice


def classes(targets: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> list[Row]:
    """As `per_class.classification`, with the accuracy: the share of all images that are rightly said to be, or not, of the class."""
    counts = per_class.confusion(targets, answers, len(names))
    hits, given, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
    accuracy = 100 * (counts.sum() - given - answered + 2 * hits) / max(1, counts.sum())
    rows = per_class.classification(targets, answers, names)
    return [{**row, "accuracy": value} for row, value in zip(rows, accuracy.tolist(), strict=True)]


def areas(counts: np.ndarray, names: Sequence[str]) -> list[Row]:
    """As `per_class.areas`, with Dice, of all pixels together, too."""
    with np.errstate(invalid="ignore"):
        dice = 200 * counts.diagonal() / (counts.sum(0) + counts.sum(1))
    return [{"class": row["class"], "pixels": row["pixels"], "iou": row["iou"], "dice": value, "precision": row["precision"],
             "recall": row["recall"]} for row, value in zip(per_class.areas(counts, names), dice.tolist(), strict=True)]


def surface_dice(target: np.ndarray, answer: np.ndarray, classes: int, spacing: Sequence[float]) -> np.ndarray:
    """MONAI's surface Dice of one volume by class without the background, (classes - 1,), NaN where the volume does not hold the class.

    The share of either surface that is within `TOLERANCE` millimetres of the other; `spacing` is millimetres per voxel.
    """
    require("measuring masks", "volumes", "monai")
    import torch
    from monai.metrics import compute_surface_dice

    found = np.full(classes - 1, np.nan)
    for i in range(1, classes):
        right, answered = (torch.from_numpy(labels == i)[None, None] for labels in (target, answer))
        if right.any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of MONAI about arguments that it passes itself
                found[i - 1] = compute_surface_dice(answered, right, [TOLERANCE], include_background=True, spacing=list(spacing)).item()
    return found


def volumes(overlaps: Sequence[per_class.Overlap], surfaces: Sequence[np.ndarray], names: Sequence[str]) -> list[Row]:
    """As `per_class.overlaps`, with the mean of surface Dice over the volumes that hold the class."""
    found = np.array(surfaces).reshape(len(surfaces), len(names) - 1)
    held = np.isfinite(found)
    with np.errstate(invalid="ignore"):
        means = 100 * np.where(held, found, 0).sum(0) / held.sum(0)
    return [{**row, "surface_dice": value} for row, value in zip(per_class.overlaps(overlaps, names), means.tolist(), strict=True)]


def calibration_error(confidences: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error (arXiv 1706.04599) in percent, of the probabilities (N,) of the most probable classes.

    Σ over the bins (0, 1/bins], (1/bins, 2/bins], … of their share of the images times the distance of the mean probability in the bin from
    the share of right answers, `right` (N,) bool.
    """
    of = np.ceil(confidences * bins).clip(1, bins).astype(int) - 1
    sums = np.bincount(of, weights=confidences - right, minlength=bins)
    return float(100 * np.abs(sums).sum() / max(1, len(confidences)))


def with_mean(rows: list[Row]) -> list[Row]:
    """The rows, and one with the mean of every column over the classes that have a number; counts have none."""
    columns = [name for name, value in rows[0].items() if isinstance(value, float)]
    values = {name: [value for row in rows if not math.isnan(value := float(row[name]))] for name in columns}
    means = {name: sum(found) / len(found) if found else math.nan for name, found in values.items()}
    return [*rows, {name: "mean" if name == "class" else means.get(name, math.nan) for name in rows[0]}]


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of text, a row each; "-" for NaN."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) for row in cells]


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2f}"
    return str(value)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """The rows as a table in a file; nothing for NaN."""
    with replacing(path) as written, written.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        lines.writeheader()
        for row in rows:
            lines.writerow({name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()})
