"""Volumes on their way into networks and masks on their way back, and sliding windows over them."""
import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from zoo.errors import InputError
from zoo.predicting import sliding_windows
from zoo.predicting.sliding_windows import segment
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


class Scores(nn.Module):
    """Logits that depend on the window: a convolution."""

    def __init__(self, dims, classes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = (nn.Conv2d, nn.Conv3d)[dims - 2](1, classes, 5, padding=2)
        self.shapes = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.conv(x)


@pytest.mark.parametrize(("size", "window"), [((9, 7), (4, 5)), ((4, 5), (4, 5)), ((11, 6, 5), (4, 3, 5)), ((7, 7, 7), (3, 3, 3))], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_windows_against_a_loop(size, window, overlap):
    model, x = Scores(len(size), 4), torch.randn(1, *size)
    seen = []
    found = segment(model, x, window, classes=4, overlap=overlap, batch=3, progress=lambda done, total: seen.append((done, total)))
    sums = torch.zeros(4, *size)
    starts = [sorted({min(s, n - w) for s in range(0, n, max(1, int(w * (1 - overlap))))}) for n, w in zip(size, window, strict=True)]
    count = 0
    for place in np.ndindex(*map(len, starts)):
        cut = tuple(slice(s[i], s[i] + w) for s, i, w in zip(starts, place, window, strict=True))
        weights = torch.ones(window)
        for axis, w in enumerate(window):
            profile = torch.tensor([np.exp(-0.5 * ((i - (w - 1) / 2) / (0.125 * w)) ** 2) for i in range(w)], dtype=torch.float32)
            weights = weights * profile.view(*[-1 if a == axis else 1 for a in range(len(window))])
        with torch.no_grad():
            sums[(slice(None), *cut)] += model(x[(slice(None), *cut)][None])[0] * weights.clamp(min=1e-3)
        count += 1
    assert found.dtype == torch.uint8 and torch.equal(found, sums.argmax(0).to(torch.uint8))
    assert seen[-1] == (count, count) and [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_memory_is_that_of_a_row_of_windows(monkeypatch):
    """What is kept of the scores does not grow with the first axis."""
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(sliding_windows.torch, "zeros", lambda *shape: made.append(shape) or zeros(*shape))
    for length in (8, 64):
        segment(Scores(3, 5), torch.randn(1, length, 6, 6), (4, 4, 4), classes=5)
    assert set(made) == {(5, 4, 6, 6)}


@pytest.mark.parametrize(("size", "window", "overlap", "message"), [
    ((8, 8), (4, 4, 4), 0.25, "the model takes 3-D input, and this is 2-D, of size 8×8"),
    ((8, 8, 3), (4, 4, 4), 0.25, "the input has 8×8×3 positions, fewer than the window of 4×4×4; choose a smaller window"),
    ((8, 8, 8), (4, 4, 4), 1.0, "overlap is 1; it has to be at least 0 and below 1"),
])
def test_windows_that_do_not_fit(size, window, overlap, message):
    with pytest.raises(InputError, match=message):
        segment(Scores(3, 2), torch.zeros(1, *size), window, classes=2, overlap=overlap)
