from pathlib import Path

import pytest

from zoo.errors import InputError
from zoo.reading.class_folders import find_classes, list_labelled
from zoo.reading.masks import paired_files
from zoo.reading.pairs import pair
from zoo.reading.pictures import PICTURE_SUFFIXES, files_below, find_pictures


def paired(pictures: str, masks: str) -> dict[str, str]:
    """By name, what is paired of two lists of names, which are given in the order of a sorted folder."""
    given = [[Path(folder, name) for name in sorted(names.split())] for folder, names in (("images", pictures), ("masks", masks))]
    return {picture.relative_to("images").as_posix(): mask.relative_to("masks").as_posix()
            for picture, mask in pair(*given, "images", "masks")}


@pytest.mark.parametrize(("pictures", "masks"), [
    ("img_1.jpg img_10.jpg img_2.jpg", "img_1_mask.png img_10_mask.png img_2_mask.png"),
    ("a.JPG b.jpeg", "a.png B.PNG"),
    ("img_1.jpg img_2.jpg", "mask_1.png mask_2.png"),
    ("1.jpg 10.jpg", "gt1.png gt10.png"),
    ("x_1_0000.nii.gz x_10_0000.nii.gz", "x_1.nii.gz x_10.nii.gz"),
    ("aachen_0_19_leftImg8bit.png aachen_0_20_leftImg8bit.png", "aachen_0_19_gtFine_labelIds.png aachen_0_20_gtFine_labelIds.png"),
    ("p1/1.png p1/2.png p2/1.png", "p1/1.png p1/2.png p2/1.png"),
    ("P1/1.png p2/1.png", "p1/1_seg.png p2/1_seg.png"),
    ("p1/image.png p2/image.png", "p1/mask.png p2/mask.png"),
    ("a.jpg b.jpg", "a.jpg.png b.jpg.png"),
    ("ISIC_01.jpg ISIC_02.jpg", "ISIC_01_segmentation.png ISIC_02_segmentation.png"),
    ("cat_1.jpg", "cat_1_mask.png"),
    ("A.png a.png", "A.png a.png"),
    ("überzug·1.png überzug·2.png", "maske_überzug·1.png maske_überzug·2.png"),
    ("v1.5.png v1.6.png", "v1.5_m.png v1.6_m.png"),
], ids=str)
def test_pairs_are_those_of_the_same_name(pictures, masks):
    assert list(paired(pictures, masks).items()) == list(zip(sorted(pictures.split()), _in_order(pictures, masks), strict=True))


def _in_order(pictures: str, masks: str) -> list[str]:
    """The masks in the order of the sorted pictures, being given in the order of the given ones."""
    partners = dict(zip(pictures.split(), masks.split(), strict=True))
    return [partners[picture] for picture in sorted(partners)]


@pytest.mark.parametrize(("pictures", "masks", "message"), [
    ("1.png 2.png", "1.png", r"2.png of the 2 pictures below images has no mask below masks; a mask is called as its picture"),
    ("1.png", "1.png 2.png", r"2.png of the 2 masks below masks has no picture below images"),
    ("img_1.png img_2.png", "img_2_mask.png img_3_mask.png", r"img_1.png of .* no mask below masks; img_3_mask.png of .* no picture"),
    ("img_1.png", "img_2_mask.png", "has no mask"),
    ("img_1.png", "2_img.png", "has no mask"),
    ("img_1.png img_11.png", "img_11_mask.png img_111_mask.png", "img_1.png of .* has no mask below masks; img_111_mask.png"),
    ("s1_img_1.png s1_img_2.png", "s2_mask_1.png s2_mask_2.png", "has no mask"),
    ("cat.png", "dog_mask.png", "has no mask"),
    ("a/1.png b/1.png", "a/1.png c/1.png", r"b/1.png of .* has no mask below masks; c/1.png"),
    ("a.png b.png c.png d.png e.png", "x_1.png", r"a.png, b.png, c.png and 2 more of the 5 pictures"),
    ("1.png 1_1.png", "1_1.png 1_1_1.png", "1.png of .* has no mask"),  # one name is the same, so that nothing is left out of others
    ("x.jpg x.png", "x.png", "images/x.jpg and images/x.png have one name"),
    ("x.jpg", "x.gif x.png", "masks/x.gif and masks/x.png have one name"),
    ("", "x.png", "there are no pictures below images"),
    ("x.png", "", "there are no masks below masks"),
], ids=str)
def test_what_has_no_partner_is_named(pictures, masks, message):
    with pytest.raises(InputError, match=message):
        paired(pictures, masks)


def test_what_did_not_count_is_said(caplog):
    caplog.set_level("INFO", "zoo")
    paired("img_1.jpg img_2.jpg", "img_1_mask.png img_2_mask.png")
    assert caplog.messages == ["pictures called … are paired with masks called …_mask"]


def test_many_names_are_paired_in_no_time_to_speak_of():
    names = [f"scan_{i:05d}" for i in range(5000)]
    found = paired(" ".join(f"{name}.png" for name in names), " ".join(f"{name}_mask.png" for name in names))
    assert all(mask == picture.replace(".png", "_mask.png") for picture, mask in found.items()) and len(found) == 5000


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for name in ("a/x.PNG", "a/._x.PNG", "b/sub/y.jpg", ".ipynb_checkpoints/z.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    assert find_classes(tmp_path, "train")[0] == ["a", "b"]
    assert list_labelled(tmp_path / "train") == [(str(tmp_path / "train/a/x.PNG"), 0), (str(tmp_path / "train/b/sub/y.jpg"), 1)]
    assert find_pictures([tmp_path / "train" / "a"]) == [tmp_path / "train/a/x.PNG"]
    (tmp_path / "train" / "b" / "sub" / "y.jpg").unlink()
    with pytest.raises(InputError, match="the folder .*/b of a class holds no picture"):
        list_labelled(tmp_path / "train")
    (tmp_path / "linked").symlink_to(tmp_path / "train")
    assert files_below(tmp_path / "linked", (".png",)) == [tmp_path / "linked/a/x.PNG"]


def test_masks_of_a_folder(tmp_path):
    for name in ("images/p/img_1.jpg", "images/p/img_10.jpg", "images/._img_1.jpg", "masks/p/img_1_mask.png", "masks/p/img_10_mask.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    found = paired_files(tmp_path, "train", "masks", PICTURE_SUFFIXES)
    assert [(picture.name, mask.name) for picture, mask in found] == [("img_1.jpg", "img_1_mask.png"), ("img_10.jpg", "img_10_mask.png")]
