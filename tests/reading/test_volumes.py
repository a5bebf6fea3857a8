"""Volumes on their way into networks and masks on their way back."""
import nibabel
import numpy as np
import pytest
import torch

from zoo.errors import InputError
from zoo.reading.volumes import Grid, check_same_grid, find_volumes, is_volume, open_volume

TURNED = np.array([[0, -2.0, 0, 5], [0, 0, 1.5, 7], [1.0, 0, 0, -3], [0, 0, 0, 1]])  # axes: superior, left, anterior


def volume(path, data, affine=TURNED, channels=1):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return open_volume(path, channels)


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


AFFINES = {  # of a volume of 5×6×7 voxels, by what is odd about it
    **{"".join(codes): None for codes in (
        "RAS", "LAS", "RPS", "RAI", "LPS", "LPI", "LAI", "RPI", "SRA", "ASR", "PIR", "AIL", "SAL", "ILP", "PSL", "LSA")},
    "rotated by 20 degrees": "rotated", "sheared": "sheared", "no code of a form": "none", "only the quaternion": "qform",
}


@pytest.mark.parametrize("oddity", AFFINES)
def test_orientations_and_header_oddities(tmp_path, oddity):
    """The same head however it is stored: prepared alike, and a mask written onto the file's own grid."""
    sizes = np.array([1.5, 2.0, 3.0])
    data = np.random.default_rng(0).integers(1, 1000, (5, 6, 7)).astype(np.int16)
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = (-4, 7, -20)
    image = nibabel.Nifti1Image(data, affine)
    if AFFINES[oddity] is None:
        orientations = nibabel.orientations
        image = image.as_reoriented(orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(oddity)))
    elif AFFINES[oddity] == "rotated":
        turn, c, s = np.eye(4), np.cos(np.pi / 9), np.sin(np.pi / 9)
        turn[:2, :2] = (c, -s), (s, c)
        image = nibabel.Nifti1Image(data, turn @ affine)
    elif AFFINES[oddity] == "sheared":
        affine[0, 1] = 0.4
        sizes = nibabel.affines.voxel_sizes(affine)
        image = nibabel.Nifti1Image(data, affine)
    else:
        image.set_sform(affine, code=0)
        image.set_qform(affine, code=int(AFFINES[oddity] == "qform"))
    nibabel.save(image, tmp_path / "x.nii.gz")
    image = open_volume(tmp_path / "x.nii.gz")
    if AFFINES[oddity] == "none":
        data = data[::-1].copy()  # nibabel takes such files for Analyze's, from right to left
    grid = Grid(clip=(0, 1000))
    assert np.array_equal((grid.prepare(image)[0] * 1000).round().numpy(), data)
    halved = Grid(spacing=tuple(sizes / 2), clip=(0, 1000))
    assert halved.size(image) == [10, 12, 14]
    assert tuple(halved.prepare(image).shape) == (1, 10, 12, 14)
    labels = torch.from_numpy(data % 7).to(torch.uint8)
    for which, value in ((grid, labels), (halved, labels.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2))):
        which.write_mask(value, image, tmp_path / "mask.nii.gz")
        mask = nibabel.load(tmp_path / "mask.nii.gz")
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) % 7)
        assert mask.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-4)


@pytest.mark.parametrize(("units", "factor"), [("mm", 1), ("unknown", 1), ("micron", 1000), ("meter", 0.001)])
def test_the_affine_says_how_large_voxels_are(tmp_path, units, factor):
    """The header's zooms say something else, and its unit is heeded."""
    image = nibabel.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.diag([1.5 * factor, 1.5 * factor, 2.0 * factor, 1]))
    image.header.set_xyzt_units(units)
    image.header["pixdim"][1:4] = 3, 3, 4
    nibabel.save(image, tmp_path / "x.nii")
    raw = bytearray((tmp_path / "x.nii").read_bytes())
    raw[80:92] = np.array([3, 3, 4], "<f4").tobytes()  # nibabel sets them as it writes
    (tmp_path / "x.nii").write_bytes(raw)
    image = open_volume(tmp_path / "x.nii")
    assert image.header.get_zooms() == (3, 3, 4)
    assert Grid(spacing=(1.5, 0.75, 4.0)).size(image) == [8, 18, 5]


