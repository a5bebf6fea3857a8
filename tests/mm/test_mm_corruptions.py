import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS
from PIL import Image
from short_runs import TINY
from timm.data import ImageNetInfo
from torchvision.transforms.functional import to_pil_image, to_tensor

from zoo.errors import InputError
from zoo.measuring import robustness
from zoo.measuring.robustness import ALEXNET, Robustness
from zoo.mm import corruptions
from zoo.mm.corruptions import CorruptImage
from zoo.mm.datasets import DigitsDataset, ImageFolderDataset, Sample, seeded
from zoo.mm.mask_datasets import DigitScenesDataset
from zoo.mm.metrics import Accuracy
from zoo.reading.corruptions import CORRUPTIONS, corrupt
from zoo.tools._cli import command

TRANSFORM = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rows, columns = np.mgrid[:40, :56]
    return Image.fromarray(np.stack([rows * 6, columns * 4, 255 - rows * 3 - columns * 2], -1).astype(np.uint8))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_the_image_reproducibly_and_more_at_higher_severity(name, picture):
    def corrupted(severity: int, seed: int = 1) -> np.ndarray:
        with seeded(seed):
            found = CorruptImage(name, severity)(picture)
        assert (found.size, found.mode) == (picture.size, picture.mode)
        return np.asarray(found).astype(float)

    mild, strong = corrupted(1), corrupted(5)
    assert np.array_equal(mild, corrupted(1))
    change = [np.abs(found - np.asarray(picture)).mean() for found in (mild, strong)]
    assert change[0] > 0
    assert change[0] < change[1] or name == "frost"  # lays one of six photographs over the image


def test_grey_images_stay_grey_and_pipelines_get_arrays(picture):
    assert CorruptImage("fog", 2)(picture.convert("L")).mode == "L"
    step = TRANSFORMS.build({"type": "CorruptImage", "name": "snow", "severity": 3})
    given = {"img": np.asarray(picture)[..., ::-1], "other": 1}
    with seeded(1):
        found = step(given)
    with seeded(1):
        expected = step(picture)
    assert found["img"].dtype == np.uint8 and found["img"].flags.c_contiguous and found["other"] == 1
    assert np.array_equal(found["img"][..., ::-1], expected) and np.array_equal(given["img"][..., ::-1], picture)


@pytest.mark.parametrize(("arguments", "message"), [
    (("foggy", 1), "did you mean fog"), (("fog", 0), "it is 1 to 5"), (("fog", 6), "severity=6"),
])
def test_unknown_corruptions(arguments, message):
    with pytest.raises(InputError, match=message):
        CorruptImage(*arguments)
    with pytest.raises(InputError, match=message):
        corrupt(np.zeros((40, 40, 3), np.uint8), *arguments)


def test_small_images_are_refused_in_a_sentence(picture):
    with pytest.raises(InputError, match="a 31x56 image cannot be corrupted: 32 pixels"):
        CorruptImage("fog", 1)(picture.crop((0, 0, 56, 31)))


