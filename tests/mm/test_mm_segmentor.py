"""Segmentation on the engine: losses and metrics against their definitions, datasets, and short runs of the whole way."""
import csv
import importlib.util
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import timm
import torch
from html_pages import Page
from mmengine.registry import DATASETS, MODELS
from monai.inferers import sliding_window_inference
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.measuring import per_class
from zoo.measuring.class_tables import surface_dice
from zoo.mm import evaluate, train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.config import load_config
from zoo.mm.datasets import Sample
from zoo.mm.mask_datasets import DecathlonDataset, DigitScenesDataset, MNI152Dataset, PictureMaskDataset, VolumeFolderDataset
from zoo.mm.metrics import MeanDice, MeanIoU
from zoo.mm.report import write_report
from zoo.mm.segmentor import Segmentor
from zoo.mm.training import evaluate_classes
from zoo.predicting.segmentation import prepare
from zoo.predicting.sliding_windows import segment
from zoo.seeing.gate_pictures import picture_gates

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for folder in ("volumes", "segmentation") for path in (ROOT / "configs" / folder).glob("*unet*.py"))
TINY = {"num_classes": 3, "in_chans": 1, "widths": (4, 6)}


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_sound(path):
    config = load_config(path)
    assert path.stem.startswith(config.model.name)
    model = MODELS.build(config.model).train()
    size = (32, 32, 32)[:model.model.spatial_dims]
    targets = torch.randint(model.num_classes, (2, *size))
    assert model(torch.randn(2, model.model.in_chans, *size), targets, mode="loss")["loss"].isfinite()


def test_loss_is_dice_and_cross_entropy():
    task = Segmentor("attention_unet", TINY).eval()
    inputs, targets = torch.randn(2, 1, 8, 8), torch.randint(3, (2, 8, 8))
    probabilities = task(inputs).softmax(1)
    one_hot = torch.eye(3)[targets].movedim(-1, 1)
    overlap, total = (one_hot * probabilities).sum((2, 3)), (one_hot + probabilities).sum((2, 3))
    dice = 1 - (2 * overlap + 1e-5) / (total + 1e-5)
    entropy = -(one_hot * probabilities.log()).sum(1).mean()
    torch.testing.assert_close(task(inputs, targets, mode="loss")["loss"], dice.mean() + entropy, atol=1e-5, rtol=1e-5)


def test_windows_of_evaluation_are_those_of_prediction():
    task = Segmentor("attention_unet3d", {**TINY, "norm": "instance"}, window=(8, 8, 8), overlap=0.5).eval()
    x = torch.randn(1, 1, 13, 9, 8)
    with torch.no_grad():
        evaluated = task(x, torch.zeros(1, 13, 9, 8), mode="predict")[0]["labels"]
    predicted = segment(task.model, x[0], (8, 8, 8), classes=3, overlap=0.5)
    assert (evaluated != predicted).sum() <= 2  # where rounding decides


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "attention_unte"}, "did you mean attention_unet"),
    ({"name": "attention_unet", "args": {"depth": 2}}, "depth"),
    ({"name": "attention_unet", "loss": {"type": "DiceCELos"}}, "monai.losses has no 'DiceCELos'; did you mean DiceCELoss"),
    ({"name": "attention_unet", "loss": {"lambda_dcie": 1}}, "lambda_dcie"),
    ({"name": "attention_unet", "window": (8, 8, 8)}, "is for 3-D, and attention_unet takes 2-D input"),
])
def test_what_cannot_be_created(arguments, message):
    with pytest.raises(InputError, match=message):
        Segmentor(**arguments)


def predictions(classes=4, images=5):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(classes - 1, (6, 7), generator=generator)  # noqa: E731  the last class never occurs
    return [{"labels": draw(), "target": draw()} for _ in range(images)]