@pytest.mark.parametrize("name", ["x.mgz", "x.mgh", "x.hdr", "x.img"])
def test_other_formats(tmp_path, name):
    data = np.random.default_rng(0).integers(0, 1000, (5, 6, 7)).astype(np.int16)
    affine = np.diag([-1.5, 2.0, 3.0, 1.0])
    kind = nibabel.MGHImage if "mg" in name else nibabel.Spm99AnalyzeImage
    nibabel.save(kind(data, affine), tmp_path / name)
    assert is_volume(tmp_path / name)
    found, = find_volumes(tmp_path)
    assert found.name == ("x.hdr" if name == "x.img" else name)  # a pair is one volume
    image = open_volume(tmp_path / name)
    grid = Grid(spacing=(1.5, 2.0, 1.5), clip=(0, 1000))
    assert grid.size(image) == [5, 6, 14]
    assert np.array_equal((Grid(clip=(0, 1000)).prepare(image)[0] * 1000).round().numpy(), data[::-1])
    grid.write_mask(torch.ones(5, 6, 14, dtype=torch.uint8), image, tmp_path / "mask.nii.gz")
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine) and np.asarray(mask.dataobj).min() == 1


def test_nan_counts_as_outside_and_is_said_and_infinite_values_are_refused(tmp_path, caplog):
    data = np.random.default_rng(0).normal(100, 20, (5, 6, 7)).astype(np.float32)
    data[:2] = 0
    holed = data.copy()
    holed[0], holed[3, 3, 3] = np.nan, np.nan
    data[3, 3, 3] = 0
    clean = volume(tmp_path / "clean.nii", data, np.eye(4))
    for grid, outside in ((Grid(), 0), (Grid(spacing=(0.5, 1, 1)), 0), (Grid(clip=(40, 160)), 40)):
        torch.testing.assert_close(grid.prepare(volume(tmp_path / "holed.nii", holed, np.eye(4))), grid.prepare(clean))
        assert caplog.messages[-1].endswith(f"holed.nii has 43 voxels that are NaN; they count as outside, {outside}")
    mask = np.ones((4, 4, 4), np.float32)
    mask[0, 0, 0] = np.nan
    assert Grid().prepare_mask(volume(tmp_path / "mask.nii", mask), 2, "mask.nii").sum() == 63
    assert "mask.nii has 1 voxels that are NaN" in caplog.messages[-1] and len(caplog.messages) == 3
    for value in (np.inf, -np.inf, 1e300):
        data = np.zeros((4, 4, 4), np.float64)
        data[1, 1, :2] = value
        for read in (Grid().prepare, Grid(clip=(0, 1)).prepare, lambda image: Grid().prepare_mask(image, 2, "x")):
            with pytest.raises(InputError, match=r"the volume .*x.nii has 2 voxels that are infinite; give them values, or NaN"):
                read(volume(tmp_path / "x.nii", data))


@pytest.mark.parametrize(("classes", "dtype"), [(3, np.uint8), (256, np.uint8), (257, np.int16), (32769, np.int32)])
def test_labels_do_not_wrap(tmp_path, classes, dtype):
    """In targets, resampled or not, in what windows give, and in what is written."""
    top = classes - 1
    data = np.zeros((4, 5, 6), np.int32)
    data[2:, :, 3:] = top
    image = volume(tmp_path / "x.nii", data)
    labels = Grid().prepare_mask(image, classes, "x")
    assert labels.max() == top and labels.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    finer = Grid(spacing=(1.0, 1.0, 1.0))
    assert finer.prepare_mask(image, classes, "x").unique().tolist() == [0, top]
    for grid in (Grid(), finer):
        grid.write_mask(grid.prepare_mask(image, classes, "x")[0], image, tmp_path / "mask.nii")
        mask = nibabel.load(tmp_path / "mask.nii")
        assert mask.get_data_dtype() == dtype and np.asarray(mask.dataobj).max() == top
        assert grid != Grid() or np.array_equal(np.asarray(mask.dataobj), data)
    for label in (classes, -1, 0.5):
        with pytest.raises(InputError, match=f"the mask x has unknown labels {label:g}; known are 0 to {top}"):
            Grid().prepare_mask(volume(tmp_path / "bad.nii", np.full((2, 2, 2), label, np.float32)), classes, "x")


