"""Bags: folders of pictures, or files of features that CLAM and TRIDENT write, each with one class."""
import csv
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from zoo.errors import InputError, first_few, require, said_by
from zoo.reading.discovery import split_folders, split_of
from zoo.reading.own_data import FOLDS
from zoo.reading.pictures import PICTURE_SUFFIXES, files_below
from zoo.reading.splits import held_out

FEATURE_SUFFIXES = (".h5", ".pt")
FEATURES = ("features", "feats", "x")  # how they are called in a file of several things
Kind = Literal["pictures", "features"]


@dataclass(frozen=True)
class Bag:
    """`files` are its pictures, or the one file of its features. `label` is the place of its class among all."""

    name: str
    label: int
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Bags:
    """`splits` has bags by "train", "val" and "test"; `notes` say what is remarkable."""

    root: Path
    kind: Kind
    classes: tuple[str, ...]
    splits: dict[str, list[Bag]]
    notes: tuple[str, ...] = ()

    def described(self) -> list[str]:
        """In words, a line each."""
        counts = ", ".join(f"{len(bags)} for {split}" for split, bags in self.splits.items())
        what = "folders of pictures" if self.kind == "pictures" else "files of features"
        return [f"{self.root}: bags as {what}, {counts}; {len(self.classes)} classes ({first_few(self.classes)})",
                *(f"note: {note}" for note in self.notes)]


def discover_bags(path: str | Path) -> Bags:
    """What lies at `path`: folders of classes, maybe within train, val and test, which hold bags; or a CSV of bags, labels, maybe splits.

    A bag is a folder of pictures, at any depth, or a file of features, see `read_features`; all are of one kind.

    Raises InputError for anything else, fewer than two classes, and classes that training does not have.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no {path}")
    found = list(_of_table(path) if path.is_file() else _of_folders(path))
    if not found:
        raise InputError(f"{path} holds no bags: folders of classes are looked for which hold folders of pictures or files of features "
                         f"({', '.join(FEATURE_SUFFIXES)}), or a CSV of their paths and labels")
    kinds = {"features" if bag.suffix.lower() in FEATURE_SUFFIXES else "pictures" for _, bag, _ in found}
    if len(kinds) > 1:
        raise InputError(f"{path} holds both folders of pictures and files of features; give one kind")
    classes = tuple(sorted({label for split, _, label in found if split == "train"}))
    if len(classes) < 2:
        raise InputError(f"{path} has the classes {first_few(classes)} for train, where there have to be two or more")
    if unknown := {label for _, _, label in found} - {*classes}:
        raise InputError(f"{path} has no bags for train of {first_few(sorted(unknown))}")
    splits: dict[str, list[Bag]] = {}
    for split, bag, label in found:
        files = (bag,) if bag.is_file() else tuple(files_below(bag, PICTURE_SUFFIXES))
        if not files:
            raise InputError(f"the bag {bag} holds no picture ({' '.join(PICTURE_SUFFIXES)})")
        splits.setdefault(split, []).append(Bag(bag.stem if bag.is_file() else bag.name, classes.index(label), files))
    return Bags(path, "features" if "features" in kinds else "pictures", classes, splits)


def _of_folders(root: Path) -> Iterator[tuple[str, Path, str]]:
    folders = _inside(root)
    for split, folder in (split_folders(root, [path.name for path in folders]) or {"train": root}).items():
        for of_class in _inside(folder):
            if of_class.is_dir():
                yield from ((split, bag, of_class.name) for bag in _inside(of_class))


def _inside(folder: Path) -> list[Path]:
    """Folders, and files of features."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")
                  and (path.is_dir() or path.suffix.lower() in FEATURE_SUFFIXES))


def _of_table(path: Path) -> Iterator[tuple[str, Path, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(map(str.strip, row))]
    if rows and not (path.parent / rows[0][0]).exists():
        rows = rows[1:]  # names of columns
    for row in rows:
        if len(row) not in (2, 3) or len(row) == 3 and split_of(row[2]) is None:
            raise InputError(f"{path} has the row {', '.join(row)!r}; rows are of a bag, its label, and maybe train, val or test")
        bag = path.parent / row[0]
        if not bag.exists() or bag.is_file() and bag.suffix.lower() not in FEATURE_SUFFIXES:
            raise InputError(f"{path} names {bag}, which is neither a folder nor a file of features ({', '.join(FEATURE_SUFFIXES)})")
        yield split_of(row[2]) or "train" if len(row) == 3 else "train", bag, row[1]


def divided_bags(bags: Bags, folds: int | None = None, fold: int = 0, seed: int = 0) -> Bags:
    """With a part for validation: their own, or one of `folds` (5) parts with equal shares of the classes."""
    if "val" in bags.splits:
        if folds is not None:
            raise InputError(f"{bags.root} has a part for validation of its own; --folds and --fold divide bags that have none")
        return bags
    train = bags.splits["train"]
    out = held_out([(bag.label,) for bag in train], range(len(train)), folds or FOLDS, fold, seed)
    parts = {"train": [bag for bag, held in zip(train, out, strict=True) if not held],
             "val": [bag for bag, held in zip(train, out, strict=True) if held]}
    note = f"there is no part for validation: {sum(out)} of {len(out)} were drawn, fold {fold} of {folds or FOLDS}, seed {seed}"
    return dataclasses.replace(bags, splits={**bags.splits, **parts}, notes=(*bags.notes, note))


def read_features(path: str | Path) -> Tensor:
    """The features (N, D) of a bag, float32: of a .pt a tensor, as CLAM writes it, or a dict with one under `FEATURES`; of an .h5 what is
    called features, (N, D) or, as TRIDENT writes it, (1, N, D). Nothing in a .pt is run.

    Raises InputError for a file without such features.
    """
    path = Path(path)
    try:
        found = _hdf5(path) if path.suffix.lower() == ".h5" else torch.load(path, "cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # whatever torch and h5py stumble over in a file of another kind
        raise InputError(f"the features in {path} cannot be read: {said_by(error)}") from error
    if isinstance(found, dict):
        found = next((found[name] for name in FEATURES if name in found), found)
    if isinstance(found, Tensor) and found.ndim == 3 and len(found) == 1:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point() or not len(found):
        came = f"a tensor of shape {tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(f"{path} holds {came}, where features (N, D) are looked for, maybe called {', '.join(FEATURES)}")
    if not found.isfinite().all():
        raise InputError(f"the features in {path} are not all finite numbers")
    return found.float()


def _hdf5(path: Path) -> Any:
    require("reading .h5 files", "bags", "h5py")
    import h5py
    with h5py.File(path) as file:
        return {name: torch.from_numpy(cast(Any, file[name])[()]) for name in FEATURES if name in file}