@pytest.mark.parametrize("kind", [MeanIoU, MeanDice])
def test_metrics_against_loops(kind):
    names, samples = ["background", "a", "b", "c"], predictions()
    metric = kind()
    metric.dataset_meta = {"classes": names}
    for sample in samples:
        metric.process(None, [sample])
    expected = {}
    for i, name in enumerate(names):
        masks = [(sample["labels"] == i, sample["target"] == i) for sample in samples]
        if kind is MeanIoU:
            union = sum((a | b).sum().item() for a, b in masks)
            found = 100 * sum((a & b).sum().item() for a, b in masks) / union if union else None
        else:
            dice = [200 * (a & b).sum().item() / (a.sum() + b.sum()).item() for a, b in masks if b.any()]
            found = sum(dice) / len(dice) if dice and i else None
        if found is not None:
            expected[f"{metric.prefix}/{name}"] = found
    expected[f"{metric.prefix}/mean"] = sum(expected.values()) / len(expected)
    assert metric.evaluate(len(samples)) == pytest.approx(expected)
    assert not metric.results


def test_hemispheres_are_apart():
    left, right = (MNI152Dataset(split, (16, 16, 16), resolution=4) for split in ("train", "val"))
    (x, mask), (other, _) = left.read(0), right.read(0)
    whole = nibabel.as_closest_canonical(__import__("nilearn.datasets").datasets.load_mni152_template(4)).shape
    assert x.shape[1] + other.shape[1] in (whole[0], whole[0] - 1) and x.shape[2:] == other.shape[2:] == whole[1:]
    assert mask.shape == x.shape and set(mask.unique().tolist()) == {0, 1, 2}
    assert x[mask == 2].mean() > x[mask == 1].mean() > x[mask == 0].mean()  # white, grey, neither, in T1