def test_channels_are_a_fourth_axis_or_files_of_their_own(tmp_path):
    data = np.random.default_rng(0).normal(100, 20, (5, 6, 7, 2)).astype(np.float32)
    data[..., 1] *= 3
    data[:2] = 0
    one = volume(tmp_path / "one.nii.gz", data, channels=2)
    for i in range(2):
        volume(tmp_path / "nnunet" / f"case.1_{i:04d}.nii.gz", data[..., i])
        volume(tmp_path / "nnunet" / f"case.2_{i:04d}.nii.gz", data[..., i])
    assert [path.name for path in find_volumes(tmp_path / "nnunet", 2)] == ["case.1_0000.nii.gz", "case.2_0000.nii.gz"]
    several = open_volume(tmp_path / "nnunet" / "case.1_0000.nii.gz", 2)
    alone = [Grid().prepare(open_volume(tmp_path / "nnunet" / f"case.1_{i:04d}.nii.gz")) for i in range(2)]
    for image in (one, several):
        x = Grid().prepare(image)
        assert x.shape == (2, 6, 7, 5)
        torch.testing.assert_close(x, torch.cat(alone))
    resampled = Grid(spacing=(1.0, 1.0, 1.0))
    assert resampled.prepare(one).shape == (2, *resampled.size(one))
    resampled.write_mask(torch.zeros(resampled.size(one), dtype=torch.uint8), several, tmp_path / "mask.nii.gz")
    assert nibabel.load(tmp_path / "mask.nii.gz").shape == (5, 6, 7)
    for path, channels, message in [
        ("one.nii.gz", 3, "of shape 5×6×7×2, where 3 channels, along a fourth axis, are needed"),
        ("one.nii.gz", 1, "of shape 5×6×7×2, where a volume of three dimensions is needed"),
        ("nnunet/case.1_0000.nii.gz", 3, "there is no volume .*case.1_0002.nii.gz"),
        ("mask.nii.gz", 2, "of shape 5×6×7, where 2 channels"),
    ]:
        with pytest.raises(InputError, match=message):
            open_volume(tmp_path / path, channels)
    volume(tmp_path / "nnunet" / "case.2_0001.nii.gz", data[..., 1], np.eye(4))
    with pytest.raises(InputError, match="the affine of the channel .*case.2_0001.nii.gz differs from that of .*case.2_0000.nii.gz by"):
        open_volume(tmp_path / "nnunet" / "case.2_0000.nii.gz", 2)


def test_voxels_without_place_or_of_no_number_are_refused(tmp_path):
    for affine in (np.diag([1, 0, 1, 1.0]), np.diag([1, np.nan, 1, 1.0])):
        image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
        image.header["sform_code"], image.header["qform_code"] = 1, 0
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            image.header[name] = affine[row]
        (tmp_path / "x.nii").write_bytes(image.header.binaryblock + bytes(4 + 64))
        with pytest.raises(InputError, match="x.nii has an affine that gives its voxels no place or size|x.nii cannot be read"):
            open_volume(tmp_path / "x.nii")
    with pytest.raises(InputError, match="has voxels of type complex64, where real numbers are needed"):
        Grid().prepare(volume(tmp_path / "c.nii", np.ones((2, 2, 2), np.complex64)))
