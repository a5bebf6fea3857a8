"""Which mask belongs to which picture or volume, what may be in it, and masks in pictures."""
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zoo.errors import InputError, near_misses, times
from zoo.reading.pictures import open_picture, picture_tensor


def paired_files(root: Path, split: str, masks: str, suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """The files of root/split/images, each with that of the same place in root/split/masks."""
    check_split(split)
    if not root.is_dir():
        raise InputError(f"there is no data folder {root}; set data_root to the folder that holds train/ and val/")
    lists = []
    for name in ("images", masks):
        folder = root / split / name
        if not folder.is_dir():
            near = near_misses(name, os.listdir(folder.parent)) if folder.parent.is_dir() else ""
            raise InputError(f"there is no folder {folder}{near}")
        lists.append(sorted(path for path in folder.iterdir() if path.name.lower().endswith(suffixes)))
    if not lists[0] or len(lists[0]) != len(lists[1]):
        raise InputError(f"{root / split} has {len(lists[0])} files in images and {len(lists[1])} in {masks}, where pairs are needed")
    return list(zip(*lists, strict=True))


def read_picture_mask(path: Path) -> Tensor:
    """The values of the pixels of a mask, (H, W). Raises InputError for a file that is no picture."""
    try:
        with Image.open(path) as mask:
            return torch.from_numpy(np.array(mask))
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"the mask {path} cannot be read as a picture: {error}") from None


def read_masked_picture(picture_path: Path, mask_path: Path, mean: Sequence[float], std: Sequence[float], classes: int,
                        ) -> tuple[Tensor, Tensor]:
    """The picture (C, H, W) as `picture_tensor` gives it, and the labels of its pixels (1, H, W) uint8.

    Raises InputError for files that are no pictures, of different shapes, and for labels that are not below `classes`.
    """
    inputs = picture_tensor(open_picture(picture_path, len(mean)), mean, std)
    labels = read_picture_mask(mask_path)
    if labels.shape != inputs.shape[1:]:
        raise InputError(f"the mask {mask_path} is of shape {times(labels.shape)}, its picture {picture_path} of {times(inputs.shape[1:])}")
    check_labels(labels, classes, mask_path)
    return inputs, labels[None].to(torch.uint8)


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
