"""Restoring pictures as a task: the data, the task, training on a folder, and what predicting and reporting make of it."""
import csv

import numpy as np
import pytest
import timm
import torch
from mmengine.registry import METRICS, MODELS
from PIL import Image

import zoo.mm  # noqa: F401  registers
from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.measuring.restoration import measured
from zoo.mm import evaluate, train
from zoo.mm.datasets import Sample
from zoo.mm.restorer import Restorer
from zoo.mm.shrunk_datasets import PhotographsDataset, PictureFolderDataset
from zoo.reading.discovery import plain_pictures
from zoo.reading.shrinking import enlarge, shrink
from zoo.tools.predict import main as predict
from zoo.tools.train import main as zoo_train

SMALL = dict(dim=8, depth=1, up_dim=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten smooth pictures, one of them grey, one a copy."""
    root, generator = tmp_path_factory.mktemp("holiday"), np.random.default_rng(0)
    (root / "day 2").mkdir()
    for i in range(9):
        coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((70 + i, 60), Image.Resampling.BICUBIC)
        (picture.convert("L") if i == 3 else picture).save(root / ("day 2" if i % 2 else ".") / f"{i}.png")
    (root / "copy.png").write_bytes((root / "0.png").read_bytes())
    return root


def test_squares_of_both_pictures_show_the_same_place():
    pictures = PhotographsDataset("val", 2, crop=16, crops=4)
    assert len(pictures) == 12 and pictures.names == ["astronaut", "chelsea", "coffee"] and pictures.metainfo == {"classes": []}
    seen = set()
    for seed in range(12):
        item = pictures[Sample(1, seed)]
        small, large = item["inputs"], item["targets"]
        assert small.shape == (3, 16, 16) and large.shape == (3, 32, 32) and small.dtype == large.dtype == torch.uint8
        inside = (slice(None), slice(3, -3), slice(3, -3))  # what lies around the square is in the pixels at its edges
        assert (shrink(large, 2)[inside].int() - small[inside].int()).abs().max() <= 1
        assert torch.equal(pictures[Sample(1, seed)]["inputs"], small)
        seen.add(small.numpy().tobytes())
    assert len(seen) == 12


def test_every_turn_and_mirror_image_is_drawn():
    pictures = PhotographsDataset("val", 2, crop=150)
    pictures.read = lambda index: torch.arange(300 * 300).remainder(251).to(torch.uint8).view(1, 300, 300)
    assert len({pictures[Sample(0, seed)]["targets"].numpy().tobytes() for seed in range(64)}) == 8


def test_whole_pictures_are_as_they_are():
    pictures = PhotographsDataset("val", 3)
    item = pictures[Sample(1, 0)]
    assert len(pictures) == 3 and item["targets"].shape == (3, 300, 450) and torch.equal(item["inputs"], shrink(item["targets"], 3))


@pytest.mark.parametrize(("args", "message"), [
    (dict(scale=0), "scale=0: it has to be at least 1"), (dict(scale=2, crop=0), "crop=0: it has to"),
    (dict(scale=2, crops=0), "crops=0: it has to"), (dict(scale=2, split="test"), "split")])
def test_data_that_cannot_be(args, message):
    with pytest.raises(InputError, match=message):
        PhotographsDataset(**{"split": "val", **args})


def test_pictures_that_are_too_small_are_named():
    with pytest.raises(InputError, match="chelsea of 450×300 pixels is smaller than what is cut out of it, 302×302"):
        PhotographsDataset("val", 2, crop=151)[Sample(1, 0)]


def test_losses_and_predictions():
    torch.manual_seed(0)
    task = Restorer("a2n_nano_x2", SMALL)
    small, large = (torch.randint(256, (2, 3, side, side), dtype=torch.uint8) for side in (14, 28))
    restored = task.model(small.float())
    torch.testing.assert_close(task(small), restored, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(task(small, large, "loss")["loss"], (restored - large).abs().mean(), atol=1e-4, rtol=1e-5)
    squared = Restorer("a2n_nano_x2", SMALL, loss="l2")
    squared.load_state_dict(task.state_dict())
    torch.testing.assert_close(squared(small, large, "loss")["loss"], (restored - large).square().mean(), atol=1e-1, rtol=1e-5)
    found = task.eval()(small, large, "predict")
    assert torch.equal(found[1]["restored"], restored[1].detach().round().clamp(0, 255).byte())
    assert torch.equal(found[1]["target"], large[1])


@pytest.mark.parametrize(("args", "message"), [
    (dict(name="a2n_nano_x2", loss="l3"), "unknown loss 'l3': it is one of l1, l2"),
    (dict(name="resnet18"), "resnet18 does not give pictures"),
    (dict(name="a2n_nano_x9"), "unknown model 'a2n_nano_x9'; did you mean"),
    (dict(name="a2n_x2", args=dict(width=3)), "cannot be created")])
def test_tasks_that_cannot_be(args, message):
    with pytest.raises(InputError, match=message):
        MODELS.build(dict(type="Restorer", **args))


def test_the_metric_is_the_mean_over_pictures():
    metric = METRICS.build(dict(type="Restoration"))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for side in (30, 40):
        target = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator)
        samples.append({"given": shrink(target, 2), "target": target, "restored": enlarge(shrink(target, 2), 2)})
    metric.process(None, samples[:1])
    metric.process(None, samples[1:])
    found = metric.evaluate(2)
    expected = [measured(sample["restored"], sample["target"], 2) for sample in samples]
    for name in expected[0]:
        assert found[f"restoration/{name}"] == pytest.approx(sum(each[name] for each in expected) / 2)
    assert found["restoration/psnr_bicubic"] == found["restoration/psnr"]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("run")
    zoo_train(["a2n_nano_x2", str(folder), "--work-dir", str(work_dir), "--epochs", "3", "--batch", "8", "--cfg-options",
               f"model.args={SMALL}", "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False",
               "val_dataloader.num_workers=0", "val_dataloader.persistent_workers=False"])
    return work_dir


def test_a_folder_is_trained_on(folder, run):
    rows = list(csv.DictReader((run / "samples.csv").open()))
    parts = {part: [row["path"] for row in rows if row["split"] == part] for part in ("train", "val")}
    assert len(parts["train"]) + len(parts["val"]) == 10 and len(parts["val"]) in (1, 2, 3)
    copies = [part for part, paths in parts.items() for path in paths if path.endswith(("copy.png", f"{folder.name}/0.png"))]
    assert len(set(copies)) == 1  # copies stay on one side
    model, info = load_trained(run / "epoch_3.pth")
    assert (info.name, info.task, info.output, info.classes) == ("a2n_nano_x2", "restoration", "picture", ()) and model.scale == 2
    assert timm.create_model("a2n_nano_x2", pretrained=True, pretrained_cfg_overlay=dict(file=str(run / "epoch_3.safetensors")), **SMALL)


def test_what_was_trained_predicts_reports_and_is_evaluated(folder, run, tmp_path, capsys):
    assert predict([str(run / "epoch_3.pth"), str(folder), "-o", str(tmp_path / "larger"), "--window", "24", "24"]) == 0
    assert len(list((tmp_path / "larger").glob("*.png"))) == 10 and Image.open(tmp_path / "larger" / "0.png").size == (140, 120)
    assert predict([str(run / "epoch_3.pth"), str(folder / "0.png"), "--ensemble", "-o", str(tmp_path / "one.png")]) == 0
    assert "140×120" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "psnr_bicubic" in page and "no table of classes" not in page.lower() and "data:image" in page
    metrics = evaluate(run / "config.py", run / "epoch_3.pth", cfg_options=[f"model.args={SMALL}"])
    assert set(metrics) == {f"restoration/{name}" for name in ("psnr", "ssim", "psnr_rgb", "ssim_rgb", "psnr_bicubic")}
    for arguments, message in ((["--top", "3"], "--top is for networks that name classes"), ([], "have to go somewhere: name a file")):
        with pytest.raises(InputError, match=message):
            predict([str(run / "epoch_3.pth"), str(folder / "0.png"), *arguments, *(["-o", str(tmp_path / "x")] if arguments else [])])


def test_resuming_goes_on(run, tmp_path):
    options = [f"{part}_dataloader.{key}" for part in ("train", "val") for key in ("num_workers=0", "persistent_workers=False")]
    again, _ = train(run / "config.py", work_dir=tmp_path, resume=run / "epoch_3.pth", cfg_options=[
        f"model.args={SMALL}", "train_cfg.max_epochs=4", "report=False", *options])
    assert (again / "epoch_4.pth").is_file()


def test_folders_of_splits_and_none(folder, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes((folder / "0.png").read_bytes())
    data = plain_pictures(tmp_path)
    assert {split: len(samples) for split, samples in data.splits.items()} == {"train": 1, "val": 1}
    assert PictureFolderDataset(str(tmp_path), "val", 2).names == [str(tmp_path / "val" / "a.png")]
    with pytest.raises(InputError, match="holds no picture"):
        (tmp_path / "none").mkdir()
        plain_pictures(tmp_path / "none")


def test_models_and_options_that_do_not_fit(folder, tmp_path):
    with pytest.raises(InputError, match="--freeze leaves nothing of a2n_nano_x2 to learn"):
        torch.save(timm.create_model("a2n_nano_x2").state_dict(), tmp_path / "w.pth")
        zoo_train(["a2n_nano_x2", str(folder), "--freeze", "--weights", str(tmp_path / "w.pth"), "--work-dir", str(tmp_path / "run")])
