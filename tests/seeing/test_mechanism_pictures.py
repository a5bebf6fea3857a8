import dataclasses
import errno
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.checkpoints import load_model
from zoo.errors import InputError
from zoo.kernels import deform_conv2d
from zoo.seeing import page as pages
from zoo.seeing.attributions import ATTRIBUTIONS
from zoo.seeing.classifiers import attribution, mechanisms
from zoo.seeing.mechanism_pictures import region_box, region_of, sampling_points

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
STAGES = {
    "attnet_nano": 4, "biformer_nano": 3, "das_resnet_nano": 4, "deit_nano_patch16_224_cb": 1, "halonet_nano": 5,
    "ifam_nano_patch16_224": 1, "litv2_nano": 2,
    "moh_transnext_nano": 4,
    "polarized_resnet_nano": 4, "sknet_nano": 4, "tap_fan_nano": 1, "vidat_nano_patch16_224": 1, "vmamba_nano_v0": 4,
}


def small(name):
    torch.manual_seed(0)
    model, info = load_model(name)
    return model, dataclasses.replace(info, data_config={**info.data_config, "input_size": (3, 64, 64)})


@pytest.fixture(scope="module")
def biformer():
    return small("biformer_nano")


@pytest.mark.parametrize("name", STAGES)
def test_one_picture_for_every_stage(name):
    seen = mechanisms(*small(name), PICTURE)
    assert len(seen) == len({shown.name for shown in seen}) == STAGES[name]
    for shown in seen:
        assert min(shown.picture.size) > 300 and len(np.unique(np.asarray(shown.picture))) > 50
        assert shown.caption


@pytest.mark.parametrize(("pooling", "class_token"), [("attentive", False), ("attentive", True), ("simpool", True)])
def test_where_each_query_of_a_probe_looks(pooling, class_token):
    """On the map of the patches, whether or not the class token is pooled with them."""
    _, info = small("test_vit")
    config = {**info.data_config, "input_size": (3, 64, 32)}
    probe = zoo.probe(timm.create_model("test_vit", img_size=(64, 32)), 3, 4, pooling=pooling, class_token=class_token).eval()
    first, = mechanisms(probe, dataclasses.replace(info, data_config=config), PICTURE)
    assert first.caption.endswith("on a map of 4x2 tokens, each in its own scale.") and first.colours == ("heat",)
    torch.nn.init.normal_(next(probe.head.parameters()), std=3)
    other, = mechanisms(probe, dataclasses.replace(info, data_config=config), PICTURE)
    assert np.any(np.asarray(first.picture) != np.asarray(other.picture))


def test_the_picture_depends_on_the_query(biformer):
    middle, corner = (mechanisms(*biformer, PICTURE, query)[0].picture for query in ((0.5, 0.5), (0.0, 0.99)))
    assert np.any(np.asarray(middle) != np.asarray(corner))


@pytest.mark.parametrize("method", ATTRIBUTIONS)
def test_attributions(biformer, method):
    model, info = biformer
    first, second = (attribution(model, info, PICTURE, method, target).picture for target in (1, 2))
    assert np.any(np.asarray(first) != np.asarray(second))
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_regions_tile_the_map():
    size, grid = (7, 10), (3, 4)
    painted = np.full(size, -1)
    for region in range(12):
        row, column, height, width = region_box(region, size, grid)
        assert (painted[row : row + height, column : column + width] == -1).all()
        painted[row : row + height, column : column + width] = region
    assert (painted >= 0).all()
    for row in range(7):
        for column in range(10):
            query = ((row + 0.5) / 7, (column + 0.5) / 10)
            assert region_of(query, size, grid) == painted[row, column]


