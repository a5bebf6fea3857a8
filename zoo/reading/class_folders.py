"""Pictures in folders that are named after their classes, as ImageNet is usually kept: root/SPLIT/CLASS/*.jpg."""
import os
from pathlib import Path

from timm.data import ImageNetInfo

from zoo.errors import InputError, near_misses
from zoo.reading.pictures import PICTURE_SUFFIXES, files_below


def find_classes(root: str | Path, split: str, known: str | None = None) -> tuple[list[str], list[int]]:
    """The names of the classes, and which of them the folders in root/split are of, in the order of the folders' names.

    `known` is the name of timm's list of all classes, "imagenet-1k", where the folders are of some only; without it, every class has
    its folder. Raises InputError for missing, empty and unknown folders.
    """
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise InputError(f"there is no data folder {root}; set data_root to the folder that holds train/ and val/")
    if not folder.is_dir():
        raise InputError(f"the data folder {root} has no {split}/{near_misses(split, os.listdir(root))}")
    folders = _folders_in(folder)
    if not folders:
        raise InputError(f"{folder} holds no folders of classes, where {split}/CLASS/*.jpg is needed")
    names = folders if known is None else _known_classes(known)
    if unknown := [name for name in folders if name not in names]:
        raise InputError(f"{folder} has a folder {unknown[0]}, which is no class of {known}")
    return names, [names.index(name) for name in folders]


def list_labelled(folder: Path) -> list[tuple[str, int]]:
    """The pictures below `folder`, each with the place of its folder in the sorted list. Raises InputError for a folder without any."""
    found = []
    for place, name in enumerate(_folders_in(folder)):
        pictures = files_below(folder / name, PICTURE_SUFFIXES)
        if not pictures:
            raise InputError(f"the folder {folder / name} of a class holds no picture ({' '.join(PICTURE_SUFFIXES)})")
        found += [(str(path), place) for path in pictures]
    return found


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _known_classes(name: str) -> list[str]:
    try:
        return ImageNetInfo(name).label_names()
    except AssertionError as error:
        raise InputError(f"classes={name!r} is no list of timm's; imagenet-1k is one") from error
