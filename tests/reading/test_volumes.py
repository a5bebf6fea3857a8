"""Volumes on their way into networks and masks on their way back."""
import nibabel
import numpy as np
import pytest
import torch

from zoo.errors import InputError
from zoo.reading.volumes import Grid, check_same_grid, open_volume

TURNED = np.array([[0, -2.0, 0, 5], [0, 0, 1.5, 7], [1.0, 0, 0, -3], [0, 0, 0, 1]])  # axes: superior, left, anterior


def volume(path, data, affine=TURNED):
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return open_volume(path)


@pytest.mark.parametrize("spacing", [None, (2.0, 1.5, 1.0), (1.0, 1.0, 2.0)], ids=str)
def test_masks_come_back_onto_the_files_grid(tmp_path, spacing):
    data = np.zeros((6, 8, 10), np.int16)
    data[1:5, 2:6, 4:8] = 40
    image = volume(tmp_path / "x.nii.gz", data)
    grid = Grid(spacing, clip=(0, 40))
    x = grid.prepare(image)
    assert tuple(x.shape[1:]) == tuple(grid.size(image)) == ((8, 10, 6) if spacing != (1.0, 1.0, 2.0) else (16, 15, 3))
    grid.write_mask((x[0] > 0.5).to(torch.uint8), image, tmp_path / "mask.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine) and mask.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(mask.dataobj), data > 0) or spacing == (1.0, 1.0, 2.0)
    assert (np.asarray(mask.dataobj) == (data > 0)).mean() > 0.9


def test_axes_are_turned_to_right_anterior_superior(tmp_path):
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    x = Grid(clip=(0, 1000)).prepare(volume(tmp_path / "x.nii", data))[0] * 1000
    assert x.shape == (3, 4, 2)
    for i, j, k in np.ndindex(2, 3, 4):
        assert x[2 - j, k, i].item() == pytest.approx(data[i, j, k], abs=1e-3)


def test_intensities(tmp_path):
    data = np.random.default_rng(0).normal(100, 20, (5, 6, 7)).astype(np.float32)
    data[:2] = 0
    image = volume(tmp_path / "x.nii", data, np.eye(4))
    x = Grid().prepare(image)[0]
    assert x[2:].mean().abs() < 1e-5 and (x[2:].std() - 1).abs() < 1e-4
    clipped = Grid(clip=(90, 110)).prepare(image)[0]
    torch.testing.assert_close(clipped, torch.tensor(((data - 90) / 20).clip(0, 1)))
    assert Grid().prepare(volume(tmp_path / "empty.nii", np.zeros((2, 2, 2), np.float32))).abs().sum() == 0


def test_bad_volumes_are_one_sentence(tmp_path):
    image = volume(tmp_path / "x.nii.gz", np.zeros((4, 5, 6), np.uint8))
    (tmp_path / "text.nii").write_text("no volume")
    (tmp_path / "half.nii.gz").write_bytes((tmp_path / "x.nii.gz").read_bytes()[:40])
    noise = np.random.default_rng(0).integers(0, 255, (20, 21, 22), dtype=np.uint8)
    for suffix in (".nii", ".nii.gz"):
        volume(tmp_path / f"noise{suffix}", noise)
        (tmp_path / f"cut{suffix}").write_bytes((tmp_path / f"noise{suffix}").read_bytes()[:5000])  # the header is whole
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.float32), np.eye(4)), tmp_path / "time.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5), np.float32), np.eye(4)), tmp_path / "flat.nii")
    for name, message in [("text.nii", "text.nii cannot be read"), ("half.nii.gz", "half.nii.gz cannot be read"),
                          ("cut.nii", "the volume .*cut.nii cannot be read"), ("cut.nii.gz", "the volume .*cut.nii.gz cannot be read"),
                          ("y.nii.gz", "there is no volume .*y.nii.gz; did you mean x.nii.gz"),
                          ("time.nii", "of shape 4×5×6×2, where a volume of three dimensions"), ("flat.nii", "of shape 4×5, where")]:
        with pytest.raises(InputError, match=message):
            Grid().prepare(open_volume(tmp_path / name))
    with pytest.raises(InputError, match="the volume .*cut.nii.gz cannot be read"):
        Grid().prepare_mask(open_volume(tmp_path / "cut.nii.gz"), 3, tmp_path / "cut.nii.gz")
    other = volume(tmp_path / "m.nii", np.zeros((4, 5, 6), np.uint8), TURNED + 0.5)
    with pytest.raises(InputError, match="the affine of the mask m differs from that of x by 0.5; resample"):
        check_same_grid("x", image, "m", other)
    with pytest.raises(InputError, match="the mask m has 4×5×5 voxels, its volume x 4×5×6"):
        check_same_grid("x", image, "m", volume(tmp_path / "s.nii", np.zeros((4, 5, 5), np.uint8)))
    for label, shown in ((7, "7"), (0.5, "0.5"), (-1, "-1")):
        mask = volume(tmp_path / "l.nii", np.full((4, 5, 6), label, np.float32))
        with pytest.raises(InputError, match=f"the mask l has unknown labels {shown}; known are 0 to 2"):
            Grid().prepare_mask(mask, 3, "l")
