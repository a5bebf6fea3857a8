"""Connections of pixels on the engine: networks of ours, from training to an exported file, and heads of mmsegmentation."""
import csv
import json
import math

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

import zoo
from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.exporting.onnx import export_onnx
from zoo.layers.connectivity import class_logits
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.segmentor import Segmentor
from zoo.mm.training import evaluate_classes
from zoo.predicting.exported import ExportedNetwork
from zoo.predicting.segmentation import prepare
from zoo.predicting.sliding_windows import segment
from zoo.tools import predict

TINY = {"num_classes": 2, "in_chans": 1, "widths": (4, 6), "connectivity": True}


@pytest.mark.parametrize("loss", [None, {}, {"type": "ConnectivityLoss", "variant": "bicon", "votes": 0.1}], ids=str)
def test_the_loss_is_of_connections(loss):
    torch.manual_seed(0)
    task = Segmentor("unet", TINY, loss=loss).train()
    inputs, targets = torch.randn(2, 1, 9, 8), torch.randint(2, (2, 9, 8))
    options = {key: value for key, value in (loss or {}).items() if key != "type"}
    torch.testing.assert_close(task(inputs, targets, mode="loss")["loss"], zoo.ConnectivityLoss(**options)(task.model(inputs), targets))


def test_the_loss_is_of_every_output_of_dconnnet():
    task = Segmentor("dconnnet_nano", {"num_classes": 3, "drop_rate": 0.0}).train()
    inputs, targets = torch.randn(2, 3, 32, 40), torch.randint(3, (2, 32, 40))
    found = task(inputs, targets, mode="loss")["loss"]
    out, prior = task.model(inputs)
    loss = zoo.ConnectivityLoss()
    torch.testing.assert_close(found, loss(out, targets) + 0.3 * loss(prior, targets))


@pytest.mark.parametrize("classes", [2, 3])
def test_windows_of_evaluation_are_those_of_prediction(classes):
    torch.manual_seed(0)
    task = Segmentor("unet", {**TINY, "num_classes": classes}, window=(8, 8), overlap=0.5).eval()
    x = torch.randn(1, 1, 13, 9)
    with torch.no_grad():
        evaluated = task(x, torch.zeros(1, 13, 9), mode="predict")[0]["labels"]
    assert (evaluated != segment(task.model, x[0], (8, 8), classes=classes, overlap=0.5)).sum() <= 2  # where rounding decides


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(name="unet", args=TINY, loss={"type": "DiceLoss"}), "unet puts out connections of pixels, whose loss is .*, not DiceLoss"),
    (dict(name="unet", args={"num_classes": 2}, loss={"type": "ConnectivityLoss"}), "ConnectivityLoss is of connections .*, which unet"),
    (dict(name="dconnnet_nano", args={"num_classes": 3}, loss={"variant": "bicon"}), "the model has 3 classes; variant='dconn' is for any"),
    (dict(name="unet", args=TINY, loss={"variants": "bicon"}), "ConnectivityLoss cannot be set up: .*variants"),
    (dict(name="unet", args=TINY, loss={"variant": "biconn"}), "variant must be bicon or dconn"),
    (dict(name="unet", args={"connectivity": True, "spatial_dims": 3}), "connectivity must be False in 3-D"),
])
def test_what_does_not_go_together_is_said(arguments, message):
    with pytest.raises((InputError, ValueError), match=message):
        Segmentor(**arguments)


