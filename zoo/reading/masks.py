"""Which mask belongs to which picture or volume, what may be in it, and masks in pictures."""
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from torch import Tensor

from zoo.errors import InputError, near_misses, times
from zoo.reading.pairs import pair
from zoo.reading.pictures import TURNED_ASIDE, UPRIGHT, files_below, open_picture, opening, orientation, picture_tensor, seen_size
from zoo.reading.say import say_once

LOOKED_AT = 32  # masks of a data set


def paired_files(root: Path, split: str, masks: str, suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """The files below root/split/images, each with the one below root/split/`masks` that `zoo.reading.pairs.pair` finds.

    Raises InputError for folders that are missing, and for files without a partner.
    """
    check_split(split)
    if not root.is_dir():
        raise InputError(f"there is no data folder {root}; set data_root to the folder that holds train/ and val/")
    folders = [root / split / name for name in ("images", masks)]
    for folder in folders:
        if not folder.is_dir():
            near = near_misses(folder.name, os.listdir(folder.parent)) if folder.parent.is_dir() else ""
            raise InputError(f"there is no folder {folder}{near}")
    pictures, labels = (files_below(folder, suffixes) for folder in folders)
    return pair(pictures, labels, *folders)


def read_picture_mask(path: str | Path, picture: str | Path | None = None) -> np.ndarray:
    """The values of the pixels of a mask, (H, W), as the file has them: of several pages the first, of a palette the places in it.

    A mask in colours whose channels are all alike counts as grey. It is turned as its own EXIF data say. With `picture`, the file
    that it is the mask of, it comes out as `open_picture` gives that: where the mask says nothing of its orientation, it lies on the
    picture as it is seen or as it is stored, which their sizes tell.

    Raises InputError for a file that is no picture, for a mask in colours, and for one of another size than its picture.
    """
    with opening(path, "mask") as mask:
        says = orientation(mask) != UPRIGHT
        mask = ImageOps.exif_transpose(mask)
        if picture is not None:
            mask = _as_seen(mask, says, path, picture)
        values = np.asarray(mask)
    if values.ndim == 3:
        colours = values[..., :3] if values.shape[2] > 2 else values[..., :1]
        if (colours != colours[..., :1]).any():
            raise InputError(f"the mask {path} is in colours, where the number of its class is needed in every pixel")
        values = colours[..., 0]
    return values.astype(np.uint8 if values.dtype == bool else values.dtype.newbyteorder("="), copy=False)


def _as_seen(mask: Image.Image, says: bool, path: str | Path, picture: str | Path) -> Image.Image:
    """A mask, which says how it is turned and is so, or not, turned as its picture is unless it is that already."""
    with opening(picture) as opened:
        turn, size = orientation(opened), seen_size(opened)
    stored = size[::-1] if turn in TURNED_ASIDE else size
    if mask.size == stored and turn != UPRIGHT and not says:
        if stored == size:
            raise InputError(f"the picture {picture} is turned by its EXIF orientation {turn}, and nothing says whether the mask {path} "
                             "was made of it before or after; save the picture as it is seen, without that entry, or give it to the mask")
        mask.getexif()[Base.Orientation] = turn
        mask = ImageOps.exif_transpose(mask)
    if mask.size != size:
        raise InputError(f"the mask {path} is of shape {times(mask.size[::-1])}, its picture {picture} of {times(size[::-1])}")
    return mask


@dataclass(frozen=True)
class MaskValues:
    """What the values in masks mean: `stored[label]` is a label's value in the files."""

    stored: tuple[int, ...]

    @classmethod
    def of(cls, classes: int, masks: Sequence[Path], given: Sequence[int] | None = None) -> Self:
        """Those that are `given`; without, the labels themselves, or 0 and 255 for two classes where `masks` have nothing else.

        Looks at `LOOKED_AT` of them, and says once in the log `zoo` if they are of 0 and 255. Raises InputError unless every class has
        a value of its own.
        """
        if given is not None:
            if len(given) != classes or len(set(given)) != classes:
                raise InputError(f"mask_values={list(given)}: there have to be {classes} different ones, one for each class")
            return cls(tuple(given))
        if classes == 2 and masks:
            looked_at = masks[::-(-len(masks) // LOOKED_AT)]
            if {value for mask in looked_at for value in np.unique(read_picture_mask(mask)).tolist()} - {0} == {255}:
                say_once("the masks in %s have values 0 and 255: 255 is taken for class 1", looked_at[0].parent)
                return cls((0, 255))
        return cls(tuple(range(classes)))

    def labels(self, values: np.ndarray, path: str | Path) -> np.ndarray:
        """The labels of the `values` that the mask at `path` holds: uint8, or int32 where there are more than 256 classes.

        Raises InputError for a value that is none of these.
        """
        found = np.unique(values)
        unknown = found[~np.isin(found, self.stored)]
        if len(unknown):
            shown = ", ".join(f"{value:g}" for value in unknown[:4].tolist()) + (", …" if len(unknown) > 4 else "")
            known = f"0 to {len(self.stored) - 1}" if self.stored == tuple(range(len(self.stored))) else ", ".join(map(str, self.stored))
            raise InputError(f"the mask {path} has unknown values {shown}; known are {known}; mask_values=[0, 255], for example, "
                             "says what stands for the classes, in their order")
        order = np.argsort(self.stored)
        labels = order[np.searchsorted(np.asarray(self.stored)[order], values)]
        return labels.astype(np.uint8 if len(self.stored) <= 256 else np.int32)


def read_masked_picture(picture_path: Path, mask_path: Path, mean: Sequence[float], std: Sequence[float], values: MaskValues,
                        ) -> tuple[Tensor, Tensor]:
    """The picture (C, H, W) as `picture_tensor` gives it, and the labels of its pixels (1, H, W), integers.

    Raises InputError for files that are no pictures, of different shapes, and for values that are none of `values`.
    """
    inputs = picture_tensor(open_picture(picture_path, len(mean)), mean, std)
    labels = values.labels(read_picture_mask(mask_path, picture_path), mask_path)
    return inputs, torch.from_numpy(labels)[None]


def check_labels(labels: Tensor, classes: int, path: str | Path) -> None:
    """Raises InputError unless `labels`, which the mask at `path` holds, are whole numbers from 0 to below `classes`."""
    found = labels.unique()
    unknown = [value for value in found.tolist() if value not in range(classes)]
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:4]) + (", …" if len(unknown) > 4 else "")
        raise InputError(f"the mask {path} has unknown labels {shown}; known are 0 to {classes - 1}")


def label_dtype(classes: int) -> torch.dtype:
    """The smallest type that holds the labels of so many classes."""
    return torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32


def check_split(split: str) -> None:
    if split not in ("train", "val"):
        raise InputError(f"split={split!r}: it is 'train' or 'val'")
