"""What somebody's own data are, found out from the names and contents of their files."""
import csv
import dataclasses
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np

from zoo.errors import InputError, first_few, near_misses
from zoo.reading.annotations import complete
from zoo.reading.decathlon import read_task
from zoo.reading.fixations import FOLDERS
from zoo.reading.masks import read_picture_mask
from zoo.reading.own_data import OwnData, Sample, picture_sizes
from zoo.reading.pairs import pair
from zoo.reading.pictures import PICTURE_SUFFIXES, files_below, find_pictures
from zoo.reading.volumes import VOLUME_SUFFIXES, is_volume, labels_in

FORMS = ("class folders (CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg), folders of pictures and of masks (images and masks) "
         "or of maps of fixations (images and maps), "
         "COCO's JSON with its pictures, NIfTI volumes and masks (images and labels, or a dataset.json), or a CSV of paths and labels")
SPLITS = {alias: split for split, aliases in {
    "train": ("train", "training", "tr"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing", "ts"),
}.items() for alias in aliases}
ROLES = {name: role for role, names in {
    "picture": ("images", "image", "imgs", "img", "img_dir", "pictures", "photos", "jpegimages", "inputs", "input", "volumes"),
    "mask": ("masks", "mask", "labels", "label", "ann_dir", "annotations", "annotation", "gt", "groundtruth", "ground_truth",
             "segmentation", "segmentations", "segmentationclass", "seg", "targets", "target"),
}.items() for name in names}
MARK = re.compile(r"(.+?)[_\-. ]?(?:masks?|labels?|gt|seg|segmentation|annotation)")  # of a mask beside its picture
TABLE_SUFFIXES = (".csv", ".tsv")
LABEL_COLUMNS = ("label", "class", "target", "category", "classname", "class_name", "y", "species")
MANY = 64  # values in masks, from which on they are no classes


def discover(path: str | Path) -> OwnData:
    """What the folder or file at `path` holds. Raises InputError for what is none of `FORMS`, or more than one of them."""
    root = Path(path)
    if not root.exists():
        others = [other.name for other in root.parent.iterdir()] if root.parent.is_dir() else []
        raise InputError(f"there is no data {root}{near_misses(root.name, others)}")
    if root.is_file() and root.suffix.lower() in TABLE_SUFFIXES:
        return table(root)
    if root.is_file() and root.suffix.lower() == ".json":
        return coco(root, {root: _json(root)})
    if root.is_dir() and (found := _folder(root)) is not None:
        return dataclasses.replace(found, notes=(*found.notes, *_aside(root, found)))
    raise InputError(f"{root} {_seen(root)}, which is none of the forms that data can have: {FORMS}")


def _folder(root: Path) -> OwnData | None:
    if described := coco_files(root):
        return coco(root, described)
    if (root / "dataset.json").is_file():
        return decathlon(root)
    if volumes := files_below(root, VOLUME_SUFFIXES):
        return volumes_with_masks(root, pairs(root, volumes))
    pictures = files_below(root, PICTURE_SUFFIXES)
    if looked := pictures_with_fixations(root, pictures):
        return looked
    if paired := pairs(root, pictures):
        return pictures_with_masks(root, paired)
    tables = [path for path in files_below(root, TABLE_SUFFIXES) if path.parent == root]
    if pictures and len(tables) == 1 and any(path.parent == root for path in pictures):
        return table(tables[0])
    return class_folders(root, pictures) if pictures else None


def _aside(root: Path, data: OwnData) -> list[str]:
    """Says what is in the folder beside what was taken, as somebody may have meant that."""
    taken = {path for samples in data.splits.values() for sample in samples for path in (sample.path, sample.mask, sample.fixations)}
    files = files_below(root, PICTURE_SUFFIXES + VOLUME_SUFFIXES + TABLE_SUFFIXES)
    left = [path for path in files if path not in taken and path != data.root]
    return [f"{len(left)} files are left aside, such as {left[0]}"] if left else []


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
            raise InputError(f"{folders[split]} has the classes {first_few(unknown)}, which {folders['train']} lacks"
                             f"{near_misses(unknown[0], classes)}")
        if missing := [name for name in classes if name not in here]:
            notes.append(f"{split} has nothing of {first_few(missing)}")
    places = {name: place for place, name in enumerate(classes)}
    splits = {split: [Sample(path, (places[parts[0]],)) for path, parts in files] for split, files in found.items()}
    return OwnData(root, "classes", "class folders", tuple(classes), splits, tuple(notes))


def plain_pictures(path: str | Path) -> OwnData:
    """The pictures in a folder, whatever its folders mean but those named after splits. Raises InputError where there are none."""
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root} is no folder, which restoring pictures is learned from")
    pictures = find_pictures([root])
    top = sorted({picture.relative_to(root).parts[0] for picture in pictures if picture.parent != root})
    folders = (split_folders(root, top) if any(map(split_of, top)) else {}) or {"train": root}
    splits = {split: [Sample(picture, (0,)) for picture in pictures if folder in picture.parents] for split, folder in folders.items()}
    return OwnData(root, "pictures", "pictures", ("picture",), splits)


