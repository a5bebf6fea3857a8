"""What data are found out to be, from the names and contents of files, and how they are divided."""
import hashlib
import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from zoo.errors import InputError
from zoo.reading.discovery import discover
from zoo.reading.own_data import divided, read_samples, write_samples
from zoo.reading.splits import held_out, identical_files


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
    """Of bytes that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[0, :, 0] = np.frombuffer(hashlib.sha256(str(path).encode()).digest()[:size[0]], np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, *values: int, size: tuple[int, int] = (6, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, np.uint8), size)).save(path)
    return path


def volume(path: Path, *values: int, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.resize(np.array(values, np.int16), (4, 5, 6)), np.diag([spacing] * 3 + [1])), path)
    return path


def folders(root: Path, *names: str, count: int = 3) -> Path:
    for name, i in itertools.product(names, range(count)):
        picture(root / name / f"{i}.png")
    return root


def coco_json(path: Path, pictures: list[str], **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {
        "images": [{"id": 10 + i, "file_name": name} for i, name in enumerate(pictures)],
        "annotations": [{"id": i, "image_id": 10 + i, "category_id": (3, 7)[i % 2], "bbox": [1, 1, 4, 3]} for i in range(len(pictures))],
        "categories": [{"id": 9, "name": "unused"}, {"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]}
    path.write_text(json.dumps(described | changes))
    return path


# Class folders

@pytest.mark.parametrize("splits", [(), ("train",), ("train", "val"), ("Train", "valid", "test"), ("training", "validation")])
def test_class_folders(tmp_path, splits):
    for split in splits or (".",):
        folders(tmp_path / split, "cat", "dog", "dog/young")
    (tmp_path / "readme.txt").write_text("x")
    picture(tmp_path / ".thumbnails" / "x.png")
    found = discover(tmp_path)
    assert (found.task, found.classes) == ("classes", ("cat", "dog"))
    assert list(found.splits) == [split for split in ("train", "val", "test") if split in {
        {"training": "train", "valid": "val", "validation": "val"}.get(s.lower(), s.lower()) for s in splits or ("train",)}]
    assert all(found.counts(split) == [3, 6] for split in found.splits)
    dogs = [sample.path for sample in found.splits["train"] if sample.labels == (1,)]
    assert {path.relative_to(tmp_path).parts[len(splits[:1])] for path in dogs} == {"dog"}


# Pictures and masks

@pytest.mark.parametrize("names", [
    ("images/{}.png", "masks/{}.png"), ("imgs/{}.jpg", "labels/{}.png"), ("img_dir/{}.png", "ann_dir/{}.png"),
    ("images/{}.jpg", "masks/{}_mask.png"), ("{}.jpg", "{}_mask.png"), ("a/{}.jpg", "a/{}-gt.tif"),
    ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
])
def test_pictures_and_masks(tmp_path, names):
    for i in (1, 2, 10):
        picture(tmp_path / names[0].format(i))
        mask(tmp_path / names[1].format(i), 0, i % 2 * 255)
    found = discover(tmp_path)
    assert (found.task, found.classes, found.values) == ("masks", ("background", "object"), (0, 255))
    assert {int(sample.path.stem): sample.labels for sample in found.splits["train"]} == {1: (0, 1), 2: (0,), 10: (0,)}
    assert all(sample.mask.stem.rstrip("_-maskgt") == sample.path.stem for sample in found.splits["train"])


@pytest.mark.parametrize("names", [
    ("{split}/images/{i}.png", "{split}/masks/{i}.png"), ("images/{split}/{i}.png", "masks/{split}/{i}.png"),
    ("{split}/{i}.png", "{split}_masks/{i}.png"), ("{split}_images/{i}.png", "{split}_labels/{i}.png"),
    ("images/{split}2017/a/{i}.png", "annotations/{split}2017/a/{i}.png"),
])
def test_pictures_and_masks_of_splits_in_either_order(tmp_path, names):
    for split, i in (("train", 1), ("train", 2), ("val", 1)):
        picture(tmp_path / names[0].format(split=split, i=i))
        mask(tmp_path / names[1].format(split=split, i=i), 0, 1, 3)
    found = discover(tmp_path)
    assert found.classes == ("background", "class 1", "class 2", "class 3") and found.values == (0, 1, 2, 3)
    assert {split: len(samples) for split, samples in found.splits.items()} == {"train": 2, "val": 1}
    assert found.counts("train") == [2, 2, 0, 2]


def test_classes_of_masks_are_named_by_a_file_and_values_are_what_they_are(tmp_path):
    picture(tmp_path / "images/1.png")
    mask(tmp_path / "masks/1.png", 0, 100, 200)
    assert discover(tmp_path).classes == ("value 0", "value 100", "value 200")
    (tmp_path / "classes.txt").write_text("ground\nroad\nroof\n")
    found = discover(tmp_path)
    assert found.classes == ("ground", "road", "roof") and found.values == (0, 100, 200) and found.counts("train") == [1, 1, 1]
    (tmp_path / "classes.txt").write_text("ground\nroad\n")
    with pytest.raises(InputError, match="names 2 classes, and the masks have 3: 0, 100, 200"):
        discover(tmp_path)


# Boxes

@pytest.mark.parametrize(("json_name", "folder"), [
    ("annotations/instances_{}2017.json", "{}2017"), ("annotations/{}.json", "images/{}"), ("{}/_annotations.coco.json", "{}"),
    ("labels_{}.json", "pictures"),
])
def test_coco(tmp_path, json_name, folder):
    for split, count in (("train", 4), ("val", 2)):
        names = [f"{split}_{i}.png" if "{}" not in folder else f"{i}.png" for i in range(count)]
        for name in names:
            picture(tmp_path / folder.format(split) / name)
        coco_json(tmp_path / json_name.format(split), names)
    found = discover(tmp_path)
    assert (found.task, found.classes, found.outlined) == ("boxes", ("cat", "dog"), False) and "without masks" in found.form
    assert {split: found.counts(split) for split in found.splits} == {"train": [2, 2], "val": [1, 1]}
    assert all(sample.path.is_file() for samples in found.splits.values() for sample in samples) and "unused" in found.notes[0]
    write_samples(found, tmp_path)
    written = json.loads((tmp_path / "train.json").read_text())
    assert [category["name"] for category in written["categories"]] == ["cat", "dog"]
    assert written["images"][1] == {"id": 1, "width": 8, "height": 6, "file_name": str(found.splits["train"][1].path.absolute())}
    first = written["annotations"][0]
    assert (first["category_id"], first["image_id"], first["area"], first["iscrowd"]) == (0, 0, 12, 0)


def test_one_json_is_divided_and_its_pictures_are_found(tmp_path):
    names = [f"{i}.png" for i in range(20)]
    for name in names:
        picture(tmp_path / "photos" / name)
    found = divided(discover(coco_json(tmp_path / "all.json", names)), folds=4)
    assert len(found.splits["train"]) == 15 and found.splits["val"]
    path = coco_json(tmp_path / "bad.json", [*names, "21.png"])
    with pytest.raises(InputError, match=r"bad.json lists a picture 21.png, which is not in .*photos"):
        discover(path)
    with pytest.raises(InputError, match="names have to say which is for train, val and test"):
        discover(tmp_path)


# Volumes

@pytest.mark.parametrize("labels", [{"0": "background", "1": "liver", "2": "tumour"}, {"background": 0, "liver": 1, "tumour": 2}])
@pytest.mark.parametrize("listed", [True, False])
def test_decathlon_and_nnunet(tmp_path, labels, listed):
    training = []
    for i in range(3):
        volume(tmp_path / "imagesTr" / (f"ct_{i}.nii.gz" if listed else f"ct_{i}_0000.nii.gz"), i, 300 + i)
        volume(tmp_path / "labelsTr" / f"ct_{i}.nii.gz", 0, i % 2)
        training.append({"image": f"./imagesTr/ct_{i}.nii.gz", "label": f"./labelsTr/ct_{i}.nii.gz"})
    volume(tmp_path / "imagesTs" / "ct_9.nii.gz", 1)
    described = {"labels": labels, "channel_names": {"0": "CT"}, **({"training": training} if listed else {"file_ending": ".nii.gz"})}
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(described).encode())
    found = discover(tmp_path)
    assert (found.task, found.classes, found.channels) == ("volumes", ("background", "liver", "tumour"), 1)
    assert list(found.splits) == ["train"] and found.counts("train") == [3, 1, 0]


def test_volumes_in_folders(tmp_path):
    for split, i in (("train", 0), ("train", 1), ("val", 0)):
        volume(tmp_path / split / "images" / f"{i}.nii.gz", 1, 2)
        volume(tmp_path / split / "labels" / f"{i}.nii.gz", 0, 2)
    found = discover(tmp_path)
    assert found.classes == ("background", "class 1", "class 2") and {k: len(v) for k, v in found.splits.items()} == {"train": 2, "val": 1}


def test_scans_of_a_subject_are_on_one_side(tmp_path):
    for subject, session in itertools.product(range(6), range(3)):
        volume(tmp_path / "images" / f"sub-{subject}_ses-{session}.nii.gz", 1, subject, 10 + session)
        volume(tmp_path / "labels" / f"sub-{subject}_ses-{session}.nii.gz", 0, 1)
    parts = divided(discover(tmp_path), 3).splits
    subjects = {split: {sample.path.name[:5] for sample in parts[split]} for split in ("train", "val")}
    assert len(subjects["val"]) == 2 and not subjects["train"] & subjects["val"]


def test_masks_of_volumes_with_nan_and_infinite_labels(tmp_path, caplog):
    for value in (np.nan, np.inf):
        volume(tmp_path / "images" / "a.nii.gz", 1, 2)
        labels = np.zeros((4, 4, 4), np.float32)
        labels[0], labels[1, 1, 1] = 1, value
        (tmp_path / "labels").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "labels" / "a.nii.gz")
        if np.isnan(value):
            assert discover(tmp_path).classes == ("background", "class 1")
            assert "labels/a.nii.gz has 1 voxels that are NaN; they count as outside" in caplog.text
        else:
            with pytest.raises(InputError, match="labels/a.nii.gz has 1 voxels that are infinite"):
                discover(tmp_path)


# Tables

@pytest.mark.parametrize("header", [None, "file{0}kind{0}set", "id{0}label"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_classes(tmp_path, header, delimiter):
    rows = []
    for i in range(6):
        picture(tmp_path / "pictures" / f"{i}.png")
        rows.append([f"pictures/{i}.png", str(10 - i % 3), "validation" if i > 3 else "train"][: header.count("{") + 1 if header else 3])
    lines = ([header.format(delimiter)] if header else []) + [delimiter.join(row) for row in rows]
    (tmp_path / "table.csv").write_text("\ufeff" + "\n".join(lines))
    found = discover(tmp_path / "table.csv")
    assert (found.task, found.classes) == ("classes", ("8", "9", "10"))
    assert [len(samples) for samples in found.splits.values()] == ([6] if header == "id{0}label" else [4, 2])
    assert found.splits["train"][1].path == tmp_path / "pictures/1.png" and found.splits["train"][1].labels == (1,)


def test_tables_of_masks(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
        mask(tmp_path / f"m{i}.png", 0, 1)
    (tmp_path / "table.csv").write_text("".join(f"{i}.png,m{i}.png\n" for i in range(3)))
    found = discover(tmp_path / "table.csv")
    assert found.task == "masks" and [sample.mask.name for sample in found.splits["train"]] == ["m0.png", "m1.png", "m2.png"]
    write_samples(found, tmp_path)
    assert read_samples(tmp_path / "samples.csv", "train") == [(tmp_path / f"{i}.png", str(tmp_path / f"m{i}.png")) for i in range(3)]


# What is refused

def _nothing(root):
    root.mkdir()


def _documents(root):
    root.mkdir()
    (root / "x.pdf").write_text("x")


def _loose(root):
    folders(root, "cat", "dog")
    picture(root / "x.png")


def _half_split(root):
    folders(root, "train", "cat")


def _two_of_a_split(root):
    folders(root, "train/a", "train/b", "val/a", "valid/b")


def _no_train(root):
    folders(root, "val/a", "val/b")


def _new_class(root):
    folders(root, "train/cat", "train/dog", "val/bird")


def _lonely(root):
    for i in range(3):
        picture(root / "images" / f"img_{i}.png")
        mask(root / "masks" / f"img_{i + 1}.png", 0, 1)


def _grey_jpegs(root):
    picture(root / "images/1.png", size=(10, 10))
    mask(root / "masks/1.png", *range(0, 200, 3), size=(10, 10))


def _unmarked_volumes(root):
    volume(root / "a.nii.gz", 1)
    volume(root / "b.nii.gz", 1)


def _label_beyond(root):
    for name in "ab":
        volume(root / f"imagesTr/{name}_0000.nii.gz", 1)
        volume(root / f"labelsTr/{name}.nii.gz", 0, 5)
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}))


@pytest.mark.parametrize(("make", "message"), [
    (None, "there is no data .*data"),
    (_nothing, "is empty, which is none of the forms"),
    (_documents, "holds 1 files ending in .pdf, which is none of the forms"),
    (lambda root: folders(root, "cat"), "in one folder only, cat, where each of two classes"),
    (_loose, "x.png lies in no folder named after a class"),
    (_half_split, r"both folders named after splits \(train\) and others \(cat\)"),
    (_two_of_a_split, "holds both val and valid"),
    (_no_train, "holds val and no train"),
    (_new_class, "val has the classes bird, which .*train lacks"),
    (_lonely, "img_0.png of the 3 pictures below .*images has no mask below .*masks; img_3.png of the 3 masks"),
    (_grey_jpegs, "have 67 different values, where there is one for each class"),
    (_unmarked_volumes, "nothing says which of the volumes in .* are masks"),
    (_label_beyond, "labelsTr/a.nii.gz has the label 5, where labels are whole numbers from 0 to 1"),
])
def test_what_is_no_data_is_said_in_a_sentence(tmp_path, make, message):
    root = tmp_path / "data"
    if make:
        make(root)
    with pytest.raises(InputError, match=message):
        discover(root)


@pytest.mark.parametrize(("text", "message"), [
    ("nowhere.png,cat\nx.png,dog\n", "names no files that are there|names .*nowhere.png, which is not there"),
    ("x.png,cat\nnowhere.png,dog\n", "names .*nowhere.png, which is not there"),
    ("x.png,cat\ny.png,dog,1\n", "all of one length"),
    ("x.png\ny.png\n", "no rows of two columns"),
    ("file,a,b\nx.png,1,2\ny.png,2,1\n", r"1 columns of files and 2 others \(file, a, b\)"),
    ("x.png,0.25\ny.png,0.75\n", "2 different numbers in the place of classes"),
    ("x.png,cat,val\ny.png,dog,val\n", "has rows for val and none for train"),
    ("x.png,cat\ny.png,cat\n", "has the classes cat, where there have to be two"),
])
def test_tables_that_are_none(tmp_path, text, message):
    picture(tmp_path / "x.png")
    picture(tmp_path / "y.png")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        discover(tmp_path / "table.csv")


# Division

def test_folds_are_stratified_and_hold_every_sample_out_once(tmp_path):
    folders(tmp_path, "a", count=20)
    folders(tmp_path, "b", count=10)
    for seed in (0, 1):
        parts = [divided(discover(tmp_path), 5, fold, seed) for fold in range(5)]
        assert all(part.counts("val") == [4, 2] and part.counts("train") == [16, 8] for part in parts)
        held = [sample.path for part in parts for sample in part.splits["val"]]
        assert len(held) == len(set(held)) == 30
    again = divided(discover(tmp_path), 5, 3, 1).splits["val"]
    assert again == parts[3].splits["val"] != divided(discover(tmp_path), 5, 3, 0).splits["val"]


def test_copies_stay_on_one_side_and_leaks_are_said(tmp_path):
    folders(tmp_path / "x", "a", "b", count=10)
    for i in range(10):
        (tmp_path / f"x/a/copy_{i}.png").write_bytes((tmp_path / f"x/a/{i % 3}.png").read_bytes())
    found = discover(tmp_path / "x")
    paths = [sample.path for sample in found.splits["train"]]
    groups = dict(zip(paths, identical_files(paths), strict=True))
    for fold in range(5):
        part = divided(found, 5, fold)
        sides = [{groups[sample.path] for sample in part.splits[split]} for split in ("train", "val")]
        assert not sides[0] & sides[1] and any("10 files are copies" in note for note in part.notes)
    folders(tmp_path / "y", "train/a", "train/b", "val/a", "val/b")
    assert not divided(discover(tmp_path / "y")).notes
    (tmp_path / "y/val/a/9.png").write_bytes((tmp_path / "y/train/b/1.png").read_bytes())
    note, = divided(discover(tmp_path / "y")).notes
    assert "1 files that are not for training are copies of files that are, such as" in note and "val/a/9.png" in note
    with pytest.raises(InputError, match="has a part for validation of its own"):
        divided(discover(tmp_path / "y"), 5)


@pytest.mark.parametrize(("labels", "groups", "folds", "fold", "message"), [
    ([(0,)] * 4, [0, 1, 2, 3], 5, 0, "4 different samples cannot be divided into 5 folds"),
    ([(0,)] * 9, [0] * 9, 2, 0, "1 different samples"),
    ([(0,)] * 9, range(9), 1, 0, "fold 0 of 1"),
    ([(0,)] * 9, range(9), 3, 3, "fold 3 of 3"),
])
def test_what_cannot_be_divided(labels, groups, folds, fold, message):
    with pytest.raises(InputError, match=message):
        held_out(labels, list(groups), folds, fold)


def test_rare_classes_and_samples_without_any_are_divided_too():
    labels = [(0, 1)] * 12 + [(0,)] * 12 + [()] * 3 + [(2,)]
    out = held_out(labels, range(28), 4, 0)
    assert sum(out[:12]) == 3 and 2 <= sum(out[12:24]) <= 4 and 0 < sum(out) < 10
