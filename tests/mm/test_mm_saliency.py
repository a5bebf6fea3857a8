"""Cutting out objects as a task: exact masks, the loss, the field's numbers, and a short run whose checkpoint is used."""
import numpy as np
import py_sod_metrics
import pytest
import torch
from PIL import Image

from zoo.checkpoints import load_trained
from zoo.errors import InputError
from zoo.mm import train
from zoo.mm.checkpoint import latest_checkpoint
from zoo.mm.datasets import Sample
from zoo.mm.saliency import Cutter, PhotographScenesDataset, SaliencyMetrics
from zoo.reading.composed import PHOTOGRAPHS, PhotographScenes
from zoo.tools.predict import main


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
