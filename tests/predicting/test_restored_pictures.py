"""Restored pictures: tiles, the self-ensemble, and what `zoo predict` writes."""
import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from zoo.checkpoints import ModelInfo, load_model
from zoo.errors import InputError
from zoo.predicting.exported import ExportedNetwork, exported_info
from zoo.predicting.restoration import RestoredPictures, restore, restore_each, self_ensemble
from zoo.reading.shrinking import whole

INFO = ModelInfo("x", (), dict(input_size=(3, 48, 48), mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3), "restoration", "picture")


class Nearest(nn.Module):
    """Every pixel `scale`² times."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale, self.seen = scale, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return nn.functional.interpolate(x, scale_factor=float(self.scale), mode="nearest")


def pixels(height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model, info = load_model("a2n_nano_x2", dim=8, depth=1, up_dim=6)
    return model, info


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize(("size", "window"), [((50, 33), (16, 16)), ((16, 40), (16, 12)), ((5, 70), (16, 16)), ((1, 1), (8, 8))], ids=str)
def test_tiles_give_every_pixel_its_place(scale, size, window):
    given, model = pixels(*size), Nearest(scale)
    expected = given.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    assert torch.equal(restore(model, INFO, given, window=window, overlap=0.3), expected)
    assert all(shape[2] <= window[0] and shape[3] <= window[1] for shape in model.seen)
    assert torch.equal(restore(model, INFO, given, ensemble=True), expected)


def test_what_a_tile_holds_whole_is_seen_whole(network):
    model, info = network
    given = pixels(40, 30)
    with torch.no_grad():
        expected = whole(model(given[None].float())[0])
    assert torch.equal(restore(model, info, given), expected) and torch.equal(restore(model, info, given, window=(40, 30)), expected)
    assert model.scale == 2 and expected.shape == (3, 80, 60)
    tiled = restore(model, info, given, window=(24, 24), overlap=0.5)
    assert tiled.shape == expected.shape and (tiled.float() - expected.float()).abs().mean() < 2


def test_memory_is_that_of_a_row_of_tiles():
    """Beside the picture and what is made of it, however many rows there are."""
    def peak(height: int) -> int:
        given = pixels(height, 64)
        held, model = [], Nearest(2)
        allocated = torch.zeros

        def zeros(*args, **kwargs):
            out = allocated(*args, **kwargs)
            held.append(out.numel())
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zoo.predicting.sliding_windows.torch.zeros", zeros)
            restore(model, INFO, given, window=(32, 32))
        return max(held)

    assert peak(1280) == peak(64)


def test_the_self_ensemble_is_the_mean_of_all_eight(network):
    model, _ = network
    x = pixels(20, 13)[None].float()
    with torch.no_grad():
        expected = sum(torch.rot90(model(torch.rot90(y, k, (2, 3))), -k, (2, 3)) if not mirrored else
                       torch.rot90(model(torch.rot90(y, k, (2, 3))), -k, (2, 3)).flip(3)
                       for mirrored, y in ((False, x), (True, x.flip(3))) for k in range(4)) / 8
        found = self_ensemble(model, x)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(self_ensemble(model, x.flip(3).mT), found.flip(3).mT, atol=1e-3, rtol=1e-5)


def test_means_and_deviations_are_undone():
    info = ModelInfo("x", (), dict(input_size=(3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), "restoration")
    given = pixels(6, 7)
    assert torch.equal(restore(Nearest(2), info, given), given.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(("options", "message"), [
    (dict(window=(8,)), "the window is 8, where x needs 2 sizes"), (dict(window=(0, 8)), "the window is 0×8"),
    (dict(overlap=1.0), "overlap is 1; it has to be at least 0 and below 1")])
def test_windows_that_are_none(options, message):
    with pytest.raises(InputError, match=message):
        restore(Nearest(2), INFO, pixels(9, 9), **options)


def test_answers_that_are_not_finite():
    broken = Nearest(2)
    broken.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(InputError, match="not finite"):
        restore(broken, INFO, pixels(9, 9))


def test_files_go_where_they_are_asked_to(tmp_path, network):
    model, info = network
    for name, size in (("a.jpg", (30, 20)), ("b.png", (9, 33))):
        Image.fromarray(pixels(size[1], size[0]).permute(1, 2, 0).numpy()).save(tmp_path / name)
    (tmp_path / "c.png").write_text("no picture")
    files, failed = [tmp_path / name for name in ("a.jpg", "b.png", "c.png")], []
    answers = RestoredPictures(files, tmp_path / "larger")
    for answer in restore_each(model, info, files, failed=lambda path, error: failed.append(str(error))):
        answers.add(answer)
    answers.close()
    assert sorted(path.name for path in (tmp_path / "larger").iterdir()) == ["a.png", "answers.csv", "b.png"]
    assert Image.open(tmp_path / "larger" / "a.png").size == (60, 40)
    rows = list(csv.DictReader((tmp_path / "larger" / "answers.csv").open()))
    assert [row["restored_height"] for row in rows] == ["40", "66"] and len(failed) == 1 and "c.png" in failed[0]
    one = RestoredPictures(files[:1], tmp_path / "one.tif")
    one.add(next(restore_each(model, info, files[:1])))
    assert one.close() == [tmp_path / "one.tif"] and Image.open(tmp_path / "one.tif").size == (60, 40)
    with pytest.raises(InputError, match="2 answers are too many for one file"):
        RestoredPictures(files[:2], tmp_path / "both.png")
    with pytest.raises(InputError, match="would be overwritten"):
        RestoredPictures(files[1:2], tmp_path / "b.png")


def test_grey_pictures(tmp_path):
    torch.manual_seed(0)
    model, info = load_model("a2n_nano_x2", dim=8, depth=1, up_dim=6, in_chans=1)
    Image.fromarray(pixels(9, 12, 1)[0].numpy()).save(tmp_path / "a.png")
    restored, = restore_each(model, info, [tmp_path / "a.png"])
    assert restored.picture.mode == "L" and restored.picture.size == (24, 18)


@pytest.mark.parametrize("name", ["a2n_nano_x2", "han_nano_x2"])
def test_exported_networks_answer_the_same_at_any_size(tmp_path, name):
    from zoo.exporting.onnx import export_onnx

    torch.manual_seed(0)
    small = dict(dim=8, depth=1, up_dim=6) if "a2n" in name else dict(dim=8, groups=2, depth=1)
    model, info = load_model(name, **small)
    assert info.task == "restoration" and info.output == "picture"
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("gamma"):
                parameter.fill_(0.1)
    exported = export_onnx(model, info, tmp_path / "x.onnx")
    assert exported.free_size and exported.free_batch and exported.worst < 1e-4
    network = ExportedNetwork(tmp_path / "x.onnx")
    known = exported_info(network)
    assert (known.task, known.data_config["mean"], network.scale) == ("restoration", (0, 0, 0), 2)
    given = pixels(33, 50)
    found, expected = (restore(net, one, given, window=(24, 30)).int() for net, one in ((network, known), (model, info)))
    assert (found - expected).abs().max() <= 1 and np.mean((found != expected).numpy()) < 0.01
    assert timm.get_pretrained_cfg(name).num_classes == 0
