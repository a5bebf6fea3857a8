"""Pictures and their masks in files of every kind: which pixel is of which class, or a sentence that names the file and the value."""
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.errors import InputError
from zoo.reading.masks import MaskValues, read_masked_picture, read_picture_mask
from zoo.reading.pictures import open_picture
from zoo.reading.say import say_once

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 2, (6, 9)).astype(np.uint8)
ORIENTATION = 0x0112
PLAIN = dict(mean=(0.0,), std=(1.0,))


def tiff(values: np.ndarray) -> bytes:
    """An uncompressed TIFF file of whole numbers in the byte order of `values`, which Pillow reads and does not write."""
    order, bits = (">" if values.dtype.byteorder == ">" else "<"), 8 * values.dtype.itemsize
    height, width = values.shape
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, values.nbytes)]
    head = struct.pack(f"{order}2sHI", b"MM" if order == ">" else b"II", 42, 8 + values.nbytes)
    body = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    return head + values.tobytes() + struct.pack(f"{order}H", len(entries)) + body + bytes(4)


def exif(turn: int) -> Image.Exif:
    entries = Image.Exif()
    entries[ORIENTATION] = turn
    return entries


def palette(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray(values, "L").convert("P")
    picture.putpalette([*(200, 0, 0), *(0, 0, 200)])
    picture.putdata(values.ravel().tolist())
    return picture


def save_pages(path, values):
    Image.fromarray(values).save(path, save_all=True, append_images=[Image.fromarray(1 - values)])


@pytest.mark.parametrize(("name", "save"), [
    ("grey.png", lambda path: Image.fromarray(LABELS).save(path)),
    ("one bit.png", lambda path: Image.fromarray(LABELS == 1).save(path)),
    ("palette.png", lambda path: palette(LABELS).save(path)),
    ("palette.gif", lambda path: palette(LABELS).save(path)),
    ("sixteen.png", lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path)),
    ("sixteen.tif", lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path)),
    ("sixteen big-endian.tif", lambda path: path.write_bytes(tiff(LABELS.astype(">u2")))),
    ("thirty-two.tif", lambda path: Image.fromarray(LABELS.astype(np.int32)).save(path)),
    ("floats.tif", lambda path: Image.fromarray(LABELS.astype(np.float32)).save(path)),
    ("pages.tif", lambda path: save_pages(path, LABELS)),
    ("grey in colours.png", lambda path: Image.fromarray(np.repeat(LABELS[..., None], 3, 2)).save(path)),
    ("grey with alpha.png", lambda path: Image.fromarray(LABELS).convert("LA").save(path)),
    ("netpbm.pgm", lambda path: Image.fromarray(LABELS).save(path)),
])
def test_masks_of_every_kind_say_the_same(tmp_path, name, save):
    save(tmp_path / name)
    values = read_picture_mask(tmp_path / name)
    labels = MaskValues.of(2, [tmp_path / name]).labels(values, name)
    assert labels.dtype == np.uint8 and np.array_equal(labels, LABELS)