def test_a_dataset_corrupts_what_is_cropped_before_it_is_normalised():
    clean = DigitsDataset("val", TRANSFORM, limit=3)
    foggy = DigitsDataset("val", TRANSFORM, limit=3, corruption={"name": "fog", "severity": 5})
    sample = Sample(0, 7)
    with seeded(7):
        pixels = CorruptImage("fog", 5)(clean.read(0)[0])
    expected = (torch.from_numpy(np.array(pixels)).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(foggy[sample]["inputs"][0], expected)
    assert not torch.equal(clean[sample]["inputs"], foggy[sample]["inputs"])
    with pytest.raises(InputError, match="unknown corruption"):
        DigitsDataset("val", TRANSFORM, corruption={"name": "rain", "severity": 1})


def test_pictures_with_masks_are_corrupted_and_masks_are_not():
    clean, foggy = (DigitScenesDataset("val", 2, **more) for more in ({}, {"corruption": {"name": "fog", "severity": 5}}))
    inputs, targets = clean.read(1)
    with seeded(7):
        pixels = CorruptImage("fog", 5)(to_pil_image(inputs * 0.25 + 0.5))
    found = foggy[Sample(1, 7)]
    assert torch.equal(found["targets"], targets[0].long())
    torch.testing.assert_close(found["inputs"], (to_tensor(pixels) - 0.5) / 0.25, atol=0.02, rtol=0)  # a step of 8 bits


@pytest.mark.parametrize(("metrics", "error"), [
    ({"accuracy/top1": 90.0, "accuracy/top5": 99.0}, 10.0), ({"iou/background": 99.0, "iou/mean": 60.0}, 40.0), ({"dice/mean": 70.0}, 30.0),
    ({"aAcc": 80.0, "mIoU": np.float32(30)}, 70.0), ({}, 100.0),
    ({"coco/bbox_mAP_50": 0.5, "coco/bbox_mAP": 0.25, "coco/segm_mAP": 0.2}, 75.0),
])
def test_errors_are_of_the_score_of_the_task(metrics, error):
    found = corruptions._error(metrics)
    assert found == error and type(found) is float


def test_what_cannot_be_corrupted_is_known_before_it_is_evaluated(monkeypatch):
    monkeypatch.setattr(corruptions, "evaluate_each", None)
    with pytest.raises(InputError, match="attention_unet3d_mni152, of MNI152Dataset, cannot be corrupted: .* unknown key .corruption.;"):
        corruptions.evaluate_corruptions("attention_unet3d_mni152", "x.pth")
    with pytest.raises(InputError, match="in the place of image folders, and the test data of biformer_nano_digits are of DigitsDataset"):
        corruptions.evaluate_corruptions("biformer_nano_digits", "x.pth", folder=".")
    with pytest.raises(InputError, match="errors are of one of accuracy/top1, .*, and the config measures loss"):
        corruptions._error({"loss": 1.0})


def test_mean_corruption_error_is_the_papers():
    errors = {name: (10.0 * i, 20.0, 30.0, 40.0, 50.0) for i, name in enumerate(CORRUPTIONS)}
    found = Robustness(5.0, errors)
    baseline = dict.fromkeys(CORRUPTIONS, 50.0)
    expected = np.mean([100 * (10 * i + 140) / (5 * 50.0) for i in range(15)])
    assert found.mean_corruption_error(baseline) == pytest.approx(expected)
    assert found.mean_error == pytest.approx(np.mean([10 * i + 140 for i in range(15)]) / 5)
    assert tuple(ALEXNET) == CORRUPTIONS
    alexnet = Robustness(43.5, {name: (error,) * 5 for name, error in ALEXNET.items()})
    assert alexnet.mean_corruption_error(ALEXNET) == pytest.approx(100)


@pytest.fixture
def tool():
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as end:
            command(["test", *map(str, arguments)])
        return end.value.code
    return run


def test_the_tool_prints_writes_and_draws(tiny_train, tool, tmp_path, monkeypatch, capsys):
    _, metrics, folder = tiny_train("run", "train_cfg.max_epochs=1", "train_cfg.val_interval=1")
    for module in (corruptions, robustness):
        monkeypatch.setattr(module, "CORRUPTIONS", ("fog", "contrast"))
        monkeypatch.setattr(module, "SEVERITIES", (1, 5))
    monkeypatch.setattr(robustness, "_draw", lambda found, baseline: _Page())
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"clean": 1.0, "errors": {"fog": [50.0], "contrast": [80.0]}}))
    command = ["biformer_nano_digits", folder / "epoch_1.pth", "--corruptions", tmp_path / "out", "--baseline", baseline,
               "--cfg-options", *TINY]
    capsys.readouterr()
    assert tool(*command) in (0, None)
    done = capsys.readouterr()
    assert "mmengine" not in done.out and done.out.count("\n") < 20
    report = json.loads((tmp_path / "out/corruptions.json").read_text())
    assert report["clean"] == pytest.approx(100 - metrics["accuracy/top1"])
    assert set(report["errors"]) == {"fog", "contrast"} and {len(errors) for errors in report["errors"].values()} == {2}
    expected = np.mean([100 * np.mean(report["errors"]["fog"]) / 50, 100 * np.mean(report["errors"]["contrast"]) / 80])
    assert f"mean corruption error: {expected:.2f} % of that of {baseline}" in done.out
    assert "5/5 contrast, severity 5: error" in done.err
    assert (tmp_path / "out/corruptions.png").read_text() == "drawn"