def test_from_training_to_an_exported_file(tmp_path):
    options = [f"model.args={ {'num_classes': 11, 'in_chans': 1, 'widths': (4, 6, 8), 'connectivity': True} }",
               "train_dataloader.dataset.scenes=32", "val_dataloader.dataset.scenes=4", "train_cfg.max_epochs=1",
               "train_cfg.val_interval=1"]
    _, metrics = train("attention_unet_digits", work_dir=tmp_path / "run", cfg_options=options)
    checkpoint = latest_checkpoint(tmp_path / "run")
    rows = evaluate_classes("attention_unet_digits", checkpoint, cfg_options=[*options, "test_dataloader.dataset.scenes=4"])[1]
    found = {f"iou/{row['class']}": row["iou"] for row in rows if not math.isnan(row["iou"])}
    assert found == pytest.approx({key: metrics[key] for key in metrics if key != "iou/mean"})
    model, info = load_trained(checkpoint)
    assert info.task == "segmentation" and model.connectivity
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90), np.uint8)).save(tmp_path / "scene.png")
    assert predict.main([str(checkpoint), str(tmp_path / "scene.png"), "-o", str(tmp_path / "seen.png")]) == 0
    x = prepare(info, tmp_path / "scene.png")
    labels = segment(model, x, (64, 64), classes=11)
    with Image.open(tmp_path / "seen.png") as seen:
        assert np.array_equal(seen, labels)
    with torch.no_grad():
        whole = model(x[None])
    maps = model.head(model.forward_features(torch.nn.functional.pad(x[None], (0, 2, 0, 2), mode="replicate")))[..., :70, :90]
    torch.testing.assert_close(class_logits(maps, 11), whole)
    assert export_onnx(model, info, tmp_path / "net.onnx").free_size
    assert (segment(ExportedNetwork(tmp_path / "net.onnx"), x, (64, 64), classes=11) != labels).float().mean() < 1e-3
    assert predict.main([str(tmp_path / "net.onnx"), str(tmp_path / "scene.png"), "-o", str(tmp_path / "table.json")]) == 0
    counted = [row["pixels"] for row in json.loads((tmp_path / "table.json").read_text())]
    assert np.abs(np.bincount(labels.flatten(), minlength=11) - counted).sum() < 20


def test_on_pictures_and_masks_of_ones_own(tmp_path):
    from zoo.tools.train import main

    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(6):
        mask = np.zeros((40, 40), np.uint8)
        mask[rng.integers(5, 35), 5:35] = 1
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
        picture = np.repeat(mask[..., None] * 150, 3, 2) + rng.integers(0, 60, (40, 40, 3))
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "data" / "images" / f"{i}.png")
    assert main(["dconnnet_nano", str(tmp_path / "data"), "--epochs", "1", "--work-dir", str(tmp_path / "run")]) is None
    model, info = load_trained(latest_checkpoint(tmp_path / "run"))
    assert info.name == "dconnnet_nano" and model.num_classes == 2 and model.head.out_channels == 8
    inputs = [str(latest_checkpoint(tmp_path / "run")), str(tmp_path / "data" / "images"), "-o", str(tmp_path / "seen.csv")]
    assert predict.main(inputs) == 0
    with (tmp_path / "seen.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def head(kind, classes, **args):
    from zoo.mm import mmseg_parts

    torch.manual_seed(0)
    given = dict(in_channels=6, channels=8, num_classes=classes, num_convs=1, norm_cfg=dict(type="BN"), align_corners=False)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return getattr(mmseg_parts, kind)(**given, **args).eval()


@pytest.mark.parametrize(("kind", "classes", "channels", "variant"), [
    ("BiconHead", 2, 8, "bicon"), ("DconnHead", 2, 8, "dconn"), ("DconnHead", 4, 32, "dconn")])
def test_heads_of_mmsegmentation(kind, classes, channels, variant):
    pytest.importorskip("mmseg", reason="needs mmsegmentation: make mm")
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model, features = head(kind, classes, in_index=0), [torch.randn(2, 6, 8, 10)]
    maps = model(features)
    assert maps.shape == (2, channels, 8, 10) and model.out_channels == classes
    labels = torch.randint(classes, (2, 32, 40))
    labels[:, :3] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each[None])) for each in labels]
    found = model.loss(features, samples, {})
    resized = torch.nn.functional.interpolate(maps, (32, 40), mode="bilinear")
    torch.testing.assert_close(found[f"loss_{variant}"], zoo.ConnectivityLoss(variant, ignore_index=255)(resized, labels))
    right = (class_logits(resized, classes).argmax(1) == labels)[labels != 255].float().mean()
    torch.testing.assert_close(found["acc_seg"].squeeze(), 100 * right)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(features, [dict(img_shape=(32, 40))] * 2, {}), class_logits(resized, classes))


@pytest.mark.parametrize(("kind", "classes", "args", "message"), [
    ("BiconHead", 3, {}, "BiconHead is for two classes, a background and a thing, and num_classes is 3"),
    ("DconnHead", 3, dict(loss_decode=dict(type="DiceLoss")), "DconnHead learns by its own loss, .* and takes no loss_decode"),
])
def test_heads_say_what_they_do_not_take(kind, classes, args, message):
    pytest.importorskip("mmseg", reason="needs mmsegmentation: make mm")
    with pytest.raises(InputError, match=message):
        head(kind, classes, **args)
