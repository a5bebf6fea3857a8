"""`zoo test --per-class`: its rows are of what the network answers, and agree with the metrics."""
import csv
import importlib

import numpy as np
import pytest
import timm
import torch
from short_runs import TINY

from zoo.errors import InputError
from zoo.measuring.class_tables import calibration_error
from zoo.mm.config import load_config
from zoo.mm.per_class import class_table
from zoo.reading.digits import CLASSES, Digits

OPTIONS = [*TINY[:2], "test_dataloader.dataset.limit=60"]


@pytest.fixture(scope="module")
def main():
    return importlib.import_module("zoo.tools.test").main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32).eval()
    torch.nn.init.normal_(network.head.weight, std=2)  # answers of every kind
    path = tmp_path_factory.mktemp("checkpoint") / "x.pth"
    torch.save({"state_dict": {f"model.{name}": value for name, value in network.state_dict().items()}}, path)
    return path, network


def test_a_classifiers_rows_and_calibration(main, checkpoint, tmp_path, capsys):
    path, network = checkpoint
    main(["biformer_nano_digits", str(path), "--per-class", "--csv", str(tmp_path / "x.csv"), "--cfg-options", *OPTIONS])
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    digits = Digits("val", 32, "L", 60)
    images, targets = zip(*(digits.read(i) for i in range(60)), strict=True)
    with torch.inference_mode():
        inputs = torch.tensor(np.stack([np.asarray(image, np.float32)[None] for image in images]) / 255)
        scores = network((inputs - 0.5) / 0.5).softmax(1)
    answers, targets = scores.argmax(1).numpy(), np.array(targets)
    assert [row["class"] for row in rows] == [*CLASSES, "mean"]
    assert len(set(answers)) > 3
    for i, row in enumerate(rows[:-1]):
        hits = ((answers == i) & (targets == i)).sum()
        assert int(row["images"]) == (targets == i).sum() and int(row["answers"]) == (answers == i).sum()
        assert float(row["recall"]) == pytest.approx(100 * hits / (targets == i).sum())
        assert (row["precision"] == "") == (not (answers == i).any())
        assert float(row["accuracy"]) == pytest.approx(100 * ((answers == i) == (targets == i)).mean())
    error = calibration_error(scores.max(1).values.numpy(), answers == targets)
    assert f"calibration/ece  {error:6.2f}" in said and f"accuracy/top1    {100 * (answers == targets).mean():6.2f}" in said
    assert f"wrote {tmp_path / 'x.csv'}" in said and "precision  recall" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["--csv", "x.csv"], "--csv is for the numbers of --per-class"),
    (["--per-class", "--corruptions", "x"], "--per-class does not go with --corruptions"),
    (["--per-class", "--csv", "nowhere/x.csv"], "there is no folder nowhere"),
])
def test_what_does_not_go_together(main, checkpoint, arguments, message):
    with pytest.raises(InputError, match=message):
        main(["biformer_nano_digits", str(checkpoint[0]), *arguments])


def test_other_models_and_metrics_have_no_rows():
    config = load_config("biformer_nano_digits")
    config.model.type = "Other"
    with pytest.raises(InputError, match="no numbers of every class for the model Other"):
        class_table(config)