class _Page:
    def savefig(self, path, dpi):
        Path(path).write_text("drawn")


def test_curves_are_drawn_for_every_corruption(tmp_path):
    found = Robustness(5.0, dict.fromkeys(CORRUPTIONS, (10.0, 20.0, 30.0, 40.0, 50.0)))
    _, curves = robustness.write_report(found, tmp_path, ALEXNET)
    with Image.open(curves) as drawn:
        assert drawn.width > 1000 and np.asarray(drawn.convert("L")).std() > 10


@pytest.mark.parametrize(("arguments", "message"), [
    (["--baseline", "x.json"], "go with --corruptions"),
    (["--corruptions", "out", "--baseline", "nowhere.json"], "cannot read the baseline nowhere.json: No such file or directory"),
    (["--corruptions", "out", "--baseline", "list.json"], "list.json is not a corruptions.json"),
    (["--corruptions", "out", "--baseline", "part.json"], "the baseline has no error for gaussian_noise"),
    (["--corruptions", "list.json"], "cannot write to the folder list.json: list.json is a file; choose another"),
    (["--corruptions", "list.json/out"], "cannot write to the folder list.json/out: list.json is a file"),
    (["--corruptions", "out", "--imagenet-c", "."], "ImageNet-C is read in the place of image folders"),
])
def test_what_the_tool_refuses(tool, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("part.json").write_text('{"errors": {"fog": [1.0]}}')
    before = sorted(tmp_path.iterdir())
    assert tool("biformer_nano_digits", "x.pth", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_options_read_imagenet_c_or_corrupt(tmp_path):
    options = corruptions._options("biformer_nano_digits", (), "fog", 3, "/data/c")
    assert options[:2] == ["test_dataloader.dataset.root='/data/c'", "test_dataloader.dataset.split=fog/3"]
    option, = corruptions._options("biformer_nano_digits", (), "fog", 3, None)
    assert option == "test_dataloader.dataset.corruption={'name': 'fog', 'severity': 3}"


def test_folders_of_some_of_imagenets_classes(tmp_path, picture):
    known = ImageNetInfo("imagenet-1k").label_names()
    some = [known[900], known[3], known[500]]
    for name in some:
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "x.png")
    dataset = ImageFolderDataset(str(tmp_path), ".", {"input_size": 32}, classes="imagenet-1k")
    dataset.full_init()
    assert sorted(target for _, target in dataset.samples) == [3, 500, 900]
    assert dataset.metainfo["classes"] == known and dataset.metainfo["scored"] == [3, 500, 900]
    metric = Accuracy(topk=(1,))
    metric.dataset_meta = dataset.metainfo
    scores = torch.zeros(1000)
    scores[7], scores[500] = 2, 1  # 7 has no folder
    metric.process(None, [{"scores": scores, "target": torch.tensor(500)}])
    assert metric.evaluate(1) == {"accuracy/top1": 100}
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="has a folder dog, which is no class of imagenet-1k"):
        ImageFolderDataset(str(tmp_path), ".", {}, classes="imagenet-1k")
    with pytest.raises(InputError, match="is no list of timm's"):
        ImageFolderDataset(str(tmp_path), ".", {}, classes="imagenet-2k")