def test_scenes_are_their_index_and_hold_their_digits():
    train_set, held_out = DigitScenesDataset("train", 3, transforms=[dict(type="RandFlipd", prob=0.5)]), DigitScenesDataset("val", 3)
    first = train_set[Sample(1, 5)]
    assert torch.equal(first["inputs"], train_set[Sample(1, 5)]["inputs"]) and first["inputs"].shape == (1, 64, 64)
    assert not torch.equal(train_set.read(1)[0], held_out.read(1)[0])
    inputs, targets = held_out.read(0)
    assert len(targets.unique()) > 2 and inputs[targets > 0].mean() > inputs[targets == 0].mean() + 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Volumes with a bright ball, in folders and with a dataset.json; pictures with a bright disc."""
    root = tmp_path_factory.mktemp("data")
    random, affine = np.random.default_rng(0), np.diag([-1.0, 1.0, 2.0, 1.0])
    entries = []
    for split, count in (("train", 2), ("val", 1)):
        for folder in ("images", "labels", "masks"):
            (root / split / folder).mkdir(parents=True)
        for i in range(count):
            size, centre = (14, 12, 10), random.uniform(4, 7, 3)
            inside = sum((axis - c) ** 2 for axis, c in zip(np.indices(size), centre, strict=True)) < 10
            volume = (100 * inside + random.normal(0, 5, size)).astype(np.float32)
            for kind, array in (("images", volume), ("labels", inside.astype(np.uint8))):
                nibabel.save(nibabel.Nifti1Image(array, affine), root / split / kind / f"{i}.nii.gz")
            Image.fromarray(volume[..., 5].clip(0, 255).astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(inside[..., 5].astype(np.uint8)).save(root / split / "masks" / f"{i}.png")
            if split == "train":
                entries.append({"image": f"train/images/{i}.nii.gz", "label": f"train/labels/{i}.nii.gz"})
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "ball"}, "training": entries}))
    return root


def test_datasets_of_files(data):
    volumes = dict(window=(8, 8, 8), clip=(0, 100))
    folder = VolumeFolderDataset(str(data), "train", ["background", "ball"], patch=(8, 8, 8), patches=3, cache=True, **volumes)
    item = folder[Sample(4, 0)]
    assert len(folder) == 6 and item["inputs"].shape == (1, 8, 8, 8) and item["targets"].shape == (8, 8, 8)
    assert torch.equal(item["inputs"], folder[Sample(4, 0)]["inputs"]) and not torch.equal(item["inputs"], folder[Sample(4, 1)]["inputs"])
    whole, mask = folder.read(0)
    assert whole[mask == 1].min() > 0.5 > whole[mask == 0].max()
    decathlon = [DecathlonDataset(str(data), split, **volumes) for split in ("train", "val")]
    assert [len(part) for part in decathlon] == [1, 1] and decathlon[0].metainfo["classes"] == ["background", "ball"]
    assert not set(decathlon[0].names) & set(decathlon[1].names)
    pictures = PictureMaskDataset(str(data), "val", ["background", "ball"], (8, 8), mean=(0.5,), std=(0.25,))
    inputs, targets = pictures.read(0)
    assert inputs.shape == targets.shape == (1, 14, 12) and inputs[targets == 1].min() > inputs[targets == 0].max()


def test_bad_data_are_one_sentence(data, tmp_path):
    volumes = dict(classes=["background", "ball"], window=(8, 8, 8))
    with pytest.raises(InputError, match=r"patch=\(8, 8\): .*0.nii.gz has 14×12×10 positions"):
        VolumeFolderDataset(str(data), "train", patch=(8, 8), **volumes)[Sample(0, 0)]
    with pytest.raises(InputError, match="has unknown labels 1; known are 0 to 0"):
        VolumeFolderDataset(str(data), "train", ["background"], (8, 8, 8))[Sample(0, 0)]
    with pytest.raises(InputError, match="has unknown values 1; known are 0 to 0"):
        PictureMaskDataset(str(data), "train", ["background"], (8, 8))[Sample(0, 0)]
    for split in ("train", "val"):
        for name in ("images", "masks"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
        Image.new("L", (9, 8)).save(tmp_path / "pictures" / split / "images" / "x.png")
    (tmp_path / "pictures" / "train" / "masks" / "x.png").write_text("no picture")
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "val" / "masks" / "x.png")
    for split, message in (("train", "the mask .* is not a picture that can be"), ("val", "x.png is of shape 8×8, its picture .* of 8×9")):
        with pytest.raises(InputError, match=message):
            PictureMaskDataset(str(tmp_path / "pictures"), split, ["background"], (8, 8))[Sample(0, 0)]
    with pytest.raises(InputError, match="there is no data folder"):
        VolumeFolderDataset(str(tmp_path / "no"), "train", **volumes)
    with pytest.raises(InputError, match="there is no folder .*labels"):
        (tmp_path / "train" / "images").mkdir(parents=True)
        VolumeFolderDataset(str(tmp_path), "train", **volumes)
    with pytest.raises(InputError, match="there is no .*dataset.json; set data_root"):
        DecathlonDataset(str(tmp_path), "train", (8, 8, 8))
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "a", "2": "b"}, "training": []}')
    with pytest.raises(InputError, match=r"has labels \[0, 2\], where they have to run from 0"):
        DecathlonDataset(str(tmp_path), "train", (8, 8, 8))
    (tmp_path / "dataset.json").write_text('{"training": []}')
    with pytest.raises(InputError, match="is not a description of the Decathlon's or nnU-Net's kind: KeyError"):
        DecathlonDataset(str(tmp_path), "train", (8, 8, 8))
    (tmp_path / "train" / "labels").mkdir()
    for name, affine, size in (("images", np.eye(4), (9, 9, 9)), ("labels", 2 * np.eye(4), (9, 9, 9))):
        nibabel.save(nibabel.Nifti1Image(np.zeros(size, np.uint8), affine), tmp_path / "train" / name / "x.nii")
    with pytest.raises(InputError, match="the affine of the mask .*x.nii differs"):
        VolumeFolderDataset(str(tmp_path), "train", **volumes)[Sample(0, 0)]


@pytest.fixture(scope="module")
def volume_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    options = [
        f"data_root={data}", "model.args={'num_classes': 2, 'widths': (4, 6, 8), 'norm': 'instance'}", "model.window=(8, 8, 8)",
        "train_cfg.max_epochs=6", "train_cfg.val_interval=6", "optim_wrapper.type=OptimWrapper", "optim_wrapper.optimizer.lr=0.02",
        "param_scheduler=[]", "experiment_name=volume_run"]
    changes = {"type": "VolumeFolderDataset", "classes": ["background", "ball"], "window": (8, 8, 8), "clip": (0, 100)}
    for part in ("train", "val", "test"):
        options += [f"{part}_dataloader.num_workers=0", f"{part}_dataloader.persistent_workers=False"]
        options += [f"{part}_dataloader.dataset.{key}={value!r}" for key, value in changes.items()]
        options.append(f"{part}_dataloader.dataset.spacing=None")
    options.append("train_dataloader.dataset.patch=(8, 8, 8)")
    _, metrics = train("attention_unet3d_folders", work_dir=folder, cfg_options=options)
    return latest_checkpoint(folder), metrics, options


def test_trains_on_volumes_evaluates_and_predicts_files(volume_run, data, tmp_path, capsys):
    checkpoint, metrics, options = volume_run
    assert metrics["dice/ball"] == metrics["dice/mean"] > 60
    assert evaluate("attention_unet3d_folders", checkpoint, cfg_options=options) == pytest.approx(metrics)
    path = data / "val" / "images" / "0.nii.gz"
    assert tool("predict")([str(checkpoint), str(path), "-o", str(tmp_path / "m.nii.gz"), "--overlap", "0.5"]) == 0
    assert "ball" in capsys.readouterr().out
    mask, image = nibabel.load(tmp_path / "m.nii.gz"), nibabel.load(path)
    assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
    truth, found = np.asarray(nibabel.load(data / "val" / "labels" / "0.nii.gz").dataobj) == 1, np.asarray(mask.dataobj) == 1
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.6
    assert tool("predict")([str(checkpoint), *[str(data / "train" / "labels")], "-o", str(tmp_path / "many")]) == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0_mask.nii.gz", "1_mask.nii.gz", "answers.csv"]
    rows = list(csv.DictReader((tmp_path / "many" / "answers.csv").open()))
    assert [row["class"] for row in rows] == ["background", "ball"] * 2
    image = nibabel.load(rows[0]["volume"])
    millilitres = np.prod(image.shape) * np.prod(image.header.get_zooms()) / 1000
    for row in rows:
        assert float(row["millilitres"]) == pytest.approx(float(row["share"]) * millilitres, abs=1e-3)


def test_rows_of_volumes_are_in_millimetres(volume_run, data, tmp_path):
    checkpoint, metrics, options = volume_run
    tool("test")(["attention_unet3d_folders", str(checkpoint), "--per-class", "--csv", str(tmp_path / "x.csv"), "--cfg-options", *options])
    row, mean = csv.DictReader((tmp_path / "x.csv").open())
    assert (row["class"], row["images"], row["missed"], mean["class"]) == ("ball", "1", "0", "mean")
    assert float(row["dice"]) == pytest.approx(metrics["dice/ball"])
    item = VolumeFolderDataset(str(data), "val", ["background", "ball"], (8, 8, 8), clip=(0, 100))[Sample(0, 0)]
    with torch.inference_mode():
        logits = sliding_window_inference(item["inputs"][None], (8, 8, 8), 4, load_trained(checkpoint)[0], overlap=0.5, mode="gaussian")
    found, truth, spacing = logits[0].argmax(0).numpy(), item["targets"].numpy(), (1.0, 1.0, 2.0)
    assert item["spacing"].tolist() == list(spacing)
    assert float(row["hd95"]) == pytest.approx(per_class.overlap(truth, found, 2, spacing).hd95[0]) and float(row["hd95"]) > 0
    assert float(row["surface_dice"]) == pytest.approx(100 * surface_dice(truth, found, 2, spacing)[0], abs=0.01)


def test_resampled_volumes_know_their_spacing(data):
    resampled = VolumeFolderDataset(str(data), "val", ["background", "ball"], (8, 8, 8), spacing=(2.0, 1.0, 1.5))
    item = resampled[Sample(0, 0)]
    assert item["inputs"].shape == (1, 7, 12, 13) and item["spacing"].tolist() == pytest.approx([2, 1, 20 / 13])
    assert "spacing" not in VolumeFolderDataset(str(data), "val", ["background", "ball"], (8, 8, 8), patch=(8, 8, 8))[Sample(0, 0)]


def test_exported_networks_give_the_masks_of_their_checkpoints(volume_run, data, tmp_path):
    path = data / "val" / "images" / "0.nii.gz"
    assert tool("export")([str(volume_run[0]), "-o", str(tmp_path / "x.onnx"), "--static-size", "--batch", "3"]) == 0
    masks = []
    for name in (str(volume_run[0]), str(tmp_path / "x.onnx")):
        assert tool("predict")([name, str(path), "-o", str(tmp_path / "m.nii.gz")]) == 0
        masks.append(np.asarray(nibabel.load(tmp_path / "m.nii.gz").dataobj))
    assert masks[0].any() and (masks[0] != masks[1]).mean() < 1e-3  # where rounding decides
    with pytest.raises(InputError, match="x.onnx does not take images of 1×9×9×9"):
        tool("predict")([str(tmp_path / "x.onnx"), str(path), "-o", str(tmp_path / "m.nii.gz"), "--window", "9", "9", "9"])


def test_a_report_of_volumes_has_their_slices_and_distances(volume_run, data):
    checkpoint, metrics, _ = volume_run
    page = Page(write_report(checkpoint.parent))
    head = page.texts.index("class")
    assert page.texts[head:head + 7] == ["class", "images", "missed", "Dice, %", "HD95, mm", "surface Dice, %", "ball"]
    assert page.texts.count(f"{metrics['dice/ball']:.1f}%") == 1 and page.says(f"{metrics['dice/ball']:.1f}")
    assert page.says("0.nii.gz, slice ") and page.says("of 10, where most differs") and len(page.pictures) == 4
    assert {what.rpartition(": ")[2] for what, _ in page.pictures} == {"picture", "given", "answer", "difference"}
    assert all(picture.size == (14, 12) for _, picture in page.pictures) and page.says(f"attention_unet3d on {data}")


def test_volumes_smaller_than_the_window_are_padded_everywhere(volume_run, data, tmp_path):
    """As patches, in evaluation and in prediction, which agree."""
    checkpoint, _, options = volume_run
    larger = (16, 24, 16)
    item = VolumeFolderDataset(str(data), "train", ["background", "ball"], larger, clip=(0, 100), patch=larger)[Sample(0, 0)]
    whole = VolumeFolderDataset(str(data), "train", ["background", "ball"], larger, clip=(0, 100)).read(0)
    for padded, inner in ((item["inputs"], whole[0]), (item["targets"][None], whole[1])):
        assert padded.shape[1:] == larger and torch.equal(padded[:, 1:15, 6:18, 3:13], inner)
        assert padded.sum().item() == pytest.approx(inner.sum().item())
    options = [*options, f"model.window={larger}", f"train_dataloader.dataset.patch={larger}", "train_cfg.max_epochs=1",
               "experiment_name=small"]
    train("attention_unet3d_folders", work_dir=tmp_path / "run", cfg_options=options)
    metrics = evaluate("attention_unet3d_folders", checkpoint, cfg_options=options)
    path = data / "val" / "images" / "0.nii.gz"
    how = ["--window", *map(str, larger), "--overlap", "0.5"]
    assert tool("predict")([str(checkpoint), str(path), "-o", str(tmp_path / "m.nii"), *how]) == 0
    truth, found = (np.asarray(nibabel.load(file).dataobj) == 1 for file in (data / "val" / "labels" / "0.nii.gz", tmp_path / "m.nii"))
    assert 200 * (truth & found).sum() / (truth.sum() + found.sum()) == pytest.approx(metrics["dice/ball"], abs=0.5)


@pytest.fixture(scope="module")
def decathlon(tmp_path_factory):
    """Two channels, of which the second alone shows the ball, as the Decathlon and as nnU-Net have them."""
    roots = {kind: tmp_path_factory.mktemp(kind) for kind in ("decathlon", "nnunet")}
    random, affine = np.random.default_rng(0), np.diag([1.0, 1.0, 2.0, 1.0])
    for root in roots.values():
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir()
    for i in range(3):
        inside = sum((axis - c) ** 2 for axis, c in zip(np.indices((9, 10, 8)), random.uniform(3, 5, 3), strict=True)) < 8
        volume = np.stack([random.normal(50, 5, inside.shape), 100 * inside + random.normal(0, 5, inside.shape)], -1).astype(np.float32)
        for root in roots.values():
            nibabel.save(nibabel.Nifti1Image(inside.astype(np.uint8), affine), root / "labelsTr" / f"c{i}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(volume, affine), roots["decathlon"] / "imagesTr" / f"c{i}.nii.gz")
        for channel in range(2):
            nibabel.save(nibabel.Nifti1Image(volume[..., channel], affine), roots["nnunet"] / "imagesTr" / f"c{i}_{channel:04d}.nii.gz")
    (roots["decathlon"] / "dataset.json").write_text(json.dumps({
        "labels": {"0": "background", "1": "ball"}, "modality": {"0": "T2", "1": "ADC"},
        "training": [{"image": f"./imagesTr/c{i}.nii.gz", "label": f"./labelsTr/c{i}.nii.gz"} for i in range(3)]}))
    (roots["nnunet"] / "dataset.json").write_text(json.dumps({
        "labels": {"background": 0, "ball": 1}, "channel_names": {"0": "T2", "1": "ADC"}, "file_ending": ".nii.gz", "numTraining": 3}))
    return roots


SEVERAL = [
    "model.args={'num_classes': 2, 'in_chans': 2, 'widths': (4, 6), 'norm': 'instance'}", "model.window=(8, 8, 8)",
    "optim_wrapper.type=OptimWrapper", "optim_wrapper.optimizer.lr=0.02", "param_scheduler=[]",
    "train_cfg.max_epochs=8", "train_cfg.val_interval=8", "train_dataloader.dataset.patch=(8, 8, 8)",
    *(f"{part}_dataloader.{key}" for part in ("train", "val", "test") for key in (
        "num_workers=0", "persistent_workers=False", "dataset.window=(8, 8, 8)", "dataset.spacing=None", "dataset.clip=None"))]


@pytest.mark.parametrize("kind", ["decathlon", "nnunet"])
def test_several_channels_are_trained_tested_predicted_and_exported(decathlon, tmp_path, kind):
    from zoo.exporting.onnx import export_onnx

    options = [f"data_root={decathlon[kind]}", *SEVERAL, f"experiment_name={kind}"]
    _, metrics = train("attention_unet3d_btcv", work_dir=tmp_path / "run", cfg_options=options)
    assert metrics["dice/ball"] > 50
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert evaluate("attention_unet3d_btcv", checkpoint, cfg_options=options) == pytest.approx(metrics)
    name = "c0.nii.gz" if kind == "decathlon" else "c0_0000.nii.gz"
    assert tool("predict")([str(checkpoint), str(decathlon[kind] / "imagesTr"), "-o", str(tmp_path / "found"), "--overlap", "0.5"]) == 0
    assert len(list((tmp_path / "found").glob("*_mask.nii.gz"))) == 3
    mask = nibabel.load(tmp_path / "found" / name.replace(".nii.gz", "_mask.nii.gz"))
    truth, found = (np.asarray(image.dataobj) == 1 for image in (nibabel.load(decathlon[kind] / "labelsTr" / "c0.nii.gz"), mask))
    dice = 200 * (truth & found).sum() / (truth.sum() + found.sum())
    assert mask.shape == truth.shape and dice == pytest.approx(metrics["dice/ball"], abs=1)
    model, info = load_trained(checkpoint)
    assert info.input_size == (2, 8, 8, 8)
    export_onnx(model, info, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"the model takes 1 channels, the train data have 2; set model.args.in_chans"):
        train("attention_unet3d_btcv", work_dir=tmp_path / "no", cfg_options=[*options, "model.args.in_chans=1"])
    with pytest.raises(InputError, match="is of shape 9×10×8, where 2 channels"):
        tool("predict")([str(checkpoint), str(decathlon[kind] / "labelsTr" / "c0.nii.gz"), "-o", str(tmp_path / "x.nii")])


def test_nan_is_said_once_for_a_file_whoever_reads_it(tmp_path, caplog):
    """Also where several processes load data, in every epoch anew: what one of them has said, the others do not say."""
    from torch.utils.data import DataLoader

    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / split / folder).mkdir(parents=True)
            data = np.ones((8, 8, 8), np.float32)
            data[0] = np.nan if folder == "images" else 0
            nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / split / folder / "x.nii")
    described = dict(classes=["background", "a"], window=(4, 4, 4), patches=6)
    dataset = VolumeFolderDataset(str(tmp_path), "train", **described)
    loader = DataLoader(dataset, batch_size=1, sampler=[Sample(i, 0) for i in range(6)], num_workers=2)
    assert all(batch["inputs"].isfinite().all() for batch in loader) and dataset.said.all()
    dataset[Sample(0, 0)]
    assert not caplog.records  # of this process
    other = VolumeFolderDataset(str(tmp_path), "train", **described)
    for _ in range(2):
        other[Sample(0, 0)]
    message, = caplog.messages
    assert message.endswith("train/images/x.nii has 64 voxels that are NaN; they count as outside, 0")
    data[0] = np.inf
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "val" / "images" / "x.nii")
    with pytest.raises(InputError, match="the volume .*val/images/x.nii has 64 voxels that are infinite"):
        VolumeFolderDataset(str(tmp_path), "val", **described)[Sample(0, 0)]


def test_gates_of_a_volume_are_pictured(volume_run, data, tmp_path):
    path = data / "val" / "images" / "0.nii.gz"
    _, info = load_trained(volume_run[0])
    plain = timm.create_model("unet3d", widths=(4, 6, 8))
    with pytest.raises(InputError, match="has no attention gates to show"):
        picture_gates(plain, info, path, tmp_path / "g.png")
    with pytest.raises(InputError, match="slice 10 is not in .*0.nii.gz, which has slices 0 to 9"):
        tool("visualize")([str(volume_run[0]), str(path), "-o", str(tmp_path / "g.png"), "--slice", "10"])
    assert not (tmp_path / "g.png").exists()
    assert tool("visualize")([str(volume_run[0]), str(path), "-o", str(tmp_path / "g.png"), "--slice", "9"]) == 0
    with Image.open(tmp_path / "g.png") as sheet:
        assert min(sheet.size) > 300  # the slice and two gates


def test_what_a_network_for_volumes_is_not_given(volume_run, data, tmp_path):
    checkpoint, picture = volume_run[0], data / "val" / "images" / "0.png"
    volume = data / "val" / "images" / "0.nii.gz"
    for arguments, message in [
        ([picture, "-o", tmp_path / "m.nii.gz"], "is a 3-D network and takes volumes .*; .*0.png is a 2-D picture"),
        ([volume], "its masks have to go somewhere: name a file or folder with -o"),
        ([volume, "-o", tmp_path / "m.nii.gz", "--window", "8", "8"], "the window is 8×8, where attention_unet3d needs 3 sizes"),
        ([volume, "-o", tmp_path / "m.nii.gz", "--overlap", "1"], "overlap is 1; it has to be at least 0 and below 1"),
        ([volume, data / "train" / "labels", "-o", tmp_path / "m.nii.gz"], "3 answers are too many for one file"),
        ([data / "val" / "masks", "-o", tmp_path / "m.nii.gz"], "holds no volume"),
        ([volume, "-o", volume], "would be overwritten"),
        ([volume, "-o", tmp_path / "overlay.png"], r"overlay.png is neither a folder nor .* here \(.csv .json .nii .nii.gz\)"),
    ]:
        with pytest.raises(InputError, match=message):
            tool("predict")([str(checkpoint), *map(str, arguments)])
    assert not list(tmp_path.iterdir())


def test_trains_on_pictures_and_overlays(data, tmp_path, capsys):
    options = ["model.args={'num_classes': 11, 'in_chans': 1, 'widths': (4, 6, 8)}", "train_dataloader.dataset.scenes=32",
               "val_dataloader.dataset.scenes=4", "train_cfg.max_epochs=1", "train_cfg.val_interval=1", "experiment_name=scenes",
               "report=True"]
    _, metrics = train("attention_unet_digits", work_dir=tmp_path / "run", cfg_options=options)
    page = Page(tmp_path / "run" / "report.html")
    assert page.says("HD95, pixels") and f"{metrics['iou/background']:.1f}" in page.texts and len(page.pictures) == 4 * 4
    assert page.says("scene 3. ") and all(picture.size == (64, 64) for _, picture in page.pictures)
    assert 0 <= metrics["iou/mean"] <= 100 and metrics["iou/background"] > 0
    checkpoint = latest_checkpoint(tmp_path / "run")
    model, info = load_trained(checkpoint)
    assert info.task == "segmentation" and info.classes[1] == "0" and info.input_size == (1, 64, 64)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90), np.uint8)).save(tmp_path / "scene.png")
    assert tool("predict")([str(checkpoint), str(tmp_path / "scene.png"), "-o", str(tmp_path / "seen.png")]) == 0
    labels = segment(model, prepare(info, tmp_path / "scene.png"), (64, 64), classes=11)
    with Image.open(tmp_path / "seen.png") as seen, Image.open(tmp_path / "seen_overlay.png") as overlay:
        assert seen.mode == "P" and np.array_equal(seen, labels)
        assert overlay.size == (90, 70) and overlay.mode == "RGB"
    assert tool("predict")([str(checkpoint), str(tmp_path / "scene.png"), "-o", str(tmp_path / "table.json")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["label"], row["pixels"]) for row in rows] == list(enumerate(np.bincount(labels.flatten(), minlength=11).tolist()))
    rows = evaluate_classes("attention_unet_digits", checkpoint, cfg_options=[*options, "test_dataloader.dataset.scenes=4"])[1]
    assert {f"iou/{row['class']}": row["iou"] for row in rows} == pytest.approx({key: metrics[key] for key in metrics if key != "iou/mean"})
    assert all(row["dice"] == pytest.approx(200 * row["iou"] / (100 + row["iou"])) for row in rows)
    assert tool("visualize")([str(checkpoint), str(tmp_path / "scene.png"), "-o", str(tmp_path / "gates.png")]) == 0
    assert "the maps of 1 gates" in capsys.readouterr().out
    with pytest.raises(InputError, match="is a 2-D network and takes pictures .*; .*0.nii.gz is a 3-D volume"):
        tool("predict")([str(checkpoint), str(data / "val" / "images" / "0.nii.gz"), "-o", str(tmp_path / "x.png")])


def test_datasets_are_registered():
    for name in ("MNI152Dataset", "DecathlonDataset", "VolumeFolderDataset", "PictureMaskDataset", "DigitScenesDataset"):
        assert DATASETS.get(name) is not None
