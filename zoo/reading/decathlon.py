"""What a `dataset.json` of the Medical Segmentation Decathlon or of nnU-Net says: classes, channels, and which mask is which volume's."""
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import InputError
from zoo.reading.masks import check_split
from zoo.reading.pictures import files_below
from zoo.reading.volumes import VOLUME_SUFFIXES

SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_.])")  # as BIDS names who was scanned


@dataclass(frozen=True)
class Task:
    """Names of the classes in the order of their labels, how many channels volumes have, and pairs of a volume and its mask.

    A volume whose channels are in files of their own is named by the first of them, see `zoo.reading.volumes.open_volume`.
    `validation` is empty where the description has none; what is in it is not in `training`.
    """

    classes: list[str]
    channels: int
    training: list[tuple[Path, Path]]
    validation: list[tuple[Path, Path]]


def read_task(path: Path) -> Task:
    """What the `dataset.json` at `path` describes, in the form of the Decathlon or of nnU-Net.

    nnU-Net's second version lists no files: `imagesTr/CASE_0000.nii.gz`, … belong to `labelsTr/CASE.nii.gz`. Files are told apart by
    where they are, not by how they are written, and those of one BIDS subject, sub-…, count as one.

    Raises InputError for a file that is missing, no such description, or has labels of regions.
    """
    described = _read_json(path)
    try:
        classes = _classes(path, described["labels"])
        channels = len(described.get("channel_names") or described.get("modality") or {"0": ""})
        if "training" in described:
            training, held_out = (_listed(path, described.get(part) or ()) for part in ("training", "validation"))
        else:
            training, held_out = _cases(path, described.get("file_ending")), []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a description of the Decathlon's or nnU-Net's kind: {error!r}") from error
    if not (training := _apart(path.parent, training, held_out)):
        raise InputError(f"{path} names no volumes for train")
    return Task(classes, channels, training, held_out)


def read_decathlon(path: Path, split: str, folds: int = 5) -> Task:
    """As `read_task`, with every `folds`-th subject of the training list for validation where the description names none.

    Raises InputError also if nothing is there for `split`, "train" or "val".
    """
    check_split(split)
    task = read_task(path)
    if not task.validation:
        groups: dict[object, list[tuple[Path, Path]]] = {}
        for pair in task.training:
            groups.setdefault(subject(path.parent, pair[0]), []).append(pair)
        held_out = [pair for group in list(groups.values())[::folds] for pair in group]
        task = Task(task.classes, task.channels, _apart(path.parent, task.training, held_out), held_out)
    if not (task.training if split == "train" else task.validation):
        raise InputError(f"{path} names no volumes for {split}")
    return task


def _apart(root: Path, training: list[tuple[Path, Path]], held_out: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The pairs of `training` that no pair of `held_out` gives away."""
    known = {key for pair in held_out for key in _identities(root, pair)}
    return [pair for pair in training if known.isdisjoint(_identities(root, pair))]


def _classes(path: Path, labels: Mapping[str, Any]) -> list[str]:
    """The names by label, from the Decathlon's {"1": "liver"} or nnU-Net's {"liver": 1}."""
    if any(isinstance(label, list | tuple) for label in labels.values()):
        raise InputError(f"{path} has labels of regions, which overlap: {labels}; a network for them gives no single class to a voxel, and "
                         "is not offered here. Give each part a label of its own")
    if all(isinstance(label, int) for label in labels.values()):
        if "ignore" in labels:
            raise InputError(f"{path} has a label 'ignore'; voxels that are not to be learned are not offered here. Give them a class")
        labels = {str(label): name for name, label in labels.items()}
    names = {int(label): str(name) for label, name in labels.items()}
    if sorted(names) != list(range(len(names))):
        raise InputError(f"{path} has labels {sorted(names)}, where they have to run from 0")
    return [names[i] for i in range(len(names))]


def _listed(path: Path, entries: Sequence[Any]) -> list[tuple[Path, Path]]:
    """Pairs that the file names. Test volumes stand without masks and are left out."""
    return [(_first(path.parent / entry["image"]), path.parent / entry["label"]) for entry in entries if isinstance(entry, Mapping)]


def _cases(path: Path, ending: str | None) -> list[tuple[Path, Path]]:
    """Pairs of nnU-Net's folders, of files that end so."""
    if ending is not None and ending.lower() not in VOLUME_SUFFIXES:
        raise InputError(f"{path} has files that end in {ending!r}; volumes that are read end in {' '.join(VOLUME_SUFFIXES)}")
    masks = files_below(path.parent / "labelsTr", VOLUME_SUFFIXES if ending is None else (ending.lower(),))
    return [(_first(path.parent / "imagesTr" / mask.name), mask) for mask in masks]


def _first(image: Path) -> Path:
    """The file of the first channel, CASE_0000.nii.gz, where there is no CASE.nii.gz: nnU-Net leaves the number out."""
    suffix = next((suffix for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if image.name.lower().endswith(suffix)), "")
    name = image.name[:len(image.name) - len(suffix)]
    first = image.with_name(f"{name}_0000{image.name[len(name):]}")
    return first if first.exists() and not image.exists() else image


def _identities(root: Path, pair: tuple[Path, Path]) -> set[object]:
    """What two pairs have in common if one of them gives the other away."""
    return {*map(_file, pair), subject(root, pair[0])}


def _file(path: Path) -> object:
    """The same for all ways to write where a file is: through links, in other letters where the file system does not mind them."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return path.resolve()


def subject(root: Path, image: Path) -> object:
    """Who was scanned, by the file's name or its folders below `root`; the file if they do not tell."""
    below = image.relative_to(root) if image.is_relative_to(root) else image
    match = SUBJECT.search(below.as_posix())
    return match[1] if match else _file(image)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"there is no {path}; set data_root to the folder that holds {path.name}")
    try:
        return json.loads(path.read_bytes())  # in any of Unicode's encodings, with their byte order mark or without
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
