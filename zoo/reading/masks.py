"""Which mask belongs to which picture or volume, what may be in it, and masks in pictures."""
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zoo.errors import InputError, near_misses, times
from zoo.reading.pairs import pair
from zoo.reading.pictures import files_below, open_picture, picture_tensor


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


def read_decathlon(path: Path, split: str, folds: int = 5) -> tuple[list[str], list[tuple[Path, Path]]]:
    """The classes in a `dataset.json` of the Medical Segmentation Decathlon, and pairs of a volume and its mask for "train" or "val".

    The file's `validation` list is the "val" part; without one, every `folds`-th of its `training` list, the rest being "train".
    Raises InputError for a file that is missing, no such description, or names nothing for the split.
    """
    check_split(split)
    described = _read_json(path)
    try:
        labels = {int(label): name for label, name in described["labels"].items()}
        training = [(entry["image"], entry["label"]) for entry in described["training"]]
        held_out = [(entry["image"], entry["label"]) for entry in described.get("validation", ()) if isinstance(entry, dict)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a description of the Decathlon's kind: {error!r}") from error
    if sorted(labels) != list(range(len(labels))):
        raise InputError(f"{path} has labels {sorted(labels)}, where they have to run from 0")
    held_out = held_out or training[::folds]
    chosen = held_out if split == "val" else [pair for pair in training if pair not in held_out]
    files = [(path.parent / image, path.parent / mask) for image, mask in chosen]
    if not files:
        raise InputError(f"{path} names no volumes for {split}")
    return [labels[i] for i in range(len(labels))], files


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


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"there is no {path}; set data_root to the folder that holds {path.name}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def check_split(split: str) -> None:
    if split not in ("train", "val"):
        raise InputError(f"split={split!r}: it is 'train' or 'val'")