def test_sampling_points_are_where_the_deformable_convolution_reads():
    """Of a map that holds its own coordinates, sampling returns the points themselves."""
    torch.manual_seed(0)
    offset = torch.rand(18, 6, 7) * 2 - 1
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    points = sampling_points(offset)
    assert points.shape == (9, 2, 6, 7)
    for place in range(9):
        weight = torch.zeros(1, 1, 3, 3)
        weight.view(-1)[place] = 1
        for i, coordinate in enumerate((rows, columns)):
            read = deform_conv2d(coordinate[None, None], offset[None], weight, padding=1)[0, 0]
            torch.testing.assert_close(read[2:-2, 2:-2], points[place, i, 2:-2, 2:-2])


class Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.headings = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.headings.append(data)


def test_the_page_needs_no_other_file(tmp_path, biformer):
    seen = mechanisms(*biformer, PICTURE)
    files = pages.write(tmp_path / "new" / "folder", "Of <model>", [("a & b.png", seen), ("c.png", seen)])
    assert [path.name for path in files] == sorted(path.name for path in files) and len(files) == 7
    assert sorted(path.parent for path in files)[0] == tmp_path / "new" / "folder"
    assert Image.open(files[0]).size == seen[0].picture.size
    page = Sources()
    page.feed(files[-1].read_text())
    assert len(page.found) == 6 and all(re.match("data:image/png;base64,", source) for source in page.found)
    assert {"Of <model>", "a & b.png", "c.png"} <= set(page.headings)


@pytest.mark.parametrize(("call", "message"), [
    (lambda model, info: mechanisms(model, info, PICTURE, (0.5, 1.0)), "the query is at least 0 and less than 1, .* got 0.5 1"),
    (lambda model, info: mechanisms(*load_model("test_resnet"), PICTURE), "test_resnet has no layer with a picture of its own"),
    (lambda model, info: attribution(model, info, PICTURE, "grad_cam"), "no attribution 'grad_cam'; did you mean gradcam"),
    (lambda model, info: attribution(model, info, PICTURE, "gradcam", 1000), "class number from 0 to 999, got 1000"),
])
def test_what_cannot_be_shown_is_one_sentence(biformer, call, message):
    with pytest.raises(InputError, match=message):
        call(*biformer)


def test_a_file_in_the_folders_place(tmp_path, biformer):
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match="cannot write to the folder .*taken: .*taken is a file; choose another"):
        pages.write(tmp_path / "taken", "x", [])


def fail_at(count):
    """In the place of Image.save: the disk is full from this call on."""
    calls, save = [], Image.Image.save

    def saves(picture, file, *args, **kwargs):
        if isinstance(file, (str, Path)):
            calls.append(file)
            if len(calls) >= count:
                raise OSError(errno.ENOSPC, "No space left on device")
        return save(picture, file, *args, **kwargs)
    return saves


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_all_or_nothing(tmp_path, monkeypatch, there):
    seen = [pages.Seen(name, name, "", PICTURE) for name in ("a", "b", "c")]
    folder = tmp_path / "new" / "folder"
    if there:
        folder.mkdir(parents=True)
        (folder / "001-a.png").write_text("older")
    monkeypatch.setattr(Image.Image, "save", fail_at(3))
    with pytest.raises(InputError, match="cannot write .*folder: No space left on device"):
        pages.write(folder, "x", [("a.png", seen)])
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "folder", "001-a.png"] if there else [])
    assert not there or (folder / "001-a.png").read_text() == "older"


def test_a_folder_in_a_files_place(tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(InputError, match="index.html: it is a folder"):
        pages.write(tmp_path, "x", [("a.png", [pages.Seen("a", "a", "", PICTURE)])])
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


@pytest.mark.parametrize("name", ["taken/below", "taken/below/further", "x" * 300, "new/" + "x" * 300])
def test_folders_that_cannot_be_are_one_sentence(tmp_path, name):
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match="cannot"), pages.folder_for_pictures(tmp_path / name):
        raise AssertionError("the work has begun")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_takes_no_files_is_one_sentence(tmp_path, monkeypatch):
    def refuses(**_):
        raise PermissionError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(pages.tempfile, "TemporaryFile", refuses)
    with pytest.raises(InputError, match="cannot write .*: Operation not permitted"), pages.folder_for_pictures(tmp_path):
        raise AssertionError("the work has begun")