def test_a_mask_in_colours_is_refused(tmp_path):
    Image.fromarray(RANDOM.integers(0, 9, (4, 4, 3)).astype(np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="the mask .*m.png is in colours"):
        read_picture_mask(tmp_path / "m.png")


@pytest.fixture
def said(caplog):
    say_once.cache_clear()
    caplog.set_level("WARNING", "zoo")
    return caplog


def test_masks_of_0_and_255_are_taken_and_it_is_said_once(tmp_path, said):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(LABELS * 255).save(files[-1])
    for _ in range(2):
        values = MaskValues.of(2, files)
    assert said.messages == [f"the masks in {tmp_path} have values 0 and 255: 255 is taken for class 1"]
    assert np.array_equal(values.labels(read_picture_mask(files[0]), files[0]), LABELS)
    Image.fromarray(LABELS).save(tmp_path / "other.png")  # of 0 and 1
    with pytest.raises(InputError, match=r"the mask .*other.png has unknown values 1; known are 0, 255"):
        values.labels(read_picture_mask(tmp_path / "other.png"), tmp_path / "other.png")


def test_values_that_nobody_named_are_refused_with_the_file(tmp_path, said):
    Image.fromarray(LABELS).save(tmp_path / "a.png")
    Image.fromarray(np.where(LABELS, 255, 1).astype(np.uint8)).save(tmp_path / "b.png")  # beside 0 and 1, 255 is no class
    plain = MaskValues.of(2, [tmp_path / "a.png", tmp_path / "b.png"])
    with pytest.raises(InputError, match=r"the mask b.png has unknown values 255; known are 0 to 1.*mask_values=\[0, 255\]"):
        plain.labels(read_picture_mask(tmp_path / "b.png"), "b.png")
    assert not said.messages
    for values, shown in [([[0.5, 1]], "0.5"), ([[np.nan, 1]], "nan"), ([[-1, 300]], "-1, 300")]:
        with pytest.raises(InputError, match=f"unknown values {shown}; known are 0 to 1"):
            plain.labels(np.array(values), "b.png")


def test_values_can_be_given():
    values = MaskValues.of(3, [], [128, 0, 1000])
    assert values.labels(np.array([[0, 1000], [128, 0]]), "m.png").tolist() == [[1, 2], [0, 1]]
    with pytest.raises(InputError, match="has unknown values 1; known are 128, 0, 1000"):
        values.labels(np.array([[0, 1]]), "m.png")
    for given in ([0, 1], [0, 1, 1]):
        with pytest.raises(InputError, match="there have to be 3 different ones"):
            MaskValues.of(3, [], given)


def test_labels_above_255_stay_what_they_are(tmp_path):
    stored = np.arange(300, dtype=np.uint16).reshape(20, 15)
    (tmp_path / "m.tif").write_bytes(tiff(stored.astype(">u2")))
    Image.new("L", (15, 20)).save(tmp_path / "p.png")
    _, labels = read_masked_picture(tmp_path / "p.png", tmp_path / "m.tif", values=MaskValues.of(300, []), **PLAIN)
    assert torch.equal(labels[0].long(), torch.from_numpy(stored.astype(np.int64)))
    with pytest.raises(InputError, match="m.tif has unknown values 256, 257, 258, 259, …; known are 0 to 255"):
        read_masked_picture(tmp_path / "p.png", tmp_path / "m.tif", values=MaskValues.of(256, []), **PLAIN)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_mask_is_turned_as_its_picture(tmp_path, turn, suffix):
    """Whether it was made of the picture as that is stored or as it is seen, and whether it says so."""
    stored = np.repeat(np.repeat(LABELS, 16, 0), 16, 1)  # which survives JPEG
    path = tmp_path / f"p.{suffix}"
    Image.fromarray(stored * 200).save(path, exif=exif(turn))
    seen = np.rot90(stored, {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[turn])
    seen = seen[:, ::-1] if turn in (2, 4, 5, 7) else seen
    Image.fromarray(stored).save(tmp_path / "with.png", exif=exif(turn))
    Image.fromarray(stored).save(tmp_path / "stored.png")
    Image.fromarray(np.ascontiguousarray(seen)).save(tmp_path / "seen.png")
    for mask in ("with.png", "stored.png", "seen.png"):
        if turn in (2, 3, 4) and mask != "with.png":
            with pytest.raises(InputError, match=f"p.{suffix} is turned by its EXIF orientation {turn}, and nothing says whether the mask"):
                read_masked_picture(path, tmp_path / mask, values=MaskValues((0, 1)), **PLAIN)
            continue
        inputs, labels = read_masked_picture(path, tmp_path / mask, values=MaskValues((0, 1)), **PLAIN)
        assert torch.equal(inputs > 0.4, labels == 1), mask
        assert np.array_equal(labels[0].numpy(), seen)


def test_a_mask_of_another_size_is_refused(tmp_path):
    Image.new("L", (9, 6)).save(tmp_path / "p.png")
    Image.new("L", (6, 9)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="the mask .*m.png is of shape 9×6, its picture .*p.png of 6×9"):
        read_picture_mask(tmp_path / "m.png", tmp_path / "p.png")
    (tmp_path / "m.png").write_text("no picture")
    with pytest.raises(InputError, match="the mask .*m.png is not a picture that can be read"):
        read_picture_mask(tmp_path / "m.png")


def test_pictures_in_open_files_are_those_in_files(tmp_path):
    """Turned upright and in 8 bits alike, and refused alike, without the name that they do not have."""
    deep, exif = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000), Image.Exif()
    exif[0x0112] = 6
    deep.save(tmp_path / "p.png", exif=exif)
    expected = open_picture(tmp_path / "p.png", 1)
    assert np.array_equal(open_picture(io.BytesIO((tmp_path / "p.png").read_bytes()), 1), expected) and expected.size == (3, 4)
    with pytest.raises(InputError, match="^the picture is not a picture that can be read$"):
        open_picture(io.BytesIO(b"no picture"))
    with pytest.raises(InputError, match="^the picture cannot be read: "):
        open_picture(io.BytesIO((tmp_path / "p.png").read_bytes()[:-30]))


def test_large_pictures_are_read_when_it_is_said_that_they_are_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24)
    Image.new("L", (7, 7)).save(tmp_path / "p.png")
    with pytest.raises(InputError, match="Image size .* exceeds limit of 48 pixels.* set the environment variable ZOO_MAX_PIXELS"):
        open_picture(tmp_path / "p.png")
    monkeypatch.setenv("ZOO_MAX_PIXELS", "49")
    assert open_picture(tmp_path / "p.png").size == (7, 7) and Image.MAX_IMAGE_PIXELS == 24
    monkeypatch.setenv("ZOO_MAX_PIXELS", "48")
    with pytest.raises(InputError, match="p.png cannot be read: it has 49 pixels, and ZOO_MAX_PIXELS=48"):
        open_picture(tmp_path / "p.png")
    monkeypatch.setenv("ZOO_MAX_PIXELS", "much")
    with pytest.raises(InputError, match="ZOO_MAX_PIXELS=much: it is a whole number"):
        open_picture(tmp_path / "p.png")
