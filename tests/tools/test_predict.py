import csv
import io
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.predicting import classification as prediction
from zoo.predicting.sheets import TILE, contact_sheet
from zoo.reading.pictures import find_pictures, open_picture


@pytest.fixture(scope="module")
def main(load_tool):
    return load_tool("predict").main


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A smooth picture, higher than wide: (40, 30, 3) uint8."""
    rows, columns = np.mgrid[:40, :30]
    return np.stack([rows * 6, columns * 8, 255 - rows * 3 - columns * 4], axis=-1).astype(np.uint8)


@pytest.fixture
def picture(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def lines(out: str) -> list[tuple[str, float]]:
    """The pairs (class, percentage) that the tool printed."""
    return [(line.split()[0], float(line.split()[1].rstrip("%"))) for line in out.splitlines() if line.startswith("  ")]


def test_names_classes_with_probabilities(main, checkpoint, picture, pixels, capsys):
    assert main([str(checkpoint), str(picture)]) == 0
    out = capsys.readouterr().out
    model, info = load_trained(checkpoint)
    images = torch.tensor(np.asarray(Image.fromarray(pixels).resize((64, 85), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    with torch.inference_mode():
        expected = model(((images[:, 10:74] - 0.5) / 0.25)[None]).softmax(-1)[0]
    assert out.splitlines()[0] == str(picture)
    assert [name for name, _ in lines(out)] == [info.classes[i] for i in expected.argsort(descending=True)]
    assert [value for _, value in lines(out)] == pytest.approx((100 * expected.sort(descending=True).values).tolist(), abs=0.3)


def test_top(main, checkpoint, picture, capsys):
    main([str(checkpoint), str(picture), "--top", "2"])
    assert len(lines(capsys.readouterr().out)) == 2


def test_batches_change_nothing(checkpoint, pixels, tmp_path):
    for i in range(5):
        Image.fromarray(np.roll(pixels, 7 * i, axis=0)).save(tmp_path / f"{i}.png")
    model, info = load_trained(checkpoint)
    found = [prediction.predict(model, info, find_pictures([tmp_path]), batch=batch) for batch in (1, 2, 8)]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.path == b.path
            assert dict(a.classes) == pytest.approx(dict(b.classes), abs=1e-5)


@pytest.mark.parametrize("name", ["rgb.png", "grey.png", "palette.png", "palette.gif", "sixteen.png", "sixteen.tif", "cmyk.jpg",
                                  "alpha.webp", "bits.png", "exif.png"])
def test_kinds_of_pictures_look_the_same(pixels, tmp_path, name):
    path, kind = tmp_path / name, name.split(".")[0]
    upright = Image.fromarray(pixels)
    grey = np.asarray(upright.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    saved = {
        "rgb": upright, "grey": Image.fromarray(grey), "palette": upright.quantize(256), "cmyk": upright.convert("CMYK"),
        "sixteen": Image.fromarray(grey.astype(np.uint16) * 256), "alpha": upright.convert("RGBA"), "bits": upright.convert("1"),
        "exif": upright.transpose(Image.Transpose.ROTATE_90),
    }[kind]
    saved.save(path, **{"exif": {"exif": exif}, "alpha": {"lossless": True}, "cmyk": {"quality": 100}}.get(kind, {}))
    for channels, expected in [(3, pixels), (1, grey)]:
        opened = open_picture(path, channels)
        assert opened.size == (30, 40)
        assert opened.mode == ("RGB" if channels == 3 else "L")
        if kind in ("grey", "sixteen"):
            expected = grey[..., None] if channels == 3 else grey
        if kind != "bits":  # dithered
            difference = np.abs(np.asarray(opened).astype(int) - expected)
            assert difference.mean() < 6
    assert set(np.unique(np.asarray(opened))) == {0, 255} or kind != "bits"


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (300, 2)])
def test_tiny_and_thin_pictures(main, checkpoint, tmp_path, capsys, size):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    assert main([str(checkpoint), str(tmp_path / "x.png"), "-o", str(tmp_path / "out.png")]) == 0
    assert sum(value for _, value in lines(capsys.readouterr().out)) == pytest.approx(100, abs=0.1)


def test_grey_model_gets_grey_pictures(trained, pixels, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    record = trained["zoo"] | {"model_args": {"in_chans": 1}, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    torch.save({"zoo": record, "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "x.pth")
    Image.fromarray(pixels).save(tmp_path / "x.png")
    model, info = load_trained(tmp_path / "x.pth")
    assert len(prediction.predict(model, info, [tmp_path / "x.png"])[0].classes) == 3


def test_writes_one_annotated_picture(main, checkpoint, picture, tmp_path, capsys):
    assert main([str(checkpoint), str(picture), "-o", str(tmp_path / "out.png")]) == 0
    assert f"wrote {tmp_path / 'out.png'}" in capsys.readouterr().out
    with Image.open(tmp_path / "out.png") as written:
        assert written.width >= TILE * 30 // 40
        assert written.height > written.width
        assert set(np.unique(np.asarray(written.convert("L"))[-40:])) >= {0, 255}  # text


def test_contact_sheet_is_in_rows():
    tiles = [Image.new("RGB", (10, 12), (40 * i, 0, 0)) for i in range(5)]
    sheet = np.asarray(contact_sheet(tiles))
    assert sheet.shape == (2 * 16, 3 * 14, 3)
    assert [sheet[16 * (i // 3) + 3, 14 * (i % 3) + 3, 0] for i in range(5)] == [0, 40, 80, 120, 160]


def test_writes_a_folder_without_overwriting(main, checkpoint, pixels, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("x.png", "x_2.png"):
            Image.fromarray(pixels).save(tmp_path / folder / name)
    before = (tmp_path / "a" / "x.png").read_bytes()
    pictures = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([str(checkpoint), *pictures, "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["answers.csv", "x.png", "x_2.png", "x_2_2.png", "x_3.png"]
    with pytest.raises(InputError, match="would be overwritten"):
        main([str(checkpoint), *pictures, "-o", str(tmp_path / "a")])
    with pytest.raises(InputError, match="would be overwritten"):
        main([str(checkpoint), *pictures, "-o", str(tmp_path / "a" / "x.png")])
    assert (tmp_path / "a" / "x.png").read_bytes() == before


DAMAGED = [
    ("text.png", r"text.png is not a picture that can be read"),
    ("half.png", r"the picture .*half.png cannot be read"),
]


@pytest.fixture
def damaged(picture, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:picture.stat().st_size // 2])


def test_pictures_that_are_none(main, checkpoint, picture, damaged, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for given, message in [
        *DAMAGED,
        ("pitcure.png", r"there is no picture .*pitcure.png; did you mean picture.png"),
        ("empty", r"the folder .*empty holds no picture"),
    ]:
        with pytest.raises(InputError, match=message):
            main([str(checkpoint), str(tmp_path / given), "-o", str(tmp_path / "out.png")])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("batch", ["1", "32"])
def test_damaged_pictures_are_told_and_the_others_go_on(main, checkpoint, damaged, tmp_path, capsys, batch):
    assert main([str(checkpoint), str(tmp_path), "-o", str(tmp_path / "out"), "--batch", batch]) == 1
    said = capsys.readouterr()
    for _, message in DAMAGED:
        assert len(re.findall(f"^error: .*{message}", said.err, re.M)) == 1
    assert "2 of 3 files could not be read" in said.err and "picture.png" in said.out and "text.png" not in said.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers.csv", "picture.png"}
    with pytest.raises(InputError, match="none of the 2 files could be read"):
        main([str(checkpoint), str(tmp_path / "text.png"), str(tmp_path / "half.png"), "-o", str(tmp_path / "none.csv")])
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("name", ["answers.csv", "ANSWERS.JSON"])
def test_tables_hold_what_is_printed(main, checkpoint, picture, pixels, tmp_path, capsys, name):
    Image.fromarray(pixels[::-1]).save(tmp_path / "a, b.png")
    assert main([str(checkpoint), str(tmp_path), "--top", "2", "-o", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    text = (tmp_path / name).read_text()
    rows = json.loads(text) if name.endswith("JSON") else list(csv.DictReader(io.StringIO(text)))
    assert [(row["picture"], int(row["rank"])) for row in rows] == [
        (str(tmp_path / name), rank) for name in ("a, b.png", "picture.png") for rank in (1, 2)]
    assert [(row["class"], round(100 * float(row["probability"]), 2)) for row in rows] == lines(said)
    assert said.splitlines()[-1] == f"wrote {tmp_path / name}"


@pytest.mark.parametrize(("output", "message"), [
    ("no/out.png", "there is no folder"), ("no/answers.csv", "there is no folder"), ("no/out/", "there is no folder"),
    ("picture.txt", "neither a folder nor"), ("pred.xlsx", r"the name of a file to write here \(\.csv \.json .*a new folder has no suffix"),
    ("mask.nii.gz", "neither a folder nor"),])
def test_output_that_cannot_be_written(main, checkpoint, picture, tmp_path, output, message):
    (tmp_path / "picture.txt").touch()
    with pytest.raises(InputError, match=message):
        main([str(checkpoint), str(picture), "-o", str(tmp_path / output)])


def test_a_models_name_is_not_a_checkpoint(main, picture):
    with pytest.raises(InputError, match="there is no checkpoint resnet18"):
        main(["resnet18", str(picture)])


def test_malicious_checkpoint_is_one_line_and_exit_status_2(run_tool, malicious, picture, tmp_path):
    path, created = malicious
    done = run_tool("predict", path, picture, "-o", tmp_path / "out.png")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path} would run code on loading")
    assert not created.exists()
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("output", ["out.png", "out"])
def test_full_disk_is_one_sentence_and_leaves_nothing_half_written(main, checkpoint, pixels, tmp_path, full_disk, output):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    with full_disk(), pytest.raises(InputError, match=r"cannot write .*\.png: File too large"):
        main([str(checkpoint), str(tmp_path / "picture.png"), "-o", str(tmp_path / output)])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["picture.png"]


def test_odd_pictures_are_predicted_or_refused_in_a_sentence(main, checkpoint, tmp_path, capsys):
    """A picture of one pixel, a very flat one, a truncated one, and one that says it is huge."""
    for name, picture in [("one.png", Image.new("P", (1, 1))), ("flat.png", Image.new("CMYK", (300, 1)).convert("RGB"))]:
        picture.save(tmp_path / name)
        assert main([str(checkpoint), str(tmp_path / name)]) == 0
    Image.new("RGB", (500, 400), "red").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"the picture .*cut.jpg cannot be read"):
        main([str(checkpoint), str(tmp_path / "cut.jpg")])
    header = b"P5 60000 60000 255\n"
    (tmp_path / "huge.pgm").write_bytes(header + bytes(100))
    with pytest.raises(InputError, match=r"the picture .*huge.pgm cannot be read: Image size"):
        main([str(checkpoint), str(tmp_path / "huge.pgm")])


@pytest.mark.parametrize(("values", "expected"), [
    (np.array([[0, 0.2, 1]], np.float32), [[0, 51, 255]]),
    (np.array([[0, 257, 65535]], np.int32), [[0, 1, 255]]),
    (np.array([[0, 257, 65535]], np.uint16), [[0, 1, 255]]),
    (np.array([[0, 17.5]], np.float32), r"from 0 to 17.5, where integers of 8 or 16 bits or floats from 0 to 1 are needed"),
    (np.array([[-0.5, 1]], np.float32), r"from -0.5 to 1, where"),
    (np.array([[0, np.nan]], np.float32), r"from nan to nan, where"),
    (np.array([[0, 65536]], np.int32), r"from 0 to 65536, where"),
    (np.array([[-1, 255]], np.int32), r"from -1 to 255, where"),
], ids=str)
def test_floats_and_many_bits_are_read_rightly_or_refused(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "x.tiff")
    if isinstance(expected, list):
        assert np.asarray(open_picture(tmp_path / "x.tiff", 1)).tolist() == expected
    else:
        with pytest.raises(InputError, match=f"the picture .*x.tiff cannot be read: its values go {expected}"):
            open_picture(tmp_path / "x.tiff")
