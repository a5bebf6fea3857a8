"""What a dataset.json says, in all the forms that there are, and that nothing is held out and trained on at once."""
import json
import os

import nibabel
import numpy as np
import pytest

from zoo.errors import InputError
from zoo.reading.decathlon import read_decathlon

LABELS = {"0": "background", "1": "liver"}


def write(root, described, files=(), encoding="utf-8"):
    (root / "dataset.json").write_text(json.dumps(described), encoding=encoding)
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), root / name)
    return root / "dataset.json"


def pairs(names, folder="./"):
    return [{"image": f"{folder}imagesTr/{name}.nii.gz", "label": f"{folder}labelsTr/{name}.nii.gz"} for name in names]


def files_of(names):
    return [f"{folder}/{name}.nii.gz" for name in names for folder in ("imagesTr", "labelsTr")]


def both(path, **args):
    task = read_decathlon(path, "train", **args)
    return {split: [os.path.realpath(image) for image, _ in files] for split, files in (("train", task.training), ("val", task.validation))}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_matter(tmp_path, encoding):
    path = write(tmp_path, {"labels": {"0": "Hintergrund", "1": "Drüse"}, "training": pairs("ab")}, encoding=encoding)
    assert read_decathlon(path, "train").classes == ["Hintergrund", "Drüse"]


def test_the_decathlons_channels_are_its_modalities(tmp_path):
    path = write(tmp_path, {"labels": LABELS, "modality": {"0": "FLAIR", "1": "T1w"}, "training": pairs("ab"), "test": ["./c.nii.gz"]})
    assert read_decathlon(path, "train").channels == 2
    assert read_decathlon(write(tmp_path, {"labels": LABELS, "training": pairs("ab")}), "val").channels == 1


@pytest.mark.parametrize("way", ["another spelling", "a way round", "a link", "a linked mask", "an absolute path"])
def test_what_is_held_out_is_not_trained_on_however_it_is_written(tmp_path, way):
    listed = {
        "another spelling": pairs("a", ""), "a way round": [{"image": "labelsTr/../imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
        "a link": [{"image": "links/x.nii.gz", "label": "links/y.nii.gz"}],
        "a linked mask": [{"image": "imagesTr/d.nii.gz", "label": "links/y.nii.gz"}],
        "an absolute path": [{key: str(tmp_path / name) for key, name in pairs("a", "")[0].items()}],
    }[way]
    path = write(tmp_path, {"labels": LABELS, "training": pairs("abc"), "validation": listed}, files_of("abcd"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x.nii.gz").symlink_to(tmp_path / "imagesTr" / "a.nii.gz")
    (tmp_path / "links" / "y.nii.gz").symlink_to(tmp_path / "labelsTr" / "a.nii.gz")
    assert [os.path.basename(name) for name in both(path)["train"]] == ["b.nii.gz", "c.nii.gz"]


def test_files_of_one_name_in_a_file_system_that_minds_no_letters(tmp_path):
    """As such a system has them, two names are one file: here by a hard link."""
    path = write(tmp_path, {"labels": LABELS, "training": pairs("ab"), "validation": pairs("A")}, files_of("ab"))
    for folder in ("imagesTr", "labelsTr"):
        os.link(tmp_path / folder / "a.nii.gz", tmp_path / folder / "A.nii.gz")
    assert [os.path.basename(name) for name in both(path)["train"]] == ["b.nii.gz"]


def test_scans_of_a_subject_stay_together(tmp_path):
    names = [f"sub-{subject:02d}_ses-{session}_T1w" for session in (1, 2) for subject in range(5)] + ["x1", "x2", "x3"]
    parts = both(write(tmp_path, {"labels": LABELS, "training": pairs(names)}, files_of(names)), folds=4)
    subjects = {split: {os.path.basename(name)[:6] for name in files} for split, files in parts.items()}
    assert subjects["val"] == {"sub-00", "sub-04"} and not subjects["train"] & subjects["val"]
    assert len(parts["train"]) + len(parts["val"]) == len(names)
    listed = {"labels": LABELS, "training": pairs(names[:5]), "validation": pairs(names[5:6])}
    assert "sub-00" not in str(both(write(tmp_path, listed))["train"])


def test_one_file_listed_twice_is_in_one_part(tmp_path):
    parts = both(write(tmp_path, {"labels": LABELS, "training": [*pairs("abc", ""), *pairs("abc")]}, files_of("abc")), folds=2)
    assert not set(parts["train"]) & set(parts["val"]) and set(parts["train"]) | set(parts["val"]) == {
        str(tmp_path.resolve() / "imagesTr" / f"{name}.nii.gz") for name in "abc"}


def test_nnunet_describes_folders(tmp_path):
    described = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "lesion": 2, "liver": 1}, "numTraining": 2,
                 "file_ending": ".nii.gz"}  # the last of which is of the second version
    path = write(tmp_path, described, [f"imagesTr/{case}_{i:04d}.nii.gz" for case in ("case_1", "case_2") for i in (0, 1)])
    write(tmp_path, described, [f"labelsTr/{case}.nii.gz" for case in ("case_1", "case_2")])
    (tmp_path / "labelsTr" / "._case_1.nii.gz").write_text("what macOS leaves")
    task = read_decathlon(path, "val")
    assert (task.classes, task.channels) == (["background", "liver", "lesion"], 2)
    assert task.validation == [(tmp_path / "imagesTr" / "case_1_0000.nii.gz", tmp_path / "labelsTr" / "case_1.nii.gz")]
    assert [image.name for image, _ in task.training] == ["case_2_0000.nii.gz"]


def test_nnunets_first_version_leaves_out_the_channels_number(tmp_path):
    path = write(tmp_path, {"labels": LABELS, "modality": {"0": "CT"}, "training": pairs("ab")},
                 ["imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz"])
    assert read_decathlon(path, "val").validation == [(tmp_path / "imagesTr" / "a_0000.nii.gz", tmp_path / "labelsTr" / "a.nii.gz")]


@pytest.mark.parametrize(("described", "message"), [
    ({"labels": {"background": 0, "whole tumour": [1, 2], "core": [2]}, "file_ending": ".nii.gz"}, "has labels of regions, which overlap"),
    ({"labels": {"background": 0, "a": 1, "ignore": 2}, "file_ending": ".nii.gz"}, "has a label 'ignore'"),
    ({"labels": {"background": 0, "a": 2}, "file_ending": ".nii.gz"}, r"has labels \[0, 2\], where they have to run from 0"),
    ({"labels": {"background": 0, "a": 1}, "file_ending": ".tif"}, "has files that end in '.tif'; volumes that are read end in .nii"),
    ({"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}, "names no volumes for train"),
    ({"labels": {"background": 0, "a": 1}}, "names no volumes for train"),
    ({"training": []}, "is not a description of the Decathlon's or nnU-Net's kind: KeyError"),
    ({"labels": ["background", "a"], "training": []}, "is not a description of the Decathlon's or nnU-Net's kind: AttributeError"),
])
def test_what_is_no_description_is_one_sentence(tmp_path, described, message):
    with pytest.raises(InputError, match=message):
        read_decathlon(write(tmp_path, described), "train")
