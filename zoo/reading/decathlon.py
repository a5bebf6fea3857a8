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
from zoo.reading.volumes import VOLUME_SUFFIXES

SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_.])")  # as BIDS names who was scanned


@dataclass(frozen=True)
class Task:
    """Names of the classes in the order of their labels, how many channels volumes have, and pairs of a volume and its mask.

    A volume whose channels are in files of their own is named by the first of them, see `zoo.reading.volumes.open_volume`.
    """

    classes: list[str]
    channels: int
    files: list[tuple[Path, Path]]


def read_decathlon(path: Path, split: str, folds: int = 5) -> Task:
    """The part "train" or "val" of the task that the `dataset.json` at `path` describes, in the form of the Decathlon or of nnU-Net.

    The file's `validation` list is the "val" part; without one, every `folds`-th subject of its `training` list, the rest being
    "train". nnU-Net's second version lists no files: `imagesTr/CASE_0000.nii.gz`, … belong to `labelsTr/CASE.nii.gz`. What is in
    "val" is not in "train": files are told apart by where they are, not by how they are written, and those of one BIDS subject,
    sub-…, stay together.

    Raises InputError for a file that is missing, no such description, names nothing for the split, or has labels of regions.
    """
    check_split(split)
    described = _read_json(path)
    try:
        classes = _classes(path, described["labels"])
        channels = len(described.get("channel_names") or described.get("modality") or {"0": ""})
        if "training" in described:
            training, held_out = (_listed(path, described.get(part) or ()) for part in ("training", "validation"))
        else:
            training, held_out = _cases(path, described["file_ending"]), []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a description of the Decathlon's or nnU-Net's kind: {error!r}") from error
    if not held_out:
        groups: dict[object, list[tuple[Path, Path]]] = {}
        for pair in training:
            groups.setdefault(_subject(path.parent, pair[0]), []).append(pair)
        held_out = [pair for group in list(groups.values())[::folds] for pair in group]
    known = {key for pair in held_out for key in _identities(path.parent, pair)}
    chosen = held_out if split == "val" else [pair for pair in training if known.isdisjoint(_identities(path.parent, pair))]
    if not chosen:
        raise InputError(f"{path} names no volumes for {split}")
    return Task(classes, channels, chosen)


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
    """Pairs that the file names. Test volumes stand without masks and are left out; nnU-Net's first version leaves out `_0000`."""
    pairs = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            continue
        image, mask = (path.parent / entry[key] for key in ("image", "label"))
        if not image.exists():
            suffix = next((suffix for suffix in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if image.name.endswith(suffix)), "")
            first = image.with_name(f"{image.name.removesuffix(suffix)}_0000{suffix}")
            image = first if first.exists() else image
        pairs.append((image, mask))
    return pairs


def _cases(path: Path, ending: str) -> list[tuple[Path, Path]]:
    """Pairs of nnU-Net's folders."""
    if ending.lower() not in VOLUME_SUFFIXES:
        raise InputError(f"{path} has files that end in {ending!r}; volumes that are read end in {' '.join(VOLUME_SUFFIXES)}")
    masks = sorted(mask for mask in (path.parent / "labelsTr").glob(f"*{ending}") if not mask.name.startswith("."))
    return [(path.parent / "imagesTr" / f"{mask.name.removesuffix(ending)}_0000{ending}", mask) for mask in masks]


def _identities(root: Path, pair: tuple[Path, Path]) -> set[object]:
    """What two pairs have in common if one of them gives the other away."""
    return {*map(_file, pair), _subject(root, pair[0])}


def _file(path: Path) -> object:
    """The same for all ways to write where a file is: through links, in other letters where the file system does not mind them."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return path.resolve()


def _subject(root: Path, image: Path) -> object:
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
