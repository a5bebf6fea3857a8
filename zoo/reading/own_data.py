"""What somebody's own data are: found out from the names and contents of files, and described so that training is set up by it."""
import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from zoo.errors import InputError, near_misses
from zoo.files import replacing
from zoo.reading.pictures import PICTURE_SUFFIXES
from zoo.reading.splits import held_out, identical_files

Task = Literal["classes", "masks", "boxes", "volumes"]

FORMS = ("class folders (CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg), folders of pictures and of masks (images and masks), "
         "COCO's JSON with its pictures, NIfTI volumes and masks (images and labels, or a dataset.json), or a CSV of paths and labels")
SPLITS = {alias: split for split, aliases in {
    "train": ("train", "training", "tr"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing", "ts"),
}.items() for alias in aliases}
COLUMNS = ("split", "path", "label")  # of the lists that training reads
FOLDS = 5
SHOWN = 4  # names in a sentence


@dataclass(frozen=True)
class Sample:
    """A file to learn from. `labels` are the classes in it: of a picture its one, of a mask those that occur, of boxes one for each."""

    path: Path
    labels: tuple[int, ...]


@dataclass(frozen=True)
class OwnData:
    """What data are: `form` says it in words, `notes` what is remarkable about them.

    `splits` has samples by "train", "val" and "test", of which "train" is always there.
    """

    root: Path
    task: Task
    form: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    notes: tuple[str, ...] = ()

    def counts(self, split: str) -> list[int]:
        """Of each class how many samples of the split are of it or show it; of boxes, how many there are."""
        found = Counter(label for sample in self.splits[split] for label in sample.labels)
        return [found[label] for label in range(len(self.classes))]


def discover(path: str | Path) -> OwnData:
    """What the folder or file at `path` holds. Raises InputError for what is none of `FORMS`, or more than one of them."""
    root = Path(path)
    if not root.exists():
        others = [other.name for other in root.parent.iterdir()] if root.parent.is_dir() else []
        raise InputError(f"there is no data {root}{near_misses(root.name, others)}")
    if root.is_dir() and (pictures := visible(root, PICTURE_SUFFIXES)):
        return class_folders(root, pictures)
    raise InputError(f"{root} {_seen(root)}, which is none of the forms that data can have: {FORMS}")


def class_folders(root: Path, pictures: Sequence[Path]) -> OwnData:
    """Pictures in folders named after their classes, which lie in folders named after splits or not."""
    top = sorted({path.relative_to(root).parts[0] for path in pictures if path.parent != root})
    folders = split_folders(root, top) or {"train": root}
    found = {split: [(path, path.relative_to(folder).parts) for path in pictures if folder in path.parents]
             for split, folder in folders.items()}
    if loose := [path for files in (*found.values(), [(path, path.relative_to(root).parts) for path in pictures])
                 for path, parts in files if len(parts) == 1]:
        raise InputError(f"{loose[0]} lies in no folder named after a class, and nothing else says what it shows; data can be {FORMS}")
    classes = sorted({parts[0] for _, parts in found["train"]})
    if len(classes) < 2:
        raise InputError(f"{folders['train']} holds pictures in one folder only, {classes[0]}, where each of two classes or more has its "
                         f"folder; data can be {FORMS}")
    notes = []
    for split, files in found.items():
        here = sorted({parts[0] for _, parts in files})
        if unknown := [name for name in here if name not in classes]:
            raise InputError(f"{folders[split]} has the classes {named(unknown)}, which {folders['train']} lacks"
                             f"{near_misses(unknown[0], classes)}")
        if missing := [name for name in classes if name not in here]:
            notes.append(f"{split} has nothing of {named(missing)}")
    places = {name: place for place, name in enumerate(classes)}
    splits = {split: [Sample(path, (places[parts[0]],)) for path, parts in files] for split, files in found.items()}
    return OwnData(root, "classes", "class folders", tuple(classes), splits, tuple(notes))


def split_folders(root: Path, names: Iterable[str]) -> dict[str, Path]:
    """Those of the folders `names` in `root` that are named after splits, by split: all of them or none.

    Raises InputError for some only, for two of one split, and without one to train on.
    """
    names = list(names)
    found: dict[str, Path] = {}
    for name in names:
        if split := split_of(name):
            if split in found:
                raise InputError(f"{root} holds both {found[split].name} and {name}, and nothing says which of them is for {split}")
            found[split] = root / name
    if found and (others := [name for name in names if root / name not in found.values()]):
        raise InputError(f"{root} holds both folders named after splits ({named(path.name for path in found.values())}) and others "
                         f"({named(others)}); leave one kind there")
    if found and "train" not in found:
        raise InputError(f"{root} holds {named(path.name for path in found.values())} and no train")
    return found


def split_of(name: str) -> str | None:
    """The split, "train", "val" or "test", that a word or the name of a folder stands for, such as valid or train2017."""
    return SPLITS.get(re.sub(r"[_-]?\d+$", "", name.casefold()))


def divided(data: OwnData, folds: int | None = None, fold: int = 0, seed: int = 0) -> OwnData:
    """The data with a part for validation: their own, or, where they have none, one of `folds` (5) parts with equal shares of the classes.

    Copies of a file stay on one side. Raises InputError as `held_out`, and for `folds` where the data bring their own part.
    """
    if "val" in data.splits:
        if folds is not None:
            raise InputError(f"{data.root} has a part for validation of its own; --folds and --fold divide data that have none")
        return dataclasses.replace(data, notes=(*data.notes, *_leaks(data.splits)))
    folds, samples = folds or FOLDS, data.splits["train"]
    groups = identical_files([sample.path for sample in samples])
    out = held_out([sample.labels for sample in samples], groups, folds, fold, seed)
    notes = [f"there is no part for validation: {sum(out)} of {len(out)} were drawn, fold {fold} of {folds}, seed {seed}"]
    if copies := len(groups) - len(set(groups)):
        notes.append(f"{copies} files are copies of others, and stay on their side")
    parts = {"train": [sample for sample, held in zip(samples, out, strict=True) if not held],
             "val": [sample for sample, held in zip(samples, out, strict=True) if held]}
    return dataclasses.replace(data, splits={**data.splits, **parts}, notes=(*data.notes, *notes))


def _leaks(splits: Mapping[str, Sequence[Sample]]) -> list[str]:
    samples = [(split, sample.path) for split, listed in splits.items() for sample in listed]
    groups = identical_files([path for _, path in samples])
    trained = {group for (split, _), group in zip(samples, groups, strict=True) if split == "train"}
    leaked = [path for (split, path), group in zip(samples, groups, strict=True) if split != "train" and group in trained]
    return [f"{len(leaked)} files that are not for training are copies of files that are, such as {leaked[0]}: what is measured on them "
            "is too good"] if leaked else []


def visible(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files below `root` that end in `suffixes`, sorted; not those in or under a name that begins with a dot."""
    return sorted(path for path in root.rglob("*") if path.name.lower().endswith(suffixes) and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(root).parts))


def picture_sizes(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """Width and height of pictures, of which only the beginning is read. Raises InputError for a file that is none."""
    sizes = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                sizes.append(picture.size)
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{path} is not a picture that can be read: {error}") from None
    return sizes


def named(names: Iterable[str]) -> str:
    """Names as sentences have them, the first few of many."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _seen(root: Path) -> str:
    """What a sentence says of a path that nothing could be made of."""
    if root.is_file():
        return f"is a file ending in {root.suffix}" if root.suffix else "is a file"
    found = Counter(path.suffix.lower() or "nothing" for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return f"holds {named(f'{count} files ending in {suffix}' for suffix, count in found.most_common())}" if found else "is empty"


def write_samples(data: OwnData, path: Path) -> None:
    """Writes a CSV with the columns split, path and label, which is the name of a class; `read_samples` reads it."""
    with replacing(path) as written, written.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for split, samples in data.splits.items():
            rows.writerows((split, sample.path.absolute(), data.classes[sample.labels[0]]) for sample in samples)


def read_samples(path: Path, split: str) -> list[tuple[Path, str]]:
    """The pairs of a path and a label that the CSV at `path` has for `split`. Raises InputError for another file, and for no pairs."""
    if not path.is_file():
        raise InputError(f"there is no list of samples {path}; set data_root to the folder that holds it")
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = [(Path(row["path"]), row["label"]) for row in rows if row["split"] == split]
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no list of samples, a CSV with the columns {', '.join(COLUMNS)}: {error!r}") from error
    if not found:
        raise InputError(f"{path} lists no samples for {split}")
    return found
