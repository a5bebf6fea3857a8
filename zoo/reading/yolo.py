"""Masks as the text files of YOLO have them, all lengths being shares of the picture's sides.

A line holds the class of an object, and of models that segment its outline, x₁ y₁ x₂ y₂ …; of those that find key points the middle, width
and height of its box, and of each point x, y and 2, which means that it is seen.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from zoo.reading.coco import box

ENDS = ("top", "right", "bottom", "left")
MIRRORED = (0, 3, 2, 1)  # which of the ends each is in the mirror


def segment_line(label: int, mask: np.ndarray) -> str:
    return f"{label} {_shares(outline(mask), mask)}"


def pose_line(label: int, mask: np.ndarray) -> str:
    """With the ends of the object as key points: the middles of its topmost, rightmost, lowest and leftmost pixel.

    Of several the first in the order of reading.
    """
    left, top, width, height = box(mask)
    rows, columns = np.nonzero(mask)
    ends = [np.argmin(rows), np.argmax(columns), np.argmax(rows), np.argmin(columns)]
    middle_and_size = [(left + width / 2, top + height / 2), (width, height)]
    points = (f" {_shares([(columns[end] + 0.5, rows[end] + 0.5)], mask)} 2" for end in ends)
    return f"{label} {_shares(middle_and_size, mask)}{''.join(points)}"


def data_file(folder: Path, classes: Sequence[str], points: Sequence[str] = ()) -> str:
    """The YAML that says where the data are."""
    data = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": dict(enumerate(classes))}
    if points:
        data |= {"kpt_shape": [len(points), 3], "flip_idx": list(MIRRORED)}
    return yaml.safe_dump(data, sort_keys=False)


def outline(mask: np.ndarray) -> list[tuple[int, int]]:
    """The corners (x, y) of one polygon along the edges of the pixels of `mask` (H, W), whose area is that of the pixels.

    It runs with the pixels on its right. To other parts and to holes it goes along a line, and on the same line back.
    """
    loops = _loops(mask)
    start = loops[0][0]
    polygon = [*loops[0], start]
    for loop in loops[1:]:
        polygon += [*loop, loop[0], start]
    return polygon if len(loops) > 1 else loops[0]


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    inside = np.pad(mask.astype(bool), 1)
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in np.argwhere(inside).tolist():
        x, y = column - 1, row - 1
        corners = ((x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1))
        for side, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            if not inside[row + down, column + right]:
                edges.setdefault(corners[side], []).append(corners[(side + 1) % 4])
    loops = []
    while edges:
        loop = [next(iter(edges))]
        while (ends := edges.get(loop[-1])) is not None:
            loop.append(ends.pop())
            if not ends:
                del edges[loop[-2]]
        loop.pop()  # the first again
        loops.append([corner for before, corner, after in zip([loop[-1], *loop], loop, [*loop[1:], loop[0]], strict=False)
                      if (corner[0] - before[0]) * (after[1] - corner[1]) != (corner[1] - before[1]) * (after[0] - corner[0])])
    return loops


def _shares(points: Sequence[tuple[float, float]], mask: np.ndarray) -> str:
    height, width = mask.shape
    return " ".join(f"{number:.8g}" for x, y in points for number in (x / width, y / height))