def pairs(root: Path, files: Sequence[Path]) -> dict[str, list[tuple[Path, Path]]]:
    """Pictures or volumes with their masks, by split, where names of folders, or of files, say which are masks; empty where none do.

    Masks are in a folder that says so in the place of the one that says that it is of pictures, or beside the pictures, called as they
    are and `_mask`, `_label` or the like. Raises InputError as `zoo.reading.pairs.pair`, which pairs them.
    """
    places = {path: _Place.of(root, path) for path in files}
    masks = [path for path, place in places.items() if place.role == "mask"]
    pictures = [path for path, place in places.items() if place.role == "picture"]
    if masks and not pictures:  # as in train/ and train_masks/
        pictures = [path for path, place in places.items() if place.role is None and not place.above and path.parent in (place.base, root)]
    if not masks:
        stems = {(path.parent, _stem(path)) for path in files}
        masks = [path for path in files if (match := MARK.fullmatch(_stem(path))) and (path.parent, match[1]) in stems]
        marked = {*masks}
        pictures = [path for path in files if path not in marked]
        places = {path: place._replace(base=path.parent, above=(str(path.parent),)) for path, place in places.items()}
    if not masks or not pictures:
        return {}
    found: dict[str, list[tuple[Path, Path]]] = {}
    groups: dict[tuple, tuple[list[Path], list[Path]]] = {}
    for which, listed in enumerate((pictures, masks)):
        for path in listed:
            groups.setdefault((places[path].split, places[path].above), ([], []))[which].append(path)
    for (split, _), members in groups.items():
        group, group_masks = members
        if group_masks or split != "test":
            for listed in members:
                if len(bases := {places[path].base for path in listed}) > 1:
                    raise InputError(f"{first_few(sorted(map(str, bases)))} hold files of one kind, and nothing says which are meant")
            bases = [places[listed[0]].base if listed else root for listed in members]
            found.setdefault(split or "train", []).extend(pair(group, group_masks, *bases))
    if "train" not in found:
        raise InputError(f"{root} holds pictures with masks for {first_few(found)} and none for train")
    return found


class _Place(NamedTuple):
    """What the folders of a file say: whether it is a "picture" or a "mask", its split, the folder that says the last of that, and
    those above it that say nothing."""

    role: str | None
    split: str | None
    base: Path
    above: tuple[str, ...]

    @classmethod
    def of(cls, root: Path, path: Path) -> Self:
        place = cls(None, None, root, ())
        above: list[str] = []
        for depth, name in enumerate(folders := path.relative_to(root).parts[:-1], 1):
            words = [name] if name.casefold() in ROLES else re.findall(r"(?:images|labels)(?=tr|ts|val)|[^\W_]+", name, re.IGNORECASE)
            roles, splits = [ROLES.get(word.casefold()) for word in words], [split_of(word) for word in words]
            known = all(map(any, zip(roles, splits, strict=True)))
            if known and not (place.role and any(roles)) and not (place.split and any(splits)):
                place = cls(place.role or next(filter(None, roles), None), place.split or next(filter(None, splits), None),
                            root.joinpath(*folders[:depth]), tuple(above))
            else:
                above.append(name)
        return place


