"""Cutting out objects as a task: exact masks, the loss, the field's numbers, and a short run whose checkpoint is used."""
from importlib.resources import files

import numpy as np
import py_sod_metrics
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.config import load_config
from zoo.mm.datasets import Sample
from zoo.mm.saliency import CutOutDataset, Cutter, PhotographScenesDataset, SaliencyMetrics
from zoo.reading.composed import PHOTOGRAPHS, PhotographScenes
from zoo.tools.predict import main
from zoo.tools.train import main as train_tool


def test_scenes_are_functions_of_their_number_and_their_masks_are_exact():
    scenes = PhotographScenes("val", 48)
    picture, mask = scenes.read(3)
    again = PhotographScenes("val", 48).read(3)
    assert (picture == again[0]).all() and (mask == again[1]).all()
    assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8 and 0 < mask.mean() < 0.5
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    item = PhotographScenesDataset("val", 5, 48)[Sample(3, 0)]
    assert item["inputs"].shape == (3, 48, 48) and (item["targets"].numpy() == mask).all()


def test_the_tasks_modes():
    torch.manual_seed(0)
    task = Cutter("inspyrenet_nano", dict(base_size=(32, 32)))
    x, targets = torch.randn(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
    task(x, targets, mode="loss")["loss"].backward()
    assert task.model.decoder.start.conv5.weight.grad.any()
    task.eval()
    with torch.no_grad():
        found = task(x, targets, mode="predict")
        assert task(x).shape == (2, 1, 32, 32)
    assert len(found) == 2 and all(one["alpha"].min() >= 0 and one["alpha"].max() <= 1 for one in found)
    with pytest.raises(ValueError, match="unknown mode 'x'"):
        task(x, mode="x")
    with pytest.raises(InputError, match="it is not of the family inspyrenet"):
        Cutter("sknet_nano")


def test_metrics_are_pysodmetrics():
    random = np.random.default_rng(0)
    alphas, targets = random.random((3, 20, 24)).astype(np.float32), random.random((3, 20, 24)) > 0.6
    metric, names = SaliencyMetrics(), ("MAE", "Smeasure", "Emeasure", "Fmeasure", "WeightedFmeasure")
    theirs = {name: getattr(py_sod_metrics, name)() for name in names}
    for alpha, target in zip(alphas, targets, strict=True):
        metric.process(None, [{"alpha": torch.from_numpy(alpha), "target": torch.from_numpy(target)}])
        for measure in theirs.values():
            measure.step((alpha * 255).round().astype(np.uint8), (target * 255).astype(np.uint8))
    results = {name: measure.get_results() for name, measure in theirs.items()}
    expected = {"saliency/MAE": results["MAE"]["mae"], "saliency/S": results["Smeasure"]["sm"],
                "saliency/E": results["Emeasure"]["em"]["curve"].mean(), "saliency/F": results["Fmeasure"]["fm"]["curve"].max(),
                "saliency/wF": results["WeightedFmeasure"]["wfm"]}
    assert metric.evaluate(3) == pytest.approx(expected)


def test_a_run_from_its_config_to_a_cutout(tmp_path):
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.dataset.scenes=8", "val_dataloader.dataset.scenes=2",
               "val_dataloader.batch_size=2"]
    folder, metrics = train("inspyrenet_nano_digits", work_dir=tmp_path / "run", cfg_options=options)
    assert set(metrics) == {f"saliency/{name}" for name in ("MAE", "S", "E", "F", "wF")}
    model, info = load_trained(latest_checkpoint(folder))
    assert info.task == "saliency" and info.classes == ("object",) and info.input_size == (3, 64, 64) and model.base_size == (64, 64)
    Image.fromarray(PhotographScenes("val", 48).read(0)[0]).save(tmp_path / "a.png")
    assert main([str(latest_checkpoint(folder)), str(tmp_path / "a.png"), "-o", str(tmp_path / "cut.png")]) == 0
    assert Image.open(tmp_path / "cut.png").mode == "RGBA"


@pytest.fixture
def own_data(tmp_path):
    """Twelve pictures of two sizes with masks of soft edges, as matting's are."""
    for i in range(12):
        for name in ("images", "masks"):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        picture, mask = PhotographScenes("train", 48).read(i)
        size = (64, 48) if i % 2 else (48, 72)
        Image.fromarray(picture).resize(size).save(tmp_path / "data" / "images" / f"{i}.jpg")
        Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BICUBIC).save(tmp_path / "data" / "masks" / f"{i}.png")
    return tmp_path / "data"


