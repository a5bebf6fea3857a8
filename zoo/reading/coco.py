"""Boxes and masks as COCO's annotations have them."""
from typing import Any, cast

import numpy as np

from zoo.errors import require


def box(mask: np.ndarray) -> list[int]:
    """Left, top, width and height of what is set in `mask` (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of `mask` (H, W): column by column, beginning with how many are not set."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: None if counts[-1] else -1].tolist()}


def compressed_run_lengths(mask: np.ndarray) -> dict:
    """The same in the compressed form, `counts` being text, which COCO's results have."""
    require("masks in COCO's form", "mm", "pycocotools")
    from pycocotools import mask as masks
    encoded = masks.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": cast(bytes, encoded["counts"]).decode()}


def decoded(segmentation: dict) -> np.ndarray:
    """The mask (H, W) bool of compressed run lengths."""
    require("masks in COCO's form", "mm", "pycocotools")
    from pycocotools import mask as masks
    return masks.decode(cast(Any, segmentation)).astype(bool)