def _stem(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[0]


def pictures_with_masks(root: Path, paired: dict[str, list[tuple[Path, Path]]]) -> OwnData:
    """Classes are the values in the masks, by the names in classes.txt, if there is one."""
    present = {mask: np.unique(read_picture_mask(mask, picture)).tolist() for listed in paired.values() for picture, mask in listed}
    values = sorted(set(itertools.chain.from_iterable(present.values())))
    if len(values) > MANY:
        raise InputError(f"the masks in {root} have {len(values)} different values, where there is one for each class; masks that were "
                         "scaled smoothly or saved as JPEG cannot be used")
    if len(values) < 2:
        raise InputError(f"the masks in {root} have the value {values[0]} only, where each of two classes or more has its own")
    if len(values) == 2 and values[0] == 0:
        names = ["background", "object"]
    elif values[-1] < MANY:
        values = list(range(values[-1] + 1))
        names = ["background", *(f"class {value}" for value in values[1:])]
    else:
        names = [f"value {value}" for value in values]
    if (listed := root / "classes.txt").is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if len(names) != len(values):
            raise InputError(f"{listed} names {len(names)} classes, and the masks have {len(values)}: {first_few(values)}")
    places = {value: place for place, value in enumerate(values)}
    splits = {split: [Sample(picture, tuple(places[value] for value in present[mask]), mask) for picture, mask in listed]
              for split, listed in paired.items()}
    note = f"in the masks {', '.join(f'{value} is {name}' for value, name in zip(values, names, strict=True))}"
    return OwnData(root, "masks", "pictures and masks", tuple(names), splits, (note,), tuple(values))


def pictures_with_fixations(root: Path, pictures: Sequence[Path]) -> OwnData | None:
    """Pictures, maps of fixations and, if there are any, pictures of fixated pixels, in folders that say so; None where none holds maps."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in pictures:
        names = path.relative_to(root).parts[:-1]
        role = next((FOLDERS[name.casefold()] for name in names if name.casefold() in FOLDERS), "")
        split = next(filter(None, map(split_of, names)), None) or "train"
        found.setdefault(split, {}).setdefault(role, []).append(path)
    if not any("map" in roles for roles in found.values()):
        return None
    splits: dict[str, list[Sample]] = {}
    for split, roles in found.items():
        if "map" not in roles:
            continue
        shown = roles.get("picture", [])
        base = {role: Path(os.path.commonpath([path.parent for path in listed])) for role, listed in roles.items()}
        maps = pair(shown, roles["map"], base.get("picture", root), base["map"])
        points = dict(pair(shown, roles["fixations"], base["picture"], base["fixations"])) if "fixations" in roles else {}
        splits[split] = [Sample(picture, (0,), looked, fixations=points.get(picture)) for picture, looked in maps]
    if "train" not in splits:
        raise InputError(f"{root} holds maps of fixations for {first_few(splits)} and none for train")
    with_points = [split for split, samples in splits.items() if samples[0].fixations]
    note = f"fixated pixels are known of {first_few(with_points)}" if with_points else "fixated pixels are not known: NSS and AUC need them"
    return OwnData(root, "fixations", "pictures and maps of fixations", ("fixations",), splits, (note,))


def volumes_with_masks(root: Path, paired: dict[str, list[tuple[Path, Path]]], names: Sequence[str] = (), channels: int = 1,
                       form: str = "volumes and masks") -> OwnData:
    """Classes are the labels in the masks, with `names` where they are known."""
    if not paired:
        raise InputError(f"nothing says which of the volumes in {root} are masks; their folder is to be called labels, that of the others "
                         "images")
    present = {mask: labels_in(mask) for listed in paired.values() for _, mask in listed}
    for mask, values in present.items():
        if bad := [value for value in values if value != int(value) or value < 0 or (names and value >= len(names)) or value >= MANY]:
            raise InputError(f"the mask {mask} has the label {bad[0]:g}, where labels are whole numbers from 0 to "
                             f"{len(names) - 1 if names else MANY - 1}")
    count = int(max(itertools.chain.from_iterable(present.values()))) + 1
    if count < 2:
        raise InputError(f"the masks in {root} are empty: they have the label 0 only")
    names = tuple(names) or ("background", *(f"class {label}" for label in range(1, count)))
    splits = {split: [Sample(volume, tuple(map(int, present[mask])), mask) for volume, mask in listed] for split, listed in paired.items()}
    return OwnData(root, "volumes", form, names, splits, channels=channels)


def decathlon(root: Path) -> OwnData:
    """A task of the Decathlon or nnU-Net, as its dataset.json describes it."""
    task = read_task(root / "dataset.json")
    paired = {"train": task.training, **({"val": task.validation} if task.validation else {})}
    return volumes_with_masks(root, paired, task.classes, task.channels, "a dataset.json with its volumes")


def coco_files(root: Path) -> dict[Path, dict]:
    """The JSON files in `root` and its folders that are COCO's descriptions of objects, read."""
    files = [path for pattern in ("*.json", "*/*.json") for path in sorted(root.glob(pattern)) if not path.name.startswith(".")]
    if len(files) > MANY:  # one beside every picture, as some tools write them
        return {}
    described = {path: _json(path) for path in files if "captions" not in path.stem and "keypoints" not in path.stem}
    return {path: content for path, content in described.items() if _is_coco(content)}


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories"))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def coco(root: Path, files: dict[Path, dict]) -> OwnData:
    """COCO's descriptions of pictures and the boxes in them, one for each split, or one to be divided."""
    by_split: dict[str, Path] = {}
    for path, content in files.items():
        if not _is_coco(content):
            raise InputError(f"{path} is not COCO's description of objects: it lacks a list of images, annotations or categories")
        words = [*re.split(r"[^a-z0-9]+", path.stem.lower()), path.parent.name]
        split = next(filter(None, map(split_of, words)), None) or ("train" if len(files) == 1 else None)
        if split is None or split in by_split:
            raise InputError(f"{root} has {len(files)} descriptions, {first_few(str(path.relative_to(root)) for path in files)}, of "
                             "which the names have to say which is for train, val and test, each once; or name one of them as the data")
        by_split[split] = path
    if len(by_split) == 1:
        by_split = {"train": next(iter(by_split.values()))}
    if "train" not in by_split:
        raise InputError(f"{root} has descriptions for {first_few(by_split)} and none for train")
    folder = root if root.is_dir() else root.parent.parent if root.parent.name == "annotations" else root.parent
    for split, path in by_split.items():
        _locate(files[path], path, split, folder)
        complete(files[path], path)
    names = {split: {entry["id"]: str(entry["name"]) for entry in sorted(files[path]["categories"], key=lambda entry: entry["id"])}
             for split, path in by_split.items()}
    used = {names[split][box["category_id"]] for split, path in by_split.items() for box in files[path]["annotations"]}
    classes = [name for name in names["train"].values() if name in used]
    if unknown := used.difference(classes):
        raise InputError(f"{root} has annotations of {first_few(sorted(unknown))}, which the description for train, {by_split['train']}, "
                         "does not name")
    if not classes:
        raise InputError(f"{by_split['train']} has no annotations")
    places = {name: place for place, name in enumerate(classes)}
    splits: dict[str, list[Sample]] = {}
    for split, path in by_split.items():
        boxes: dict[Any, list[dict]] = {image["id"]: [] for image in files[path]["images"]}
        for box in files[path]["annotations"]:
            boxes[box["image_id"]].append({**box, "category_id": places[names[split][box["category_id"]]]})
        splits[split] = [Sample(Path(image["file_name"]), tuple(box["category_id"] for box in boxes[image["id"]]),
                                size=(image["width"], image["height"]), boxes=tuple(boxes[image["id"]]))
                         for image in files[path]["images"]]
    notes = [f"nothing is of {first_few(left)}, which are left out"] if (left := [
        name for name in names["train"].values() if name not in used]) else []
    if empty := sum(not sample.boxes for sample in splits["train"]):
        notes.append(f"{empty} of {len(splits['train'])} pictures for training have no boxes, and are left out there")
    outlined = all(box.get("segmentation") for listed in splits.values() for sample in listed for box in sample.boxes)
    form = f"COCO's boxes {'and masks' if outlined else 'without masks'}"
    return OwnData(root, "boxes", form, tuple(classes), splits, tuple(notes), outlined=outlined)


def _locate(content: dict, path: Path, split: str, folder: Path) -> None:
    """Puts whole paths, and sizes where they are missing, into the images of the description at `path`.

    They are in the one folder below `folder`, not one of masks, that has all of them, of several in that of the split.
    """
    images = content["images"]
    if not images or not all(isinstance(image, dict) and isinstance(image.get("file_name"), str) for image in images):
        raise InputError(f"{path} is not COCO's description of objects: it lists no images, or one without file_name")
    first = images[0]["file_name"]
    folders = [folder, *sorted(below for below in folder.rglob("*") if below.is_dir())]
    holding = [below for below in folders if (below / first).is_file() and _Place.of(folder, below / "x").role != "mask"]
    whole = [below for below in holding if all((below / image["file_name"]).is_file() for image in images)]
    if len(whole) > 1:
        whole = [below for below in whole if _Place.of(folder, below / "x").split == split] or whole
    if len(whole) > 1:
        raise InputError(f"the pictures of {path} are in {first_few(whole)}, and nothing says which of them are meant")
    if not holding:
        raise InputError(f"{path} lists a picture {first}, which is in no folder below {folder}")
    if not whole:
        missing = next(image["file_name"] for image in images if not (holding[0] / image["file_name"]).is_file())
        raise InputError(f"{path} lists a picture {missing}, which is not in {holding[0]}, where others are")
    for image in images:
        image["file_name"] = str(whole[0] / image["file_name"])
        if not {"width", "height"} <= image.keys():
            (image["width"], image["height"]), = picture_sizes([Path(image["file_name"])])


def table(path: Path) -> OwnData:
    """A CSV whose columns are files of pictures or volumes, and their classes or the files of their masks; and maybe their splits."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.read(4096)
        file.seek(0)
        delimiter = max(",;\t", key=head.partition("\n")[0].count)
        rows = [row for row in csv.reader(file, delimiter=delimiter) if any(map(str.strip, row))]
    if not rows or any(len(row) != len(rows[0]) for row in rows) or len(rows[0]) < 2:
        raise InputError(f"{path} has no rows of two columns or more, all of one length: paths, and labels or masks, and maybe splits")
    located = [[(path.parent / cell.strip()) for cell in row] for row in rows]
    header = [cell.strip().casefold() for cell in rows[0]]
    if any(cell.endswith(PICTURE_SUFFIXES + VOLUME_SUFFIXES) for cell in header):
        header = []
    rows, located = (rows[1:], located[1:]) if header else (rows, located)
    if not rows:
        raise InputError(f"{path} has no files in its first row, and no other rows")
    columns = range(len(rows[0]))
    files = [column for column in columns if located[0][column].is_file()]
    if not files:
        raise InputError(f"{path} names no files that are there: {first_few(rows[0])} in its first row are looked for in {path.parent}")
    for column in files:
        if missing := next((place[column] for place in located if not place[column].is_file()), None):
            raise InputError(f"{path} names {missing}, which is not there")
    split = next((column for column in columns if column not in files and all(split_of(row[column].strip()) for row in rows)), None)
    others = [column for column in columns if column not in files and column != split]
    splits = [cast(str, split_of(row[split].strip())) if split is not None else "train" for row in rows]
    if split is not None and "train" not in splits:
        raise InputError(f"{path} has rows for {first_few(sorted(set(splits)))} and none for train")
    if len(files) == 2:
        paired: dict[str, list[tuple[Path, Path]]] = {}
        for here, place in zip(splits, located, strict=True):
            paired.setdefault(here, []).append((place[files[0]], place[files[1]]))
        kind = volumes_with_masks if is_volume(located[0][files[0]]) else pictures_with_masks
        return dataclasses.replace(kind(path, paired), form="a table of files and masks")
    if len(others) > 1 and header:
        others = [column for column in others if header[column] in LABEL_COLUMNS] or others
    if len(files) > 2 or len(others) != 1:
        raise InputError(f"{path} has {len(files)} columns of files and {len(others)} others"
                         f"{f' ({first_few(header)})' if header else ''}; there have to be files and one column of labels, called label "
                         "where there are more, or files and their masks")
    labels = [row[others[0]].strip() for row in rows]
    classes = sorted({label for label, here in zip(labels, splits, strict=True) if here == "train"}, key=_by_number)
    if len(classes) < 2 or "" in labels:
        raise InputError(f"{path} has the classes {first_few(classes)}, where there have to be two or more, and one in every row")
    if unknown := {*labels} - {*classes}:
        raise InputError(f"{path} has no rows for train of {first_few(sorted(unknown))}")
    if len(classes) > len(rows) / 2 and all(re.fullmatch(r"-?\d*\.\d+", label) for label in labels):
        raise InputError(f"{path} has {len(classes)} different numbers in the place of classes; values are not learned here, only classes")
    found: dict[str, list[Sample]] = {}
    for here, place, label in zip(splits, located, labels, strict=True):
        found.setdefault(here, []).append(Sample(place[files[0]], (classes.index(label),)))
    return OwnData(path, "classes", "a table of files and classes", tuple(classes), found)


def _by_number(name: str) -> tuple:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


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
        raise InputError(f"{root} holds both folders named after splits ({first_few(path.name for path in found.values())}) and others "
                         f"({first_few(others)}); leave one kind there")
    if found and "train" not in found:
        raise InputError(f"{root} holds {first_few(path.name for path in found.values())} and no train")
    return found


def split_of(name: str) -> str | None:
    """The split, "train", "val" or "test", that a word or the name of a folder stands for, such as valid or train2017."""
    return SPLITS.get(re.sub(r"[_-]?\d+$", "", name.casefold()))


def _seen(root: Path) -> str:
    """What a sentence says of a path that nothing could be made of."""
    if root.is_file():
        return f"is a file ending in {root.suffix}" if root.suffix else "is a file"
    found = Counter(path.suffix.lower() or "nothing" for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return f"holds {first_few(f'{count} files ending in {suffix}' for suffix, count in found.most_common())}" if found else "is empty"
