"""What is known of somebody's own data, how they are divided, and the lists of samples that training reads."""
import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from zoo.errors import InputError
from zoo.files import replacing
from zoo.reading.decathlon import subject
from zoo.reading.fixations import write_listed
from zoo.reading.masks import read_picture_mask
from zoo.reading.pictures import opening, seen_size
from zoo.reading.splits import held_out, identical_files

Task = Literal["classes", "masks", "boxes", "volumes", "pictures", "fixations"]

SAMPLES = "samples.csv"
COLUMNS = ("split", "path", "label")  # of the lists that training reads
FOLDS = 5


@dataclass(frozen=True)
class Sample:
    """A file to learn from. `labels` are the classes in it: of a picture its one, of a mask those that occur, of boxes one for each.

    `mask` is the file of its mask, or of its map of fixations; `fixations` that of the fixated pixels, if they are known. `boxes` are
    COCO's annotations, with the place of the class among all in `category_id`, of a picture of `size`, its width and height.
    """

    path: Path
    labels: tuple[int, ...]
    mask: Path | None = None
    size: tuple[int, int] = (0, 0)
    boxes: tuple[dict, ...] = ()
    fixations: Path | None = None


@dataclass(frozen=True)
class OwnData:
    """What data are: `form` says it in words, `notes` what is remarkable about them.

    `splits` has samples by "train", "val" and "test", of which "train" is always there. Of masks in pictures, `values` are those that
    stand for the classes; of volumes, `channels` says how many values a voxel has; of boxes, `outlined` whether all have masks.
    """

    root: Path
    task: Task
    form: str
    classes: tuple[str, ...]
    splits: dict[str, list[Sample]]
    notes: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    channels: int = 1
    outlined: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", {split: self.splits[split] for split in ("train", "val", "test") if split in self.splits})

    def counts(self, split: str) -> list[int]:
        """Of each class how many samples of the split are of it or show it; of boxes, how many there are."""
        found = Counter(label for sample in self.splits[split] for label in sample.labels)
        return [found[label] for label in range(len(self.classes))]

    def described(self) -> list[str]:
        """Lines that say what the data are: their form, a table of the classes, the notes."""
        counts = {split: self.counts(split) for split in self.splits}
        width = max(map(len, self.classes))
        return [f"{self.root}: {self.form}, {', '.join(f'{len(samples)} for {split}' for split, samples in self.splits.items())}",
                " ".join([f"  {'class':<{width}}", *(f"{split:>8}" for split in counts)]),
                *(" ".join([f"  {label:<{width}}", *(f"{counted[place]:>8}" for counted in counts.values())])
                  for place, label in enumerate(self.classes)),
                *(f"  {line}" for line in self.notes)]


def mask_labels(data: OwnData, sample: Sample) -> np.ndarray:
    """The places of the classes, (H, W), in the mask of a picture."""
    return np.searchsorted(data.values, read_picture_mask(cast(Path, sample.mask), sample.path))


def divided(data: OwnData, folds: int | None = None, fold: int = 0, seed: int = 0) -> OwnData:
    """The data with a part for validation: their own, or, where they have none, one of `folds` (5) parts with equal shares of the classes.

    Copies of a file stay on one side, and so do volumes of one BIDS subject, sub-…. Raises InputError as `held_out`, and for `folds`
    where the data bring their own part.
    """
    if "val" in data.splits:
        if folds is not None:
            raise InputError(f"{data.root} has a part for validation of its own; --folds and --fold divide data that have none")
        return dataclasses.replace(data, notes=(*data.notes, *_leaks(data.splits)))
    folds, samples = folds or FOLDS, data.splits["train"]
    copied = groups = identical_files([sample.path for sample in samples])
    if data.task == "volumes":  # scans of one subject stay together
        firsts: dict[object, int] = {}
        groups = [firsts.setdefault(subject(data.root, sample.path), group) for sample, group in zip(samples, copied, strict=True)]
    out = held_out([sample.labels for sample in samples], groups, folds, fold, seed)
    notes = [f"there is no part for validation: {sum(out)} of {len(out)} were drawn, fold {fold} of {folds}, seed {seed}"]
    if copies := len(copied) - len(set(copied)):
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


def picture_sizes(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """Width and height of pictures as they are seen; only their beginning is read. Raises InputError for a file that is none."""
    sizes = []
    for path in paths:
        with opening(path) as picture:
            sizes.append(seen_size(picture))
    return sizes


def write_samples(data: OwnData, folder: Path) -> None:
    """Writes into `folder` what training reads: samples.csv, with the columns split, path and label, which is the name of a class or the
    path of a mask; of a map of fixations, then with that of fixated pixels; of boxes COCO's descriptions train.json, val.json and
    test.json, with the places of classes and whole paths."""
    if data.task == "boxes":
        for split, samples in data.splits.items():
            with replacing(folder / f"{split}.json") as written:
                written.write_text(json.dumps(_described(samples, data.classes)))
        return
    if data.task == "fixations":
        with replacing(folder / SAMPLES) as written:
            write_listed(written, ((split, sample.path, cast(Path, sample.mask), sample.fixations)
                                   for split, samples in data.splits.items() for sample in samples))
        return
    with replacing(folder / SAMPLES) as written, written.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for split, samples in data.splits.items():
            rows.writerows((split, sample.path.absolute(), sample.mask.absolute() if sample.mask else data.classes[sample.labels[0]])
                           for sample in samples)


def _described(samples: Sequence[Sample], classes: Sequence[str]) -> dict:
    boxes = [{**box, "image_id": place} for place, sample in enumerate(samples) for box in sample.boxes]
    return {
        "images": [{"id": place, "file_name": str(sample.path.absolute()), "width": sample.size[0], "height": sample.size[1]}
                   for place, sample in enumerate(samples)],
        "annotations": [{**box, "id": number} for number, box in enumerate(boxes, 1)],
        "categories": [{"id": place, "name": name} for place, name in enumerate(classes)]}


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