def test_ones_own_pictures_are_learned_and_evaluated_and_cut_out(own_data, tmp_path, capsys):
    run = tmp_path / "run"
    train_tool(["inspyrenet_nano", str(own_data), "--epochs", "1", "--batch", "4", "--size", "32", "--work-dir", str(run)])
    said = capsys.readouterr().out
    assert "are seen at 32×32, what has 128 in a mask or more is cut out" in said and "saliency/MAE" in said
    report = (run / "report.html").read_text()
    assert "The largest mean errors of what was cut out" in report and "of it are the object" in report
    model, info = load_trained(latest_checkpoint(run))
    assert (info.task, info.input_size, model.base_size) == ("saliency", (3, 32, 32), (32, 32))
    assert main([str(latest_checkpoint(run)), str(own_data / "images" / "0.jpg"), "-o", str(tmp_path / "cut.png")]) == 0
    assert Image.open(tmp_path / "cut.png").size == (48, 72)


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (3, 7)])
def test_masks_of_two_values_are_background_and_object(values, tmp_path):
    for split in ("train", "val"):
        for name in ("images", "masks"):
            (tmp_path / split / name).mkdir(parents=True)
        for i in range(4):
            picture, mask = PhotographScenes("train", 64).read(i)
            Image.fromarray(picture).save(tmp_path / split / "images" / f"{i}.png")
            Image.fromarray(np.where(mask, values[1], values[0]).astype(np.uint8)).save(tmp_path / split / "masks" / f"{i}.png")
    dataset = CutOutDataset(str(tmp_path), "train", (64, 64), object_from=values[1])
    item = dataset[Sample(2, 0)]
    assert (item["targets"].numpy() == PhotographScenes("train", 64).read(2)[1]).all() and item["inputs"].shape == (3, 64, 64)
    small = CutOutDataset(str(tmp_path), "val", (32, 96), object_from=values[1])[Sample(0, 0)]
    assert small["inputs"].shape == (3, 32, 96) and small["targets"].shape == (32, 96) and set(small["targets"].unique().tolist()) == {0, 1}


def test_the_authors_recipe_and_what_it_starts_from(own_data, tmp_path):
    config = load_config("inspyrenet_swin_b_duts", [f"data_root={own_data}"])
    for loader, batch in ((config.train_dataloader, 6), (config.val_dataloader, 1)):
        assert (loader.dataset.type, loader.dataset.size, loader.batch_size) == ("CutOutDataset", (384, 384), batch)
        assert loader.dataset.root == str(own_data) and not {"classes", "window", "patch"} & loader.dataset.keys()
    whole = timm.create_model("sknet_nano")
    torch.save(whole.state_dict(), tmp_path / "encoder.pth")
    task = Cutter("inspyrenet_nano", weights=str(tmp_path / "encoder.pth"))
    task.init_weights()
    own, theirs = task.model.backbone.state_dict(), whole.state_dict()
    shared = [(name, name.removeprefix("model.")) for name in own if name.removeprefix("model.") in theirs]
    assert len(shared) > 20 and all(torch.equal(own[mine], theirs[name]) for mine, name in shared)
    torch.save(task.model.state_dict(), tmp_path / "all.pth")
    other = Cutter("inspyrenet_nano", weights=str(tmp_path / "all.pth"))
    other.init_weights()
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in task.model.state_dict().items())


def test_the_authors_training_augments_pictures_and_masks_alike(own_data):
    """Where transforms move the object, they move its mask: a picture that is its own mask stays so."""
    config = Config.fromfile(str(files("zoo.configs") / "saliency" / "inspyrenet_swin_b_duts.py"))
    moving = [step for step in config.train_dataloader.dataset.transforms if step.get("keys") != "inputs"]
    assert [step["type"] for step in moving] == ["RandZoomd", "RandFlipd", "RandRotated"]
    for i in range(12):
        mask = Image.open(own_data / "masks" / f"{i}.png")
        mask.convert("RGB").save(own_data / "images" / f"{i}.jpg", quality=98)
    (own_data / "train").mkdir()
    for name in ("images", "masks"):
        (own_data / name).rename(own_data / "train" / name)
    dataset = CutOutDataset(str(own_data), "train", (64, 64), mean=(0.0,) * 3, std=(1.0,) * 3, transforms=moving)
    for i in range(12):
        item = dataset[Sample(i, i)]
        assert ((item["inputs"][0] > 0.5) != item["targets"].bool()).float().mean() < 0.03
    assert Cutter("inspyrenet_nano", dict(base_size=(64, 64))).eval()(item["inputs"][None]).shape == (1, 1, 64, 64)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--freeze", "--weights", "w.pth"], "--freeze leaves nothing of inspyrenet_nano to learn"),
    (["--size", "40"], "--size 40: inspyrenet_nano is trained at multiples of 32 pixels"),
])
def test_what_cannot_be_trained_is_told(arguments, message, own_data, tmp_path):
    with pytest.raises(InputError, match=message):
        train_tool(["inspyrenet_nano", str(own_data), "--work-dir", str(tmp_path / "run"), *arguments])


def test_objects_of_several_kinds_are_told(own_data, tmp_path):
    for path in (own_data / "masks").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) // 100).astype(np.uint8)).save(path)
    with pytest.raises(InputError, match="inspyrenet_nano cuts out objects of one kind, and the masks of .* have 3 classes"):
        train_tool(["inspyrenet_nano", str(own_data), "--work-dir", str(tmp_path / "run")])
    with pytest.raises(InputError, match=r"size=\(40, 64\): it is a height and a width, multiples of 32"):
        CutOutDataset(str(tmp_path), "train", (40, 64))
