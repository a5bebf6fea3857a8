"""Label maps, overlays and names of output files, against what is known of them."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.errors import InputError
from zoo.predicting.answers import output_files, output_suffix
from zoo.predicting.label_maps import background_and, label_map, overlay


@pytest.mark.parametrize(("classes", "mode"), [(2, "P"), (16, "P"), (256, "P"), (257, "I;16"), (1000, "I;16")])
def test_label_maps_hold_the_labels_whatever_their_number(classes, mode, tmp_path):
    labels = np.random.default_rng(0).integers(0, classes, (9, 13))
    labels[0, 0] = classes - 1
    label_map(labels, background_and(classes)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        assert written.mode == mode and np.array_equal(np.asarray(written), labels)
        if mode == "P":
            np.testing.assert_array_equal(np.asarray(written.convert("RGB")), background_and(classes)[labels])


def test_overlays_are_halfway_to_the_colours():
    picture, colours = Image.new("RGB", (2, 1), (10, 20, 30)), np.array([[0, 0, 0], [200, 100, 0]], np.uint8)
    labels = np.array([[0, 1]])
    assert np.asarray(overlay(picture, labels, colours)).tolist() == [[[5, 10, 15], [105, 60, 15]]]
    assert np.asarray(overlay(picture, labels, colours, clear=0)).tolist() == [[[10, 20, 30], [105, 60, 15]]]


@pytest.mark.parametrize(("name", "suffix"), [
    ("answers.csv", ".csv"), ("A.B.CSV", ".csv"), ("there.v2", ""), ("new", ""), ("new.v2/", ""), ("answers.csv/", ""), (".hidden", ""),
])
def test_what_a_name_means(name, suffix, tmp_path):
    (tmp_path / "there.v2").mkdir()
    assert output_suffix(f"{tmp_path}/{name}", (".csv", ".png")) == suffix


@pytest.mark.parametrize("name", ["new.v2", "answers.xlsx", "mask.nii.gz", "file"])
def test_names_that_mean_nothing_are_refused(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=rf"{name} is neither a folder nor .* \(.csv .png\); the name of a new folder has no"):
        output_suffix(tmp_path / name, (".csv", ".png"))


def test_files_in_a_folder_never_share_a_name():
    inputs = [Path("a/x.png"), Path("b/x.png"), Path("x_2.jpg"), Path("x_overlay.png"), Path("v.nii.gz")]
    found = output_files(inputs, "out", (".png", "_overlay.png"))
    assert len({path for paths in found for path in paths}) == 10
    assert found[0] == (Path("out/x.png"), Path("out/x_overlay.png")) and found[-1][0] == Path("out/v.png")
